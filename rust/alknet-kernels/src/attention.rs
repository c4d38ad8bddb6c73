//! Causal attention in blocks of keys.
//!
//! For one key/value head, `n` queries (of all heads that share it) stand in the columns of
//!
//! ```text
//! Sᵀ = K Qᵀ           [keys, n]         scores
//! Pᵀ = 2^(Sᵀ − r)     [keys, n]         weights, and their sums; queries are scaled by log₂ e
//! Oᵀ = Oᵀ + Vᵀ Pᵀ     [head_dim, n]
//! ```
//!
//! so that keys and values are read as they lie in the cache, and every step runs over whole vectors of
//! queries. Only the queries and the result are transposed, once. Queries, keys, values, weights and the result are
//! bf16 numbers; here in fp32, in `amx/attention.rs` in tiles, with the same bits.
//!
//! The reference `r` is zero, and no maximum is looked for: fp32 and bf16 hold the weights of all scores that
//! a trained model has. Where the weights of a column sum up to what is not [`IN_RANGE`], its largest
//! score becomes the reference, and all is computed once more.
//!
//! Blocks start at multiples of [`KEY_BLOCK`] positions and a masked key adds exactly nothing, so
//! that a token's result does not depend on which tokens are computed with it.
//!
//! Source: FlashAttention, arXiv 2205.14135.

use std::{
    cell::RefCell,
    ops::{Range, RangeInclusive},
};

use crate::{
    lines::Lines,
    scalar::{LANES, STEP, UPPER_HALF, add_product, bf16, exp2},
};

/// Keys that are read at a time: whole steps of a product.
const KEY_BLOCK: usize = 2 * STEP;

/// Sums of weights without a loss that matters: weights below `2⁻¹²⁶` become zero, those from `2¹²⁸` on infinite.
pub(crate) const IN_RANGE: RangeInclusive<f32> = 1e-18..=1e18;

/// What is left of a weight rounded towards zero to bf16, on average: of mantissas whose logarithms are
/// evenly spread.
pub(crate) const ROUNDED: f32 = 1.0 - 1.0 / 354.9;

/// Queries that are multiplied with a block of keys at a time: their scores stay in the first-level cache.
const BLOCK_QUERIES: usize = 96;

/// Tokens whose queries fill a block, where `heads` query heads share the keys.
pub(crate) fn tokens_per_block(heads: usize) -> usize {
    (BLOCK_QUERIES / heads).max(8)
}

/// Queries of one key/value head, for tokens of one sequence: bf16 numbers, as keys and values.
pub(crate) struct AttentionTask<'a> {
    /// Query heads that share the key/value head.
    pub(crate) heads: usize,
    /// Last position that the first token sees.
    pub(crate) first: usize,
    /// How many more each token sees than the one before it.
    pub(crate) step: usize,
    /// Number of tokens.
    pub(crate) tokens: usize,
    /// Width of a head.
    pub(crate) head_dim: usize,
    /// Rows `query_stride` apart, one a token: `[heads, head_dim]`, rotated and scaled for powers of two.
    pub(crate) queries: &'a [f32],
    /// Numbers from one row of queries to the next.
    pub(crate) query_stride: usize,
    /// Rows `stride` apart, one a position: `[head_dim]`, rotated.
    pub(crate) keys: &'a [f32],
    /// Rows `stride` apart, one a position: `[head_dim]`.
    pub(crate) values: &'a [f32],
    /// Numbers from one row of keys or values to the next.
    pub(crate) stride: usize,
}

impl AttentionTask<'_> {
    /// The number of positions that token `t` sees.
    pub(crate) fn seen(&self, t: usize) -> usize {
        self.first + t * self.step + 1
    }
}

/// The left side of a product: element `(i, k)` is `numbers[i · row + k · column]`.
pub(crate) struct Operand<'a> {
    pub(crate) numbers: &'a [f32],
    pub(crate) row: usize,
    pub(crate) column: usize,
}

/// What instruction sets have kernels of their own for.
pub(crate) trait Arithmetic {
    /// The left side of products, as [`Arithmetic::product`] wants it; `room` is for a copy.
    ///
    /// # Shapes
    /// - `size`: `[rows, depth]`
    #[inline(always)]
    fn left<'a>(a: Operand<'a>, size: [usize; 2], room: &'a mut Lines<f32>) -> Operand<'a> {
        let _ = (size, room);
        a
    }

    /// The right side of products, as [`Arithmetic::product`] wants it, in the same place.
    ///
    /// # Shapes
    /// - `b`: `[depth, n]`, or longer
    #[inline(always)]
    fn right(b: &mut [f32], depth: usize, n: usize) -> &[f32] {
        &b[..depth * n]
    }

    /// `c = a · b`, or `c += a · b` when `ADD`, by steps of [`STEP`] from the first place on (see [`add_product`]).
    ///
    /// # Shapes
    /// - `a`: `[rows, depth]`, `b`: `[depth, n]`, `c`: `[rows, n]`; `n` a multiple of [`LANES`]
    fn product<const ADD: bool>(a: &Operand<'_>, b: &[f32], n: usize, c: &mut [f32]);

    /// Sets scores of a key to −∞ where it comes after the query's position.
    ///
    /// With intrinsics: compilers make a branch for every lane of it.
    fn hide(scores: &mut [f32; LANES], positions: &[u32; LANES], key: u32);

    /// [`crate::scalar::transpose`].
    fn transpose(
        x: &[f32],
        stride: usize,
        size: (usize, usize),
        out: &mut [f32],
        out_stride: usize,
    );
}

/// Buffers of one attention task, kept between tasks.
#[derive(Default)]
pub(crate) struct AttentionScratch {
    blocks: Vec<QueryBlock>,
    /// `[KEY_BLOCK, n]`.
    scores: Lines<f32>,
    keys: Lines<f32>,
    values: Lines<f32>,
}

/// Keys and values of some positions, the left sides of products.
struct KeyBlock<'a> {
    /// Position of the first one.
    start: usize,
    keys: Operand<'a>,
    values: Operand<'a>,
}

impl<'a> KeyBlock<'a> {
    /// The block of positions from `start` on, up to `seen`.
    #[inline(always)]
    fn new<A: Arithmetic>(
        task: &AttentionTask<'a>,
        start: usize,
        seen: usize,
        [keys, values]: [&'a mut Lines<f32>; 2],
    ) -> Self {
        let (len, dim, row) = (KEY_BLOCK.min(seen - start), task.head_dim, task.stride);
        let operand = |numbers: &'a [f32], row, column| Operand {
            numbers: &numbers[start * task.stride..],
            row,
            column,
        };
        Self {
            start,
            keys: A::left(operand(task.keys, row, 1), [len, dim], keys),
            values: A::left(operand(task.values, 1, row), [dim, len], values),
        }
    }
}

/// Queries that are multiplied together: `n` of them, rounded up to whole vectors.
#[derive(Default)]
struct QueryBlock {
    /// Tokens of the task.
    tokens: Range<usize>,
    n: usize,
    /// `[head_dim, n]`, and more; of which the first `ready` are the right side of a product.
    columns: Lines<f32>,
    ready: usize,
    /// `[head_dim, n]`, and more.
    sums: Lines<f32>,
    softmax: Softmax,
}

/// What the weights of every query are made from, and their sums.
#[derive(Default)]
struct Softmax {
    /// `[n]`: positions of the queries.
    positions: Vec<u32>,
    /// `[n]`: scores whose weight is one.
    references: Vec<f32>,
    /// `[n]`: sums of the weights of even and of odd keys.
    totals: [Vec<f32>; 2],
}

impl QueryBlock {
    /// Reads the queries of `tokens`.
    #[inline(always)]
    fn start<A: Arithmetic>(&mut self, task: &AttentionTask<'_>, tokens: Range<usize>) {
        let (dim, len) = (task.head_dim, tokens.len());
        let n = (task.heads * len).next_multiple_of(LANES);
        self.columns.grow(dim * n);
        self.sums.grow(dim * n);
        // Columns beyond the queries hold zeros: they cost time, and nobody reads their result.
        for row in self.columns[..dim * n].chunks_exact_mut(n) {
            row[task.heads * len..].fill(0.0);
        }
        for head in 0..task.heads {
            let queries = &task.queries[tokens.start * task.query_stride + head * dim..];
            let columns = &mut self.columns[head * len..];
            A::transpose(queries, task.query_stride, (len, dim), columns, n);
        }
        let position = |i| (task.seen(tokens.start + i % len) - 1) as u32;
        self.softmax.reset((0..n).map(position));
        self.ready = A::right(&mut self.columns, dim, n).len();
        (self.tokens, self.n) = (tokens, n);
    }

    /// The number of positions that the last token sees.
    fn end(&self, task: &AttentionTask<'_>) -> usize {
        task.seen(self.tokens.end - 1)
    }

    /// Scores of a block of keys, up to the last one that anybody here sees; returns how many keys that are.
    #[inline(always)]
    fn score<A: Arithmetic>(
        &self,
        task: &AttentionTask<'_>,
        block: &KeyBlock<'_>,
        scores: &mut [f32],
    ) -> usize {
        let keys = KEY_BLOCK.min(self.end(task) - block.start);
        let scores = &mut scores[..keys * self.n];
        A::product::<false>(&block.keys, &self.columns[..self.ready], self.n, scores);
        keys
    }

    /// Adds a block of keys. With the first of them the sums begin: what they held is another task's.
    #[inline(always)]
    fn add<A: Arithmetic>(
        &mut self,
        task: &AttentionTask<'_>,
        block: &KeyBlock<'_>,
        scores: &mut [f32],
    ) {
        let keys = self.score::<A>(task, block, scores);
        self.softmax.weigh::<A>(&mut scores[..keys * self.n], self.n, block.start);
        let weights = A::right(scores, keys, self.n);
        let sums = &mut self.sums[..task.head_dim * self.n];
        if block.start == 0 {
            A::product::<false>(&block.values, weights, self.n, sums);
        } else {
            A::product::<true>(&block.values, weights, self.n, sums);
        }
    }

    /// Starts again with the largest scores as references of the columns that are out of range.
    #[cold]
    fn refer_to_largest<A: Arithmetic>(
        &mut self,
        task: &AttentionTask<'_>,
        scores: &mut [f32],
        [keys, values]: [&mut Lines<f32>; 2],
    ) {
        let (n, end) = (self.n, self.end(task));
        let mut largest = vec![f32::NEG_INFINITY; n];
        for start in (0..end).step_by(KEY_BLOCK) {
            let block = KeyBlock::new::<A>(task, start, end, [&mut *keys, &mut *values]);
            let seen = self.score::<A>(task, &block, scores);
            for (key, row) in scores[..seen * n].chunks_exact(n).enumerate() {
                for (i, score) in row.iter().enumerate() {
                    if start + key <= self.softmax.positions[i] as usize {
                        // NaN is passed over here; it comes back with the weights.
                        largest[i] = largest[i].max(*score);
                    }
                }
            }
        }
        for (i, largest) in largest.into_iter().enumerate() {
            if !IN_RANGE.contains(&self.softmax.total(i)) {
                self.softmax.references[i] = largest;
            }
        }
        self.softmax.totals.iter_mut().for_each(|totals| totals.fill(0.0));
    }

    /// Divides by the sums of weights and writes `[heads, task.tokens, head_dim]`.
    #[inline(always)]
    fn finish<A: Arithmetic>(&mut self, task: &AttentionTask<'_>, out: &mut [f32]) {
        let (dim, len, n) = (task.head_dim, self.tokens.len(), self.n);
        let [inverse, odd] = &mut self.softmax.totals;
        for (total, odd) in inverse.iter_mut().zip(odd) {
            *total = 1.0 / ROUNDED / (*total + *odd);
        }
        for sums in self.sums[..dim * n].chunks_exact_mut(n) {
            sums.iter_mut().zip(&*inverse).for_each(|(sum, inverse)| *sum = bf16(*sum * inverse));
        }
        for head in 0..task.heads {
            let out = &mut out[(head * task.tokens + self.tokens.start) * dim..];
            A::transpose(&self.sums[head * len..], n, (dim, len), out, dim);
        }
    }
}

impl Softmax {
    fn reset(&mut self, positions: impl ExactSizeIterator<Item = u32>) {
        let n = positions.len();
        for numbers in [&mut self.references].into_iter().chain(&mut self.totals) {
            numbers.clear();
            numbers.resize(n, 0.0);
        }
        self.positions.clear();
        self.positions.extend(positions);
    }

    /// Sum of the weights of column `i`.
    fn total(&self, i: usize) -> f32 {
        self.totals[0][i] + self.totals[1][i]
    }

    /// Whether the weights of all columns can be relied on; NaN cannot.
    fn in_range(&self) -> bool {
        (0..self.positions.len()).all(|i| IN_RANGE.contains(&self.total(i)))
    }

    /// Turns scores `[keys, n]` into weights, zero for keys after the query's position, and adds them up;
    /// `start` is the first key's position.
    #[inline(always)]
    fn weigh<A: Arithmetic>(&mut self, scores: &mut [f32], n: usize, start: usize) {
        // Only the last blocks hold keys after the first query's position.
        let last = start + scores.len() / n - 1;
        if self.positions[0] as usize >= last {
            self.columns::<A, false>(scores, n, start);
        } else {
            self.columns::<A, true>(scores, n, start);
        }
    }

    /// [`Softmax::weigh`], a vector's width of columns at a time.
    #[inline(always)]
    fn columns<A: Arithmetic, const MASKED: bool>(
        &mut self,
        scores: &mut [f32],
        n: usize,
        start: usize,
    ) {
        let [even, odd] = &mut self.totals;
        for first in (0..n).step_by(LANES) {
            weigh_columns::<A, MASKED>(
                scores,
                (n, first),
                start,
                lanes(&self.positions, first),
                lanes(&self.references, first),
                [lanes_mut(even, first), lanes_mut(odd, first)],
            );
        }
    }
}

/// Attention of a task.
///
/// # Shapes
/// - `out`: `[heads, tokens, head_dim]`
#[inline(always)]
pub(crate) fn attention<A: Arithmetic>(task: &AttentionTask<'_>, out: &mut [f32]) {
    // Not in a closure, which would be compiled for the instruction set of all.
    let mut scratch = SCRATCH.take();
    attention_in::<A>(&mut scratch, task, out);
    SCRATCH.set(scratch);
}

/// [`attention`] with a place for what is computed.
#[inline(always)]
fn attention_in<A: Arithmetic>(
    AttentionScratch { blocks: all, scores, keys, values }: &mut AttentionScratch,
    task: &AttentionTask<'_>,
    out: &mut [f32],
) {
    let block = tokens_per_block(task.heads);
    let blocks = task.tokens.div_ceil(block);
    if all.len() < blocks {
        all.resize_with(blocks, QueryBlock::default);
    }
    let blocks = &mut all[..blocks];
    for (i, queries) in blocks.iter_mut().enumerate() {
        queries.start::<A>(task, i * block..task.tokens.min((i + 1) * block));
    }
    let widest = blocks.iter().map(|queries| queries.n).max().unwrap_or(0);
    scores.grow(KEY_BLOCK * widest);
    let seen = blocks.last().map_or(0, |last| last.end(task));
    for start in (0..seen).step_by(KEY_BLOCK) {
        let block = KeyBlock::new::<A>(task, start, seen, [keys, values]);
        for queries in blocks.iter_mut().filter(|queries| start < queries.end(task)) {
            queries.add::<A>(task, &block, scores);
        }
    }
    for queries in blocks {
        if !queries.softmax.in_range() {
            queries.refer_to_largest::<A>(task, scores, [keys, values]);
            let end = queries.end(task);
            for start in (0..end).step_by(KEY_BLOCK) {
                let block = KeyBlock::new::<A>(task, start, end, [keys, values]);
                queries.add::<A>(task, &block, scores);
            }
        }
        queries.finish::<A>(task, out);
    }
}

fn lanes<T>(numbers: &[T], first: usize) -> &[T; LANES] {
    numbers[first..].first_chunk().expect("columns come in whole vectors")
}

fn lanes_mut<T>(numbers: &mut [T], first: usize) -> &mut [T; LANES] {
    numbers[first..].first_chunk_mut().expect("columns come in whole vectors")
}

/// Turns a vector's width of columns of scores into weights, rounded towards zero to bf16, zero for keys
/// after the query's position, of which there are none unless `MASKED`; and adds them up as they were.
///
/// # Shapes
/// - `scores`: `[keys, n]`, of which columns `first..first + LANES`; `start` is the first key's position
#[inline(always)]
fn weigh_columns<A: Arithmetic, const MASKED: bool>(
    scores: &mut [f32],
    (n, first): (usize, usize),
    start: usize,
    positions: &[u32; LANES],
    references: &[f32; LANES],
    totals: [&mut [f32; LANES]; 2],
) {
    // Copies, which stay in registers.
    let mut sums = totals.each_ref().map(|total| **total);
    let weigh = |row: &mut [f32], key: usize, sum: &mut [f32; LANES]| {
        let row = lanes_mut(row, first);
        if MASKED {
            A::hide(row, positions, key as u32);
        }
        for i in 0..LANES {
            let weight = exp2(row[i] - references[i]);
            sum[i] += weight;
            row[i] = f32::from_bits(weight.to_bits() & UPPER_HALF);
        }
    };
    let [even, odd] = &mut sums;
    let mut key = start;
    let mut rows = scores.chunks_exact_mut(n);
    while let Some(row) = rows.next() {
        weigh(row, key, even);
        if let Some(row) = rows.next() {
            weigh(row, key + 1, odd);
        }
        key += 2;
    }
    totals.into_iter().zip(sums).for_each(|(total, sum)| *total = sum);
}

thread_local! {
    /// Buffers of attention, some 100 KiB per thread.
    static SCRATCH: RefCell<AttentionScratch> = RefCell::default();
}

/// Portable arithmetic.
pub(crate) struct Portable;

impl Arithmetic for Portable {
    #[inline(always)]
    fn product<const ADD: bool>(a: &Operand<'_>, b: &[f32], n: usize, c: &mut [f32]) {
        let depth = b.len() / n;
        for (i, c) in c.chunks_exact_mut(n).enumerate() {
            for (column, c) in c.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                let mut sums = if ADD { *c } else { [0.0; LANES] };
                for start in (0..depth).step_by(STEP) {
                    let step = start..depth.min(start + STEP);
                    let left = step.clone().map(|k| a.numbers[i * a.row + k * a.column]);
                    add_product(&mut sums, left, step.map(|k| lanes(b, k * n + column * LANES)));
                }
                *c = sums;
            }
        }
    }

    #[inline(always)]
    fn hide(scores: &mut [f32; LANES], positions: &[u32; LANES], key: u32) {
        for (score, position) in scores.iter_mut().zip(positions) {
            *score = if *position < key { f32::NEG_INFINITY } else { *score };
        }
    }

    #[inline(always)]
    fn transpose(
        x: &[f32],
        stride: usize,
        size: (usize, usize),
        out: &mut [f32],
        out_stride: usize,
    ) {
        crate::scalar::transpose(x, stride, size, out, out_stride);
    }
}

//! Causal attention in blocks of keys with a running softmax.
//!
//! For one key/value head, `n` queries (of all heads that share it) stand in the columns of
//!
//! ```text
//! Sᵀ = K Qᵀ            [keys, n]         scores
//! Pᵀ = exp(Sᵀ − max)   [keys, n]         column maxima over all keys so far
//! Oᵀ = Oᵀ · c + Vᵀ Pᵀ  [head_dim, n]     c brings earlier sums to the new maxima
//! ```
//!
//! so that keys and values are read as they lie in the cache, and every step of the softmax runs over
//! whole vectors of queries. Only the queries and the result are transposed, once.
//!
//! Blocks start at multiples of [`KEY_BLOCK`] positions and a masked key adds exactly nothing, so
//! that a token's result does not depend on which tokens are computed with it.
//!
//! Source: FlashAttention, arXiv 2205.14135.

use std::{cell::RefCell, f32::consts::LOG2_E, ops::Range};

use crate::scalar::{LANES, POWER_OF_TWO, ROUNDING, exp, power_of_two};

/// Keys that are read at a time.
const KEY_BLOCK: usize = 64;

/// Queries that are multiplied with a block of keys at a time: their scores stay in the first-level cache.
const BLOCK_QUERIES: usize = 96;

/// Tokens whose queries fill a block, where `heads` query heads share the keys.
pub(crate) fn tokens_per_block(heads: usize) -> usize {
    (BLOCK_QUERIES / heads).max(8)
}

/// Queries of one key/value head, for consecutive tokens of one sequence.
pub(crate) struct AttentionTask<'a> {
    /// Query heads that share the key/value head.
    pub(crate) heads: usize,
    /// Position of the first token.
    pub(crate) first: usize,
    /// Number of tokens.
    pub(crate) tokens: usize,
    /// Width of a head.
    pub(crate) head_dim: usize,
    /// Rows `query_stride` apart, one a token: `[heads, head_dim]`, rotated and scaled.
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

/// The left side of a product: element `(i, k)` is `words[i · row + k · column]`.
pub(crate) struct Operand<'a, W> {
    pub(crate) words: &'a [W],
    pub(crate) row: usize,
    pub(crate) column: usize,
}

/// Arithmetic of attention's products; one implementation per instruction set.
///
/// Depth is counted in 32-bit words: one fp32 number each, or a pair of bf16 numbers.
pub(crate) trait Arithmetic {
    /// What a product multiplies.
    type Word: Copy + Default;

    /// Keys from `start` on as a left side: rows are keys, depth runs over the head.
    fn keys<'a>(
        task: &AttentionTask<'a>,
        start: usize,
        len: usize,
        buffer: &'a mut Vec<Self::Word>,
    ) -> Operand<'a, Self::Word>;

    /// Values from `start` on as a left side: rows run over the head, depth over keys.
    fn values<'a>(
        task: &AttentionTask<'a>,
        start: usize,
        len: usize,
        buffer: &'a mut Vec<Self::Word>,
    ) -> Operand<'a, Self::Word>;

    /// Makes a right side of rows of `n` numbers: `[depth, n]`, depth rounded up to whole words.
    fn pack(x: &[f32], n: usize, words: &mut Vec<Self::Word>);

    /// What `pack` made of `x`, or `x` itself.
    fn packed<'a>(x: &'a [f32], words: &'a [Self::Word]) -> &'a [Self::Word];

    /// `c = a · b`, or `c += a · b` when `ADD`.
    ///
    /// # Shapes
    /// - `a`: `[rows, depth]`, `b`: `[depth, n]`, `c`: `[rows, n]`; `n` a multiple of [`LANES`]
    fn product<const ADD: bool>(
        a: &Operand<'_, Self::Word>,
        b: &[Self::Word],
        n: usize,
        c: &mut [f32],
    );

    /// Sets scores of a key to −∞ where it comes after the query's position.
    ///
    /// With intrinsics: compilers make a branch for every lane of it.
    fn hide(scores: &mut [f32; LANES], positions: &[u32; LANES], key: u32);

    /// `eˣ` for weights, of numbers up to zero; NaN stays NaN.
    #[inline(always)]
    fn exp(x: f32) -> f32 {
        exp(x)
    }

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
pub(crate) struct AttentionScratch<W> {
    blocks: Vec<QueryBlock<W>>,
    /// `[KEY_BLOCK, n]`.
    scores: Vec<f32>,
    score_words: Vec<W>,
    /// Left sides of the products, where they are not read from the cache.
    keys: Vec<W>,
    values: Vec<W>,
}

/// Queries that are multiplied together: `n` of them, rounded up to whole vectors.
#[derive(Default)]
struct QueryBlock<W> {
    /// Tokens of the task.
    tokens: Range<usize>,
    n: usize,
    /// `[head_dim, n]`.
    columns: Vec<f32>,
    words: Vec<W>,
    /// `[head_dim, n]`.
    sums: Vec<f32>,
    softmax: Softmax,
}

/// The running softmax of every query.
#[derive(Default)]
struct Softmax {
    /// `[n]`: positions of the queries.
    positions: Vec<u32>,
    /// `[n]`: largest score so far.
    max: Vec<f32>,
    /// `[n]`: sum of exponentials relative to `max`.
    total: Vec<f32>,
    /// `[n]`: factor that brings earlier sums to the present `max`.
    correction: Vec<f32>,
}

impl<W: Copy + Default> QueryBlock<W> {
    /// Reads the queries of `tokens`.
    #[inline(always)]
    fn start<A: Arithmetic<Word = W>>(&mut self, task: &AttentionTask<'_>, tokens: Range<usize>) {
        let (dim, len) = (task.head_dim, tokens.len());
        let n = (task.heads * len).next_multiple_of(LANES);
        self.columns.resize(dim * n, 0.0);
        self.sums.resize(dim * n, 0.0);
        // Columns beyond the queries hold zeros: they cost time, and nobody reads their result.
        for row in self.columns.chunks_exact_mut(n) {
            row[task.heads * len..].fill(0.0);
        }
        for head in 0..task.heads {
            let queries = &task.queries[tokens.start * task.query_stride + head * dim..];
            let columns = &mut self.columns[head * len..];
            A::transpose(queries, task.query_stride, (len, dim), columns, n);
        }
        A::pack(&self.columns, n, &mut self.words);
        let position = |i| (task.first + tokens.start + i % len) as u32;
        self.softmax.reset((0..n).map(position));
        (self.tokens, self.n) = (tokens, n);
    }

    /// Adds the keys from `start` on.
    #[inline(always)]
    fn add<A: Arithmetic<Word = W>>(
        &mut self,
        keys: &Operand<'_, W>,
        values: &Operand<'_, W>,
        start: usize,
        scores: &mut [f32],
        score_words: &mut Vec<W>,
    ) {
        let n = self.n;
        A::product::<false>(keys, A::packed(&self.columns, &self.words), n, scores);
        self.softmax.run::<A>(scores, n, start);
        A::pack(scores, n, score_words);
        let weights = A::packed(scores, score_words);
        if start == 0 {
            // The sums begin here: what they held is another task's.
            A::product::<false>(values, weights, n, &mut self.sums);
            return;
        }
        // Most keys leave all maxima as they are: multiplying by one would change nothing.
        let correction = &self.softmax.correction;
        if correction.iter().any(|c| *c != 1.0) {
            for sums in self.sums.chunks_exact_mut(n) {
                sums.iter_mut().zip(correction).for_each(|(sum, c)| *sum *= c);
            }
        }
        A::product::<true>(values, weights, n, &mut self.sums);
    }

    /// Divides by the sums of weights and writes `[heads, task.tokens, head_dim]`.
    #[inline(always)]
    fn finish<A: Arithmetic<Word = W>>(&mut self, task: &AttentionTask<'_>, out: &mut [f32]) {
        let (dim, len, n) = (task.head_dim, self.tokens.len(), self.n);
        let inverse = &mut self.softmax.total;
        inverse.iter_mut().for_each(|total| *total = 1.0 / *total);
        for sums in self.sums.chunks_exact_mut(n) {
            sums.iter_mut().zip(&*inverse).for_each(|(sum, inverse)| *sum *= inverse);
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
        self.max.clear();
        self.max.resize(n, f32::NEG_INFINITY);
        self.total.clear();
        self.total.resize(n, 0.0);
        self.correction.resize(n, 0.0);
        self.positions.clear();
        self.positions.extend(positions);
    }

    /// Turns scores `[keys, n]` into exponentials relative to the largest score so far, zero for keys
    /// after the query's position; `start` is the first key's position.
    #[inline(always)]
    fn run<A: Arithmetic>(&mut self, scores: &mut [f32], n: usize, start: usize) {
        // Only the last blocks hold keys after the first query's position.
        let last = start + scores.len() / n - 1;
        if self.positions[0] as usize >= last {
            self.columns::<A, false>(scores, n, start);
        } else {
            self.columns::<A, true>(scores, n, start);
        }
    }

    /// [`Softmax::run`], a vector's width of columns at a time.
    #[inline(always)]
    fn columns<A: Arithmetic, const MASKED: bool>(
        &mut self,
        scores: &mut [f32],
        n: usize,
        start: usize,
    ) {
        for column in (0..n).step_by(LANES) {
            softmax_columns::<A, MASKED>(
                scores,
                (n, column),
                start,
                lanes(&self.positions, column),
                lanes_mut(&mut self.max, column),
                lanes_mut(&mut self.total, column),
                lanes_mut(&mut self.correction, column),
            );
        }
    }
}

/// Attention of a task.
///
/// # Shapes
/// - `out`: `[heads, tokens, head_dim]`
#[inline(always)]
pub(crate) fn attention<A: Arithmetic>(
    task: &AttentionTask<'_>,
    scratch: &mut AttentionScratch<A::Word>,
    out: &mut [f32],
) {
    let block = tokens_per_block(task.heads);
    let blocks = task.tokens.div_ceil(block);
    if scratch.blocks.len() < blocks {
        scratch.blocks.resize_with(blocks, QueryBlock::default);
    }
    let AttentionScratch { blocks: all, scores, score_words, keys, values } = scratch;
    let blocks = &mut all[..blocks];
    for (i, queries) in blocks.iter_mut().enumerate() {
        queries.start::<A>(task, i * block..task.tokens.min((i + 1) * block));
    }
    let widest = blocks.iter().map(|queries| queries.n).max().unwrap_or(0);
    if scores.len() < KEY_BLOCK * widest {
        scores.resize(KEY_BLOCK * widest, 0.0);
    }
    let end = task.first + task.tokens;
    for start in (0..end).step_by(KEY_BLOCK) {
        let len = KEY_BLOCK.min(end - start);
        let keys = A::keys(task, start, len, keys);
        let values = A::values(task, start, len, values);
        for queries in blocks.iter_mut().filter(|block| start < task.first + block.tokens.end) {
            // Nobody in the block sees the keys after its last token.
            let len = len.min(task.first + queries.tokens.end - start);
            let scores = &mut scores[..len * queries.n];
            queries.add::<A>(&keys, &values, start, scores, score_words);
        }
    }
    for queries in blocks {
        queries.finish::<A>(task, out);
    }
}

/// `eˣ` of numbers up to zero within a part in 100,000; NaN stays NaN.
///
/// Fuses multiplications with additions, so that it is for instruction sets that can.
#[inline(always)]
pub(crate) fn fused_exp(x: f32) -> f32 {
    // Not `max`, which would turn NaN into a number.
    let x = if x < -87.0 { -87.0 } else { x };
    let shifted = x.mul_add(LOG2_E, ROUNDING);
    let r = x.mul_add(LOG2_E, ROUNDING - shifted);
    let [mut p, rest @ ..] = POWER_OF_TWO;
    for c in rest {
        p = p.mul_add(r, c);
    }
    p * power_of_two(shifted)
}

fn lanes<T>(numbers: &[T], first: usize) -> &[T; LANES] {
    numbers[first..].first_chunk().expect("columns come in whole vectors")
}

fn lanes_mut<T>(numbers: &mut [T], first: usize) -> &mut [T; LANES] {
    numbers[first..].first_chunk_mut().expect("columns come in whole vectors")
}

/// Turns a vector's width of columns of scores into exponentials relative to the largest score so
/// far, zero for keys after the query's position, of which there are none unless `MASKED`.
///
/// # Shapes
/// - `scores`: `[keys, n]`, of which columns `first..first + LANES`; `start` is the first key's position
#[inline(always)]
fn softmax_columns<A: Arithmetic, const MASKED: bool>(
    scores: &mut [f32],
    (n, first): (usize, usize),
    start: usize,
    positions: &[u32; LANES],
    max: &mut [f32; LANES],
    total: &mut [f32; LANES],
    correction: &mut [f32; LANES],
) {
    if MASKED {
        for (j, row) in scores.chunks_exact_mut(n).enumerate() {
            A::hide(lanes_mut(row, first), positions, (start + j) as u32);
        }
    }
    // Copies, which stay in registers.
    let (mut largest, mut sum) = (*max, *total);
    for row in scores.chunks_exact(n) {
        for (largest, score) in largest.iter_mut().zip(lanes(row, first)) {
            // NaN is passed over here; it comes back through the exponential.
            *largest = if *score > *largest { *score } else { *largest };
        }
    }
    for i in 0..LANES {
        correction[i] = A::exp(max[i] - largest[i]);
        sum[i] *= correction[i];
    }
    for row in scores.chunks_exact_mut(n) {
        let row = lanes_mut(row, first);
        for i in 0..LANES {
            let weight = A::exp(row[i] - largest[i]);
            // Exponentials are not zero so far down.
            row[i] = if MASKED && row[i] == f32::NEG_INFINITY { 0.0 } else { weight };
            sum[i] += row[i];
        }
    }
    (*max, *total) = (largest, sum);
}

thread_local! {
    /// Buffers of attention in fp32, some 100 KiB per thread.
    pub(crate) static FP32_SCRATCH: RefCell<AttentionScratch<f32>> = RefCell::default();
}

/// fp32 words: keys, values and columns are read where they are.
macro_rules! fp32_operands {
    () => {
        type Word = f32;

        #[inline(always)]
        fn keys<'a>(
            task: &AttentionTask<'a>,
            start: usize,
            _len: usize,
            _buffer: &'a mut Vec<f32>,
        ) -> Operand<'a, f32> {
            Operand { words: &task.keys[start * task.stride..], row: task.stride, column: 1 }
        }

        #[inline(always)]
        fn values<'a>(
            task: &AttentionTask<'a>,
            start: usize,
            _len: usize,
            _buffer: &'a mut Vec<f32>,
        ) -> Operand<'a, f32> {
            Operand { words: &task.values[start * task.stride..], row: 1, column: task.stride }
        }

        #[inline(always)]
        fn pack(_x: &[f32], _n: usize, _words: &mut Vec<f32>) {}

        #[inline(always)]
        fn packed<'a>(x: &'a [f32], _words: &'a [f32]) -> &'a [f32] {
            x
        }
    };
}
pub(crate) use fp32_operands;

/// Portable fp32 arithmetic.
pub(crate) struct Portable;

impl Arithmetic for Portable {
    fp32_operands!();

    #[inline(always)]
    fn hide(scores: &mut [f32; LANES], positions: &[u32; LANES], key: u32) {
        for (score, position) in scores.iter_mut().zip(positions) {
            *score = if *position < key { f32::NEG_INFINITY } else { *score };
        }
    }

    #[inline(always)]
    fn product<const ADD: bool>(a: &Operand<'_, f32>, b: &[f32], n: usize, c: &mut [f32]) {
        for (i, c) in c.chunks_exact_mut(n).enumerate() {
            for (column, c) in c.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                let mut sums = if ADD { *c } else { [0.0; LANES] };
                for (k, b) in b.chunks_exact(n).enumerate() {
                    let a = a.words[i * a.row + k * a.column];
                    for (sum, b) in sums.iter_mut().zip(lanes(b, column * LANES)) {
                        *sum += a * b;
                    }
                }
                *c = sums;
            }
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

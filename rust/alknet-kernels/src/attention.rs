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

use std::cell::RefCell;

use crate::scalar::{LANES, exp};

/// Keys that are read at a time.
const KEY_BLOCK: usize = 64;

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

    /// Rows of `n` numbers as a right side, `[depth, n]`, depth rounded up to whole words.
    fn columns<'a>(x: &'a [f32], n: usize, buffer: &'a mut Vec<Self::Word>) -> &'a [Self::Word];

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

/// Buffers of one attention task, kept between tasks. `n` is the number of queries, rounded up.
#[derive(Default)]
pub(crate) struct AttentionScratch<W> {
    /// `[head_dim, n]`.
    queries: Vec<f32>,
    query_words: Vec<W>,
    /// `[KEY_BLOCK, n]`.
    scores: Vec<f32>,
    score_words: Vec<W>,
    /// Left side of the product at hand, where it is not read from the cache.
    left: Vec<W>,
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

impl<W: Copy + Default> AttentionScratch<W> {
    fn reset(&mut self, task: &AttentionTask<'_>, n: usize) {
        // Columns beyond the queries hold zeros: they cost time, and nobody reads their result.
        self.queries.clear();
        self.queries.resize(task.head_dim * n, 0.0);
        self.scores.resize(KEY_BLOCK * n, 0.0);
        self.sums.clear();
        self.sums.resize(task.head_dim * n, 0.0);
        self.softmax.reset(task, n);
    }
}

impl Softmax {
    fn reset(&mut self, task: &AttentionTask<'_>, n: usize) {
        self.max.clear();
        self.max.resize(n, f32::NEG_INFINITY);
        self.total.clear();
        self.total.resize(n, 0.0);
        self.correction.resize(n, 0.0);
        self.positions.clear();
        let position = |i| (task.first + i % task.tokens) as u32;
        self.positions.extend((0..n).map(position));
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
    let (dim, tokens) = (task.head_dim, task.tokens);
    let n = (task.heads * tokens).next_multiple_of(LANES);
    scratch.reset(task, n);
    for head in 0..task.heads {
        let queries = &task.queries[head * dim..];
        let columns = &mut scratch.queries[head * tokens..];
        A::transpose(queries, task.query_stride, (tokens, dim), columns, n);
    }
    let queries = A::columns(&scratch.queries, n, &mut scratch.query_words);
    let end = task.first + tokens;
    for start in (0..end).step_by(KEY_BLOCK) {
        let len = KEY_BLOCK.min(end - start);
        let scores = &mut scratch.scores[..len * n];
        A::product::<false>(&A::keys(task, start, len, &mut scratch.left), queries, n, scores);
        scratch.softmax.run::<A>(scores, n, start);
        // Most blocks leave all maxima as they are: multiplying by one would change nothing.
        let correction = &scratch.softmax.correction;
        if correction.iter().any(|c| *c != 1.0) {
            for sums in scratch.sums.chunks_exact_mut(n) {
                sums.iter_mut().zip(correction).for_each(|(sum, c)| *sum *= c);
            }
        }
        let scores = A::columns(scores, n, &mut scratch.score_words);
        let values = A::values(task, start, len, &mut scratch.left);
        A::product::<true>(&values, scores, n, &mut scratch.sums);
    }
    for sums in scratch.sums.chunks_exact_mut(n) {
        sums.iter_mut().zip(&scratch.softmax.total).for_each(|(sum, total)| *sum /= total);
    }
    A::transpose(&scratch.sums, n, (dim, task.heads * tokens), out, dim);
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
    let old_max = *max;
    for (j, row) in scores.chunks_exact(n).enumerate() {
        let row = lanes(row, first);
        for i in 0..LANES {
            let visible = !MASKED || positions[i] >= (start + j) as u32;
            // NaN is passed over here; it comes back through the exponential.
            max[i] = if visible && row[i] > max[i] { row[i] } else { max[i] };
        }
    }
    for i in 0..LANES {
        correction[i] = A::exp(old_max[i] - max[i]);
        total[i] *= correction[i];
    }
    for (j, row) in scores.chunks_exact_mut(n).enumerate() {
        let row = lanes_mut(row, first);
        for i in 0..LANES {
            let visible = !MASKED || positions[i] >= (start + j) as u32;
            row[i] = if visible { A::exp(row[i] - max[i]) } else { 0.0 };
            total[i] += row[i];
        }
    }
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
        fn columns<'a>(x: &'a [f32], _n: usize, _buffer: &'a mut Vec<f32>) -> &'a [f32] {
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

//! Causal attention on tiles of bf16 numbers, with a running softmax.
//!
//! The steps are those of [`crate::attention`]: queries stand in columns, so that the softmax runs over whole
//! registers of them. Here a column is a token and one of the query heads that share keys and values; 32
//! columns go through all blocks of keys, and all that belongs to them stays in the first-level cache.
//!
//! A column's maximum is only raised when a block exceeds it by [`SLACK`]: then earlier sums are
//! scaled, which hardly ever happens after the first block. A weight is at most `2^SLACK`.

use std::{arch::x86_64::*, cell::RefCell};

use super::{
    exp2,
    tiles::{ROW_BYTES, ROWS, Tiles, tile_asm},
};
use crate::{
    avx512bf16::INTERLEAVE,
    dispatch::{StoreValues, TileAttention},
    keys::{BLOCK, GROUP},
    rows::Intermediate,
    scalar::LANES,
};

/// Columns that go through all keys together: two tiles.
pub(super) const COLUMNS: usize = 2 * LANES;

/// By how much scores may exceed the maximum that weights are relative to, in powers of two.
const SLACK: f32 = 8.0;

/// Cache lines that are fetched while weights of four keys are computed: over a block, as many as 64 keys or
/// values of 64 numbers have.
const LINES_PER_STEP: usize = 8;

/// A row of a tile: 16 pairs of bf16 numbers.
type Row = [u32; LANES];

/// A register of fp32 numbers in memory.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Numbers([f32; LANES]);

impl Numbers {
    const fn of(x: f32) -> Self {
        Self([x; LANES])
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load(&self) -> __m512 {
        // SAFETY: there are 16 numbers, aligned.
        unsafe { _mm512_load_ps(self.0.as_ptr()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn store(&mut self, x: __m512) {
        // SAFETY: as above.
        unsafe { _mm512_store_ps(self.0.as_mut_ptr(), x) }
    }
}

/// A register of pairs of bf16 numbers in memory.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Pairs(Row);

/// What belongs to one tile of columns.
struct Column {
    /// `[BLOCK]`: scores.
    scores: [Numbers; BLOCK],
    /// `[BLOCK / 2]`: weights of pairs of keys.
    weights: [Pairs; BLOCK / 2],
    max: Numbers,
    /// Sums of weights; four, so that they need not wait for each other.
    totals: [Numbers; 4],
}

/// Buffers of a task.
struct Scratch {
    /// `[2, row / 2]`: queries, pairs of neighbours in a head.
    queries: Vec<Pairs>,
    /// `[2, row]`: sums of weighted values.
    sums: Vec<Numbers>,
    states: [Column; 2],
}

thread_local! {
    /// Buffers of attention, some 24 KiB per thread.
    static SCRATCH: RefCell<Scratch> = const {
        let states = [const { Column::new() }; 2];
        RefCell::new(Scratch { queries: Vec::new(), sums: Vec::new(), states })
    };
}

/// Attention of the columns of a task.
///
/// # Safety
/// The rows and heads of the task's columns must belong to it alone.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
pub(super) unsafe fn attention(task: &TileAttention<'_>) {
    SCRATCH.with_borrow_mut(|scratch| {
        // SAFETY: this table of kernels is handed out where AMX is available.
        let tiles = unsafe { Tiles::new() };
        for first in task.columns.clone().step_by(COLUMNS) {
            // SAFETY: this function's contract.
            unsafe { columns(task, first, scratch) };
        }
        drop(tiles);
    });
}

/// Attention of 32 columns from `first` on; those beyond the last one repeat it.
///
/// # Safety
/// As [`attention`]; tiles must be configured.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
unsafe fn columns(task: &TileAttention<'_>, first: usize, scratch: &mut Scratch) {
    let row = task.shape.row;
    let places = places(task, first);
    scratch.queries.resize(row, Pairs([0; LANES]));
    scratch.sums.resize(2 * row, Numbers::of(0.0));
    for (half, queries) in scratch.queries.chunks_exact_mut(row / 2).enumerate() {
        let of = |i: usize| &task.queries[places.query[half * LANES + i]..][..row];
        for (part, queries) in queries.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            // SAFETY: every query has a whole number of 32 words.
            let words = |i| unsafe { _mm512_loadu_si512(of(i)[part * GROUP..].as_ptr().cast()) };
            for (queries, words) in queries.iter_mut().zip(transpose(std::array::from_fn(words))) {
                // SAFETY: there are 16 pairs.
                unsafe { _mm512_store_si512(queries.0.as_mut_ptr().cast(), words) };
            }
        }
    }
    scratch.states.iter_mut().for_each(Column::reset);
    let positions: [_; 2] = std::array::from_fn(|half| {
        let positions = &places.position[half * LANES..][..LANES];
        // SAFETY: there are 16 positions.
        unsafe { _mm512_loadu_si512(positions.as_ptr().cast()) }
    });
    let (earliest, end) = (places.position[0] as usize, places.position[COLUMNS - 1] as usize + 1);
    for start in (0..end).step_by(BLOCK) {
        // Whole groups, of which the keys after the last column are masked.
        let len = (end - start).next_multiple_of(GROUP).min(BLOCK);
        let block = &task.words[start / BLOCK * task.shape.block()..][..2 * task.shape.half()];
        let (keys, values) = block.split_at(task.shape.half());
        // What is read after the weights comes into the first-level cache while they are computed.
        let next = task.words.get((start / BLOCK + 1) * task.shape.block()..).unwrap_or(keys);
        // SAFETY: this function's contract.
        unsafe { scores(&keys[..len * row], row, &scratch.queries, &mut scratch.states) };
        let states = scratch.states.iter_mut().zip([values, next]);
        for (((state, fetch), positions), sums) in
            states.zip(positions).zip(scratch.sums.chunks_exact_mut(row))
        {
            // Before the first block there are no sums.
            let sums = if start == 0 { &mut [] } else { sums };
            if earliest + 1 >= start + len {
                state.softmax::<false>(len, positions, sums, fetch);
            } else {
                // The last key that a column sees, counted from the first of the block.
                let seen = _mm512_sub_epi32(positions, _mm512_set1_epi32(start as i32));
                state.softmax::<true>(len, seen, sums, fetch);
            }
        }
        // SAFETY: as above.
        unsafe {
            if start == 0 {
                add_values::<false>(values, len, &scratch.states, &mut scratch.sums);
            } else {
                add_values::<true>(values, len, &scratch.states, &mut scratch.sums);
            }
        }
    }
    for (half, (state, sums)) in
        scratch.states.iter().zip(scratch.sums.chunks_exact_mut(row)).enumerate()
    {
        // SAFETY: as above.
        unsafe { state.finish(task, &places, half * LANES, sums) };
    }
}

/// Where each of 32 columns is.
struct Places {
    /// First word of its query.
    query: [usize; COLUMNS],
    /// Its position in the sequence.
    position: [i32; COLUMNS],
    /// Row and first column of its numbers in the output.
    out: [(usize, usize); COLUMNS],
    /// Number of columns that are not repetitions of the last.
    len: usize,
}

/// Places of the columns from `first` on; those beyond the last one repeat it.
fn places(task: &TileAttention<'_>, first: usize) -> Places {
    let len = COLUMNS.min(task.columns.end - first);
    let mut places =
        Places { query: [0; COLUMNS], position: [0; COLUMNS], out: [(0, 0); COLUMNS], len };
    let (mut token, mut head) = (first / task.group, first % task.group);
    for i in 0..COLUMNS {
        places.query[i] = token * task.query_stride + head * task.shape.row;
        places.position[i] = (task.first + token) as i32;
        places.out[i] = (task.out_row + token, task.out_column + head * task.head_dim);
        if i + 1 < len {
            head += 1;
            if head == task.group {
                (token, head) = (token + 1, 0);
            }
        }
    }
    places
}

impl Column {
    const fn new() -> Self {
        Self {
            scores: [Numbers::of(0.0); BLOCK],
            weights: [Pairs([0; LANES]); BLOCK / 2],
            max: Numbers::of(f32::NEG_INFINITY),
            totals: [Numbers::of(0.0); 4],
        }
    }

    /// Forgets all keys.
    fn reset(&mut self) {
        self.max = Numbers::of(f32::NEG_INFINITY);
        self.totals = [Numbers::of(0.0); 4];
    }

    /// Turns the scores of the first `len` keys into weights, and scales earlier sums where a maximum
    /// is raised. With `MASKED`, keys after number `seen` of the block weigh nothing. The first lines of `fetch`
    /// come into the first-level cache meanwhile.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
    fn softmax<const MASKED: bool>(
        &mut self,
        len: usize,
        seen: __m512i,
        sums: &mut [Numbers],
        fetch: &[u16],
    ) {
        let log2_e = _mm512_set1_ps(std::f32::consts::LOG2_E);
        let visible = |j: usize| {
            if MASKED { _mm512_cmpge_epi32_mask(seen, _mm512_set1_epi32(j as i32)) } else { !0 }
        };
        // NaN is passed over here; it comes back through the exponential.
        let mut max = self.max.load();
        let mut largest = [max; 4];
        for (j, scores) in self.scores[..len].as_chunks::<4>().0.iter().enumerate() {
            for (i, scores) in scores.iter().enumerate() {
                let mask = visible(4 * j + i);
                largest[i] = _mm512_mask_max_ps(largest[i], mask, scores.load(), largest[i]);
            }
        }
        let largest = _mm512_max_ps(
            _mm512_max_ps(largest[0], largest[1]),
            _mm512_max_ps(largest[2], largest[3]),
        );
        let slack = _mm512_set1_ps(SLACK * std::f32::consts::LN_2);
        let raised = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(largest, _mm512_add_ps(max, slack));
        if raised != 0 {
            let fall = exp2(_mm512_mul_ps(_mm512_sub_ps(max, largest), log2_e));
            let factor = _mm512_mask_mov_ps(_mm512_set1_ps(1.0), raised, fall);
            max = _mm512_mask_mov_ps(max, raised, largest);
            self.max.store(max);
            for sum in self.totals.iter_mut().chain(sums) {
                sum.store(_mm512_mul_ps(sum.load(), factor));
            }
        }
        let zero = _mm512_mul_ps(max, log2_e);
        let mut totals = self.totals.each_ref().map(|total| total.load());
        let fours = self.scores[..len].as_chunks::<4>().0.iter();
        for (j, (scores, pairs)) in fours.zip(self.weights.as_chunks_mut::<2>().0).enumerate() {
            for line in LINES_PER_STEP * j..LINES_PER_STEP * (j + 1) {
                _mm_prefetch::<_MM_HINT_T0>(fetch.as_ptr().wrapping_add(GROUP * line).cast());
            }
            let weights: [_; 4] = std::array::from_fn(|i| {
                let weight = exp2(_mm512_fmsub_ps(scores[i].load(), log2_e, zero));
                if MASKED { _mm512_maskz_mov_ps(visible(4 * j + i), weight) } else { weight }
            });
            totals = std::array::from_fn(|i| _mm512_add_ps(totals[i], weights[i]));
            for (i, pairs) in pairs.iter_mut().enumerate() {
                let words = pair(weights[2 * i], weights[2 * i + 1]);
                // SAFETY: there are 16 pairs.
                unsafe { _mm512_store_si512(pairs.0.as_mut_ptr().cast(), words) };
            }
        }
        for (sum, total) in self.totals.iter_mut().zip(totals) {
            sum.store(total);
        }
    }

    /// Divides by the sums of weights and writes the columns from number `first` of the 32 on.
    ///
    /// # Safety
    /// As [`attention`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn finish(
        &self,
        task: &TileAttention<'_>,
        places: &Places,
        first: usize,
        sums: &[Numbers],
    ) {
        let [a, b, c, d] = self.totals.each_ref().map(|total| total.load());
        let total = _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d));
        let inverse = _mm512_div_ps(_mm512_set1_ps(1.0), total);
        let dim = task.head_dim;
        // SAFETY: there are 32 numbers.
        let interleave = unsafe { _mm512_loadu_si512(INTERLEAVE.as_ptr().cast()) };
        for (part, sums) in sums.as_chunks::<GROUP>().0.iter().enumerate() {
            let pairs = std::array::from_fn(|i| {
                let [a, b] = [0, 1].map(|odd| _mm512_mul_ps(sums[2 * i + odd].load(), inverse));
                // SAFETY: any pattern is a row of bf16 numbers.
                let halves =
                    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(b, a)) };
                _mm512_permutexvar_epi16(interleave, halves)
            });
            let outs = places.out[..places.len].iter().skip(first);
            for ((row, column), words) in outs.zip(transpose(pairs)) {
                let place =
                    |i| Intermediate::place(task.out_width, *row, column + part * GROUP + i);
                // SAFETY: this function's contract; any pattern is a row of bf16 numbers.
                unsafe {
                    if dim.is_multiple_of(GROUP) {
                        let out = task.out.range(place(0), GROUP);
                        _mm512_storeu_si512(out.as_mut_ptr().cast(), words);
                        continue;
                    }
                    // The head may end in one tile and begin in another.
                    let words: [u16; GROUP] = std::mem::transmute(words);
                    for (i, word) in words.into_iter().enumerate().take(dim - part * GROUP) {
                        task.out.range(place(i), 1)[0] = word;
                    }
                }
            }
        }
    }
}

/// Scores of a block's keys: `K Qᵀ`.
///
/// # Safety
/// Tiles must be configured.
#[inline]
unsafe fn scores(keys: &[u16], row: usize, queries: &[Pairs], states: &mut [Column; 2]) {
    let steps = row / GROUP;
    let [left, right] = states;
    let queries = [queries.as_ptr(), queries[row / 2..].as_ptr()];
    let tiles = left.scores.as_chunks_mut::<GROUP>().0.iter_mut();
    let tiles = tiles.zip(right.scores.as_chunks_mut::<GROUP>().0);
    for (keys, (left, right)) in keys.chunks_exact(GROUP * row).zip(tiles) {
        let keys = [keys.as_ptr(), keys[ROWS * row..].as_ptr()];
        let sums = [
            left.as_mut_ptr(),
            right.as_mut_ptr(),
            left[ROWS..].as_mut_ptr(),
            right[ROWS..].as_mut_ptr(),
        ];
        // SAFETY: this function's contract; 32 keys of whole steps, as many pairs of queries, and
        // sums of 32 keys by two columns.
        unsafe { multiply::<false>(keys, 2 * row, ROW_BYTES, queries, steps, sums) };
    }
}

/// The weighted values of a block's first `len` keys, `Vᵀ Pᵀ`, added to `sums` or put in their place.
///
/// # Safety
/// As [`scores`].
#[inline]
unsafe fn add_values<const ADD: bool>(
    values: &[u16],
    len: usize,
    states: &[Column; 2],
    sums: &mut [Numbers],
) {
    let row = sums.len() / 2;
    let weights = [states[0].weights.as_ptr(), states[1].weights.as_ptr()];
    let (left, right) = sums.split_at_mut(row);
    for first in (0..row).step_by(GROUP) {
        let values = &values[first * GROUP..];
        let values = [values.as_ptr(), values[ROWS * GROUP..].as_ptr()];
        let (left, right) = (&mut left[first..], &mut right[first..]);
        let sums = [
            left.as_mut_ptr(),
            right.as_mut_ptr(),
            left[ROWS..].as_mut_ptr(),
            right[ROWS..].as_mut_ptr(),
        ];
        // SAFETY: this function's contract; 32 places in the head for whole groups of keys, pairs of
        // weights for as many, and sums of 32 places by two columns.
        unsafe {
            multiply::<ADD>(values, ROW_BYTES, row * ROW_BYTES, weights, len / GROUP, sums);
        }
    }
}

/// Two tiles of rows by two tiles of columns, in which everything but `a` lies row after row.
///
/// A tile of `a` has rows `stride` bytes apart, and comes `step` bytes after the one before it.
///
/// # Safety
/// Tiles must be configured, and there must be `steps` of them in each of `a`
/// and `b`.
#[inline]
unsafe fn multiply<const ADD: bool>(
    a: [*const u16; 2],
    stride: usize,
    step: usize,
    b: [*const Pairs; 2],
    steps: usize,
    c: [*mut Numbers; 4],
) {
    macro_rules! call {
        ($($start:literal,)*) => {
            tile_asm!(
                $($start,)*
                "2:",
                "tileloadd tmm4, [{upper} + {stride}]",
                "tileloadd tmm6, [{left} + {line}]",
                "tileloadd tmm7, [{right} + {line}]",
                "tileloadd tmm5, [{lower} + {stride}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {upper}, {step}",
                "add {lower}, {step}",
                "add {left}, 1024",
                "add {right}, 1024",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{c0} + {line}], tmm0",
                "tilestored [{c1} + {line}], tmm1",
                "tilestored [{c2} + {line}], tmm2",
                "tilestored [{c3} + {line}], tmm3",;
                upper = inout(reg) a[0] => _,
                lower = inout(reg) a[1] => _,
                stride = in(reg) stride,
                step = in(reg) step,
                left = inout(reg) b[0] => _,
                right = inout(reg) b[1] => _,
                line = in(reg) ROW_BYTES,
                steps = inout(reg) steps => _,
                c0 = in(reg) c[0],
                c1 = in(reg) c[1],
                c2 = in(reg) c[2],
                c3 = in(reg) c[3],
            )
        };
    }
    // SAFETY: this function's contract.
    unsafe {
        if ADD {
            call!(
                "tileloadd tmm0, [{c0} + {line}]",
                "tileloadd tmm1, [{c1} + {line}]",
                "tileloadd tmm2, [{c2} + {line}]",
                "tileloadd tmm3, [{c3} + {line}]",
            );
        } else {
            call!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",);
        }
    }
}

/// Pairs of the nearest bf16 numbers, of two the upper one. Quicker than the conversion of the instruction
/// set and a permutation; for numbers that are not negative.
#[inline]
#[target_feature(enable = "avx512f")]
fn pair(first: __m512, second: __m512) -> __m512i {
    let half = _mm512_set1_epi32(0x8000);
    let rounded = |x| _mm512_add_epi32(_mm512_castps_si512(x), half);
    // `a ? b : c` by the bits of the mask.
    const SELECT: i32 = 0xca;
    let upper = _mm512_set1_epi32(!0xffff);
    let first = _mm512_srli_epi32::<16>(rounded(first));
    _mm512_ternarylogic_epi32::<SELECT>(upper, rounded(second), first)
}

/// Transposes 16 rows of 16 words of 32 bits.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(rows: [__m512i; LANES]) -> [__m512i; LANES] {
    // Pairs of rows, fours, then quarters of registers: eights and sixteens.
    let mut r = rows;
    for i in (0..LANES).step_by(2) {
        (r[i], r[i + 1]) = (
            _mm512_unpacklo_epi32(rows[i], rows[i + 1]),
            _mm512_unpackhi_epi32(rows[i], rows[i + 1]),
        );
    }
    // Register `4k + c` has, in each quarter, column `4 · quarter + c` of rows `4k` to `4k + 3`.
    let mut fours = r;
    for k in (0..LANES).step_by(4) {
        fours[k] = _mm512_unpacklo_epi64(r[k], r[k + 2]);
        fours[k + 1] = _mm512_unpackhi_epi64(r[k], r[k + 2]);
        fours[k + 2] = _mm512_unpacklo_epi64(r[k + 1], r[k + 3]);
        fours[k + 3] = _mm512_unpackhi_epi64(r[k + 1], r[k + 3]);
    }
    let mut out = fours;
    for c in 0..4 {
        let [a, b, d, e] = [fours[c], fours[4 + c], fours[8 + c], fours[12 + c]];
        let (even_low, even_high) = (
            _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b),
            _mm512_shuffle_i32x4::<0b10_00_10_00>(d, e),
        );
        let (odd_low, odd_high) = (
            _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b),
            _mm512_shuffle_i32x4::<0b11_01_11_01>(d, e),
        );
        out[c] = _mm512_shuffle_i32x4::<0b10_00_10_00>(even_low, even_high);
        out[8 + c] = _mm512_shuffle_i32x4::<0b11_01_11_01>(even_low, even_high);
        out[4 + c] = _mm512_shuffle_i32x4::<0b10_00_10_00>(odd_low, odd_high);
        out[12 + c] = _mm512_shuffle_i32x4::<0b11_01_11_01>(odd_low, odd_high);
    }
    out
}

/// Writes the values of some positions of a group of 32, and zeros after them where they are the last.
///
/// # Safety
/// `out` must be the group's `[row, GROUP]` words, and those that are written this task's alone.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn store_values(task: &StoreValues<'_>, out: *mut u16) {
    let StoreValues { rows, stride, first, len, last, row } = *task;
    assert!(first + len <= GROUP && rows.len() >= (len - 1) * stride + row);
    assert!(row.is_multiple_of(GROUP));
    let after = if last { 0 } else { (!0_u64 << (first + len)) as __mmask32 };
    let mask: __mmask32 = !0 << first & !after;
    // SAFETY: there are 32 numbers.
    let interleave = unsafe { _mm512_loadu_si512(INTERLEAVE.as_ptr().cast()) };
    for part in (0..row).step_by(LANES) {
        let words = |position: usize| match position.checked_sub(first) {
            // SAFETY: a row has 16 numbers from every multiple of 16 on.
            Some(i) if i < len => unsafe {
                _mm256_loadu_si256(rows[i * stride + part..][..LANES].as_ptr().cast())
            },
            _ => _mm256_setzero_si256(),
        };
        let pairs = std::array::from_fn(|i| {
            let halves = _mm512_castsi256_si512(words(2 * i));
            let halves = _mm512_inserti64x4::<1>(halves, words(2 * i + 1));
            _mm512_permutexvar_epi16(interleave, halves)
        });
        for (i, words) in transpose(pairs).into_iter().enumerate() {
            // SAFETY: this function's contract; there are 32 numbers.
            unsafe { _mm512_mask_storeu_epi16(out.add((part + i) * GROUP).cast(), mask, words) };
        }
    }
}

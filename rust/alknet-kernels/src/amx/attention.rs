//! Causal attention on tiles of bf16 numbers.
//!
//! The steps are those of [`crate::attention`]: queries stand in columns, so that the softmax runs over whole
//! registers of them. Here a column is a token and one of the query heads that share keys and values; 32
//! columns go through all blocks of keys, and all that belongs to them stays in the first-level cache.

use std::{arch::x86_64::*, array, cell::RefCell};

use super::{
    INTERLEAVE, exp2,
    tiles::{ROW_BYTES, ROWS, TILE_BYTES, Tiles, tile_asm},
};
use crate::{
    attention::{IN_RANGE, ROUNDED},
    dispatch::{StoreValues, TileAttention},
    keys::{BLOCK, GROUP},
    rows::Intermediate,
    scalar::LANES,
};

/// Columns that go through all keys together: two tiles.
pub(super) const COLUMNS: usize = 2 * LANES;

/// A register of fp32 numbers in memory.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Numbers([f32; LANES]);

impl Numbers {
    const ZERO: Self = Self([0.0; LANES]);

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
struct Pairs([u32; LANES]);

impl Pairs {
    const ZERO: Self = Self([0; LANES]);

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn store(&mut self, x: __m512i) {
        // SAFETY: there are 16 pairs, aligned.
        unsafe { _mm512_store_si512(self.0.as_mut_ptr().cast(), x) }
    }
}

/// Rows of both tiles of columns.
type Both<T> = [[T; ROWS]; 2];

/// What belongs to 32 columns.
struct Columns {
    places: Places,
    /// `[row / GROUP]`: queries, pairs of neighbours in a head.
    queries: Vec<Both<Pairs>>,
    /// Scores of a block of keys.
    scores: [Both<Numbers>; BLOCK / ROWS],
    /// Weights of pairs of keys of a block.
    weights: [Both<Pairs>; BLOCK / GROUP],
    /// Sums of weights in each tile, of even and of odd keys.
    totals: [[Numbers; 2]; 2],
    /// `[row / ROWS]`: sums of weighted values.
    sums: Vec<Both<Numbers>>,
    /// Scores whose weight is one, if not zero.
    references: Option<[Numbers; 2]>,
}

thread_local! {
    /// Buffers of attention, some 24 KiB per thread.
    static SCRATCH: RefCell<Columns> = const { RefCell::new(Columns::NEW) };
}

/// Attention of the columns of a task.
///
/// # Safety
/// The rows and heads of the task's columns must belong to it alone.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
pub(super) unsafe fn attention(task: &TileAttention<'_>) {
    SCRATCH.with_borrow_mut(|columns| {
        // SAFETY: this table of kernels is handed out where AMX is available.
        let tiles = unsafe { Tiles::new() };
        for first in task.columns.clone().step_by(COLUMNS) {
            columns.start(task, first);
            // SAFETY: this function's contract; tiles are configured.
            unsafe {
                columns.add_keys(task);
                if columns.out_of_range() != [0; 2] {
                    columns.refer_to_largest(task);
                    columns.add_keys(task);
                }
                columns.finish(task);
            }
        }
        drop(tiles);
    });
}

/// Where each of 32 columns is.
struct Places {
    /// First word of its query.
    query: [usize; COLUMNS],
    /// The last position that it sees.
    position: [i32; COLUMNS],
    /// Row and first column of its numbers in the output.
    out: [(usize, usize); COLUMNS],
    /// Number of columns that are not repetitions of the last.
    len: usize,
}

impl Places {
    const NONE: Self =
        Self { query: [0; COLUMNS], position: [0; COLUMNS], out: [(0, 0); COLUMNS], len: 0 };

    /// Places of the columns from `first` on; those beyond the last one repeat it.
    fn of(task: &TileAttention<'_>, first: usize) -> Self {
        let len = COLUMNS.min(task.columns.end - first);
        let mut places = Self { len, ..Self::NONE };
        let (mut token, mut head) = (first / task.group, first % task.group);
        for i in 0..COLUMNS {
            places.query[i] = token * task.query_stride + head * task.shape.row;
            places.position[i] = (task.first + token * task.step) as i32;
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

    /// The number of positions that the last column sees.
    fn end(&self) -> usize {
        self.position[COLUMNS - 1] as usize + 1
    }

    /// Blocks of keys: their first position, how many of their keys are read, and their keys and values. These
    /// are whole groups, of which the keys after the last column are masked.
    fn blocks<'a>(
        &self,
        task: &TileAttention<'a>,
    ) -> impl Iterator<Item = (usize, usize, &'a [u16], &'a [u16])> + use<'a> {
        let (words, shape, end) = (task.words, task.shape, self.end());
        (0..end).step_by(BLOCK).map(move |start| {
            let block = &words[start / BLOCK * shape.block()..][..2 * shape.half()];
            let (keys, values) = block.split_at(shape.half());
            (start, (end - start).next_multiple_of(GROUP).min(BLOCK), keys, values)
        })
    }
}

impl Columns {
    const NEW: Self = Self {
        places: Places::NONE,
        queries: Vec::new(),
        scores: [[[Numbers::ZERO; ROWS]; 2]; BLOCK / ROWS],
        weights: [[[Pairs::ZERO; ROWS]; 2]; BLOCK / GROUP],
        totals: [[Numbers::ZERO; 2]; 2],
        sums: Vec::new(),
        references: None,
    };

    /// Takes the queries of the columns from `first` on.
    #[target_feature(enable = "avx512f")]
    fn start(&mut self, task: &TileAttention<'_>, first: usize) {
        let row = task.shape.row;
        self.places = Places::of(task, first);
        self.references = None;
        self.queries.resize(row / GROUP, [[Pairs::ZERO; ROWS]; 2]);
        self.sums.resize(row / ROWS, [[Numbers::ZERO; ROWS]; 2]);
        for (part, queries) in self.queries.iter_mut().enumerate() {
            for (half, queries) in queries.iter_mut().enumerate() {
                let words = array::from_fn(|i| {
                    let query = self.places.query[half * LANES + i];
                    let words = &task.queries[query + part * GROUP..][..GROUP];
                    // SAFETY: there are 32 words.
                    unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
                });
                for (queries, words) in queries.iter_mut().zip(transpose(words)) {
                    queries.store(words);
                }
            }
        }
    }

    /// Weighs the values of all keys that the columns see.
    ///
    /// # Safety
    /// Tiles must be configured.
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn add_keys(&mut self, task: &TileAttention<'_>) {
        self.totals = [[Numbers::ZERO; 2]; 2];
        for (start, len, keys, values) in self.places.blocks(task) {
            // SAFETY: this function's contract.
            unsafe {
                self.score(keys, len);
                self.weigh(start, len);
                self.add_values(values, start, len);
            }
        }
    }

    /// Scores of the first `len` keys of a block: `K Qᵀ`.
    ///
    /// # Safety
    /// Tiles must be configured.
    #[inline]
    unsafe fn score(&mut self, keys: &[u16], len: usize) {
        let steps = self.queries.len();
        assert!(len <= BLOCK && keys.len() >= len * steps * GROUP);
        let keys = Tiled { start: keys.as_ptr(), row: steps * ROW_BYTES, step: ROW_BYTES };
        let (queries, scores) = (self.queries.as_ptr().cast(), self.scores.as_mut_ptr().cast());
        // SAFETY: this function's contract; whole groups of keys, all queries, and room for the scores.
        unsafe { multiply::<false>(keys, queries, scores, len / GROUP, steps) };
    }

    /// Turns the scores of the first `len` keys into weights.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    fn weigh(&mut self, start: usize, len: usize) {
        let earliest = self.places.position[0] as usize;
        for group in 0..len / GROUP {
            let start = start + group * GROUP;
            if self.references.is_none() && start + GROUP <= earliest + 1 {
                self.weigh_group(group, |_, _, score| exp2(score));
                continue;
            }
            let references = self.references.unwrap_or([Numbers::ZERO; 2]);
            // SAFETY: there are 32 positions.
            let positions = [0, LANES].map(|first| unsafe {
                _mm512_loadu_si512(self.places.position[first..].as_ptr().cast())
            });
            self.weigh_group(group, |half, key, score| {
                let key = _mm512_set1_epi32((start + key) as i32);
                let visible = _mm512_cmpge_epi32_mask(positions[half], key);
                let weight = exp2(_mm512_sub_ps(score, references[half].load()));
                _mm512_maskz_mov_ps(visible, weight)
            });
        }
    }

    /// Makes `weight(tile of columns, key, scores)` the weights of a group of keys, and adds them up.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn weigh_group(&mut self, group: usize, weight: impl Fn(usize, usize, __m512) -> __m512) {
        let scores = &self.scores[group * GROUP / ROWS..];
        for (half, words) in self.weights[group].iter_mut().enumerate() {
            let mut totals = self.totals[half].each_ref().map(|total| total.load());
            for (i, words) in words.iter_mut().enumerate() {
                let weights = [2 * i, 2 * i + 1]
                    .map(|key| weight(half, key, scores[key / ROWS][half][key % ROWS].load()));
                totals = array::from_fn(|odd| _mm512_add_ps(totals[odd], weights[odd]));
                words.store(pair(weights));
            }
            for (sum, total) in self.totals[half].iter_mut().zip(totals) {
                sum.store(total);
            }
        }
    }

    /// Adds the weighted values of a block's first `len` keys: `Vᵀ Pᵀ`. With the first block the sums begin.
    ///
    /// # Safety
    /// As [`Columns::score`].
    #[inline]
    unsafe fn add_values(&mut self, values: &[u16], start: usize, len: usize) {
        let (row, steps) = (self.sums.len() * ROWS, len / GROUP);
        assert!(len <= BLOCK && values.len() >= row * len);
        let values = Tiled { start: values.as_ptr(), row: ROW_BYTES, step: row * ROW_BYTES };
        let (weights, sums) = (self.weights.as_ptr().cast(), self.sums.as_mut_ptr().cast());
        let product = if start == 0 { multiply::<false> } else { multiply::<true> };
        // SAFETY: this function's contract; all places in the head by whole groups of keys, weights of as many,
        // and sums for all places.
        unsafe { product(values, weights, sums, row / GROUP, steps) };
    }

    /// Sums of the columns' weights, as they were before they were rounded.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn totals(&self) -> [__m512; 2] {
        self.totals.each_ref().map(|[even, odd]| _mm512_add_ps(even.load(), odd.load()))
    }

    /// The columns whose weights sum up to what is out of range.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn out_of_range(&self) -> [__mmask16; 2] {
        let [least, most] = [IN_RANGE.start(), IN_RANGE.end()].map(|x| _mm512_set1_ps(*x));
        // NaN is out of range.
        self.totals().map(|total| {
            let enough = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(total, least);
            !_mm512_mask_cmp_ps_mask::<_CMP_LE_OQ>(enough, total, most)
        })
    }

    /// Makes the largest score of those columns their reference.
    ///
    /// # Safety
    /// Tiles must be configured.
    #[cold]
    #[target_feature(enable = "avx512f")]
    unsafe fn refer_to_largest(&mut self, task: &TileAttention<'_>) {
        let mut largest = [[f32::NEG_INFINITY; LANES]; 2];
        for (start, len, keys, _) in self.places.blocks(task) {
            // SAFETY: this function's contract.
            unsafe { self.score(keys, len) };
            for (key, column) in (0..len).flat_map(|key| (0..COLUMNS).map(move |i| (key, i))) {
                let (half, i) = (column / LANES, column % LANES);
                if (start + key) as i32 <= self.places.position[column] {
                    // NaN is passed over here; it comes back with the weights.
                    let score = self.scores[key / ROWS][half][key % ROWS].0[i];
                    largest[half][i] = largest[half][i].max(score);
                }
            }
        }
        let chosen = self.out_of_range();
        let reference =
            |half: usize, i| if chosen[half] >> i & 1 == 1 { largest[half][i] } else { 0.0 };
        self.references = Some([0, 1].map(|half| Numbers(array::from_fn(|i| reference(half, i)))));
    }

    /// Divides by the sums of weights and writes the result.
    ///
    /// # Safety
    /// As [`attention`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn finish(&self, task: &TileAttention<'_>) {
        let dim = task.head_dim;
        // SAFETY: there are 32 numbers.
        let interleave = unsafe { _mm512_loadu_si512(INTERLEAVE.as_ptr().cast()) };
        for (half, total) in self.totals().into_iter().enumerate() {
            let inverse = _mm512_div_ps(_mm512_set1_ps(1.0 / ROUNDED), total);
            for (part, sums) in self.sums.as_chunks::<2>().0.iter().enumerate() {
                let pairs = array::from_fn(|i| {
                    let sums = &sums[2 * i / ROWS][half][2 * i % ROWS..];
                    let [a, b] = [0, 1].map(|odd| _mm512_mul_ps(sums[odd].load(), inverse));
                    // SAFETY: any pattern is a row of bf16 numbers.
                    let halves = unsafe {
                        std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(b, a))
                    };
                    _mm512_permutexvar_epi16(interleave, halves)
                });
                let outs = self.places.out[..self.places.len].iter().skip(half * LANES);
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
}

/// The left side of a product: tiles of rows that lie `row` bytes apart, each tile `step` bytes after the one
/// before it.
struct Tiled {
    start: *const u16,
    row: usize,
    step: usize,
}

/// `pairs` times two tiles of rows by two tiles of columns, in which everything but `a` lies row after row: `steps`
/// tiles of `a` in each row of tiles, as many pairs of tiles `b`, and pairs of tiles of sums `c`.
///
/// # Safety
/// Tiles must be configured, and all that is named must be there.
#[inline]
unsafe fn multiply<const ADD: bool>(
    a: Tiled,
    b: *const Pairs,
    c: *mut Numbers,
    pairs: usize,
    steps: usize,
) {
    macro_rules! product {
        ($($start:literal,)*) => {
            tile_asm!(
                "2:",
                $($start,)*
                "mov {left}, {steps}",
                "3:",
                "tileloadd tmm4, [{a} + {row}]",
                "tileloadd tmm6, [{b} + {line}]",
                "tileloadd tmm7, [{b} + {line} + 1024]",
                "tileloadd tmm5, [{lower} + {row}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, {step}",
                "add {lower}, {step}",
                "add {b}, 2048",
                "dec {left}",
                "jnz 3b",
                "tilestored [{c} + {line}], tmm0",
                "tilestored [{c} + {line} + 1024], tmm1",
                "tilestored [{c} + {line} + 2048], tmm2",
                "tilestored [{c} + {line} + 3072], tmm3",
                "add {c}, 4096",
                "add {a}, {next}",
                "add {lower}, {next}",
                "sub {b}, {back}",
                "dec {pairs}",
                "jnz 2b",;
                a = inout(reg) a.start => _,
                lower = inout(reg) a.start.wrapping_byte_add(ROWS * a.row) => _,
                row = in(reg) a.row,
                step = in(reg) a.step,
                next = in(reg) (2 * ROWS * a.row).wrapping_sub(steps * a.step),
                b = inout(reg) b => _,
                back = in(reg) steps * 2 * TILE_BYTES,
                line = in(reg) ROW_BYTES,
                steps = in(reg) steps,
                left = out(reg) _,
                c = inout(reg) c => _,
                pairs = inout(reg) pairs => _,
            )
        };
    }
    // SAFETY: this function's contract.
    unsafe {
        if ADD {
            product!(
                "tileloadd tmm0, [{c} + {line}]",
                "tileloadd tmm1, [{c} + {line} + 1024]",
                "tileloadd tmm2, [{c} + {line} + 2048]",
                "tileloadd tmm3, [{c} + {line} + 3072]",
            );
        } else {
            product!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",);
        }
    }
}

/// Pairs of bf16 numbers, rounded towards zero.
#[inline]
#[target_feature(enable = "avx512f")]
fn pair([first, second]: [__m512; 2]) -> __m512i {
    // `a ? b : c` by the bits of the mask.
    const SELECT: i32 = 0xca;
    let [first, second] = [first, second].map(|x| _mm512_castps_si512(x));
    let upper = _mm512_set1_epi32(!0xffff);
    _mm512_ternarylogic_epi32::<SELECT>(upper, second, _mm512_srli_epi32::<16>(first))
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

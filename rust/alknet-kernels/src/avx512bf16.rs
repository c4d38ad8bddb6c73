//! AVX-512 with BF16: 32 products of bf16 numbers per instruction, everything else as `avx512.rs`.
//!
//! `vdpbf16ps` adds the products of two pairs of numbers to a sum one after the other, those of the upper halves
//! first, and rounds after each. With numbers `k` and `k + 2` as a pair a sum takes those at even places, or at
//! odd ones, each in turn: the specification's order (see [`crate::scalar::add_product`]).

use std::{arch::x86_64::*, mem::transmute};

use crate::{
    attention::{self, Arithmetic, AttentionTask, Operand},
    avx2, avx512,
    dispatch::Kernels,
    isa::Isa,
    lines::Lines,
    scalar::{LANES, STEP},
};

pub(crate) static KERNELS: Kernels = Kernels { isa: Isa::Avx512Bf16, attention, ..avx512::KERNELS };

/// Numbers that make two pairs: even ones and odd ones.
const FOUR: usize = 4;

/// Pairs of a step of a product.
const STEP_PAIRS: usize = STEP / 2;

#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512bf16")]
fn attention(task: &AttentionTask<'_>, out: &mut [f32]) {
    attention::attention::<Pairs>(task, out);
}

/// Attention's products, of which each instruction makes 32; both sides hold pairs in place of fp32 numbers.
struct Pairs;

impl Arithmetic for Pairs {
    /// Pair `p` of row `i` is `numbers[i · row + p · column]`.
    #[inline(always)]
    fn left<'a>(
        a: Operand<'a>,
        [rows, depth]: [usize; 2],
        room: &'a mut Lines<f32>,
    ) -> Operand<'a> {
        // SAFETY: only this file's `attention` uses this type, on a CPU with AVX-512 BF16.
        unsafe {
            if a.column == 1 {
                let numbers = pair_columns(a.numbers, a.row, rows, depth, room);
                Operand { numbers, row: numbers.len() / rows, column: 1 }
            } else {
                assert_eq!(a.row, 1, "one side of an operand is dense");
                let width = rows.next_multiple_of(LANES);
                let pairs = depth.div_ceil(FOUR) * 2;
                room.grow(pairs * width);
                let out = &mut room[..pairs * width];
                assert!(a.numbers.len() >= (depth - 1) * a.column + rows);
                pair_rows(a.numbers.as_ptr(), a.column, [depth, rows], out.as_mut_ptr());
                Operand { numbers: out, row: 1, column: width }
            }
        }
    }

    /// `[pairs, n]`.
    #[inline(always)]
    fn right(b: &mut [f32], depth: usize, n: usize) -> &[f32] {
        let pairs = depth.div_ceil(FOUR) * 2;
        assert!(n.is_multiple_of(LANES) && b.len() >= n * depth.max(pairs));
        // SAFETY: as above. Pairs are written where the numbers read before were, or ahead of them.
        unsafe {
            let b = b.as_mut_ptr();
            pair_rows(b, n, [depth, n], b);
        }
        &b[..pairs * n]
    }

    #[inline(always)]
    fn product<const ADD: bool>(a: &Operand<'_>, b: &[f32], n: usize, c: &mut [f32]) {
        // SAFETY: as above.
        unsafe { product::<ADD>(a, b, n, c) }
    }

    #[inline(always)]
    fn hide(scores: &mut [f32; LANES], positions: &[u32; LANES], key: u32) {
        // SAFETY: as above.
        unsafe { avx512::hide(scores, positions, key) }
    }

    #[inline(always)]
    fn transpose(
        x: &[f32],
        stride: usize,
        size: (usize, usize),
        out: &mut [f32],
        out_stride: usize,
    ) {
        // SAFETY: as above.
        unsafe { avx2::transpose(x, stride, size, out, out_stride) }
    }
}

/// Numbers of rows `k` and `k + 2` as pairs: `[pairs, columns]`, rows filled up with zeros to a multiple of four,
/// columns to whole vectors. The output may be the input.
///
/// # Safety
/// There must be rows of `columns` numbers, `stride` apart, and room for the pairs.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn pair_rows(x: *const f32, stride: usize, [rows, columns]: [usize; 2], out: *mut f32) {
    let width = columns.next_multiple_of(LANES);
    for four in 0..rows.div_ceil(FOUR) {
        for column in (0..columns).step_by(LANES) {
            let mask = first_lanes(columns - column);
            // SAFETY: this function's contract.
            unsafe {
                let [a, b, c, d] = std::array::from_fn(|i| {
                    let row = FOUR * four + i;
                    let mask = if row < rows { mask } else { 0 };
                    _mm512_maskz_loadu_epi32(mask, x.wrapping_add(row * stride + column).cast())
                });
                let out = out.add(2 * four * width + column);
                _mm512_storeu_si512(out.cast(), pairs(a, c));
                _mm512_storeu_si512(out.add(width).cast(), pairs(b, d));
            }
        }
    }
}

/// Numbers `k` and `k + 2` of each row as pairs: `[rows, pairs]`, filled up with zeros to whole vectors.
///
/// # Shapes
/// - `x`: rows `stride` apart, of `columns` numbers
#[inline]
#[target_feature(enable = "avx512f")]
fn pair_columns<'a>(
    x: &[f32],
    stride: usize,
    rows: usize,
    columns: usize,
    out: &'a mut Lines<f32>,
) -> &'a [f32] {
    let width = columns.div_ceil(STEP) * STEP_PAIRS;
    out.grow(rows * width);
    let out = &mut out[..rows * width];
    assert!(x.len() >= (rows - 1) * stride + columns);
    for (row, out) in out.chunks_exact_mut(width).enumerate() {
        for (step, out) in out.as_chunks_mut::<STEP_PAIRS>().0.iter_mut().enumerate() {
            let [low, high] = [0, LANES].map(|half| {
                let column = step * STEP + half;
                let mask = first_lanes(columns.saturating_sub(column));
                let x = x.as_ptr().wrapping_add(row * stride + column);
                // SAFETY: the mask's lanes lie within rows and columns, as asserted.
                unsafe { _mm512_maskz_loadu_epi32(mask, x.cast()) }
            });
            // SAFETY: the output is a vector.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), pair_neighbours(low, high)) };
        }
    }
    out
}

/// A mask of the first `len` lanes.
fn first_lanes(len: usize) -> __mmask16 {
    if len >= LANES { !0 } else { (1 << len) - 1 }
}

/// Pairs of bf16 numbers, which fp32 numbers hold exactly, the first ones above.
#[inline]
#[target_feature(enable = "avx512f")]
fn pairs(first: __m512i, second: __m512i) -> __m512i {
    _mm512_or_si512(first, _mm512_srli_epi32::<16>(second))
}

/// [`pairs`] of numbers 0 and 2, 1 and 3, 4 and 6, 5 and 7, … of 32.
#[inline]
#[target_feature(enable = "avx512f")]
fn pair_neighbours(low: __m512i, high: __m512i) -> __m512i {
    let first = _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29);
    let second = _mm512_add_epi32(first, _mm512_set1_epi32(2));
    pairs(_mm512_permutex2var_epi32(low, first, high), _mm512_permutex2var_epi32(low, second, high))
}

/// [`Arithmetic::product`].
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn product<const ADD: bool>(a: &Operand<'_>, b: &[f32], n: usize, c: &mut [f32]) {
    let mut column = 0;
    while column < n {
        let width = ((n - column) / LANES).min(3);
        let (b, c) = (&b[column..], &mut c[column..]);
        match width {
            1 => columns::<ADD, 1>(a, b, n, c),
            2 => columns::<ADD, 2>(a, b, n, c),
            _ => columns::<ADD, 3>(a, b, n, c),
        }
        column += width * LANES;
    }
}

/// All rows of `P` registers of columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn columns<const ADD: bool, const P: usize>(a: &Operand<'_>, b: &[f32], n: usize, c: &mut [f32]) {
    // 4 rows of 3 registers use 24 of 32 registers for sums of even and of odd numbers.
    const ROWS: usize = 4;
    // It starts at a column: the last row is short.
    let rows = c.len().div_ceil(n);
    for row in (0..rows).step_by(ROWS) {
        let a = Operand { numbers: &a.numbers[row * a.row..], ..*a };
        let c = &mut c[row * n..];
        match rows - row {
            1 => steps::<ADD, 1, P>(&a, b, n, c),
            2 => steps::<ADD, 2, P>(&a, b, n, c),
            3 => steps::<ADD, 3, P>(&a, b, n, c),
            _ => steps::<ADD, ROWS, P>(&a, b, n, c),
        }
    }
}

/// `R` rows by `P` registers of columns: [`crate::scalar::add_product`] for every step.
#[target_feature(enable = "avx512f,avx512bf16")]
fn steps<const ADD: bool, const R: usize, const P: usize>(
    a: &Operand<'_>,
    b: &[f32],
    n: usize,
    c: &mut [f32],
) {
    let Operand { row, column, .. } = *a;
    let (pairs, width) = (b.len().div_ceil(n), P * LANES);
    assert!(pairs.is_multiple_of(2) && pairs > 0);
    assert!(a.numbers.len() > (R - 1) * row + (pairs - 1) * column);
    assert!(b.len() >= (pairs - 1) * n + width && c.len() >= (R - 1) * n + width);
    for start in (0..pairs).step_by(STEP_PAIRS) {
        let (mut even, mut odd) = ([[_mm512_setzero_ps(); P]; R], [[_mm512_setzero_ps(); P]; R]);
        for pair in (start..pairs.min(start + STEP_PAIRS)).step_by(2) {
            // SAFETY: every access is within the bounds asserted above.
            unsafe {
                let (a, b) = (a.numbers.as_ptr().add(pair * column), b.as_ptr().add(pair * n));
                add_products(&mut even, a, row, b);
                add_products(&mut odd, a.add(column), row, b.add(n));
            }
        }
        for (r, (even, odd)) in even.into_iter().zip(odd).enumerate() {
            for (p, (even, odd)) in even.into_iter().zip(odd).enumerate() {
                // SAFETY: as above.
                unsafe {
                    let c = c.as_mut_ptr().add(r * n + p * LANES);
                    let sum =
                        if ADD || start > 0 { _mm512_loadu_ps(c) } else { _mm512_setzero_ps() };
                    _mm512_storeu_ps(c, _mm512_add_ps(sum, _mm512_add_ps(even, odd)));
                }
            }
        }
    }
}

/// Adds the products of a pair of each of `R` rows, `row` numbers apart, and `P` registers of pairs.
///
/// # Safety
/// There must be as many.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn add_products<const R: usize, const P: usize>(
    sums: &mut [[__m512; P]; R],
    a: *const f32,
    row: usize,
    b: *const f32,
) {
    // SAFETY: this function's contract; 512 bits of fp32 numbers are as many of pairs.
    unsafe {
        let columns: [__m512bh; P] =
            std::array::from_fn(|p| transmute(_mm512_loadu_ps(b.add(p * LANES))));
        for (r, sums) in sums.iter_mut().enumerate() {
            let a = transmute::<__m512, __m512bh>(_mm512_set1_ps(*a.add(r * row)));
            for (sum, column) in sums.iter_mut().zip(columns) {
                *sum = _mm512_dpbf16_ps(*sum, column, a);
            }
        }
    }
}

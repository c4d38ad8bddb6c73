//! AVX-512 with BF16: 32 products of bf16 numbers per instruction, everything else as `avx512.rs`.
//!
//! `vdpbf16ps` adds the products of two pairs of numbers to a sum one after the other, those of the upper halves
//! first, and rounds after each. With numbers `k` and `k + 2` as a pair a sum takes those at even places, or at
//! odd ones, each in turn: the specification's order (see [`crate::scalar::add_product`]).

use std::{arch::x86_64::*, cell::RefCell};

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

/// Attention's products, of which each instruction makes 32.
struct Pairs;

impl Arithmetic for Pairs {
    #[inline(always)]
    fn product<const ADD: bool>(a: &Operand<'_>, b: &[f32], n: usize, c: &mut [f32]) {
        // SAFETY: only this file's `attention` uses this type, on a CPU with AVX-512 BF16.
        SCRATCH.with_borrow_mut(|scratch| unsafe { product::<ADD>(scratch, a, b, n, c) });
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

/// Both sides of a product in pairs.
#[derive(Default)]
struct Scratch {
    a: Lines<u32>,
    b: Lines<u32>,
}

thread_local! {
    /// Some 50 KiB per thread.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The left side of a product in pairs: pair `p` of row `i` is `pairs[i · row + p · column]`.
#[derive(Clone, Copy)]
struct PairedOperand<'a> {
    pairs: &'a [u32],
    row: usize,
    column: usize,
}

/// [`Arithmetic::product`].
#[inline]
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512bf16")]
fn product<const ADD: bool>(
    scratch: &mut Scratch,
    a: &Operand<'_>,
    b: &[f32],
    n: usize,
    c: &mut [f32],
) {
    let (rows, depth) = (c.len() / n, b.len() / n);
    let b = pair_rows(b, n, (depth, n), &mut scratch.b);
    let a = if a.row == 1 {
        let pairs = pair_rows(a.numbers, a.column, (depth, rows), &mut scratch.a);
        PairedOperand { pairs, row: 1, column: rows.next_multiple_of(LANES) }
    } else {
        assert_eq!(a.column, 1, "one side of an operand is dense");
        let pairs = pair_columns(a.numbers, a.row, (rows, depth), &mut scratch.a);
        PairedOperand { pairs, row: pairs.len() / rows, column: 1 }
    };
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

/// Numbers of rows `k` and `k + 2` as pairs, the former above: `[pairs, columns]`, columns rounded up to
/// whole vectors, rows filled up with zeros.
///
/// # Shapes
/// - `x`: rows `stride` apart; `size`: rows and columns of it
#[inline]
#[target_feature(enable = "avx512f")]
fn pair_rows<'a>(
    x: &[f32],
    stride: usize,
    (rows, columns): (usize, usize),
    out: &'a mut Lines<u32>,
) -> &'a [u32] {
    let (fours, width) = (rows.div_ceil(FOUR), columns.next_multiple_of(LANES));
    out.grow(fours * 2 * width);
    let out = &mut out[..fours * 2 * width];
    assert!(rows > 0 && x.len() >= (rows - 1) * stride + columns);
    for (four, out) in out.chunks_exact_mut(2 * width).enumerate() {
        for column in (0..columns).step_by(LANES) {
            let mask = first_lanes(columns - column);
            // SAFETY: what is loaded lies within rows and columns, as asserted; the output has whole vectors.
            unsafe {
                let [a, b, c, d] = std::array::from_fn(|i| {
                    let row = FOUR * four + i;
                    let mask = if row < rows { mask } else { 0 };
                    _mm512_maskz_loadu_epi32(
                        mask,
                        x.as_ptr().wrapping_add(row * stride + column).cast(),
                    )
                });
                _mm512_storeu_si512(out.as_mut_ptr().add(column).cast(), pairs(a, c));
                _mm512_storeu_si512(out.as_mut_ptr().add(width + column).cast(), pairs(b, d));
            }
        }
    }
    out
}

/// Numbers `k` and `k + 2` of each row as pairs, the former above: `[rows, pairs]`, filled up with zeros to
/// whole vectors.
///
/// # Shapes
/// - `x`: rows `stride` apart; `size`: rows and columns of it
#[inline]
#[target_feature(enable = "avx512f")]
fn pair_columns<'a>(
    x: &[f32],
    stride: usize,
    (rows, columns): (usize, usize),
    out: &'a mut Lines<u32>,
) -> &'a [u32] {
    let width = columns.div_ceil(STEP) * STEP_PAIRS;
    out.grow(rows * width);
    let out = &mut out[..rows * width];
    assert!(rows > 0 && x.len() >= (rows - 1) * stride + columns);
    for (row, out) in out.chunks_exact_mut(width).enumerate() {
        for (step, out) in out.as_chunks_mut::<STEP_PAIRS>().0.iter_mut().enumerate() {
            // SAFETY: what is loaded lies within rows and columns, as asserted; the output is a vector.
            unsafe {
                let [low, high] = [0, LANES].map(|half| {
                    let column = step * STEP + half;
                    let mask = first_lanes(columns.saturating_sub(column));
                    _mm512_maskz_loadu_epi32(
                        mask,
                        x.as_ptr().wrapping_add(row * stride + column).cast(),
                    )
                });
                _mm512_storeu_si512(out.as_mut_ptr().cast(), pair_neighbours(low, high));
            }
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

/// All rows of `P` registers of columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn columns<const ADD: bool, const P: usize>(
    a: PairedOperand<'_>,
    b: &[u32],
    n: usize,
    c: &mut [f32],
) {
    // 4 rows of 3 registers use 24 of 32 registers for sums of even and of odd numbers.
    const ROWS: usize = 4;
    // It starts at a column: the last row is short.
    let rows = c.len().div_ceil(n);
    for row in (0..rows).step_by(ROWS) {
        let a = PairedOperand { pairs: &a.pairs[row * a.row..], ..a };
        let c = &mut c[row * n..];
        match rows - row {
            1 => steps::<ADD, 1, P>(a, b, n, c),
            2 => steps::<ADD, 2, P>(a, b, n, c),
            3 => steps::<ADD, 3, P>(a, b, n, c),
            _ => steps::<ADD, ROWS, P>(a, b, n, c),
        }
    }
}

/// `R` rows by `P` registers of columns: [`crate::scalar::add_product`] for every step.
#[target_feature(enable = "avx512f,avx512bf16")]
fn steps<const ADD: bool, const R: usize, const P: usize>(
    a: PairedOperand<'_>,
    b: &[u32],
    n: usize,
    c: &mut [f32],
) {
    let (pairs, width) = (b.len().div_ceil(n), P * LANES);
    assert!(pairs.is_multiple_of(2) && pairs > 0);
    assert!(a.pairs.len() > (R - 1) * a.row + (pairs - 1) * a.column);
    assert!(b.len() >= (pairs - 1) * n + width && c.len() >= (R - 1) * n + width);
    for start in (0..pairs).step_by(STEP_PAIRS) {
        let mut sums = [[[_mm512_setzero_ps(); P]; R]; 2];
        for four in (start..pairs.min(start + STEP_PAIRS)).step_by(2) {
            for (odd, sums) in sums.iter_mut().enumerate() {
                let pair = four + odd;
                // SAFETY: every access is within the bounds asserted above.
                unsafe {
                    let columns: [_; P] =
                        std::array::from_fn(|p| load_pairs(b.as_ptr().add(pair * n + p * LANES)));
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let a = splat_pair(*a.pairs.as_ptr().add(r * a.row + pair * a.column));
                        for (sum, column) in sums.iter_mut().zip(columns) {
                            *sum = _mm512_dpbf16_ps(*sum, column, a);
                        }
                    }
                }
            }
        }
        let [even, odd] = sums;
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

/// # Safety
/// There must be 16 pairs.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn load_pairs(pairs: *const u32) -> __m512bh {
    // SAFETY: this function's contract; both types are 32 bf16 numbers.
    unsafe { std::mem::transmute(_mm512_loadu_si512(pairs.cast())) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn splat_pair(pair: u32) -> __m512bh {
    // SAFETY: both types are 32 bf16 numbers.
    unsafe { std::mem::transmute(_mm512_set1_epi32(pair as i32)) }
}

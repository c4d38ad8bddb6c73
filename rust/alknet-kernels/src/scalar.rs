//! What every kernel computes: the specification, and the code for CPUs without kernels of their own.
//!
//! Functions are `#[inline(always)]`, so that `avx2.rs` and `avx512.rs` compile the same source for
//! their instruction set. Every sum has one order and every fused step is written as such, so that all
//! instruction sets give the same bits: those of AMX, whose products of bf16 numbers cannot be had in
//! another order (see [`add_product`]). Products of two bf16 numbers are exact in fp32, so that it does
//! not matter there whether they are fused with the addition.

use std::ops::Range;

use crate::{pack::PackedMatrix, pool::Shared, rows::QuantizedRows};

/// Partial sums of a reduction, and outputs of one panel of packed weights.
pub(crate) const LANES: usize = 16;

/// Rows of 8-bit numbers are filled up to a multiple of this, a cache line.
pub(crate) const K_ALIGN: usize = 64;

/// Widest block that the rotation mixes.
const HADAMARD_MAX: usize = 64;

/// Bit pattern of +∞: absolute values at or above it are not finite.
const INFINITE_BITS: u32 = 0x7f80_0000;

/// Size of the blocks that the rotation of rows of `width` numbers mixes: the largest power of two
/// that divides it, up to 64.
pub(crate) fn hadamard_block(width: usize) -> usize {
    (1 << width.trailing_zeros()).min(HADAMARD_MAX)
}

/// Multiplies every block of `x` by the (unnormalised, symmetric) Hadamard matrix of that size.
///
/// Blocks of 64 are summed up as tiles do (see [`add_product`]): halves by the matrix of 32, then their sum and
/// difference. Smaller ones by the fast Walsh–Hadamard transform.
#[inline(always)]
pub(crate) fn hadamard(x: &mut [f32], block: usize) {
    for x in x.chunks_exact_mut(block) {
        let mut stride = block / 2;
        if block == HADAMARD_MAX {
            x.as_chunks_mut().0.iter_mut().for_each(hadamard_32);
            butterflies(x, stride);
            continue;
        }
        while stride > 0 {
            butterflies(x, stride);
            stride /= 2;
        }
    }
}

/// Sums and differences of numbers that stand `stride` apart.
#[inline(always)]
fn butterflies(x: &mut [f32], stride: usize) {
    for pair in x.chunks_exact_mut(2 * stride) {
        let (low, high) = pair.split_at_mut(stride);
        for (a, b) in low.iter_mut().zip(high) {
            (*a, *b) = (*a + *b, *a - *b);
        }
    }
}

/// Multiplies 32 numbers by the Hadamard matrix: those at even and at odd places each in turn.
#[inline(always)]
fn hadamard_32(x: &mut [f32; 32]) {
    let mut sums = [[0.0; LANES]; 2];
    for (pair, signs) in x.as_chunks::<2>().0.iter().zip(&SIGNS) {
        for (sums, x) in sums.iter_mut().zip(pair) {
            sums.iter_mut().zip(signs).for_each(|(sum, sign)| *sum += x * sign);
        }
    }
    // Columns of the matrix differ in pairs by the sign of odd rows alone.
    let [even, odd] = sums;
    for (out, (even, odd)) in x.as_chunks_mut().0.iter_mut().zip(even.iter().zip(odd)) {
        *out = [even + odd, even - odd];
    }
}

/// The Hadamard matrix of 16.
pub(crate) static SIGNS: [[f32; LANES]; LANES] = {
    let mut signs = [[1.0; LANES]; LANES];
    let mut i = 0;
    while i < LANES * LANES {
        if ((i / LANES) & (i % LANES)).count_ones() % 2 == 1 {
            signs[i / LANES][i % LANES] = -1.0;
        }
        i += 1;
    }
    signs
};

/// The nearest bf16 number, the even one of two; NaN stays NaN.
#[inline(always)]
pub(crate) fn bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & UPPER_HALF;
    if x.is_nan() { x } else { f32::from_bits(nearest) }
}

/// The bits of a bf16 number in those of an fp32 number.
pub(crate) const UPPER_HALF: u32 = 0xffff_0000;

/// Rounds `x` to 8 bits: `x ≈ scale · q` with `|q| ≤ 127`; returns the scale and `Σ q`.
///
/// `out` may be longer than `x` and is filled with zeros. When `x` holds a number that is not
/// finite, the scale is NaN, so that it cannot get lost.
#[inline(always)]
pub(crate) fn quantize(x: &[f32], out: &mut [i8]) -> (f32, i32) {
    let largest = x.iter().fold(0, |largest: u32, x| largest.max(x.to_bits() & !(1 << 31)));
    let Some((inverse, scale)) = steps(largest) else {
        out.fill(0);
        return (f32::NAN, 0);
    };
    let (out, filling) = out.split_at_mut(x.len());
    filling.fill(0);
    let mut sum = 0;
    for (q, x) in out.iter_mut().zip(x) {
        // Adding 1.5 · 2²³ leaves the number, rounded half to even, in the lowest bits.
        let rounded = (x * inverse + ROUNDING).to_bits() as i32 - ROUNDING.to_bits() as i32;
        *q = rounded as i8;
        sum += rounded;
    }
    (scale, sum)
}

/// Steps per unit of a row and the size of one, from the bits of its largest magnitude; nothing when
/// that is not finite.
pub(crate) fn steps(largest: u32) -> Option<(f32, f32)> {
    if largest >= INFINITE_BITS {
        return None;
    }
    let largest = f32::from_bits(largest);
    // Below this, 127 / largest would overflow; such a row is zero for every purpose.
    let inverse = if largest > 1e-36 { 127.0 / largest } else { 0.0 };
    Some((inverse, largest / 127.0))
}

/// `1.5 · 2²³`: the unit in the last place is 1, for negative numbers too.
pub(crate) const ROUNDING: f32 = 12_582_912.0;

/// RMSNorm in bf16: `out = x / √(mean(x²) + eps) · weight`.
#[inline(always)]
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let factor = 1.0 / (sum_of_squares(x) / x.len() as f32 + eps).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = bf16(x * factor * weight);
    }
}

/// `Σ x²` over four times [`LANES`] partial sums.
#[inline(always)]
fn sum_of_squares(x: &[f32]) -> f32 {
    let mut sums = [[0.0f32; LANES]; 4];
    let (blocks, rest) = x.as_chunks::<{ 4 * LANES }>();
    for block in blocks {
        for (sums, x) in sums.iter_mut().zip(block.as_chunks::<LANES>().0) {
            sums.iter_mut().zip(x).for_each(|(sum, x)| *sum = x.mul_add(*x, *sum));
        }
    }
    for (sum, x) in sums.as_flattened_mut().iter_mut().zip(rest) {
        *sum = x.mul_add(*x, *sum);
    }
    let [a, b, c, d] = sums;
    sum_lanes(std::array::from_fn(|i| (a[i] + b[i]) + (c[i] + d[i])))
}

/// Sum of partial sums, pairwise.
#[inline(always)]
fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// `2ˣ` within a part in 579, less than rounding to bf16 costs. Zero up to −127, infinite from 128 on; NaN stays NaN.
#[inline(always)]
pub(crate) fn exp2(x: f32) -> f32 {
    // Not `clamp`, which is more than one instruction a side.
    let x = if x < -127.0 { -127.0 } else { x };
    let x = if x > 128.0 { 128.0 } else { x };
    let shifted = x + ROUNDING;
    let r = x - (shifted - ROUNDING);
    let [a, b, c] = EXP2;
    let p = a.mul_add(r, b).mul_add(r, c);
    // What was added is in the lowest bits; those of ROUNDING itself are shifted out.
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}

/// Coefficients of a polynomial near `2ʳ` for `|r| ≤ ½`, highest power first: the least relative error.
pub(crate) const EXP2: [f32; 3] = [0.238_428_97, 0.703_448, 1.000_443_1];

/// Bits from which those of a number are taken for its reciprocal, within a part in 19.
pub(crate) const RECIPROCAL: u32 = 0x7ef3_11c7;

/// One, and half of the largest error that a step of Newton's leaves of such a reciprocal, which is always too small.
pub(crate) const STEP_TO: f32 = 1.001_31;

/// Largest exponent of what [`reciprocal`] takes.
pub(crate) const MOST: f32 = 64.0;

/// `1 / x` within a part in 750, of numbers from 1 to `2⁶⁵`; NaN stays NaN.
///
/// Not the CPU's own, which is another one with every maker; a division takes longer than all else
/// about a gate.
#[inline(always)]
pub(crate) fn reciprocal(x: f32) -> f32 {
    let guess = f32::from_bits(RECIPROCAL.wrapping_sub(x.to_bits()));
    guess.mul_add((-x).mul_add(guess, STEP_TO), guess)
}

/// `SiLU(gate) · up` in bf16, within a part in 330 before it is rounded.
#[inline(always)]
pub(crate) fn silu_mul(gate: f32, up: f32) -> f32 {
    let x = gate * -std::f32::consts::LOG2_E;
    let x = if x > MOST { MOST } else { x };
    bf16(gate * up * reciprocal(1.0 + exp2(x)))
}

/// Where a tile of a product's result goes: rows `stride` apart, the first of them at `start`.
pub(crate) struct Place<'a> {
    pub(crate) out: &'a Shared<f32>,
    pub(crate) start: usize,
    pub(crate) stride: usize,
}

impl Place<'_> {
    /// `len` numbers of row `row`.
    ///
    /// # Safety
    /// They must belong to this task alone (see [`Shared::range`]).
    #[expect(clippy::mut_from_ref, reason = "tasks hold rows that do not overlap")]
    #[inline(always)]
    unsafe fn row(&self, row: usize, len: usize) -> &mut [f32] {
        // SAFETY: this function's contract.
        unsafe { self.out.range(self.start + row * self.stride, len) }
    }
}

/// Copies the first `width` numbers of every row of `tile`, or adds them when `ADD`.
///
/// # Shapes
/// - `tile`: `[rows, columns]`
///
/// # Safety
/// The place must belong to this task alone.
#[inline(always)]
pub(crate) unsafe fn finish_linear<const ADD: bool>(
    tile: &[f32],
    columns: usize,
    width: usize,
    place: &Place<'_>,
) {
    for (row, tile) in tile.chunks_exact(columns).enumerate() {
        // SAFETY: this function's contract.
        let out = unsafe { place.row(row, width) };
        if ADD {
            out.iter_mut().zip(&tile[..width]).for_each(|(out, x)| *out += x);
        } else {
            copy(&tile[..width], out);
        }
    }
}

/// `SiLU(gate) · up` for rows of [`LANES`] gates and [`LANES`] ups in turn; `width` numbers a row.
///
/// # Shapes
/// - `tile`: `[rows, columns]`
///
/// # Safety
/// The place must belong to this task alone.
#[inline(always)]
pub(crate) unsafe fn finish_gate_up(tile: &[f32], columns: usize, width: usize, place: &Place<'_>) {
    for (row, tile) in tile.chunks_exact(columns).enumerate() {
        // SAFETY: this function's contract.
        let out = unsafe { place.row(row, width) };
        for (out, tile) in out.chunks_mut(LANES).zip(tile.as_chunks::<{ 2 * LANES }>().0) {
            let (gates, ups) = tile.split_at(LANES);
            let mut product = [0.0; LANES];
            for (product, (gate, up)) in product.iter_mut().zip(gates.iter().zip(ups)) {
                *product = silu_mul(*gate, *up);
            }
            copy(&product[..out.len()], out);
        }
    }
}

/// Rotates heads of queries and keys, and rounds them and those of values to bf16.
///
/// # Shapes
/// - `tile`: `[rows, heads.scales.len() · padded]`; `angles`: `[rows, head_dim]`
///
/// # Safety
/// The place must belong to this task alone.
#[inline(always)]
pub(crate) unsafe fn finish_qkv(
    tile: &[f32],
    heads: &TileHeads<'_>,
    angles: &[f32],
    place: &Place<'_>,
) {
    let (dim, padded) = (heads.head_dim, heads.padded);
    let rows = tile.chunks_exact(heads.scales.len() * padded);
    for (row, (tile, angles)) in rows.zip(angles.chunks_exact(dim)).enumerate() {
        let (cos, sin) = angles.split_at(dim / 2);
        // SAFETY: this function's contract.
        let out = unsafe { place.row(row, heads.scales.len() * dim) };
        let numbers = tile.chunks_exact(padded).zip(out.chunks_exact_mut(dim));
        for ((head, out), scale) in numbers.zip(heads.scales) {
            match scale {
                Some(scale) => rope(&head[..dim], cos, sin, *scale, out),
                None => out.iter_mut().zip(&head[..dim]).for_each(|(out, x)| *out = bf16(*x)),
            }
        }
    }
}

/// Heads in a tile of the joint projection.
pub(crate) struct TileHeads<'a> {
    pub(crate) head_dim: usize,
    /// Numbers from one head to the next.
    pub(crate) padded: usize,
    /// What each head is multiplied by after its rotation; nothing for values, which are not rotated.
    pub(crate) scales: &'a [Option<f32>],
}

/// Copies a short row in whole vectors: a call of `memcpy` costs more than copying.
#[inline(always)]
pub(crate) fn copy(x: &[f32], out: &mut [f32]) {
    let ((x, x_rest), (out, out_rest)) = (x.as_chunks::<LANES>(), out.as_chunks_mut::<LANES>());
    for (out, x) in out.iter_mut().zip(x) {
        out.iter_mut().zip(x).for_each(|(out, x)| *out = *x);
    }
    out_rest.iter_mut().zip(x_rest).for_each(|(out, x)| *out = *x);
}

/// Rotates one head (pairs `i`, `i + head_dim/2`), multiplies it by `scale` and rounds it to bf16.
///
/// # Shapes
/// - `x`, `out`: `[head_dim]`; `cos`, `sin`: `[head_dim / 2]`
#[inline(always)]
fn rope(x: &[f32], cos: &[f32], sin: &[f32], scale: f32, out: &mut [f32]) {
    let (low, high) = x.split_at(cos.len());
    let (low_out, high_out) = out.split_at_mut(cos.len());
    let numbers = low.iter().zip(high).zip(cos.iter().zip(sin));
    for (((a, b), (cos, sin)), (x, y)) in numbers.zip(low_out.iter_mut().zip(high_out)) {
        let (cos, sin) = (cos * scale, sin * scale);
        (*x, *y) = (bf16(a.mul_add(cos, -(b * sin))), bf16(b.mul_add(cos, a * sin)));
    }
}

/// Kernels that are this file's code, compiled for an instruction set.
macro_rules! compile_for {
    ($features:literal) => {
        #[target_feature(enable = $features)]
        fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
            $crate::scalar::rms_norm(x, weight, eps, out);
        }

        #[target_feature(enable = $features)]
        unsafe fn finish_linear<const ADD: bool>(
            tile: &[f32],
            columns: usize,
            width: usize,
            place: &$crate::scalar::Place<'_>,
        ) {
            // SAFETY: the same contract.
            unsafe { $crate::scalar::finish_linear::<ADD>(tile, columns, width, place) };
        }

        #[target_feature(enable = $features)]
        unsafe fn finish_gate_up(
            tile: &[f32],
            columns: usize,
            width: usize,
            place: &$crate::scalar::Place<'_>,
        ) {
            // SAFETY: the same contract.
            unsafe { $crate::scalar::finish_gate_up(tile, columns, width, place) };
        }

        #[target_feature(enable = $features)]
        unsafe fn finish_qkv(
            tile: &[f32],
            heads: &$crate::scalar::TileHeads<'_>,
            angles: &[f32],
            place: &$crate::scalar::Place<'_>,
        ) {
            // SAFETY: the same contract.
            unsafe { $crate::scalar::finish_qkv(tile, heads, angles, place) };
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(crate) use compile_for;

/// `out = x · Wᵀ + bias` for some rows of `x` and some panels of `W`.
///
/// # Shapes
/// - `out`: `[rows, panels · LANES]`
#[inline(always)]
pub(crate) fn matmul(
    x: &QuantizedRows,
    rows: Range<usize>,
    w: &PackedMatrix,
    panels: Range<usize>,
    out: &mut [f32],
) {
    let columns = panels.len() * LANES;
    for (row, out) in rows.zip(out.chunks_exact_mut(columns)) {
        let q = &x.data[row * x.stride()..][..x.stride()];
        for (panel, out) in panels.clone().zip(out.chunks_exact_mut(LANES)) {
            let mut sums = [x.offsets[row]; LANES];
            for (q, w) in q.chunks_exact(4).zip(w.panel(panel).chunks_exact(4 * LANES)) {
                for (sum, w) in sums.iter_mut().zip(w.chunks_exact(4)) {
                    for (q, w) in q.iter().zip(w) {
                        *sum += i32::from(*q) * i32::from(*w);
                    }
                }
            }
            let (scales, bias) = (w.scales(panel), w.bias(panel));
            for (i, out) in out.iter_mut().enumerate() {
                *out = (sums[i] as f32 * x.scales[row]).mul_add(scales[i], bias[i]);
            }
        }
    }
}

/// Depth of one step of a product of bf16 numbers, that of a tile.
pub(crate) const STEP: usize = 32;

/// `sum + a · b` for one step of up to [`STEP`] bf16 numbers: those at even and at odd places are each added
/// up in turn, then both sums, then that to what was there. Tiles do so.
///
/// Source: `TDPBF16PS` in Intel's Architectures Software Developer's Manual.
#[inline(always)]
pub(crate) fn add_product<'a>(
    sum: &mut [f32; LANES],
    a: impl Iterator<Item = f32>,
    b: impl Iterator<Item = &'a [f32; LANES]>,
) {
    let mut sums = [[0.0; LANES]; 2];
    for (k, (a, b)) in a.zip(b).enumerate() {
        sums[k % 2].iter_mut().zip(b).for_each(|(sum, b)| *sum += a * b);
    }
    for (sum, (even, odd)) in sum.iter_mut().zip(sums[0].iter().zip(sums[1])) {
        *sum += even + odd;
    }
}

/// Transposes a matrix: `out[j · out_stride + i] = x[i · stride + j]`.
///
/// # Shapes
/// - `x`: `[rows, columns]`, rows `stride` apart; `out`: `[columns, rows]`, rows `out_stride` apart
#[inline(always)]
pub(crate) fn transpose(
    x: &[f32],
    stride: usize,
    (rows, columns): (usize, usize),
    out: &mut [f32],
    out_stride: usize,
) {
    for i in 0..rows {
        for (j, x) in x[i * stride..][..columns].iter().enumerate() {
            out[j * out_stride + i] = *x;
        }
    }
}

//! What every kernel computes: the specification, and the code for CPUs without kernels of their own.
//!
//! Functions are `#[inline(always)]`, so that `avx2.rs` and `avx512.rs` compile the same source for
//! their instruction set. No multiplication is fused with an addition here, and sums run over
//! [`LANES`] partial sums, so that all instruction sets round alike.

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
/// Fast Walsh–Hadamard transform, widest stride first.
#[inline(always)]
pub(crate) fn hadamard(x: &mut [f32], block: usize) {
    for x in x.chunks_exact_mut(block) {
        let mut stride = block / 2;
        while stride > 0 {
            for pair in x.chunks_exact_mut(2 * stride) {
                let (low, high) = pair.split_at_mut(stride);
                for (a, b) in low.iter_mut().zip(high) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            stride /= 2;
        }
    }
}

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

/// RMSNorm: `out = x / √(mean(x²) + eps) · weight`.
#[inline(always)]
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mut lanes = [0.0f32; LANES];
    let mut blocks = x.chunks_exact(LANES);
    for block in &mut blocks {
        for (sum, x) in lanes.iter_mut().zip(block) {
            *sum += x * x;
        }
    }
    for (sum, x) in lanes.iter_mut().zip(blocks.remainder()) {
        *sum += x * x;
    }
    let factor = 1.0 / (sum_lanes(lanes) / x.len() as f32 + eps).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * factor * weight;
    }
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

/// `eˣ` within 2 units in the last place; arguments beyond ±87 are clamped, NaN stays NaN.
///
/// Source: Cephes `expf` (Moshier), with a reduction that vectorises.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = clamp(x);
    let shifted = x * std::f32::consts::LOG2_E + ROUNDING;
    let n = shifted - ROUNDING;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    (p * r * r + r + 1.0) * power_of_two(shifted)
}

/// `eˣ` within a part in 50,000, clamped as [`exp`]: enough for what is rounded to 8 bits afterwards.
#[inline(always)]
pub(crate) fn short_exp(x: f32) -> f32 {
    let x = clamp(x) * std::f32::consts::LOG2_E;
    let shifted = x + ROUNDING;
    let r = x - (shifted - ROUNDING);
    let [mut p, rest @ ..] = POWER_OF_TWO;
    for c in rest {
        p = p * r + c;
    }
    p * power_of_two(shifted)
}

/// Coefficients of `2ʳ`, highest power first, for `|r| ≤ ½`: off by 3 parts in a million (fitted for the
/// least relative error, with no error at zero).
pub(crate) const POWER_OF_TWO: [f32; 5] =
    [9.582_85e-3, 5.590_643e-2, 2.402_41e-1, 6.931_242e-1, 1.0];

/// What exponentials take; unlike `f32::clamp` one instruction a side.
#[inline(always)]
fn clamp(x: f32) -> f32 {
    let x = if x < -87.0 { -87.0 } else { x };
    if x > 87.0 { 87.0 } else { x }
}

/// `2ⁿ` from `n` + [`ROUNDING`].
#[inline(always)]
pub(crate) fn power_of_two(shifted: f32) -> f32 {
    // The bits of ROUNDING itself are shifted out.
    f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}

/// `SiLU(gate) · up`.
#[inline(always)]
fn silu_mul(gate: f32, up: f32) -> f32 {
    gate / (1.0 + short_exp(-gate)) * up
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
        for_lanes(out, &tile[..width], |out, x| if ADD { out + x } else { x });
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
            for_lanes(out, &product[..out.len()], |_, x| x);
        }
    }
}

/// Rotates heads of queries and keys and copies those of values.
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
                None => copy(&head[..dim], out),
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

/// `out = f(out, x)`, most of it in whole vectors: for short rows a call of `memcpy` costs more than copying.
#[inline(always)]
fn for_lanes(out: &mut [f32], x: &[f32], f: impl Fn(f32, f32) -> f32) {
    let ((x, x_rest), (out, out_rest)) = (x.as_chunks::<LANES>(), out.as_chunks_mut::<LANES>());
    for (out, x) in out.iter_mut().zip(x) {
        out.iter_mut().zip(x).for_each(|(out, x)| *out = f(*out, *x));
    }
    out_rest.iter_mut().zip(x_rest).for_each(|(out, x)| *out = f(*out, *x));
}

/// Copies a short row.
#[inline(always)]
pub(crate) fn copy(x: &[f32], out: &mut [f32]) {
    for_lanes(out, x, |_, x| x);
}

/// Rotates one head (pairs `i`, `i + head_dim/2`) and multiplies it by `scale`.
///
/// # Shapes
/// - `x`, `out`: `[head_dim]`; `cos`, `sin`: `[head_dim / 2]`
#[inline(always)]
fn rope(x: &[f32], cos: &[f32], sin: &[f32], scale: f32, out: &mut [f32]) {
    let (low, high) = x.split_at(cos.len());
    let (low_out, high_out) = out.split_at_mut(cos.len());
    let numbers = low.iter().zip(high).zip(cos.iter().zip(sin));
    for (((a, b), (cos, sin)), (x, y)) in numbers.zip(low_out.iter_mut().zip(high_out)) {
        (*x, *y) = ((a * cos - b * sin) * scale, (b * cos + a * sin) * scale);
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
                *out = sums[i] as f32 * x.scales[row] * scales[i] + bias[i];
            }
        }
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

//! AVX2 and FMA. Bytes are widened to 16 bits, where products of bytes add up exactly in pairs;
//! the byte instruction (`vpmaddubsw`) would saturate.

use std::{arch::x86_64::*, ops::Range};

use crate::{
    attention::{self, Arithmetic, AttentionTask, FP32_SCRATCH, Operand, fp32_operands},
    dispatch::Kernels,
    isa::Isa,
    pack::PackedMatrix,
    rows::QuantizedRows,
    scalar::{self, LANES},
};

pub(crate) static KERNELS: Kernels = Kernels {
    isa: Isa::Avx2,
    rotate_quantize,
    rms_norm,
    matmul,
    copy_tile: finish_linear::<false>,
    add_tile: finish_linear::<true>,
    finish_gate_up,
    finish_qkv,
    attention,
    tiles: None,
};

#[target_feature(enable = "avx2,fma")]
fn rotate_quantize(x: &mut [f32], block: usize, out: &mut [i8]) -> (f32, i32) {
    if block == 64 {
        for x in x.as_chunks_mut().0 {
            hadamard(x);
        }
    } else {
        scalar::hadamard(x, block);
    }
    scalar::quantize(x, out)
}

/// [`scalar::hadamard`] of one block of 64.
#[target_feature(enable = "avx2,fma")]
fn hadamard(x: &mut [f32; 64]) {
    // SAFETY: the eight loads cover the 64 numbers.
    let mut r: [__m256; 8] =
        std::array::from_fn(|i| unsafe { _mm256_loadu_ps(x.as_ptr().add(8 * i)) });
    for stride in [4, 2, 1] {
        for a in (0..8).filter(|a| a & stride == 0) {
            let b = a + stride;
            (r[a], r[b]) = (_mm256_add_ps(r[a], r[b]), _mm256_sub_ps(r[a], r[b]));
        }
    }
    // Within a register: the lower half of each pair takes a + b, the upper a − b. Multiplying by
    // ±1 is exact, so that fusing it with the addition changes no rounding.
    let signs = |stride: i32| {
        let sign = |lane: i32| if lane & stride == 0 { 1.0 } else { -1.0 };
        let [a, b, c, d, e, f, g, h] = std::array::from_fn(|lane| sign(lane as i32));
        _mm256_setr_ps(a, b, c, d, e, f, g, h)
    };
    for r in &mut r {
        *r = _mm256_fmadd_ps(*r, signs(4), _mm256_permute2f128_ps::<1>(*r, *r));
        *r = _mm256_fmadd_ps(*r, signs(2), _mm256_permute_ps::<0b01_00_11_10>(*r));
        *r = _mm256_fmadd_ps(*r, signs(1), _mm256_permute_ps::<0b10_11_00_01>(*r));
    }
    for (i, r) in r.into_iter().enumerate() {
        // SAFETY: the eight stores cover the 64 numbers.
        unsafe { _mm256_storeu_ps(x.as_mut_ptr().add(8 * i), r) };
    }
}

scalar::compile_for!("avx2,fma");

#[target_feature(enable = "avx2,fma")]
fn attention(task: &AttentionTask<'_>, out: &mut [f32]) {
    FP32_SCRATCH.with_borrow_mut(|scratch| attention::attention::<Fma>(task, scratch, out));
}

/// Most rows of a tile: 6 rows of half a panel use 12 of 16 registers for sums.
const TILE_ROWS: usize = 6;

/// [`scalar::matmul`] in tiles of up to 6 rows.
#[target_feature(enable = "avx2")]
fn matmul(
    x: &QuantizedRows,
    rows: Range<usize>,
    w: &PackedMatrix,
    panels: Range<usize>,
    out: &mut [f32],
) {
    let columns = panels.len() * LANES;
    let stride = x.stride();
    let mut wide = Vec::with_capacity(TILE_ROWS * stride);
    let tiles = rows.len().div_ceil(TILE_ROWS);
    let mut row = rows.start;
    for tile in 0..tiles {
        let height = (rows.end - row).div_ceil(tiles - tile);
        wide.clear();
        wide.extend(x.data[row * stride..][..height * stride].iter().map(|q| i16::from(*q)));
        let tile = Tile { wide: &wide, x, row, w, columns };
        for (i, panel) in panels.clone().enumerate() {
            let out = &mut out[(row - rows.start) * columns + i * LANES..];
            match height {
                1 => tile.run::<1>(panel, out),
                2 => tile.run::<2>(panel, out),
                3 => tile.run::<3>(panel, out),
                4 => tile.run::<4>(panel, out),
                5 => tile.run::<5>(panel, out),
                _ => tile.run::<6>(panel, out),
            }
        }
        row += height;
    }
}

/// A few rows, widened to 16 bits.
struct Tile<'a> {
    /// `[rows, stride]`.
    wide: &'a [i16],
    x: &'a QuantizedRows,
    /// First of the rows in `x`.
    row: usize,
    w: &'a PackedMatrix,
    /// Numbers from one row of the output to the next.
    columns: usize,
}

impl Tile<'_> {
    /// `R` rows by one panel, in two halves of 8 outputs.
    #[target_feature(enable = "avx2")]
    fn run<const R: usize>(&self, panel: usize, out: &mut [f32]) {
        let stride = self.x.stride();
        assert!(self.wide.len() >= R * stride);
        let q = self.wide.as_ptr();
        for half in 0..2 {
            let bytes = self.w.panel(panel)[half * 32..].as_ptr();
            // Each register holds two partial sums of four outputs.
            let mut sums = [[_mm256_setzero_si256(); 2]; R];
            for k in (0..stride).step_by(4) {
                // SAFETY: a panel has 16 · stride bytes, the half starts at 32 · half, k ≤ stride − 4.
                let weights = unsafe {
                    let bytes = bytes.add(k * LANES);
                    [
                        _mm256_cvtepu8_epi16(_mm_loadu_si128(bytes.cast())),
                        _mm256_cvtepu8_epi16(_mm_loadu_si128(bytes.add(16).cast())),
                    ]
                };
                for (r, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: row `r` has `stride` numbers, and k ≤ stride − 4.
                    let four = unsafe { q.add(r * stride + k).cast::<i64>().read_unaligned() };
                    let four = _mm256_set1_epi64x(four);
                    for (sum, weights) in sums.iter_mut().zip(weights) {
                        *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(weights, four));
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                let out = &mut out[r * self.columns + half * 8..][..8];
                self.finish(*sums, self.row + r, panel, half, out);
            }
        }
    }

    /// Adds the partial sums of 8 outputs up and scales them.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn finish(&self, sums: [__m256i; 2], row: usize, panel: usize, half: usize, out: &mut [f32]) {
        // Pairs come out as outputs 0 1 4 5 | 2 3 6 7.
        let sum = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_hadd_epi32(sums[0], sums[1]));
        let sum = _mm256_add_epi32(sum, _mm256_set1_epi32(self.x.offsets[row]));
        let product = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(self.x.scales[row]));
        let scales = &self.w.scales(panel)[half * 8..][..8];
        let bias = &self.w.bias(panel)[half * 8..][..8];
        assert_eq!(out.len(), 8);
        // SAFETY: the three slices have 8 numbers.
        unsafe {
            let product = _mm256_mul_ps(product, _mm256_loadu_ps(scales.as_ptr()));
            let product = _mm256_add_ps(product, _mm256_loadu_ps(bias.as_ptr()));
            _mm256_storeu_ps(out.as_mut_ptr(), product);
        }
    }
}

/// fp32 arithmetic of attention.
struct Fma;

impl Arithmetic for Fma {
    fp32_operands!();

    #[inline(always)]
    fn product<const ADD: bool>(a: &Operand<'_, f32>, b: &[f32], n: usize, c: &mut [f32]) {
        // SAFETY: only this file's `attention` uses this type, on a CPU with AVX2 and FMA.
        unsafe { product::<ADD>(a, b, n, c) }
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
        unsafe { transpose(x, stride, size, out, out_stride) }
    }
}

/// [`Arithmetic::product`] in tiles of up to 6 rows by 16 columns.
#[target_feature(enable = "avx2,fma")]
fn product<const ADD: bool>(a: &Operand<'_, f32>, b: &[f32], n: usize, c: &mut [f32]) {
    let rows = c.len() / n;
    let mut row = 0;
    while row < rows {
        let height = (rows - row).min(6);
        let left = Operand { words: &a.words[row * a.row..], ..*a };
        for column in (0..n).step_by(LANES) {
            let (b, c) = (&b[column..], &mut c[row * n + column..]);
            match height {
                1 => product_tile::<ADD, 1>(&left, b, n, c),
                2 => product_tile::<ADD, 2>(&left, b, n, c),
                3 => product_tile::<ADD, 3>(&left, b, n, c),
                4 => product_tile::<ADD, 4>(&left, b, n, c),
                5 => product_tile::<ADD, 5>(&left, b, n, c),
                _ => product_tile::<ADD, 6>(&left, b, n, c),
            }
        }
        row += height;
    }
}

/// `R` rows by 16 columns.
#[target_feature(enable = "avx2,fma")]
fn product_tile<const ADD: bool, const R: usize>(
    a: &Operand<'_, f32>,
    b: &[f32],
    n: usize,
    c: &mut [f32],
) {
    // `b` starts at a column: its last row is short.
    let depth = b.len().div_ceil(n);
    assert!(depth > 0 && a.words.len() > (R - 1) * a.row + (depth - 1) * a.column);
    assert!(b.len() >= (depth - 1) * n + LANES && c.len() >= (R - 1) * n + LANES);
    // SAFETY: every access is within the bounds asserted above.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); 2]; R];
        if ADD {
            for (r, sums) in sums.iter_mut().enumerate() {
                for (p, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm256_loadu_ps(c.as_ptr().add(r * n + p * 8));
                }
            }
        }
        for k in 0..depth {
            let b = b.as_ptr().add(k * n);
            let columns = [_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8))];
            for (r, sums) in sums.iter_mut().enumerate() {
                let a = _mm256_set1_ps(*a.words.as_ptr().add(r * a.row + k * a.column));
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum = _mm256_fmadd_ps(a, column, *sum);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (p, sum) in sums.iter().enumerate() {
                _mm256_storeu_ps(c.as_mut_ptr().add(r * n + p * 8), *sum);
            }
        }
    }
}

/// [`scalar::transpose`] in blocks of 8 by 8.
#[target_feature(enable = "avx2")]
pub(crate) fn transpose(
    x: &[f32],
    stride: usize,
    (rows, columns): (usize, usize),
    out: &mut [f32],
    out_stride: usize,
) {
    let (whole_rows, whole_columns) = (rows / 8 * 8, columns / 8 * 8);
    for i in (0..whole_rows).step_by(8) {
        for j in (0..whole_columns).step_by(8) {
            transpose_block(
                &x[i * stride + j..],
                stride,
                &mut out[j * out_stride + i..],
                out_stride,
            );
        }
    }
    let right = (whole_rows, columns - whole_columns);
    if right.1 > 0 && right.0 > 0 {
        let out = &mut out[whole_columns * out_stride..];
        scalar::transpose(&x[whole_columns..], stride, right, out, out_stride);
    }
    if rows > whole_rows {
        let (x, out) = (&x[whole_rows * stride..], &mut out[whole_rows..]);
        scalar::transpose(x, stride, (rows - whole_rows, columns), out, out_stride);
    }
}

/// Transposes 8 by 8 numbers.
#[target_feature(enable = "avx2")]
fn transpose_block(x: &[f32], stride: usize, out: &mut [f32], out_stride: usize) {
    assert!(x.len() >= 7 * stride + 8 && out.len() >= 7 * out_stride + 8);
    // SAFETY: every access is within the bounds asserted above.
    unsafe {
        let r: [__m256; 8] = std::array::from_fn(|i| _mm256_loadu_ps(x.as_ptr().add(i * stride)));
        // Pairs of rows, then fours, then the halves of all eight.
        let pair =
            |i: usize| [_mm256_unpacklo_ps(r[i], r[i + 1]), _mm256_unpackhi_ps(r[i], r[i + 1])];
        let four = |i: usize| {
            let (a, b) = (pair(i), pair(i + 2));
            [
                _mm256_shuffle_ps::<0b01_00_01_00>(a[0], b[0]),
                _mm256_shuffle_ps::<0b11_10_11_10>(a[0], b[0]),
                _mm256_shuffle_ps::<0b01_00_01_00>(a[1], b[1]),
                _mm256_shuffle_ps::<0b11_10_11_10>(a[1], b[1]),
            ]
        };
        let (upper, lower) = (four(0), four(4));
        for i in 0..4 {
            let low = _mm256_permute2f128_ps::<0x20>(upper[i], lower[i]);
            let high = _mm256_permute2f128_ps::<0x31>(upper[i], lower[i]);
            _mm256_storeu_ps(out.as_mut_ptr().add(i * out_stride), low);
            _mm256_storeu_ps(out.as_mut_ptr().add((i + 4) * out_stride), high);
        }
    }
}

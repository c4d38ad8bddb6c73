//! AVX2 and FMA. Bytes are widened to 16 bits, where products of bytes add up exactly in pairs;
//! the byte instruction (`vpmaddubsw`) would saturate.

use std::{arch::x86_64::*, ops::Range};

use crate::{
    dispatch::Kernels,
    isa::Isa,
    pack::PackedMatrix,
    rows::QuantizedRows,
    scalar::{self, AttentionScratch, AttentionTask, LANES, Product},
};

pub(crate) static KERNELS: Kernels =
    Kernels { isa: Isa::Avx2, rotate_quantize, rms_norm, matmul, silu_mul, attention };

#[target_feature(enable = "avx2,fma")]
fn rotate_quantize(x: &mut [f32], block: usize, out: &mut [i8]) -> (f32, i32) {
    scalar::hadamard(x, block);
    scalar::quantize(x, out)
}

#[target_feature(enable = "avx2,fma")]
fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    scalar::rms_norm(x, weight, eps, out);
}

#[target_feature(enable = "avx2,fma")]
fn silu_mul(tile: &mut [f32]) {
    scalar::silu_mul(tile);
}

#[target_feature(enable = "avx2,fma")]
fn attention(task: &AttentionTask<'_>, scratch: &mut AttentionScratch) {
    // SAFETY: this function has the instruction set that `Fma` needs.
    unsafe { scalar::attention::<Fma>(task, scratch) }
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

/// fp32 product with fused multiply-add.
struct Fma;

impl Product for Fma {
    #[inline(always)]
    unsafe fn product<const ADD: bool>(
        a: &[f32],
        lda: usize,
        depth: usize,
        b: &[f32],
        n: usize,
        c: &mut [f32],
    ) {
        // SAFETY: the contract is passed on.
        unsafe { product::<ADD>(a, lda, depth, b, n, c) }
    }
}

/// [`Product::product`] in tiles of up to 6 rows by 16 columns.
#[target_feature(enable = "avx2,fma")]
fn product<const ADD: bool>(
    a: &[f32],
    lda: usize,
    depth: usize,
    b: &[f32],
    n: usize,
    c: &mut [f32],
) {
    let m = c.len() / n;
    let mut row = 0;
    while row < m {
        let height = (m - row).min(6);
        for column in (0..n).step_by(LANES) {
            let (a, b, c) = (&a[row * lda..], &b[column..], &mut c[row * n + column..]);
            match height {
                1 => product_tile::<ADD, 1>(a, lda, depth, b, n, c),
                2 => product_tile::<ADD, 2>(a, lda, depth, b, n, c),
                3 => product_tile::<ADD, 3>(a, lda, depth, b, n, c),
                4 => product_tile::<ADD, 4>(a, lda, depth, b, n, c),
                5 => product_tile::<ADD, 5>(a, lda, depth, b, n, c),
                _ => product_tile::<ADD, 6>(a, lda, depth, b, n, c),
            }
        }
        row += height;
    }
}

/// `R` rows by 16 columns.
#[target_feature(enable = "avx2,fma")]
fn product_tile<const ADD: bool, const R: usize>(
    a: &[f32],
    lda: usize,
    depth: usize,
    b: &[f32],
    n: usize,
    c: &mut [f32],
) {
    assert!(depth > 0 && a.len() >= (R - 1) * lda + depth);
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
                let a = _mm256_set1_ps(*a.as_ptr().add(r * lda + k));
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

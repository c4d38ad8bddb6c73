//! AVX-512 with VNNI: 64 products of bytes per instruction.

use std::{arch::x86_64::*, ops::Range};

use crate::{
    dispatch::Kernels,
    isa::Isa,
    pack::PackedMatrix,
    rows::QuantizedRows,
    scalar::{self, AttentionScratch, AttentionTask, LANES, Product},
};

pub(crate) static KERNELS: Kernels =
    Kernels { isa: Isa::Avx512, rotate_quantize, rms_norm, matmul, silu_mul, attention };

#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl")]
fn rotate_quantize(x: &mut [f32], block: usize, out: &mut [i8]) -> (f32, i32) {
    scalar::hadamard(x, block);
    scalar::quantize(x, out)
}

#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl")]
fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    scalar::rms_norm(x, weight, eps, out);
}

#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl")]
fn silu_mul(tile: &mut [f32]) {
    scalar::silu_mul(tile);
}

#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl")]
fn attention(task: &AttentionTask<'_>, scratch: &mut AttentionScratch) {
    // SAFETY: this function has the instruction set that `Fma` needs.
    unsafe { scalar::attention::<Fma>(task, scratch) }
}

/// Most rows of a tile: 12 rows of 2 panels use 24 of 32 registers for sums.
const TILE_ROWS: usize = 12;

/// [`scalar::matmul`] in tiles of up to 12 rows and 2 panels.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn matmul(
    x: &QuantizedRows,
    rows: Range<usize>,
    w: &PackedMatrix,
    panels: Range<usize>,
    out: &mut [f32],
) {
    let columns = panels.len() * LANES;
    let tiles = rows.len().div_ceil(TILE_ROWS);
    let mut row = rows.start;
    for tile in 0..tiles {
        // Tiles of nearly equal height keep more sums in flight than a short last one would.
        let height = (rows.end - row).div_ceil(tiles - tile);
        let out = &mut out[(row - rows.start) * columns..][..height * columns];
        for panel in panels.clone().step_by(2) {
            let out = &mut out[(panel - panels.start) * LANES..];
            if panel + 1 < panels.end {
                tile_of_height::<2>(height, x, row, w, panel, out, columns);
            } else {
                tile_of_height::<1>(height, x, row, w, panel, out, columns);
            }
        }
        row += height;
    }
}

/// Calls [`tile`] with a constant height.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn tile_of_height<const P: usize>(
    height: usize,
    x: &QuantizedRows,
    row: usize,
    w: &PackedMatrix,
    panel: usize,
    out: &mut [f32],
    columns: usize,
) {
    macro_rules! call {
        ($($rows:literal)*) => {
            match height {
                $($rows => tile::<$rows, P>(x, row, w, panel, out, columns),)*
                _ => unreachable!("tiles have 1 to {TILE_ROWS} rows"),
            }
        };
    }
    call!(1 2 3 4 5 6 7 8 9 10 11 12)
}

/// `R` rows by `P` panels, `columns` numbers from one row of `out` to the next.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn tile<const R: usize, const P: usize>(
    x: &QuantizedRows,
    row: usize,
    w: &PackedMatrix,
    panel: usize,
    out: &mut [f32],
    columns: usize,
) {
    let stride = x.stride();
    let q = x.data[row * stride..][..R * stride].as_ptr();
    let bytes = w.panel_range(panel..panel + P).as_ptr();
    let mut sums = [[_mm512_setzero_si512(); P]; R];
    for (r, sums) in sums.iter_mut().enumerate() {
        *sums = [_mm512_set1_epi32(x.offsets[row + r]); P];
    }
    for k in (0..stride).step_by(4) {
        let mut weights = [_mm512_setzero_si512(); P];
        for (p, weights) in weights.iter_mut().enumerate() {
            // SAFETY: panel `p` has 16 · stride bytes, and k ≤ stride − 4.
            *weights = unsafe { _mm512_loadu_si512(bytes.add((p * stride + k) * LANES).cast()) };
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: row `r` has `stride` bytes, and k ≤ stride − 4.
            let four = unsafe { q.add(r * stride + k).cast::<i32>().read_unaligned() };
            let four = _mm512_set1_epi32(four);
            for (sum, weights) in sums.iter_mut().zip(weights) {
                *sum = _mm512_dpbusd_epi32(*sum, weights, four);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        let row_scale = _mm512_set1_ps(x.scales[row + r]);
        for (p, sum) in sums.iter().enumerate() {
            let out = &mut out[r * columns + p * LANES..][..LANES];
            // SAFETY: the three slices have 16 numbers.
            unsafe {
                let scale = _mm512_loadu_ps(w.scales(panel + p).as_ptr());
                let bias = _mm512_loadu_ps(w.bias(panel + p).as_ptr());
                let product = _mm512_mul_ps(_mm512_cvtepi32_ps(*sum), row_scale);
                let product = _mm512_add_ps(_mm512_mul_ps(product, scale), bias);
                _mm512_storeu_ps(out.as_mut_ptr(), product);
            }
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

/// [`Product::product`] in tiles of up to 6 rows by 64 columns.
#[target_feature(enable = "avx512f")]
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
        let mut column = 0;
        while column < n {
            let width = (n - column).min(4 * LANES);
            let (a, b, c) = (&a[row * lda..], &b[column..], &mut c[row * n + column..]);
            macro_rules! call {
                ($($r:literal)*) => {
                    match (height, width / LANES) {
                        $(($r, 4) => product_tile::<ADD, $r, 4>(a, lda, depth, b, n, c),
                        ($r, 3) => product_tile::<ADD, $r, 3>(a, lda, depth, b, n, c),
                        ($r, 2) => product_tile::<ADD, $r, 2>(a, lda, depth, b, n, c),
                        ($r, _) => product_tile::<ADD, $r, 1>(a, lda, depth, b, n, c),)*
                        _ => unreachable!("tiles have 1 to 6 rows"),
                    }
                };
            }
            call!(1 2 3 4 5 6);
            column += width;
        }
        row += height;
    }
}

/// `R` rows by `P` registers of columns.
#[target_feature(enable = "avx512f")]
fn product_tile<const ADD: bool, const R: usize, const P: usize>(
    a: &[f32],
    lda: usize,
    depth: usize,
    b: &[f32],
    n: usize,
    c: &mut [f32],
) {
    assert!(depth > 0 && a.len() >= (R - 1) * lda + depth);
    assert!(b.len() >= (depth - 1) * n + P * LANES && c.len() >= (R - 1) * n + P * LANES);
    // SAFETY: every access is within the bounds asserted above.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); P]; R];
        if ADD {
            for (r, sums) in sums.iter_mut().enumerate() {
                for (p, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_loadu_ps(c.as_ptr().add(r * n + p * LANES));
                }
            }
        }
        for k in 0..depth {
            let mut columns = [_mm512_setzero_ps(); P];
            for (p, column) in columns.iter_mut().enumerate() {
                *column = _mm512_loadu_ps(b.as_ptr().add(k * n + p * LANES));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let a = _mm512_set1_ps(*a.as_ptr().add(r * lda + k));
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum = _mm512_fmadd_ps(a, column, *sum);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (p, sum) in sums.iter().enumerate() {
                _mm512_storeu_ps(c.as_mut_ptr().add(r * n + p * LANES), *sum);
            }
        }
    }
}

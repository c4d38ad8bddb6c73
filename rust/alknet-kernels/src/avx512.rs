//! AVX-512 with VNNI: 64 products of bytes per instruction.

mod sums;

use std::{arch::x86_64::*, ops::Range};

use sums::sum;

use crate::{
    attention::{self, Arithmetic, AttentionTask, FP32_SCRATCH, Operand, fp32_operands, fused_exp},
    avx2,
    bytes::byte_matmul,
    dispatch::Kernels,
    isa::Isa,
    pack::PackedMatrix,
    rows::QuantizedRows,
    scalar::{self, LANES},
};

pub(crate) static KERNELS: Kernels = Kernels {
    isa: Isa::Avx512,
    rotate_quantize,
    split: None,
    rms_norm,
    matmul,
    copy_tile: finish_linear::<false>,
    add_tile: finish_linear::<true>,
    finish_gate_up,
    finish_qkv,
    attention,
    tiles: None,
};

#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl")]
pub(crate) fn rotate_quantize(x: &mut [f32], block: usize, out: &mut [i8]) -> (f32, i32) {
    if block == 64 {
        rotate_quantize_64s(x, out)
    } else {
        scalar::hadamard(x, block);
        scalar::quantize(x, out)
    }
}

/// [`rotate_quantize`] for blocks of 64: the largest number is found while they are in registers.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl")]
fn rotate_quantize_64s(x: &mut [f32], out: &mut [i8]) -> (f32, i32) {
    let mut largest = _mm512_setzero_si512();
    for x in x.as_chunks_mut().0 {
        for r in hadamard(x) {
            let magnitude = _mm512_castps_si512(_mm512_abs_ps(r));
            largest = _mm512_max_epu32(largest, magnitude);
        }
    }
    let Some((inverse, scale)) = scalar::steps(_mm512_reduce_max_epu32(largest)) else {
        out.fill(0);
        return (f32::NAN, 0);
    };
    let (out, filling) = out.split_at_mut(x.len());
    filling.fill(0);
    let (inverse, rounding) = (_mm512_set1_ps(inverse), _mm512_set1_ps(scalar::ROUNDING));
    let mut sums = [_mm512_setzero_si512(); 4];
    for (x, q) in x.as_chunks::<64>().0.iter().zip(out.as_chunks_mut::<64>().0) {
        for (i, sum) in sums.iter_mut().enumerate() {
            // SAFETY: there are 16 numbers and as many bytes from `16 · i` on.
            unsafe {
                let x = _mm512_mul_ps(_mm512_loadu_ps(x.as_ptr().add(16 * i)), inverse);
                let rounded = _mm512_castps_si512(_mm512_add_ps(x, rounding));
                let rounded = _mm512_sub_epi32(rounded, _mm512_castps_si512(rounding));
                *sum = _mm512_add_epi32(*sum, rounded);
                _mm_storeu_si128(q.as_mut_ptr().add(16 * i).cast(), _mm512_cvtepi32_epi8(rounded));
            }
        }
    }
    let [a, b, c, d] = sums;
    let sum = _mm512_add_epi32(_mm512_add_epi32(a, b), _mm512_add_epi32(c, d));
    (scale, _mm512_reduce_add_epi32(sum))
}

/// [`scalar::hadamard`] of one block of 64, which is also returned.
#[inline]
#[target_feature(enable = "avx512f")]
fn hadamard(x: &mut [f32; 64]) -> [__m512; 4] {
    // SAFETY: the four loads cover the 64 numbers.
    let mut r: [__m512; 4] =
        std::array::from_fn(|i| unsafe { _mm512_loadu_ps(x.as_ptr().add(16 * i)) });
    for (a, b) in [(0, 2), (1, 3), (0, 1), (2, 3)] {
        (r[a], r[b]) = (_mm512_add_ps(r[a], r[b]), _mm512_sub_ps(r[a], r[b]));
    }
    // Within a register: the lower half of each pair takes a + b, the upper a − b. Multiplying by
    // ±1 is exact, so that fusing it with the addition changes no rounding.
    let signs = |upper: u16| _mm512_mask_blend_ps(upper, _mm512_set1_ps(1.0), _mm512_set1_ps(-1.0));
    for r in &mut r {
        let swapped = _mm512_shuffle_f32x4::<0b01_00_11_10>(*r, *r);
        *r = _mm512_fmadd_ps(*r, signs(0xff00), swapped);
        let swapped = _mm512_shuffle_f32x4::<0b10_11_00_01>(*r, *r);
        *r = _mm512_fmadd_ps(*r, signs(0xf0f0), swapped);
        *r = _mm512_fmadd_ps(*r, signs(0xcccc), _mm512_permute_ps::<0b01_00_11_10>(*r));
        *r = _mm512_fmadd_ps(*r, signs(0xaaaa), _mm512_permute_ps::<0b10_11_00_01>(*r));
    }
    for (i, r) in r.into_iter().enumerate() {
        // SAFETY: the four stores cover the 64 numbers.
        unsafe { _mm512_storeu_ps(x.as_mut_ptr().add(16 * i), r) };
    }
    r
}

scalar::compile_for!("avx2,fma,avx512f,avx512bw,avx512vl");

#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl")]
fn attention(task: &AttentionTask<'_>, out: &mut [f32]) {
    FP32_SCRATCH.with_borrow_mut(|scratch| attention::attention::<Fma>(task, scratch, out));
}

// 12 rows of 2 registers use 24 of 32 registers for sums.
byte_matmul! {
    features: "avx512f,avx512bw,avx512vl,avx512vnni",
    outputs: 16,
    rows: 1 2 3 4 5 6 7 8 9 10 11 12,
    zero: _mm512_setzero_si512,
    splat: _mm512_set1_epi32,
    load: _mm512_loadu_si512,
    sum: sum,
    dot: _mm512_dpbusd_epi32,
    convert: _mm512_cvtepi32_ps,
    splat_float: _mm512_set1_ps,
    load_float: _mm512_loadu_ps,
    multiply: _mm512_mul_ps,
    add: _mm512_add_ps,
    store_float: _mm512_storeu_ps,
}

/// fp32 arithmetic of attention.
struct Fma;

impl Arithmetic for Fma {
    fp32_operands!();

    #[inline(always)]
    fn product<const ADD: bool>(a: &Operand<'_, f32>, b: &[f32], n: usize, c: &mut [f32]) {
        // SAFETY: only this file's `attention` uses this type, on a CPU with AVX-512.
        unsafe { fp32_product::<ADD>(a, b, n, c) }
    }

    #[inline(always)]
    fn hide(scores: &mut [f32; LANES], positions: &[u32; LANES], key: u32) {
        // SAFETY: only this file's `attention` uses this type, on a CPU with AVX-512.
        unsafe { hide(scores, positions, key) }
    }

    #[inline(always)]
    fn exp(x: f32) -> f32 {
        fused_exp(x)
    }

    #[inline(always)]
    fn transpose(
        x: &[f32],
        stride: usize,
        size: (usize, usize),
        out: &mut [f32],
        out_stride: usize,
    ) {
        // SAFETY: only this file's `attention` uses this type, on a CPU with AVX2.
        unsafe { avx2::transpose(x, stride, size, out, out_stride) }
    }
}

/// [`Arithmetic::hide`].
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn hide(scores: &mut [f32; LANES], positions: &[u32; LANES], key: u32) {
    // SAFETY: there are 16 of each.
    unsafe {
        let positions = _mm512_loadu_si512(positions.as_ptr().cast());
        let hidden = _mm512_cmplt_epu32_mask(positions, _mm512_set1_epi32(key as i32));
        let infinite = _mm512_set1_ps(f32::NEG_INFINITY);
        _mm512_mask_storeu_ps(scores.as_mut_ptr(), hidden, infinite);
    }
}

/// Defines a product of attention in tiles of up to 8 rows by 3 registers.
///
/// `$multiply_add(sum, a, b)` adds the product of 16 words `a` and `b`.
macro_rules! attention_product {
    ($name:ident, $tile:ident, $word:ty, $features:literal, $multiply_add:expr) => {
        #[target_feature(enable = $features)]
        fn $name<const ADD: bool>(a: &Operand<'_, $word>, b: &[$word], n: usize, c: &mut [f32]) {
            let rows = c.len() / n;
            let mut row = 0;
            while row < rows {
                // Heights are powers of two: 1 to 8 rows are at most four tiles.
                let height = (1 << (rows - row).ilog2()).min(8);
                let left = Operand { words: &a.words[row * a.row..], ..*a };
                let mut column = 0;
                while column < n {
                    let width = ((n - column) / LANES).min(3);
                    let (b, c) = (&b[column..], &mut c[row * n + column..]);
                    match (height, width) {
                        (8, 3) => $tile::<ADD, 8, 3>(&left, b, n, c),
                        (8, 2) => $tile::<ADD, 8, 2>(&left, b, n, c),
                        (8, _) => $tile::<ADD, 8, 1>(&left, b, n, c),
                        (4, 3) => $tile::<ADD, 4, 3>(&left, b, n, c),
                        (4, 2) => $tile::<ADD, 4, 2>(&left, b, n, c),
                        (4, _) => $tile::<ADD, 4, 1>(&left, b, n, c),
                        (2, 3) => $tile::<ADD, 2, 3>(&left, b, n, c),
                        (2, 2) => $tile::<ADD, 2, 2>(&left, b, n, c),
                        (2, _) => $tile::<ADD, 2, 1>(&left, b, n, c),
                        (_, 3) => $tile::<ADD, 1, 3>(&left, b, n, c),
                        (_, 2) => $tile::<ADD, 1, 2>(&left, b, n, c),
                        (_, _) => $tile::<ADD, 1, 1>(&left, b, n, c),
                    }
                    column += width * LANES;
                }
                row += height;
            }
        }

        /// `R` rows by `P` registers of columns.
        #[target_feature(enable = $features)]
        fn $tile<const ADD: bool, const R: usize, const P: usize>(
            a: &Operand<'_, $word>,
            b: &[$word],
            n: usize,
            c: &mut [f32],
        ) {
            // `b` starts at a column: its last row is short.
            let depth = b.len().div_ceil(n);
            assert!(depth > 0 && a.words.len() > (R - 1) * a.row + (depth - 1) * a.column);
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
                        *column = _mm512_loadu_ps(b.as_ptr().add(k * n + p * LANES).cast());
                    }
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let a = a.words.as_ptr().add(r * a.row + k * a.column).cast::<f32>();
                        let a = _mm512_set1_ps(*a);
                        for (sum, column) in sums.iter_mut().zip(columns) {
                            *sum = $multiply_add(*sum, a, column);
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
    };
}
pub(crate) use attention_product;

attention_product!(fp32_product, fp32_tile, f32, "avx512f", |sum, a, b| _mm512_fmadd_ps(a, b, sum));

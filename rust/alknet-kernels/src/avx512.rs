//! AVX-512 with VNNI: 64 products of bytes per instruction.

mod sums;

use std::{arch::x86_64::*, ops::Range};

use sums::sum;

use crate::{
    attention::{self, Arithmetic, AttentionTask, Operand},
    avx2,
    bf16::bf16_product,
    bytes::byte_matmul,
    dispatch::Kernels,
    isa::Isa,
    pack::PackedMatrix,
    rows::QuantizedRows,
    scalar::{self, LANES, SIGNS},
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
    let mut sums = [[_mm512_setzero_ps(); 2]; 2];
    for (pair, signs) in SIGNS.iter().enumerate() {
        // SAFETY: there are 16 signs.
        let signs = unsafe { _mm512_loadu_ps(signs.as_ptr()) };
        for (half, sums) in sums.iter_mut().enumerate() {
            for (odd, sum) in sums.iter_mut().enumerate() {
                let x = _mm512_set1_ps(x[32 * half + 2 * pair + odd]);
                *sum = _mm512_fmadd_ps(x, signs, *sum);
            }
        }
    }
    let pairs = |first: i32| {
        let [a, b, c, d, e, f, g, h] = std::array::from_fn(|i| first + i as i32);
        let [i, j, k, l, m, n, o, p] = [a, b, c, d, e, f, g, h].map(|i| 16 + i);
        _mm512_setr_epi32(a, i, b, j, c, k, d, l, e, m, f, n, g, o, h, p)
    };
    let [[a, b], [c, d]] = sums.map(|[even, odd]| {
        let (sum, difference) = (_mm512_add_ps(even, odd), _mm512_sub_ps(even, odd));
        [0, 8].map(|first| _mm512_permutex2var_ps(sum, pairs(first), difference))
    });
    let r = [_mm512_add_ps(a, c), _mm512_add_ps(b, d), _mm512_sub_ps(a, c), _mm512_sub_ps(b, d)];
    for (i, r) in r.into_iter().enumerate() {
        // SAFETY: the four stores cover the 64 numbers.
        unsafe { _mm512_storeu_ps(x.as_mut_ptr().add(16 * i), r) };
    }
    r
}

scalar::compile_for!("avx2,fma,avx512f,avx512bw,avx512vl");

#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl")]
fn attention(task: &AttentionTask<'_>, out: &mut [f32]) {
    attention::attention::<Fma>(task, out);
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
    multiply_add: _mm512_fmadd_ps,
    store_float: _mm512_storeu_ps,
}

/// Attention's products, of which each instruction makes 16.
struct Fma;

impl Arithmetic for Fma {
    #[inline(always)]
    fn product<const ADD: bool>(a: &Operand<'_>, b: &[f32], n: usize, c: &mut [f32]) {
        // SAFETY: only this file's `attention` uses this type, on a CPU with AVX-512.
        unsafe { product::<ADD>(a, b, n, c) }
    }

    #[inline(always)]
    fn hide(scores: &mut [f32; LANES], positions: &[u32; LANES], key: u32) {
        // SAFETY: only this file's `attention` uses this type, on a CPU with AVX-512.
        unsafe { hide(scores, positions, key) }
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

// 8 rows of 3 registers use 24 of 32 registers for sums.
bf16_product! {
    features: "avx512f",
    numbers: 16,
    rows: 1 2 3 4 5 6 7 8,
    registers: 1 2 3,
    zero: _mm512_setzero_ps,
    splat: _mm512_set1_ps,
    load: _mm512_loadu_ps,
    multiply_add: _mm512_fmadd_ps,
    add: _mm512_add_ps,
    store: _mm512_storeu_ps,
}

//! AVX2 and FMA. `vpmaddubsw` adds products of bytes up in pairs of 16 bits, where large ones would
//! saturate: the few inputs that would make them are split off when a row is quantised, and
//! multiplied apart. That takes half the instructions of widening all bytes to 16 bits.

use std::{arch::x86_64::*, ops::Range};

use crate::{
    attention::{self, Arithmetic, AttentionTask, Operand},
    bf16::bf16_product,
    bytes::{byte_matmul, byte_sum},
    dispatch::Kernels,
    isa::Isa,
    pack::PackedMatrix,
    rows::{Excess, QuantizedRows},
    scalar::{self, LANES, SIGNS},
};

pub(crate) static KERNELS: Kernels = Kernels {
    isa: Isa::Avx2,
    rotate_quantize,
    split: Some(split),
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
    // Of each half: sums of even and of odd numbers.
    let mut sums = [[[_mm256_setzero_ps(); 2]; 2]; 2];
    for (pair, signs) in SIGNS.iter().enumerate() {
        // SAFETY: there are 16 signs.
        let signs = [0, 8].map(|first| unsafe { _mm256_loadu_ps(signs[first..].as_ptr()) });
        for (half, sums) in sums.iter_mut().enumerate() {
            for (odd, sums) in sums.iter_mut().enumerate() {
                let x = _mm256_set1_ps(x[32 * half + 2 * pair + odd]);
                for (sum, signs) in sums.iter_mut().zip(signs) {
                    *sum = _mm256_fmadd_ps(x, signs, *sum);
                }
            }
        }
    }
    for part in 0..2 {
        let [low, high] = sums.map(|[even, odd]| {
            let sum = _mm256_add_ps(even[part], odd[part]);
            let difference = _mm256_sub_ps(even[part], odd[part]);
            let a = _mm256_unpacklo_ps(sum, difference);
            let b = _mm256_unpackhi_ps(sum, difference);
            [_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b)]
        });
        for (i, (low, high)) in low.into_iter().zip(high).enumerate() {
            let place = 16 * part + 8 * i;
            // SAFETY: there are 8 numbers from each place on.
            unsafe {
                _mm256_storeu_ps(x[place..].as_mut_ptr(), _mm256_add_ps(low, high));
                _mm256_storeu_ps(x[32 + place..].as_mut_ptr(), _mm256_sub_ps(low, high));
            }
        }
    }
}

scalar::compile_for!("avx2,fma");

#[target_feature(enable = "avx2,fma")]
fn attention(task: &AttentionTask<'_>, out: &mut [f32]) {
    attention::attention::<Fma>(task, out);
}

/// Zeroes the second input of every pair whose product with two weights might not fit 16 bits, and
/// collects those inputs in `excess`; returns how many words of four that are.
///
/// Stored weights are at most 255 and inputs at most 127 in size, so that a product of one fits. Two
/// of them fit as well unless they have one sign and add up to more than 128. Of inputs that are
/// spread by the rotation that is one pair in fifty.
#[target_feature(enable = "avx2")]
fn split(row: &mut [i8], excess: &mut [Excess]) -> usize {
    let mut len = 0;
    for (i, bytes) in row.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        // SAFETY: the load covers the 32 bytes.
        let q = unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) };
        let sums = _mm256_abs_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), q));
        let seconds = _mm256_slli_epi16::<8>(_mm256_cmpgt_epi16(sums, _mm256_set1_epi16(128)));
        let beyond = _mm256_and_si256(q, seconds);
        let mut words = [[0; 4]; 8];
        // SAFETY: the stores cover 32 bytes each.
        unsafe {
            _mm256_storeu_si256(bytes.as_mut_ptr().cast(), _mm256_andnot_si256(seconds, q));
            _mm256_storeu_si256(words.as_mut_ptr().cast(), beyond);
        }
        let zeros = _mm256_cmpeq_epi32(beyond, _mm256_setzero_si256());
        let mut found = !_mm256_movemask_ps(_mm256_castsi256_ps(zeros)) & 0xff;
        while found != 0 {
            let word = found.trailing_zeros() as usize;
            excess[len] = Excess { first: (32 * i + 4 * word) as u32, four: words[word] };
            len += 1;
            found &= found - 1;
        }
    }
    len
}

/// Adds four products of bytes to each 32-bit sum, of which pairs must fit 16 bits (see [`split`]).
#[inline]
#[target_feature(enable = "avx2")]
fn dot(sum: __m256i, weights: __m256i, four: __m256i) -> __m256i {
    let pairs = _mm256_maddubs_epi16(weights, four);
    _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
}

// 5 rows of 2 registers use 10 of 16 registers for sums; a sixth would leave none for the parts of `dot`.
byte_matmul! {
    features: "avx2,fma",
    outputs: 8,
    rows: 1 2 3 4 5,
    zero: _mm256_setzero_si256,
    splat: _mm256_set1_epi32,
    load: _mm256_loadu_si256,
    sum: sum,
    dot: dot,
    convert: _mm256_cvtepi32_ps,
    splat_float: _mm256_set1_ps,
    load_float: _mm256_loadu_ps,
    multiply: _mm256_mul_ps,
    multiply_add: _mm256_fmadd_ps,
    store_float: _mm256_storeu_ps,
}

byte_sum! {
    name: sum,
    features: "avx2",
    register: __m256i,
    outputs: 8,
    splat: _mm256_set1_epi32,
    load: _mm256_loadu_si256,
    dot: dot,
}

/// Attention's products, of which each instruction makes 8.
struct Fma;

impl Arithmetic for Fma {
    #[inline(always)]
    fn product<const ADD: bool>(a: &Operand<'_>, b: &[f32], n: usize, c: &mut [f32]) {
        // SAFETY: only this file's `attention` uses this type, on a CPU with AVX2 and FMA.
        unsafe { product::<ADD>(a, b, n, c) }
    }

    #[inline(always)]
    fn hide(scores: &mut [f32; LANES], positions: &[u32; LANES], key: u32) {
        // SAFETY: as above.
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
        // SAFETY: as above.
        unsafe { transpose(x, stride, size, out, out_stride) }
    }
}

/// [`Arithmetic::hide`].
#[inline]
#[target_feature(enable = "avx2")]
fn hide(scores: &mut [f32; LANES], positions: &[u32; LANES], key: u32) {
    let key = _mm256_set1_epi32(key as i32);
    let infinite = _mm256_set1_ps(f32::NEG_INFINITY);
    for (scores, positions) in
        scores.as_chunks_mut::<8>().0.iter_mut().zip(positions.as_chunks::<8>().0)
    {
        // SAFETY: there are eight of each. Positions are far below 2³¹.
        unsafe {
            let hidden = _mm256_cmpgt_epi32(key, _mm256_loadu_si256(positions.as_ptr().cast()));
            let shown = _mm256_loadu_ps(scores.as_ptr());
            let shown = _mm256_blendv_ps(shown, infinite, _mm256_castsi256_ps(hidden));
            _mm256_storeu_ps(scores.as_mut_ptr(), shown);
        }
    }
}

// 6 rows of 2 registers use 12 of 16 registers for sums.
bf16_product! {
    features: "avx2,fma",
    numbers: 8,
    rows: 1 2 3 4 5 6,
    registers: 2,
    zero: _mm256_setzero_ps,
    splat: _mm256_set1_ps,
    load: _mm256_loadu_ps,
    multiply_add: _mm256_fmadd_ps,
    add: _mm256_add_ps,
    store: _mm256_storeu_ps,
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

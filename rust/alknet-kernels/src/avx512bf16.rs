//! AVX-512 with BF16: as `avx512.rs`, but attention multiplies pairs of bf16 numbers, two at a time.
//!
//! bf16 keeps 8 bits of the mantissa, as much as the 8-bit activations that queries, keys and values
//! are made from; sums are fp32. It pays where `vdpbf16ps` runs once a cycle or more, which it does not
//! on Intel's CPUs (see [`Isa::best`]).

use std::{arch::x86_64::*, cell::RefCell};

use crate::{
    attention::{self, Arithmetic, AttentionScratch, AttentionTask, Operand, fused_exp},
    avx2,
    avx512::{self, attention_product},
    dispatch::Kernels,
    isa::Isa,
    scalar::LANES,
};

pub(crate) static KERNELS: Kernels = Kernels { isa: Isa::Avx512Bf16, attention, ..avx512::KERNELS };

thread_local! {
    /// Buffers of attention in bf16, some 100 KiB per thread.
    static SCRATCH: RefCell<AttentionScratch<u32>> = RefCell::default();
}

#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512bf16")]
fn attention(task: &AttentionTask<'_>, out: &mut [f32]) {
    SCRATCH.with_borrow_mut(|scratch| attention::attention::<Bf16>(task, scratch, out));
}

/// Pairs of bf16 numbers, the first in the lower half of a word.
struct Bf16;

impl Arithmetic for Bf16 {
    type Word = u32;

    #[inline(always)]
    fn keys<'a>(
        task: &AttentionTask<'a>,
        start: usize,
        len: usize,
        buffer: &'a mut Vec<u32>,
    ) -> Operand<'a, u32> {
        let row = task.head_dim / 2;
        buffer.resize(len * row, 0);
        for (j, out) in buffer.chunks_exact_mut(row).enumerate() {
            let key = &task.keys[(start + j) * task.stride..][..task.head_dim];
            // SAFETY: only this file's `attention` comes here, on a CPU with BF16.
            unsafe { pair_neighbours(key, out) };
        }
        Operand { words: buffer, row, column: 1 }
    }

    #[inline(always)]
    fn values<'a>(
        task: &AttentionTask<'a>,
        start: usize,
        len: usize,
        buffer: &'a mut Vec<u32>,
    ) -> Operand<'a, u32> {
        let rows = |j| &task.values[(start + j) * task.stride..][..task.head_dim];
        pair_all(rows, len, task.head_dim, buffer);
        Operand { words: buffer, row: 1, column: task.head_dim }
    }

    #[inline(always)]
    fn pack(x: &[f32], n: usize, words: &mut Vec<u32>) {
        pair_all(|j| &x[j * n..][..n], x.len() / n, n, words);
    }

    #[inline(always)]
    fn packed<'a>(_x: &'a [f32], words: &'a [u32]) -> &'a [u32] {
        words
    }

    #[inline(always)]
    fn product<const ADD: bool>(a: &Operand<'_, u32>, b: &[u32], n: usize, c: &mut [f32]) {
        // SAFETY: only this file's `attention` uses this type, on a CPU with BF16.
        unsafe { bf16_product::<ADD>(a, b, n, c) }
    }

    #[inline(always)]
    fn hide(scores: &mut [f32; LANES], positions: &[u32; LANES], key: u32) {
        // SAFETY: only this file's `attention` uses this type, on a CPU with AVX-512.
        unsafe { avx512::hide(scores, positions, key) }
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

/// Pairs rows `2j` and `2j + 1` of `len` rows; the partner of a last odd row is zero.
#[inline(always)]
fn pair_all<'a>(
    rows: impl Fn(usize) -> &'a [f32],
    len: usize,
    width: usize,
    buffer: &mut Vec<u32>,
) {
    buffer.resize(len.div_ceil(2) * width, 0);
    for (j, out) in buffer.chunks_exact_mut(width).enumerate() {
        let second = (2 * j + 1 < len).then(|| rows(2 * j + 1));
        // SAFETY: only this file's `attention` comes here, on a CPU with BF16.
        unsafe { pair_rows(rows(2 * j), second, out) };
    }
}

/// `out[i] = (x[2i], x[2i + 1])`.
#[target_feature(enable = "avx512f,avx512bf16")]
fn pair_neighbours(x: &[f32], out: &mut [u32]) {
    assert_eq!(x.len(), 2 * out.len());
    let ((x, x_rest), (out, out_rest)) = (x.as_chunks::<{ 2 * LANES }>(), out.as_chunks_mut());
    for (x, out) in x.iter().zip(out) {
        pair_32_neighbours(x, out);
    }
    if !out_rest.is_empty() {
        let (mut last, mut pairs) = ([0.0; 2 * LANES], [0; LANES]);
        last[..x_rest.len()].copy_from_slice(x_rest);
        pair_32_neighbours(&last, &mut pairs);
        out_rest.copy_from_slice(&pairs[..out_rest.len()]);
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn pair_32_neighbours(x: &[f32; 2 * LANES], out: &mut [u32; LANES]) {
    // SAFETY: the arrays are as long as the registers; any pattern is a row of bf16 numbers.
    unsafe {
        let (low, high) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(LANES)));
        let pairs: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
        _mm512_storeu_si512(out.as_mut_ptr().cast(), pairs);
    }
}

/// `out[i] = (x[i], y[i])`, or `(x[i], 0)` without `y`.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pair_rows(x: &[f32], y: Option<&[f32]>, out: &mut [u32]) {
    assert!(x.len() == out.len() && y.is_none_or(|y| y.len() == x.len()));
    let zeros = [0.0; LANES];
    let ((x, x_rest), (out, out_rest)) = (x.as_chunks(), out.as_chunks_mut());
    let (y, y_rest) = y.unwrap_or_default().as_chunks();
    for (i, (x, out)) in x.iter().zip(out).enumerate() {
        pair_16(x, y.get(i).unwrap_or(&zeros), out);
    }
    if !out_rest.is_empty() {
        let (mut low, mut high, mut pairs) = (zeros, zeros, [0; LANES]);
        low[..x_rest.len()].copy_from_slice(x_rest);
        high[..y_rest.len()].copy_from_slice(y_rest);
        pair_16(&low, &high, &mut pairs);
        out_rest.copy_from_slice(&pairs[..out_rest.len()]);
    }
}

/// Numbers 0 and 16, 1 and 17, …
pub(crate) const INTERLEAVE: [u16; 32] = {
    let mut order = [0; 32];
    let mut i = 0;
    while i < 32 {
        order[i] = (i / 2 + i % 2 * 16) as u16;
        i += 1;
    }
    order
};

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pair_16(x: &[f32; LANES], y: &[f32; LANES], out: &mut [u32; LANES]) {
    // SAFETY: the arrays are as long as the registers; any pattern is a row of bf16 numbers.
    unsafe {
        let (low, high) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(y.as_ptr()));
        let halves: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
        let interleave = _mm512_loadu_si512(INTERLEAVE.as_ptr().cast());
        let pairs = _mm512_permutexvar_epi16(interleave, halves);
        _mm512_storeu_si512(out.as_mut_ptr().cast(), pairs);
    }
}

/// `sum + a · b` over pairs; the two operands are words of such pairs.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn multiply_add(sum: __m512, a: __m512, b: __m512) -> __m512 {
    // SAFETY: registers of 512 bits, any pattern of which is a row of bf16 numbers.
    let pairs = |x| unsafe { std::mem::transmute::<__m512, __m512bh>(x) };
    _mm512_dpbf16_ps(sum, pairs(a), pairs(b))
}

attention_product!(bf16_product, bf16_tile, u32, "avx512f,avx512bf16", multiply_add);

//! AVX2 with VNNI: 32 products of bytes per instruction, everything else as `avx2.rs`.

use std::{arch::x86_64::*, ops::Range};

use crate::{
    avx2,
    bytes::{byte_matmul, byte_sum},
    dispatch::Kernels,
    isa::Isa,
    pack::PackedMatrix,
    rows::QuantizedRows,
    scalar::LANES,
};

pub(crate) static KERNELS: Kernels =
    Kernels { isa: Isa::AvxVnni, split: None, matmul, ..avx2::KERNELS };

// 6 rows of 2 registers use 12 of 16 registers for sums.
byte_matmul! {
    features: "avx2,fma,avxvnni",
    outputs: 8,
    rows: 1 2 3 4 5 6,
    zero: _mm256_setzero_si256,
    splat: _mm256_set1_epi32,
    load: _mm256_loadu_si256,
    sum: sum,
    dot: _mm256_dpbusd_avx_epi32,
    convert: _mm256_cvtepi32_ps,
    splat_float: _mm256_set1_ps,
    load_float: _mm256_loadu_ps,
    multiply: _mm256_mul_ps,
    multiply_add: _mm256_fmadd_ps,
    store_float: _mm256_storeu_ps,
}

byte_sum! {
    name: sum,
    features: "avx2,avxvnni",
    register: __m256i,
    outputs: 8,
    splat: _mm256_set1_epi32,
    load: _mm256_loadu_si256,
    dot: _mm256_dpbusd_avx_epi32,
}

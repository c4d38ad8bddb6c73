//! Sums of products of bytes with VNNI.
//!
//! A word of a row, four bytes, is multiplied by two registers of weights. In what compilers make of the
//! intrinsics every row has an address of its own to add up for every word; that takes turns from the products.
//! Here three rows share an address, and four words an addition (docs/decisions/0014-assembly-for-avx512.md).

use std::arch::x86_64::*;

use crate::{bytes::byte_sum, scalar::LANES};

/// Words of a row between two additions to its address.
const WORDS_AT_ONCE: usize = 4;

/// Adds the products of `R` rows and `P` registers of weights to their sums: as [`sum_any`], by assembly where
/// it can be.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn sum<const R: usize, const P: usize>(
    q: &[i8],
    weights: &[u8],
    fetch: &[u8],
    sums: &mut [[__m512i; P]; R],
) {
    let stride = q.len() / R;
    if P != 2 || stride == 0 || !stride.is_multiple_of(4 * WORDS_AT_ONCE) {
        return sum_any(q, weights, fetch, sums);
    }
    assert!(weights.len() >= 2 * LANES * stride);
    // SAFETY: there are the rows and the weights of both panels, as asserted, and two sums a row.
    unsafe {
        sum_pair::<R>(
            q.as_ptr(),
            stride,
            weights.as_ptr(),
            fetch.as_ptr(),
            sums.as_mut_ptr().cast(),
        )
    };
}

byte_sum! {
    name: sum_any,
    features: "avx512f,avx512bw,avx512vl,avx512vnni",
    register: __m512i,
    outputs: 16,
    splat: _mm512_set1_epi32,
    load: _mm512_loadu_si512,
    dot: _mm512_dpbusd_epi32,
}

/// What is done for row `$row`, if there is one.
macro_rules! of_row {
    ($row:literal, $($line:expr),*) => {
        concat!(".if {rows} > ", $row, "\n", $($line, "\n",)* ".endif")
    };
}

/// Loads both sums of a row.
macro_rules! load_row {
    ($row:literal, $a:literal, $b:literal) => {
        of_row!(
            $row,
            concat!("vmovdqu64 zmm", $a, ", [{sums} + 128*", $row, "]"),
            concat!("vmovdqu64 zmm", $b, ", [{sums} + 128*", $row, " + 64]")
        )
    };
}

/// Stores them.
macro_rules! store_row {
    ($row:literal, $a:literal, $b:literal) => {
        of_row!(
            $row,
            concat!("vmovdqu64 [{sums} + 128*", $row, "], zmm", $a),
            concat!("vmovdqu64 [{sums} + 128*", $row, " + 64], zmm", $b)
        )
    };
}

/// Multiplies a word of a row by both registers of weights.
macro_rules! multiply_row {
    ($row:literal, $a:literal, $b:literal, $four:literal, $at:literal) => {
        of_row!(
            $row,
            concat!("vpbroadcastd zmm", $four, ", dword ptr [", $at, " + \\word]"),
            concat!("vpdpbusd zmm", $a, ", zmm24, zmm", $four),
            concat!("vpdpbusd zmm", $b, ", zmm25, zmm", $four)
        )
    };
}

/// [`sum`] of two registers and at most 12 rows.
///
/// # Safety
/// There must be `R` rows of `stride` bytes, two panels of 16 times as many, and `[R, 2]` sums.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn sum_pair<const R: usize>(
    q: *const i8,
    stride: usize,
    weights: *const u8,
    fetch: *const u8,
    sums: *mut __m512i,
) {
    const { assert!(R <= 12, "there are registers for 12 rows") };
    // SAFETY: this function's contract; rows beyond `R` are not read, and a prefetch of any address is
    // harmless.
    unsafe {
        std::arch::asm!(
            load_row!(0, 0, 1), load_row!(1, 2, 3), load_row!(2, 4, 5), load_row!(3, 6, 7),
            load_row!(4, 8, 9), load_row!(5, 10, 11), load_row!(6, 12, 13), load_row!(7, 14, 15),
            load_row!(8, 16, 17), load_row!(9, 18, 19), load_row!(10, 20, 21), load_row!(11, 22, 23),
            "2:",
            ".irp word, 0, 4, 8, 12",
            "vmovdqu64 zmm24, [{weights} + 16*\\word]",
            "vmovdqu64 zmm25, [{weights} + {panel} + 16*\\word]",
            "prefetcht0 [{fetch} + 16*\\word]",
            "prefetcht0 [{fetch} + {panel} + 16*\\word]",
            multiply_row!(0, 0, 1, 26, "{q0}"),
            multiply_row!(1, 2, 3, 27, "{q0} + {stride}"),
            multiply_row!(2, 4, 5, 28, "{q0} + 2*{stride}"),
            multiply_row!(3, 6, 7, 29, "{q3}"),
            multiply_row!(4, 8, 9, 30, "{q3} + {stride}"),
            multiply_row!(5, 10, 11, 31, "{q3} + 2*{stride}"),
            multiply_row!(6, 12, 13, 26, "{q6}"),
            multiply_row!(7, 14, 15, 27, "{q6} + {stride}"),
            multiply_row!(8, 16, 17, 28, "{q6} + 2*{stride}"),
            multiply_row!(9, 18, 19, 29, "{q9}"),
            multiply_row!(10, 20, 21, 30, "{q9} + {stride}"),
            multiply_row!(11, 22, 23, 31, "{q9} + 2*{stride}"),
            ".endr",
            "add {q0}, 16", "add {q3}, 16", "add {q6}, 16", "add {q9}, 16",
            "add {weights}, 256",
            "add {fetch}, 256",
            "dec {steps}",
            "jnz 2b",
            store_row!(0, 0, 1), store_row!(1, 2, 3), store_row!(2, 4, 5), store_row!(3, 6, 7),
            store_row!(4, 8, 9), store_row!(5, 10, 11), store_row!(6, 12, 13), store_row!(7, 14, 15),
            store_row!(8, 16, 17), store_row!(9, 18, 19), store_row!(10, 20, 21), store_row!(11, 22, 23),
            rows = const R,
            sums = in(reg) sums,
            stride = in(reg) stride,
            panel = in(reg) LANES * stride,
            steps = inout(reg) stride / (4 * WORDS_AT_ONCE) => _,
            weights = inout(reg) weights => _,
            fetch = inout(reg) fetch => _,
            q0 = inout(reg) q => _,
            q3 = inout(reg) q.wrapping_add(3 * stride) => _,
            q6 = inout(reg) q.wrapping_add(6 * stride) => _,
            q9 = inout(reg) q.wrapping_add(9 * stride) => _,
            out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _, out("zmm5") _,
            out("zmm6") _, out("zmm7") _, out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
            out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _, out("zmm16") _,
            out("zmm17") _, out("zmm18") _, out("zmm19") _, out("zmm20") _, out("zmm21") _,
            out("zmm22") _, out("zmm23") _, out("zmm24") _, out("zmm25") _, out("zmm26") _,
            out("zmm27") _, out("zmm28") _, out("zmm29") _, out("zmm30") _, out("zmm31") _,
            options(nostack),
        );
    }
}

//! Rotation and rounding of activations: the Hadamard matrix is multiplied on tiles of bf16 numbers.
//!
//! Rounding to bf16 before the rotation adds at most a quarter to the squared error of rounding to 8 bits
//! after it, and that only where one number outweighs all others of the row. Sums are fp32.
//!
//! With the matrix of 32, `H`, and the halves `a` and `b` of a block of 64, the rotated block is
//! `aH + bH` and `aH − bH`. It is computed twice, for the largest number of a row and for rounding:
//! that is quicker than to keep it outside the first-level cache.

use std::{arch::x86_64::*, cell::RefCell};

use super::tiles::{ROW_BYTES, ROWS, Tiles, tile_asm};
use crate::{
    dispatch::QuantizedTiles,
    lines::Lines,
    rows::{TILE_DEPTH, TILE_WORDS},
    scalar::{self, LANES},
};

/// Numbers that are rotated together.
pub(crate) const BLOCK: usize = 2 * TILE_DEPTH;

/// A tile of bf16 numbers, pairs of neighbouring rows of the matrix side by side.
#[repr(C, align(64))]
struct Signs([[[u16; 2]; LANES]; ROWS]);

/// The two halves of the columns of the Hadamard matrix of 32.
static HADAMARD: [Signs; 2] = [signs(0), signs(LANES)];

const fn signs(first: usize) -> Signs {
    const ONE: u16 = 0x3f80;
    const MINUS_ONE: u16 = 0xbf80;
    let mut signs = [[[ONE; 2]; LANES]; ROWS];
    let mut i = 0;
    while i < TILE_DEPTH * LANES {
        let (row, column) = (i / LANES, i % LANES);
        if (row & (first + column)).count_ones() % 2 == 1 {
            signs[row / 2][column][row % 2] = MINUS_ONE;
        }
        i += 1;
    }
    Signs(signs)
}

/// Products of the halves of 16 blocks: `[half of the block, half of the columns]`.
#[repr(C, align(64))]
struct Products([[[[f32; LANES]; ROWS]; 2]; 2]);

/// Buffers of a task.
struct Scratch {
    /// Of one block.
    products: Products,
    /// A tile of normed rows.
    normed: Lines<u16>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        products: Products([[[[0.0; LANES]; ROWS]; 2]; 2]),
        normed: Lines::default(),
    });
}

/// Rotates and rounds rows in [tiles](crate::rows::Intermediate).
///
/// # Safety
/// AMX must be available.
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
pub(super) unsafe fn quantize(words: &[u16], out: &mut QuantizedTiles<'_>) {
    SCRATCH.with_borrow_mut(|Scratch { products, .. }| {
        // SAFETY: this function's contract.
        let tiles = unsafe { Tiles::new() };
        for (words, mut out) in words.chunks_exact(ROWS * out.width).zip(out.tiles()) {
            // SAFETY: tiles are configured.
            unsafe { quantize_tile(words, products, &mut out) };
        }
        drop(tiles);
    });
}

/// [`scalar::rms_norm`], then [`quantize`].
///
/// # Safety
/// As [`quantize`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
pub(super) unsafe fn norm_quantize(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    out: &mut QuantizedTiles<'_>,
) {
    SCRATCH.with_borrow_mut(|Scratch { products, normed }| {
        // SAFETY: this function's contract.
        let tiles = unsafe { Tiles::new() };
        let width = weight.len();
        normed.grow(ROWS * width);
        for (x, mut out) in x.chunks(ROWS * width).zip(out.tiles()) {
            norm_tile(x, weight, eps, normed);
            // SAFETY: tiles are configured.
            unsafe { quantize_tile(&normed[..ROWS * width], products, &mut out) };
        }
        drop(tiles);
    });
}

/// Writes up to 16 rows, normed, into a tile of rows.
#[target_feature(enable = "avx512f,avx512bf16")]
fn norm_tile(x: &[f32], weight: &[f32], eps: f32, out: &mut [u16]) {
    // SAFETY: there are 16 numbers.
    let load = |x: &[f32; LANES]| unsafe { _mm512_loadu_ps(x.as_ptr()) };
    let width = weight.len();
    let mut factors = [0.0; ROWS];
    for (factor, x) in factors.iter_mut().zip(x.chunks_exact(width)) {
        *factor = 1.0 / (sum_of_squares(x) / width as f32 + eps).sqrt();
    }
    let weights = weight.as_chunks::<LANES>().0.as_chunks::<2>().0.iter();
    for ((i, weight), out) in weights.enumerate().zip(out.chunks_exact_mut(TILE_WORDS)) {
        let weight = weight.each_ref().map(load);
        let rows = x.chunks_exact(width).zip(&factors).zip(out.as_chunks_mut::<TILE_DEPTH>().0);
        for ((x, factor), line) in rows {
            let x = &x.as_chunks::<LANES>().0.as_chunks::<2>().0[i];
            let factor = _mm512_set1_ps(*factor);
            let [low, high] =
                [0, 1].map(|i| _mm512_mul_ps(_mm512_mul_ps(load(&x[i]), factor), weight[i]));
            // SAFETY: there are 32 words; any pattern is a row of bf16 numbers.
            unsafe {
                let words =
                    std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
                _mm512_storeu_si512(line.as_mut_ptr().cast(), words);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn sum_of_squares(x: &[f32]) -> f32 {
    // SAFETY: there are 16 numbers.
    let load = |x: &[f32; LANES]| unsafe { _mm512_loadu_ps(x.as_ptr()) };
    let mut squares = [_mm512_setzero_ps(); 4];
    for x in x.as_chunks::<BLOCK>().0 {
        for (sum, x) in squares.iter_mut().zip(x.as_chunks().0) {
            *sum = _mm512_fmadd_ps(load(x), load(x), *sum);
        }
    }
    let [a, b, c, d] = squares;
    _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)))
}

/// [`quantize`] for up to 16 rows.
///
/// # Safety
/// Tiles must be configured.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
unsafe fn quantize_tile(words: &[u16], products: &mut Products, out: &mut QuantizedTiles<'_>) {
    let magnitude = |x| _mm512_castps_si512(_mm512_abs_ps(x));
    let mut largest = [_mm512_setzero_si512(); ROWS];
    // SAFETY: this function's contract.
    unsafe {
        for_blocks(words, products, |_, products| {
            for (row, largest) in largest.iter_mut().enumerate() {
                for [a, b] in products.row(row) {
                    // The larger magnitude of sum and difference.
                    let sum = _mm512_add_ps(_mm512_abs_ps(a), _mm512_abs_ps(b));
                    *largest = _mm512_max_epu32(*largest, magnitude(sum));
                }
            }
        });
    }
    let rows = out.rows();
    let mut inverses = [0.0; ROWS];
    for (row, (largest, inverse)) in largest.iter().zip(&mut inverses).enumerate().take(rows) {
        let steps = scalar::steps(_mm512_reduce_max_epu32(*largest));
        (*inverse, out.scales[row]) = steps.unwrap_or((0.0, f32::NAN));
    }
    // Quarters of lanes are what packing leaves together.
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    // SAFETY: this function's contract.
    unsafe {
        for_blocks(words, products, |block, products| {
            for (row, inverse) in inverses.iter().enumerate().take(rows) {
                let inverse = _mm512_set1_ps(*inverse);
                let rounded = |x| _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
                let [[a, b], [c, d]] = products.row(row);
                let low =
                    _mm512_packs_epi32(rounded(_mm512_add_ps(a, b)), rounded(_mm512_add_ps(c, d)));
                let high =
                    _mm512_packs_epi32(rounded(_mm512_sub_ps(a, b)), rounded(_mm512_sub_ps(c, d)));
                let q = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
                let q_row = &mut out.data[(block * ROWS + row) * BLOCK..][..BLOCK];
                // SAFETY: there are 64 bytes.
                _mm512_storeu_si512(q_row.as_mut_ptr().cast(), q);
            }
        });
    }
}

impl Products {
    /// What row `row` of a block is made from: `[aH, bH]` for each half of the columns.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn row(&self, row: usize) -> [[__m512; 2]; 2] {
        let [a, b] = &self.0;
        // SAFETY: there are 16 numbers, aligned.
        let load = |x: &[f32; LANES]| unsafe { _mm512_load_ps(x.as_ptr()) };
        [[load(&a[0][row]), load(&b[0][row])], [load(&a[1][row]), load(&b[1][row])]]
    }
}

/// Calls `run(block, products)` for all blocks of a tile of rows.
///
/// # Safety
/// Tiles must be configured.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn for_blocks(
    words: &[u16],
    products: &mut Products,
    mut run: impl FnMut(usize, &Products),
) {
    for (block, words) in words.as_chunks::<{ 2 * TILE_WORDS }>().0.iter().enumerate() {
        // SAFETY: this function's contract.
        unsafe { multiply(words, products) };
        run(block, products);
    }
}

/// Products of both halves of a block.
///
/// # Safety
/// Tiles must be configured.
#[inline]
unsafe fn multiply(words: &[u16; 2 * TILE_WORDS], products: &mut Products) {
    // SAFETY: this function's contract; two tiles of words, two of the matrix and four of products.
    unsafe {
        tile_asm!(
            "tileloadd tmm4, [{words} + {line}]",
            "tileloadd tmm5, [{words} + {line} + 1024]",
            "tileloadd tmm6, [{matrix} + {line}]",
            "tileloadd tmm7, [{matrix} + {line} + 1024]",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tilestored [{products} + {line}], tmm0",
            "tilestored [{products} + {line} + 1024], tmm1",
            "tilestored [{products} + {line} + 2048], tmm2",
            "tilestored [{products} + {line} + 3072], tmm3",;
            words = in(reg) words.as_ptr(),
            matrix = in(reg) HADAMARD.as_ptr(),
            products = in(reg) products.0.as_mut_ptr(),
            line = in(reg) ROW_BYTES,
        );
    }
}

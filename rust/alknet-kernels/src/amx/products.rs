//! Linear products: bytes on tiles, finished block by block while the sums are in the first-level cache.

use std::{arch::x86_64::*, ops::Range};

use super::tiles::{ROW_BYTES, ROWS, Tiles, tile_asm};
use crate::{
    dispatch::Product,
    pool::Shared,
    scalar::{K_ALIGN, LANES},
};

/// Rows of a block: two tiles.
const BLOCK_ROWS: usize = 2 * ROWS;

/// Panels of a block.
const PAIR: usize = 2;

/// Sums of a block.
#[repr(C, align(64))]
struct Sums([[[i32; LANES]; PAIR]; BLOCK_ROWS]);

/// A block of up to 32 rows by up to two panels.
struct Block<'a> {
    product: &'a Product<'a>,
    rows: Range<usize>,
    panels: Range<usize>,
    sums: &'a Sums,
}

impl Block<'_> {
    /// Calls `finish(row, p, numbers)` for the 16 outputs of every row and of every panel, counted
    /// from the block's first: `sum · row scale · scale + bias`, rounded after each step as
    /// [`crate::scalar::matmul`] does.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn for_rows(&self, mut finish: impl FnMut(usize, [__m512; PAIR])) {
        let (x, w) = (self.product.x, self.product.w);
        // Where the second panel is missing, the first one is finished twice.
        let panels = [self.panels.start, self.panels.end - 1];
        // SAFETY: panels have 16 scales and biases.
        let load = |numbers: &[f32; LANES]| unsafe { _mm512_loadu_ps(numbers.as_ptr()) };
        let (scales, biases) = (panels.map(|p| load(w.scales(p))), panels.map(|p| load(w.bias(p))));
        let factors = x.scales[self.rows.clone()].iter().zip(&x.offsets[self.rows.clone()]);
        for (r, (sums, (scale, offset))) in self.sums.0.iter().zip(factors).enumerate() {
            let (row_scale, offset) = (_mm512_set1_ps(*scale), _mm512_set1_epi32(*offset));
            let numbers = std::array::from_fn(|p| {
                // SAFETY: there are 16 sums.
                let sum = unsafe { _mm512_loadu_si512(sums[p].as_ptr().cast()) };
                let sum = _mm512_cvtepi32_ps(_mm512_add_epi32(sum, offset));
                let product = _mm512_mul_ps(_mm512_mul_ps(sum, row_scale), scales[p]);
                _mm512_add_ps(product, biases[p])
            });
            finish(self.rows.start + r, numbers);
        }
    }
}

/// [`crate::scalar::matmul`], of which every block is handed to `finish`.
///
/// A pair of panels stays in the first-level cache over all rows; the next pair is fetched meanwhile.
#[inline]
#[target_feature(enable = "avx512f")]
fn for_blocks(product: &Product<'_>, mut finish: impl FnMut(&Block<'_>)) {
    let Product { x, rows, w, panels } = product;
    if rows.is_empty() {
        return;
    }
    let stride = x.stride();
    let mut sums = Sums([[[0; LANES]; PAIR]; BLOCK_ROWS]);
    let lines = LINES_PER_STEP.div_ceil(rows.len().div_ceil(BLOCK_ROWS));
    // SAFETY: this file's kernels are handed out where AMX is available.
    let mut tiles = unsafe { Tiles::new(ROWS.min(rows.len()), ROWS) };
    for panel in panels.clone().step_by(PAIR) {
        let panels = panel..panels.end.min(panel + PAIR);
        let bytes = w.panel_range(panels.clone());
        let mut fetch = Fetch { next: bytes.as_ptr_range().end, lines };
        for row in rows.clone().step_by(BLOCK_ROWS) {
            let rows = row..rows.end.min(row + BLOCK_ROWS);
            let upper = ROWS.min(rows.len());
            tiles.reshape(upper, rows.len() - upper);
            let left = &x.data[row * stride..rows.end * stride];
            // SAFETY: rows and panels are whole, and tiles configured for as many rows.
            unsafe { multiply(left, upper, stride, bytes, &mut fetch, &mut sums) };
            finish(&Block { product, rows, panels: panels.clone(), sums: &sums });
        }
    }
}

/// Cache lines of a pair of panels that a step of 64 inputs reads.
const LINES_PER_STEP: usize = PAIR * LANES * K_ALIGN / 64;

/// What is fetched into the second-level cache while a product runs.
struct Fetch {
    next: *const u8,
    /// Cache lines per step.
    lines: usize,
}

/// Sums of a block: the rows of `left`, the first `upper` of them in one tile and the others in a
/// second, by the one or two panels of `bytes`.
///
/// # Safety
/// Tiles must be configured for the rows, of which all, and all panels, are `stride` bytes wide.
#[inline]
unsafe fn multiply(
    left: &[i8],
    upper: usize,
    stride: usize,
    bytes: &[u8],
    fetch: &mut Fetch,
    sums: &mut Sums,
) {
    let lower = upper * stride;
    let left = if lower < left.len() {
        [left.as_ptr(), left[lower..].as_ptr()]
    } else {
        [left.as_ptr(), std::ptr::null()]
    };
    // Where the second panel is missing, the first one is multiplied twice.
    let panels = [bytes.as_ptr(), bytes[bytes.len() - LANES * stride..].as_ptr()];
    let steps = stride / K_ALIGN;
    // SAFETY: this function's contract.
    unsafe {
        match fetch.lines {
            0..=2 => multiply_steps::<2>(left, stride, panels, steps, fetch, sums),
            3..=4 => multiply_steps::<4>(left, stride, panels, steps, fetch, sums),
            5..=8 => multiply_steps::<8>(left, stride, panels, steps, fetch, sums),
            9..=16 => multiply_steps::<16>(left, stride, panels, steps, fetch, sums),
            _ => multiply_steps::<32>(left, stride, panels, steps, fetch, sums),
        }
    }
}

/// [`multiply`] with `LINES` fetches per step.
///
/// # Safety
/// As [`multiply`]; there are no lower rows where their pointer is null.
unsafe fn multiply_steps<const LINES: usize>(
    left: [*const i8; 2],
    stride: usize,
    panels: [*const u8; 2],
    steps: usize,
    fetch: &mut Fetch,
    sums: &mut Sums,
) {
    // SAFETY: this function's contract; a prefetch of any address is harmless.
    unsafe {
        if left[1].is_null() {
            tile_asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "2:",
                "tileloadd tmm4, [{upper} + {stride}]",
                "tileloadd tmm6, [{first} + {line}]",
                "tdpbsud tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{second} + {line}]",
                "tdpbsud tmm1, tmm4, tmm7",
                ".rept {lines}",
                "prefetcht1 [{fetch}]",
                "add {fetch}, 64",
                ".endr",
                "add {upper}, 64",
                "add {first}, 1024",
                "add {second}, 1024",
                "dec {steps}",
                "jnz 2b",
                "lea {line}, [{line} + {line}]",
                "tilestored [{sums} + {line}], tmm0",
                "tilestored [{sums} + {line} + 64], tmm1",;
                lines = const LINES,
                upper = inout(reg) left[0] => _,
                stride = in(reg) stride,
                first = inout(reg) panels[0] => _,
                second = inout(reg) panels[1] => _,
                line = inout(reg) ROW_BYTES => _,
                fetch = inout(reg) fetch.next,
                steps = inout(reg) steps => _,
                sums = in(reg) sums.0.as_mut_ptr(),
            );
        } else {
            tile_asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{upper} + {stride}]",
                "tileloadd tmm6, [{first} + {line}]",
                "tileloadd tmm7, [{second} + {line}]",
                "tileloadd tmm5, [{lower} + {stride}]",
                "tdpbsud tmm0, tmm4, tmm6",
                "tdpbsud tmm1, tmm4, tmm7",
                "tdpbsud tmm2, tmm5, tmm6",
                "tdpbsud tmm3, tmm5, tmm7",
                ".rept {lines}",
                "prefetcht1 [{fetch}]",
                "add {fetch}, 64",
                ".endr",
                "add {upper}, 64",
                "add {lower}, 64",
                "add {first}, 1024",
                "add {second}, 1024",
                "dec {steps}",
                "jnz 2b",
                "lea {line}, [{line} + {line}]",
                "tilestored [{sums} + {line}], tmm0",
                "tilestored [{sums} + {line} + 64], tmm1",
                "tilestored [{sums} + {line} + 2048], tmm2",
                "tilestored [{sums} + {line} + 2112], tmm3",;
                lines = const LINES,
                upper = inout(reg) left[0] => _,
                lower = inout(reg) left[1] => _,
                stride = in(reg) stride,
                first = inout(reg) panels[0] => _,
                second = inout(reg) panels[1] => _,
                line = inout(reg) ROW_BYTES => _,
                fetch = inout(reg) fetch.next,
                steps = inout(reg) steps => _,
                sums = in(reg) sums.0.as_mut_ptr(),
            );
        }
    }
}

/// `out = x · Wᵀ + bias`, or `out += …` when `ADD`; rows of `width` numbers.
///
/// # Safety
/// The rows and outputs of the product must belong to this task alone.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn linear<const ADD: bool>(
    product: &Product<'_>,
    width: usize,
    out: &Shared<f32>,
) {
    for_blocks(product, |block| {
        let first = block.panels.start * LANES;
        let len = (block.panels.end * LANES).min(width) - first;
        let masks = [lanes_mask(len), lanes_mask(len.saturating_sub(LANES))];
        block.for_rows(|row, numbers| {
            // SAFETY: this function's contract; the masks leave the `len` numbers of the range.
            unsafe {
                let out = out.range(row * width + first, len).as_mut_ptr();
                for (p, (mut x, mask)) in numbers.into_iter().zip(masks).enumerate() {
                    let out = out.wrapping_add(p * LANES);
                    if ADD {
                        x = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out), x);
                    }
                    _mm512_mask_storeu_ps(out, mask, x);
                }
            }
        });
    });
}

/// The first `len` lanes of a register.
fn lanes_mask(len: usize) -> __mmask16 {
    ((1_u32 << len.min(LANES)) - 1) as __mmask16
}

/// `SiLU(gate) · up` for panels of gates and ups in turn; rows of `width` numbers.
///
/// # Safety
/// As [`linear`].
#[target_feature(enable = "avx512f,avx512dq")]
pub(super) unsafe fn gate_up(product: &Product<'_>, width: usize, out: &Shared<f32>) {
    for_blocks(product, |block| {
        let first = block.panels.start / 2 * LANES;
        let len = LANES.min(width - first);
        let mask = lanes_mask(len);
        block.for_rows(|row, [gate, up]| {
            // SAFETY: as above.
            unsafe {
                let out = out.range(row * width + first, len).as_mut_ptr();
                _mm512_mask_storeu_ps(out, mask, silu_mul(gate, up));
            }
        });
    });
}

/// `SiLU(gate) · up` within a part in 50,000.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn silu_mul(gate: __m512, up: __m512) -> __m512 {
    // The bound comes first, so that NaN passes.
    let x = _mm512_mul_ps(gate, _mm512_set1_ps(-std::f32::consts::LOG2_E));
    let below =
        _mm512_add_ps(_mm512_set1_ps(1.0), super::exp2(_mm512_min_ps(_mm512_set1_ps(100.0), x)));
    // One step of Newton's from 14 bits.
    let inverse = _mm512_rcp14_ps(below);
    let inverse = _mm512_mul_ps(inverse, _mm512_fnmadd_ps(below, inverse, _mm512_set1_ps(2.0)));
    _mm512_mul_ps(_mm512_mul_ps(gate, up), inverse)
}

/// [`crate::scalar::matmul`].
#[target_feature(enable = "avx512f")]
pub(super) fn matmul(
    x: &crate::rows::QuantizedRows,
    rows: Range<usize>,
    w: &crate::pack::PackedMatrix,
    panels: Range<usize>,
    out: &mut [f32],
) {
    let (first_row, first_panel, columns) = (rows.start, panels.start, panels.len() * LANES);
    for_blocks(&Product { x, rows, w, panels }, |block| {
        let first = (block.panels.start - first_panel) * LANES;
        block.for_rows(|row, numbers| {
            for (p, x) in numbers.into_iter().take(block.panels.len()).enumerate() {
                let out = &mut out[(row - first_row) * columns + first + p * LANES..][..LANES];
                // SAFETY: the slice has 16 numbers.
                unsafe { _mm512_storeu_ps(out.as_mut_ptr(), x) };
            }
        });
    });
}

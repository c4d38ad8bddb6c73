//! Linear products: bytes on tiles, finished block by block while the sums are in the first-level cache.

use std::{arch::x86_64::*, cell::RefCell, ops::Range};

use super::tiles::{ROW_BYTES, ROWS, Tiles, tile_asm};
use crate::{
    dispatch::Product,
    keys::Projection,
    ops::Heads,
    pack::PackedMatrix,
    pool::Shared,
    rows::{Intermediate, QuantizedRows},
    scalar::{self, K_ALIGN, LANES, Place, TileHeads},
};

/// Rows of a block: two tiles.
const BLOCK_ROWS: usize = 2 * ROWS;

/// Panels of a block.
const PAIR: usize = 2;

/// Blocks of rows that go through all parts of a pair of panels together.
const GROUP_BLOCKS: usize = 4;

/// Most steps of 64 inputs in a part of a pair of panels: 18 KiB of weights and as much of a block of
/// rows are in the first-level cache together.
const PART_STEPS: usize = 9;

/// Sums of a block.
#[repr(C, align(64))]
struct Sums([[[i32; LANES]; PAIR]; BLOCK_ROWS]);

thread_local! {
    /// Sums of a group of blocks, 16 KiB per thread.
    static SUMS: RefCell<[Sums; GROUP_BLOCKS]> = const {
        RefCell::new([const { Sums([[[0; LANES]; PAIR]; BLOCK_ROWS]) }; GROUP_BLOCKS])
    };
}

/// A block of up to 32 rows by two panels.
struct Block<'a> {
    product: &'a Product<'a>,
    rows: Range<usize>,
    panels: [usize; PAIR],
    sums: &'a Sums,
}

impl Block<'_> {
    /// Calls `finish(row, numbers)` for the outputs of every row, 16 of each panel: `sum · row scale ·
    /// scale + bias`, rounded after each step as [`crate::scalar::matmul`] does, or in the end when `FUSED`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn for_rows<const FUSED: bool>(&self, mut finish: impl FnMut(usize, [__m512; PAIR])) {
        let (x, w) = (self.product.x, self.product.w);
        // SAFETY: panels have 16 scales and biases.
        let load = |numbers: &[f32; LANES]| unsafe { _mm512_loadu_ps(numbers.as_ptr()) };
        let (scales, biases) =
            (self.panels.map(|p| load(w.scales(p))), self.panels.map(|p| load(w.bias(p))));
        let row_scales = &x.scales[self.rows.clone()];
        for (r, (sums, scale)) in self.sums.0.iter().zip(row_scales).enumerate() {
            let row_scale = _mm512_set1_ps(*scale);
            let numbers = std::array::from_fn(|p| {
                // SAFETY: there are 16 sums.
                let sum = unsafe { _mm512_loadu_si512(sums[p].as_ptr().cast()) };
                let sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), row_scale);
                if FUSED {
                    _mm512_fmadd_ps(sum, scales[p], biases[p])
                } else {
                    _mm512_add_ps(_mm512_mul_ps(sum, scales[p]), biases[p])
                }
            });
            finish(self.rows.start + r, numbers);
        }
    }
}

/// Pairs of neighbouring panels; a last one without a neighbour is paired with itself.
fn neighbours(panels: Range<usize>) -> impl Iterator<Item = [usize; PAIR]> {
    panels.clone().step_by(PAIR).map(move |panel| [panel, (panel + 1).min(panels.end - 1)])
}

/// [`crate::scalar::matmul`] by pairs of panels, of which every block is handed to `finish`.
///
/// A part of a pair of panels stays in the first-level cache over a group of rows; panels `ahead` of it
/// are fetched meanwhile.
#[inline]
#[target_feature(enable = "avx512f")]
fn for_blocks(
    product: &Product<'_>,
    pairs: impl Iterator<Item = [usize; PAIR]>,
    ahead: usize,
    finish: impl FnMut(&Block<'_>),
) {
    SUMS.with_borrow_mut(|sums| for_blocks_in(sums, product, pairs, ahead, finish));
}

/// [`for_blocks`] with a place for the sums of a group.
#[inline]
#[target_feature(enable = "avx512f")]
fn for_blocks_in(
    sums: &mut [Sums; GROUP_BLOCKS],
    product: &Product<'_>,
    pairs: impl Iterator<Item = [usize; PAIR]>,
    ahead: usize,
    mut finish: impl FnMut(&Block<'_>),
) {
    let Product { x, rows, w, panels } = product;
    if rows.is_empty() {
        return;
    }
    assert!(rows.start.is_multiple_of(ROWS), "products begin with a tile");
    let stride = x.stride();
    let steps = stride / K_ALIGN;
    // A single block of rows reads panels only once: nothing needs to stay.
    let parts = if rows.len() > BLOCK_ROWS { steps.div_ceil(PART_STEPS) } else { 1 };
    let part = steps.div_ceil(parts);
    let lines = LINES_PER_STEP.div_ceil(rows.len().div_ceil(BLOCK_ROWS));
    let all = w.panel_range(panels.clone());
    // SAFETY: this file's kernels are handed out where AMX is available.
    let tiles = unsafe { Tiles::new() };
    for (i, panels) in pairs.enumerate() {
        let bytes = panels.map(|panel| w.panel(panel));
        // What follows is another task's; in place of it come lines that are here already.
        let next = all.get((PAIR * i + ahead) * LANES * stride..).unwrap_or(bytes[0]).as_ptr();
        let mut fetch = Fetch { next, lines };
        for group in rows.clone().step_by(GROUP_BLOCKS * BLOCK_ROWS) {
            for step in (0..steps).step_by(part) {
                let end = steps.min(step + part);
                let blocks = (group..rows.end).step_by(BLOCK_ROWS);
                for (row, sums) in blocks.zip(&mut *sums) {
                    let rows = row..rows.end.min(row + BLOCK_ROWS);
                    let upper = x.tile(row);
                    let lower = (rows.len() > ROWS).then(|| x.tile(row + ROWS));
                    let operands = Operands { upper, lower, panels: bytes, steps: step..end };
                    // SAFETY: tiles are configured.
                    unsafe { multiply(&operands, &mut fetch, sums) };
                    if end == steps {
                        finish(&Block { product, rows, panels, sums });
                    }
                }
            }
        }
    }
    drop(tiles);
}

/// Cache lines of a pair of panels that a step of 64 inputs reads.
const LINES_PER_STEP: usize = PAIR * LANES * K_ALIGN / 64;

/// What is fetched into the second-level cache while a product runs.
struct Fetch {
    next: *const u8,
    /// Cache lines per step.
    lines: usize,
}

/// What a block multiplies.
struct Operands<'a> {
    /// A tile of rows, and a second one if there is any.
    upper: &'a [i8],
    lower: Option<&'a [i8]>,
    /// Panels as wide as the rows.
    panels: [&'a [u8]; PAIR],
    /// The part of their width, in steps of 64 inputs.
    steps: Range<usize>,
}

/// Sums of a block, or of its part that begins at the first step; later parts are added to them.
///
/// # Safety
/// Tiles must be configured.
#[inline]
unsafe fn multiply(operands: &Operands<'_>, fetch: &mut Fetch, sums: &mut Sums) {
    // SAFETY: this function's contract.
    unsafe {
        match fetch.lines {
            0..=2 => multiply_steps::<2>(operands, fetch, sums),
            3..=4 => multiply_steps::<4>(operands, fetch, sums),
            5..=8 => multiply_steps::<8>(operands, fetch, sums),
            9..=16 => multiply_steps::<16>(operands, fetch, sums),
            _ => multiply_steps::<32>(operands, fetch, sums),
        }
    }
}

/// [`multiply`] with `LINES` fetches per step.
///
/// # Safety
/// As [`multiply`].
unsafe fn multiply_steps<const LINES: usize>(
    operands: &Operands<'_>,
    fetch: &mut Fetch,
    sums: &mut Sums,
) {
    let Operands { upper, lower, panels, ref steps } = *operands;
    assert!(steps.start < steps.end && steps.end * ROWS * K_ALIGN <= upper.len());
    // A step is a tile of rows, and as much of a panel.
    let start = steps.start * ROWS * K_ALIGN;
    let [first, second] = panels.map(|panel| panel[start..].as_ptr());
    let (upper, lower) = (upper[start..].as_ptr(), lower.map(|lower| lower[start..].as_ptr()));
    let later = usize::from(steps.start > 0);
    // The loop over steps: what is done with the upper rows, and with the lower ones after each step.
    macro_rules! call {
        (
            load: $($load:literal)*;
            zero: $($zero:literal)*;
            step: $($step:literal)*;
            store: $($store:literal)*;
            $($operand:tt)*
        ) => {
            tile_asm!(
                "test {later}, {later}",
                "jz 2f",
                $($load,)*
                "jmp 3f",
                "2:",
                $($zero,)*
                "3:",
                "tileloadd tmm4, [{upper} + {line}]",
                "tileloadd tmm6, [{first} + {line}]",
                "tileloadd tmm7, [{second} + {line}]",
                $($step,)*
                ".rept {lines}",
                "prefetcht1 [{fetch}]",
                "add {fetch}, 64",
                ".endr",
                "add {upper}, 1024",
                "add {first}, 1024",
                "add {second}, 1024",
                "dec {steps}",
                "jnz 3b",
                $($store,)*;
                lines = const LINES,
                later = in(reg) later,
                upper = inout(reg) upper => _,
                first = inout(reg) first => _,
                second = inout(reg) second => _,
                line = in(reg) ROW_BYTES,
                sums_line = in(reg) PAIR * ROW_BYTES,
                fetch = inout(reg) fetch.next,
                steps = inout(reg) steps.len() => _,
                sums = in(reg) sums.0.as_mut_ptr(),
                $($operand)*
            )
        };
    }
    // SAFETY: steps of rows and panels are whole; this function's contract; a prefetch of any address
    // is harmless.
    unsafe {
        if let Some(lower) = lower {
            call!(
                load:
                    "tileloadd tmm0, [{sums} + {sums_line}]"
                    "tileloadd tmm1, [{sums} + {sums_line} + 64]"
                    "tileloadd tmm2, [{sums} + {sums_line} + 2048]"
                    "tileloadd tmm3, [{sums} + {sums_line} + 2112]";
                zero: "tilezero tmm0" "tilezero tmm1" "tilezero tmm2" "tilezero tmm3";
                step:
                    "tileloadd tmm5, [{lower} + {line}]"
                    "add {lower}, 1024"
                    "tdpbssd tmm0, tmm4, tmm6"
                    "tdpbssd tmm1, tmm4, tmm7"
                    "tdpbssd tmm2, tmm5, tmm6"
                    "tdpbssd tmm3, tmm5, tmm7";
                store:
                    "tilestored [{sums} + {sums_line}], tmm0"
                    "tilestored [{sums} + {sums_line} + 64], tmm1"
                    "tilestored [{sums} + {sums_line} + 2048], tmm2"
                    "tilestored [{sums} + {sums_line} + 2112], tmm3";
                lower = inout(reg) lower => _,
            );
        } else {
            call!(
                load:
                    "tileloadd tmm0, [{sums} + {sums_line}]"
                    "tileloadd tmm1, [{sums} + {sums_line} + 64]";
                zero: "tilezero tmm0" "tilezero tmm1";
                step: "tdpbssd tmm0, tmm4, tmm6" "tdpbssd tmm1, tmm4, tmm7";
                store:
                    "tilestored [{sums} + {sums_line}], tmm0"
                    "tilestored [{sums} + {sums_line} + 64], tmm1";
            );
        }
    }
}

/// [`crate::scalar::matmul`].
#[target_feature(enable = "avx512f")]
pub(super) fn matmul(
    x: &QuantizedRows,
    rows: Range<usize>,
    w: &PackedMatrix,
    panels: Range<usize>,
    out: &mut [f32],
) {
    let (first_row, first_panel, columns) = (rows.start, panels.start, panels.len() * LANES);
    let pairs = neighbours(panels.clone());
    for_blocks(&Product { x, rows, w, panels }, pairs, PAIR, |block| {
        block.for_rows::<false>(|row, numbers| {
            for (panel, x) in block.panels.into_iter().zip(numbers) {
                let first = (row - first_row) * columns + (panel - first_panel) * LANES;
                // SAFETY: the slice has 16 numbers.
                unsafe { _mm512_storeu_ps(out[first..][..LANES].as_mut_ptr(), x) };
            }
        });
    });
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
    for_blocks(product, neighbours(product.panels.clone()), PAIR, |block| {
        let [first, second] = block.panels.map(|panel| panel * LANES);
        let len = (second + LANES).min(width) - first;
        let masks = [lanes_mask(len), lanes_mask(len.saturating_sub(LANES))];
        block.for_rows::<false>(|row, numbers| {
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

/// `SiLU(gate) · up` for panels of gates and ups in turn, into [tiles](Intermediate) of rows of `width` numbers.
///
/// # Safety
/// As [`linear`].
#[target_feature(enable = "avx512f,avx512dq,avx512bf16")]
pub(super) unsafe fn gate_up(product: &Product<'_>, width: usize, out: &Shared<u16>) {
    for_blocks(product, neighbours(product.panels.clone()), PAIR, |block| {
        let first = block.panels[0] / 2 * LANES;
        block.for_rows::<true>(|row, [gate, up]| {
            // SAFETY: this function's contract; any pattern is a row of bf16 numbers.
            unsafe {
                let out = out.range(Intermediate::place(width, row, first), LANES);
                let words: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(silu_mul(gate, up)));
                _mm256_storeu_si256(out.as_mut_ptr().cast(), words);
            }
        });
    });
}

/// `SiLU(gate) · up` within a part in 6,000.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn silu_mul(gate: __m512, up: __m512) -> __m512 {
    let exp = super::exp2(_mm512_mul_ps(gate, _mm512_set1_ps(-std::f32::consts::LOG2_E)));
    let inverse = _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1.0), exp));
    _mm512_mul_ps(_mm512_mul_ps(gate, up), inverse)
}

/// The joint projection for whole heads: queries and keys are rotated, queries also scaled, and all
/// rounded to bf16.
///
/// # Shapes
/// - `angles`: `[all rows, head_dim]`
/// - `out`: [`Projection::words`]
///
/// # Safety
/// The rows and heads of the product must belong to this task alone.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn qkv(product: &Product<'_>, heads: &Heads, angles: &[f32], out: &Shared<u16>) {
    let (dim, panels) = (heads.head_dim, heads.packed_head() / LANES);
    if !dim.is_multiple_of(2 * LANES) {
        // SAFETY: this function's contract.
        unsafe { qkv_of_odd_heads(product, heads, angles, out) };
        return;
    }
    // Numbers that are rotated together stand half a head apart.
    let half = panels / 2;
    let pairs = product.panels.clone().step_by(panels);
    let pairs = pairs.flat_map(|head| (head..head + half).map(move |panel| [panel, panel + half]));
    for_blocks(product, pairs, panels, |block| {
        let (head, place) = (block.panels[0] / panels, block.panels[0] % panels * LANES);
        let scale = heads.scale_base_two(head);
        let start = Projection::place(heads, 0, head) + place;
        block.for_rows::<true>(|row, [a, b]| {
            let (mut low, mut high) = (a, b);
            // SAFETY: this function's contract; half a head has 16 numbers and angles from `place` on.
            unsafe {
                if let Some(scale) = scale {
                    let angles = angles[row * dim..][..dim].as_ptr();
                    let scale = _mm512_set1_ps(scale);
                    let cos = _mm512_mul_ps(_mm512_loadu_ps(angles.add(place)), scale);
                    let sin = _mm512_mul_ps(_mm512_loadu_ps(angles.add(dim / 2 + place)), scale);
                    low = _mm512_fmsub_ps(a, cos, _mm512_mul_ps(b, sin));
                    high = _mm512_fmadd_ps(b, cos, _mm512_mul_ps(a, sin));
                }
                let out = out.range(start + row * Projection::width(heads), dim / 2 + LANES);
                for (x, place) in [(low, 0), (high, dim / 2)] {
                    let words = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x));
                    _mm256_storeu_si256(out[place..][..LANES].as_mut_ptr().cast(), words);
                }
            }
        });
    });
}

/// [`qkv`] for heads that are no whole number of pairs of panels: by way of fp32 numbers.
///
/// # Safety
/// As [`qkv`].
#[target_feature(enable = "avx512f")]
unsafe fn qkv_of_odd_heads(
    product: &Product<'_>,
    heads: &Heads,
    angles: &[f32],
    out: &Shared<u16>,
) {
    let Product { x, rows, w, panels } = product;
    let (dim, padded) = (heads.head_dim, heads.packed_head());
    let task_heads = panels.start * LANES / padded..panels.end * LANES / padded;
    let mut tile = vec![0.0; rows.len() * panels.len() * LANES];
    matmul(x, rows.clone(), w, panels.clone(), &mut tile);
    let mut numbers = vec![0.0; rows.len() * task_heads.len() * dim];
    let scales: Vec<_> = task_heads.clone().map(|head| heads.scale_base_two(head)).collect();
    let tile_heads = TileHeads { head_dim: dim, padded, scales: &scales };
    let angles = &angles[rows.start * dim..];
    let place = Place { out: &Shared::new(&mut numbers), start: 0, stride: task_heads.len() * dim };
    // SAFETY: the place is this function's own.
    unsafe { scalar::finish_qkv(&mut tile, &tile_heads, angles, &place) };
    let places = rows.clone().flat_map(|row| task_heads.clone().map(move |head| (row, head)));
    for ((row, head), numbers) in places.zip(numbers.chunks_exact(dim)) {
        let place = Projection::place(heads, row, head);
        // SAFETY: this function's contract.
        let out = unsafe { out.range(place, Projection::place(heads, row, head + 1) - place) };
        let (out, filling) = out.split_at_mut(dim);
        out.iter_mut().zip(numbers).for_each(|(word, x)| *word = bf16(*x));
        filling.fill(0);
    }
}

/// The nearest bf16 number, the even one of two; NaN stays NaN.
fn bf16(x: f32) -> u16 {
    if x.is_nan() {
        return 0x7fc0;
    }
    let bits = x.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

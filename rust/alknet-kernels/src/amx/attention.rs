//! Attention on tiles of bf16 numbers.

use super::tiles::{ROW_BYTES, ROWS, Tiles, tile_asm};
use crate::{
    attention::{self, Arithmetic, AttentionTask, Operand},
    avx2,
    avx512bf16::{self, Bf16, pair_all, pair_keys},
    scalar::LANES,
};

#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) fn attention(task: &AttentionTask<'_>, out: &mut [f32]) {
    avx512bf16::SCRATCH
        .with_borrow_mut(|scratch| attention::attention::<Bf16Tiles>(task, scratch, out));
}

/// Pairs of bf16 numbers as [`Bf16`], rows of which fill whole tiles.
struct Bf16Tiles;

/// Words in a row of a tile.
const ROW_WORDS: usize = ROW_BYTES / 4;

impl Arithmetic for Bf16Tiles {
    type Word = u32;

    #[inline(always)]
    fn keys<'a>(
        task: &AttentionTask<'a>,
        start: usize,
        len: usize,
        buffer: &'a mut Vec<u32>,
    ) -> Operand<'a, u32> {
        pair_keys(task, start, len, (task.head_dim / 2).next_multiple_of(ROW_WORDS), buffer)
    }

    #[inline(always)]
    fn values<'a>(
        task: &AttentionTask<'a>,
        start: usize,
        len: usize,
        buffer: &'a mut Vec<u32>,
    ) -> Operand<'a, u32> {
        let rows = |j| &task.values[(start + j) * task.stride..][..task.head_dim];
        let (dim, row) = (task.head_dim, len.div_ceil(2).next_multiple_of(ROW_WORDS));
        pair_all(rows, len, dim, buffer);
        buffer.resize(2 * row * dim, 0);
        let (pairs, out) = buffer.split_at_mut(row * dim);
        // SAFETY: only this file's `attention` uses this type, on a CPU with AVX2.
        unsafe { avx2::transpose(as_f32(pairs), dim, (row, dim), as_f32_mut(out), row) };
        Operand { words: out, row, column: 1 }
    }

    #[inline(always)]
    fn pack(x: &[f32], n: usize, words: &mut Vec<u32>) {
        Bf16::pack(x, n, words);
        words.resize((words.len() / n).next_multiple_of(ROW_WORDS) * n, 0);
    }

    #[inline(always)]
    fn packed<'a>(x: &'a [f32], words: &'a [u32]) -> &'a [u32] {
        Bf16::packed(x, words)
    }

    #[inline(always)]
    fn product<const ADD: bool>(a: &Operand<'_, u32>, b: &[u32], n: usize, c: &mut [f32]) {
        // SAFETY: only this file's `attention` uses this type, where AMX is available.
        unsafe { bf16_product::<ADD>(a, b, n, c) }
    }

    #[inline(always)]
    fn exp(x: f32) -> f32 {
        Bf16::exp(x)
    }

    #[inline(always)]
    fn transpose(
        x: &[f32],
        stride: usize,
        size: (usize, usize),
        out: &mut [f32],
        out_stride: usize,
    ) {
        Bf16::transpose(x, stride, size, out, out_stride);
    }
}

/// Words as numbers that are moved and never computed with.
fn as_f32(words: &[u32]) -> &[f32] {
    // SAFETY: the two types have the same size and alignment, and every pattern is a number.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), words.len()) }
}

/// As [`as_f32`].
fn as_f32_mut(words: &mut [u32]) -> &mut [f32] {
    // SAFETY: as above.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), words.len()) }
}

/// [`Arithmetic::product`] in blocks of up to 32 rows by 32 columns; depth fills whole tiles.
///
/// # Safety
/// AMX must be available.
unsafe fn bf16_product<const ADD: bool>(a: &Operand<'_, u32>, b: &[u32], n: usize, c: &mut [f32]) {
    let (rows, depth) = (c.len() / n, b.len() / n);
    assert!(depth.is_multiple_of(ROW_WORDS) && n.is_multiple_of(LANES) && a.column == 1);
    assert!(a.row >= depth && a.words.len() >= rows * a.row);
    // SAFETY: this function's contract.
    let mut tiles = unsafe { Tiles::new(ROWS, ROWS) };
    for row in (0..rows).step_by(2 * ROWS) {
        // Where there is no second tile of rows or columns, the first one is computed twice.
        let upper = ROWS.min(rows - row);
        let (below, lower) =
            if rows > row + ROWS { (ROWS, ROWS.min(rows - row - ROWS)) } else { (0, upper) };
        tiles.reshape(upper, lower);
        for column in (0..n).step_by(2 * LANES) {
            let right = if column + LANES < n { LANES } else { 0 };
            let at = |below: usize, right: usize| (row + below) * n + column + right;
            // SAFETY: tiles of `upper` and `lower` rows by 16 columns lie within `c`, those of
            // `depth` words within `a` and `b`, as asserted above.
            unsafe {
                let left = a.words.as_ptr().add(row * a.row);
                let (b, c) = (b.as_ptr().add(column), c.as_mut_ptr());
                bf16_two_by_two::<ADD>(
                    [left, left.add(below * a.row)],
                    a.row,
                    [b, b.add(right)],
                    n,
                    depth / ROW_WORDS,
                    [
                        c.add(at(0, 0)),
                        c.add(at(0, right)),
                        c.add(at(below, 0)),
                        c.add(at(below, right)),
                    ],
                );
            }
        }
    }
}

/// Two tiles of rows by two of columns; `stride` numbers between the rows of `b` and `c`.
///
/// # Safety
/// Tiles must be configured for the rows of `a`, and all tiles must lie within their matrices.
unsafe fn bf16_two_by_two<const ADD: bool>(
    a: [*const u32; 2],
    a_stride: usize,
    b: [*const u32; 2],
    stride: usize,
    steps: usize,
    c: [*mut f32; 4],
) {
    macro_rules! call {
        ($($start:literal,)*) => {
            tile_asm!(
                $($start,)*
                "2:",
                "tileloadd tmm4, [{upper} + {a_stride}]",
                "tileloadd tmm6, [{left} + {stride}]",
                "tileloadd tmm7, [{right} + {stride}]",
                "tileloadd tmm5, [{lower} + {a_stride}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {upper}, 64",
                "add {lower}, 64",
                "add {left}, {sixteen}",
                "add {right}, {sixteen}",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{c0} + {stride}], tmm0",
                "tilestored [{c1} + {stride}], tmm1",
                "tilestored [{c2} + {stride}], tmm2",
                "tilestored [{c3} + {stride}], tmm3",;
                upper = inout(reg) a[0] => _,
                lower = inout(reg) a[1] => _,
                a_stride = in(reg) 4 * a_stride,
                left = inout(reg) b[0] => _,
                right = inout(reg) b[1] => _,
                stride = in(reg) 4 * stride,
                sixteen = in(reg) 4 * ROWS * stride,
                steps = inout(reg) steps => _,
                c0 = in(reg) c[0],
                c1 = in(reg) c[1],
                c2 = in(reg) c[2],
                c3 = in(reg) c[3],
            )
        };
    }
    // SAFETY: this function's contract.
    unsafe {
        if ADD {
            call!(
                "tileloadd tmm0, [{c0} + {stride}]",
                "tileloadd tmm1, [{c1} + {stride}]",
                "tileloadd tmm2, [{c2} + {stride}]",
                "tileloadd tmm3, [{c3} + {stride}]",
            );
        } else {
            call!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",);
        }
    }
}

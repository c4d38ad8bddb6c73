//! The table of kernels of one instruction set.

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use crate::{amx, avx2, avx512, avx512bf16, avxvnni};
use crate::{
    attention::{AttentionTask, Portable, attention},
    isa::{Isa, UnsupportedIsa},
    keys::BlockShape,
    ops::Heads,
    pack::PackedMatrix,
    pool::Shared,
    rows::{Excess, QuantizedRows, TILE_ROWS},
    scalar::{self, K_ALIGN, LANES, Place, TileHeads},
};

/// Some rows of `x` times some panels of `w`.
pub(crate) struct Product<'a> {
    pub(crate) x: &'a QuantizedRows,
    pub(crate) rows: Range<usize>,
    pub(crate) w: &'a PackedMatrix,
    pub(crate) panels: Range<usize>,
    /// Weights that the thread is likely to read after these.
    pub(crate) next: &'a [u8],
}

type RotateQuantize = unsafe fn(&mut [f32], usize, &mut [i8]) -> (f32, i32);
type Split = unsafe fn(&mut [i8], &mut [Excess]) -> usize;
type RmsNorm = unsafe fn(&[f32], &[f32], f32, &mut [f32]);
type Matmul = unsafe fn(&QuantizedRows, Range<usize>, &PackedMatrix, Range<usize>, &mut [f32]);
type FinishTile = unsafe fn(&[f32], usize, usize, &Place<'_>);
type FinishQkv = unsafe fn(&[f32], &TileHeads<'_>, &[f32], &Place<'_>);
type Attention = unsafe fn(&AttentionTask<'_>, &mut [f32]);

/// Consecutive columns of attention of one key/value head: for every token the query heads that share it.
pub(crate) struct TileAttention<'a> {
    /// Query heads that share the key/value head.
    pub(crate) group: usize,
    /// Width of a head.
    pub(crate) head_dim: usize,
    /// Last position that the first token of the segment sees.
    pub(crate) first: usize,
    /// How many more each token sees than the one before it.
    pub(crate) step: usize,
    /// Columns of the segment: `token · group + head`.
    pub(crate) columns: Range<usize>,
    /// bf16 rows `query_stride` apart, one a token of the segment: `[group, shape.row]`.
    pub(crate) queries: &'a [u16],
    /// Words from one row of queries to the next.
    pub(crate) query_stride: usize,
    /// The head's keys and values of the first block, and all that follows.
    pub(crate) words: &'a [u16],
    /// Measures of blocks.
    pub(crate) shape: BlockShape,
    /// Words of [`crate::rows::Intermediate`] of `out_width` numbers a row, of which the segment's rows
    /// begin with `out_row`, and the numbers of the task's heads with `out_column`.
    pub(crate) out: &'a Shared<u16>,
    pub(crate) out_width: usize,
    pub(crate) out_row: usize,
    pub(crate) out_column: usize,
}

/// Values of one head for some positions of one group (see [`crate::keys::KeyBlocks`]).
pub(crate) struct StoreValues<'a> {
    /// bf16 rows `stride` apart, one a position: `[row]`.
    pub(crate) rows: &'a [u16],
    pub(crate) stride: usize,
    /// Place of the first position in the group.
    pub(crate) first: usize,
    /// Number of positions.
    pub(crate) len: usize,
    /// Whether zeros follow them to the end of the group.
    pub(crate) last: bool,
    /// Numbers in a row.
    pub(crate) row: usize,
}

/// Whole tiles of [`QuantizedRows`] that are written together, the last of which may have fewer rows.
pub(crate) struct QuantizedTiles<'a> {
    /// Numbers in a row.
    pub(crate) width: usize,
    /// `[tiles, width / 64, 16, 64]`.
    pub(crate) data: &'a mut [i8],
    /// `[rows]`.
    pub(crate) scales: &'a mut [f32],
}

impl QuantizedTiles<'_> {
    /// Number of rows.
    pub(crate) fn rows(&self) -> usize {
        self.scales.len()
    }

    /// The rows of each tile.
    pub(crate) fn tiles(&mut self) -> impl Iterator<Item = QuantizedTiles<'_>> {
        let width = self.width;
        let tiles = self.data.chunks_mut(TILE_ROWS * width).zip(self.scales.chunks_mut(TILE_ROWS));
        tiles.map(move |(data, scales)| QuantizedTiles { width, data, scales })
    }
}

type Finished = unsafe fn(&Product<'_>, usize, &Shared<f32>);
type FinishedWords = unsafe fn(&Product<'_>, usize, &Shared<u16>);
type QuantizeTiles = unsafe fn(&[u16], &mut QuantizedTiles<'_>);
type NormQuantizeTiles = unsafe fn(&[f32], &[f32], f32, &mut QuantizedTiles<'_>);
type Project = unsafe fn(&Product<'_>, &Heads, &[f32], &Shared<u16>);

/// Kernels that finish their products themselves, without a buffer of numbers in between, and whose
/// attention reads bf16 numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TileKernels {
    pub(crate) copy: Finished,
    pub(crate) add: Finished,
    pub(crate) gate_up: FinishedWords,
    pub(crate) qkv: Project,
    /// The group's values begin at the pointer.
    pub(crate) store_values: unsafe fn(&StoreValues<'_>, *mut u16),
    pub(crate) attention: unsafe fn(&TileAttention<'_>),
    /// Columns that attention computes together.
    pub(crate) columns: usize,
    /// Rotate and round rows of whole blocks of `rotation` numbers, which are rounded to bf16 before.
    pub(crate) rotation: usize,
    pub(crate) quantize: QuantizeTiles,
    pub(crate) norm_quantize: NormQuantizeTiles,
}

/// Kernels of one instruction set that this CPU has.
///
/// A table is handed out only by [`Kernels::of`], after the check that its functions may be called.
#[derive(Debug)]
pub(crate) struct Kernels {
    pub(crate) isa: Isa,
    pub(crate) rotate_quantize: RotateQuantize,
    /// Splits off a row what its product could not hold; nothing for kernels that multiply any rows.
    pub(crate) split: Option<Split>,
    pub(crate) rms_norm: RmsNorm,
    pub(crate) matmul: Matmul,
    pub(crate) copy_tile: FinishTile,
    pub(crate) add_tile: FinishTile,
    pub(crate) finish_gate_up: FinishTile,
    pub(crate) finish_qkv: FinishQkv,
    pub(crate) attention: Attention,
    /// Used in place of the ones above where there are any.
    pub(crate) tiles: Option<TileKernels>,
}

static SCALAR: Kernels = Kernels {
    isa: Isa::Scalar,
    rotate_quantize: |x, block, out| {
        scalar::hadamard(x, block);
        scalar::quantize(x, out)
    },
    split: None,
    rms_norm: |x, weight, eps, out| scalar::rms_norm(x, weight, eps, out),
    matmul: |x, rows, w, panels, out| scalar::matmul(x, rows, w, panels, out),
    copy_tile: scalar::finish_linear::<false>,
    add_tile: scalar::finish_linear::<true>,
    finish_gate_up: scalar::finish_gate_up,
    finish_qkv: scalar::finish_qkv,
    attention: |task, out| attention::<Portable>(task, out),
    tiles: None,
};

impl Kernels {
    /// The kernels of `isa`, or of the best instruction set of this CPU.
    ///
    /// # Errors
    /// [`UnsupportedIsa`] when this CPU lacks `isa`.
    pub(crate) fn of(isa: Option<Isa>) -> Result<&'static Self, UnsupportedIsa> {
        let isa = isa.unwrap_or_else(Isa::best);
        if !isa.is_available() {
            return Err(UnsupportedIsa(isa));
        }
        Ok(match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => &amx::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => &avx512bf16::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => &avx512::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => &avxvnni::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &avx2::KERNELS,
            _ => &SCALAR,
        })
    }

    /// [`scalar::hadamard`], then [`scalar::quantize`].
    pub(crate) fn rotate_quantize(
        &self,
        x: &mut [f32],
        block: usize,
        out: &mut [i8],
    ) -> (f32, i32) {
        assert!(x.len().is_multiple_of(block) && block.is_power_of_two() && out.len() >= x.len());
        // SAFETY: the table was handed out after the CPU check; shapes checked above.
        unsafe { (self.rotate_quantize)(x, block, out) }
    }

    /// Splits a row for [`Kernels::matmul`], if that needs it; returns how much was split off.
    pub(crate) fn split(&self, row: &mut [i8], excess: &mut [Excess]) -> usize {
        assert!(row.len().is_multiple_of(K_ALIGN) && excess.len() == row.len() / 4);
        // SAFETY: the table was handed out after the CPU check; shapes checked above.
        self.split.map_or(0, |split| unsafe { split(row, excess) })
    }

    /// [`scalar::rms_norm`].
    pub(crate) fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        assert!(x.len() == weight.len() && x.len() == out.len());
        // SAFETY: the table was handed out after the CPU check; shapes checked above.
        unsafe { (self.rms_norm)(x, weight, eps, out) }
    }

    /// [`scalar::matmul`].
    pub(crate) fn matmul(
        &self,
        x: &QuantizedRows,
        rows: Range<usize>,
        w: &PackedMatrix,
        panels: Range<usize>,
        out: &mut [f32],
    ) {
        assert!(rows.start <= rows.end && rows.end <= x.rows() && x.width() == w.inputs());
        assert!(panels.start <= panels.end && panels.end <= w.panels());
        assert_eq!(out.len(), rows.len() * panels.len() * LANES);
        // SAFETY: the table was handed out after the CPU check; shapes checked above.
        unsafe { (self.matmul)(x, rows, w, panels, out) }
    }

    /// [`scalar::finish_linear`].
    ///
    /// # Safety
    /// The place must belong to this task alone.
    pub(crate) unsafe fn finish_linear<const ADD: bool>(
        &self,
        tile: &[f32],
        columns: usize,
        width: usize,
        place: &Place<'_>,
    ) {
        let finish = if ADD { self.add_tile } else { self.copy_tile };
        // SAFETY: the table was handed out after the CPU check; and this function's contract.
        unsafe { finish(tile, columns, width, place) }
    }

    /// [`scalar::finish_gate_up`].
    ///
    /// # Safety
    /// The place must belong to this task alone.
    pub(crate) unsafe fn finish_gate_up(
        &self,
        tile: &[f32],
        columns: usize,
        width: usize,
        place: &Place<'_>,
    ) {
        // SAFETY: as above.
        unsafe { (self.finish_gate_up)(tile, columns, width, place) }
    }

    /// [`scalar::finish_qkv`].
    ///
    /// # Safety
    /// The place must belong to this task alone.
    pub(crate) unsafe fn finish_qkv(
        &self,
        tile: &[f32],
        heads: &TileHeads<'_>,
        angles: &[f32],
        place: &Place<'_>,
    ) {
        // SAFETY: as above.
        unsafe { (self.finish_qkv)(tile, heads, angles, place) }
    }

    /// [`attention`]: `[heads, tokens, head_dim]` into `out`.
    pub(crate) fn attention(&self, task: &AttentionTask<'_>, out: &mut [f32]) {
        let numbers = task.heads * task.head_dim;
        assert!(out.len() == task.tokens * numbers && task.head_dim.is_multiple_of(2));
        assert!(task.queries.len() >= (task.tokens - 1) * task.query_stride + numbers);
        let last = task.seen(task.tokens - 1) - 1;
        for rows in [task.keys, task.values] {
            assert!(rows.len() >= last * task.stride + task.head_dim);
        }
        // SAFETY: the table was handed out after the CPU check; shapes checked above.
        unsafe { (self.attention)(task, out) }
    }
}

//! The steps of a decoder block: the crate's safe surface.
//!
//! A [`Pass`] takes rows through them in one of two ways. Where there are enough rows for all threads,
//! each thread takes its own through one step after the other ([`Pass::for_each_part`]), and they stay in its
//! core's cache; threads wait for each other only where attention reads keys and values of them all. Fewer
//! rows go through every step on all threads, which share the columns: then each core reads only its part
//! of the weights.

use std::{
    cell::RefCell,
    f32::consts::LOG2_E,
    ops::Range,
    sync::{Mutex, PoisonError},
};

use crate::{
    attention::{AttentionTask, tokens_per_block},
    dispatch::{Kernels, Product, QuantizedTiles, StoreValues, TileAttention, TileKernels},
    isa::{Isa, UnsupportedIsa},
    keys::{BLOCK, BlockShape, GROUP, KeyValues, NewPositions, Projection},
    pack::{MatrixSource, PackError, PackedMatrix, padded_outputs},
    pool::{Pool, Shared, Turn},
    rows::{Excess, Intermediate, QuantizedRows, TILE_ROWS},
    scalar::{self, K_ALIGN, LANES, Place, TileHeads},
};

/// Rows of one product between two visits of the epilogue: its tile stays in the first-level cache.
const ROW_BLOCK: usize = 128;

/// Panels that are computed together: 32 outputs.
const PANEL_PAIR: usize = 2;

/// Numbers of a product that are computed between two visits of the epilogue, about.
const TILE_NUMBERS: usize = 16 << 10;

/// Tasks of attention per thread that even out what threads are held up by.
const MIN_TASKS_PER_THREAD: usize = 4;

/// Fewest rows that one thread takes through all steps, more than a tile: with fewer, reading all weights
/// takes longer than handing rows over.
const MIN_ROWS_PER_THREAD: usize = TILE_ROWS + 1;

/// Blocks of queries of one attention task at most: they share the keys that were made ready.
const MAX_QUERY_BLOCKS: usize = 4;

/// Kernels of one instruction set on one thread pool.
#[derive(Debug)]
pub struct Engine {
    kernels: &'static Kernels,
    pool: Pool,
}

impl Engine {
    /// An engine for `isa` (the best one by default) and `threads` threads (see [`Pool::new`]).
    ///
    /// # Errors
    /// [`UnsupportedIsa`] when this CPU lacks `isa`.
    pub fn new(isa: Option<Isa>, threads: Option<usize>) -> Result<Self, UnsupportedIsa> {
        Ok(Self { kernels: Kernels::of(isa)?, pool: Pool::new(threads) })
    }

    /// Instruction set of the kernels.
    pub fn isa(&self) -> Isa {
        self.kernels.isa
    }

    /// Number of threads, the caller's own included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Waits for a turn on the pool.
    pub fn pass(&self) -> Pass {
        Pass { kernels: self.kernels, turn: self.pool.turn() }
    }
}

/// Head counts and width of attention.
///
/// One row of the joint projection is `[num_attention_heads + 2 · num_key_value_heads, head_dim]`:
/// queries, keys, values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads, a divisor of the query heads.
    pub num_key_value_heads: usize,
    /// Width of a head, even.
    pub head_dim: usize,
}

impl Heads {
    /// Numbers in a row of the joint projection.
    pub fn qkv_width(&self) -> usize {
        self.all() * self.head_dim
    }

    /// Numbers in a row of keys, or of values.
    pub fn kv_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Numbers in a row of queries, or of attention's result.
    pub fn query_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Query heads per key/value head.
    fn group(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }

    /// All heads of the joint projection.
    fn all(&self) -> usize {
        self.num_attention_heads + 2 * self.num_key_value_heads
    }

    /// What a head of the joint projection is multiplied by after its rotation; nothing for values,
    /// which are not rotated. Attention takes powers of two in place of `e`.
    pub(crate) fn scale(&self, head: usize) -> Option<f32> {
        match head {
            _ if head < self.num_attention_heads => {
                Some(1.0 / (self.head_dim as f32).sqrt() * LOG2_E)
            }
            _ if head < self.num_attention_heads + self.num_key_value_heads => Some(1.0),
            _ => None,
        }
    }

    /// Outputs of one head in the packed joint projection.
    pub fn packed_head(&self) -> usize {
        padded_outputs(self.head_dim)
    }
}

/// Tokens of one sequence within a chunk, as far from each other.
#[derive(Debug, Clone)]
pub struct Segment<'a> {
    /// Rows of the chunk.
    pub rows: Range<usize>,
    /// Last position of the sequence that the first of them sees.
    pub first: usize,
    /// How many more positions each one sees than the one before it.
    pub step: usize,
    /// Keys and values of all positions up to the last that is seen.
    pub cache: &'a KeyValues,
}

impl Segment<'_> {
    /// The number of positions that the last row sees.
    fn seen(&self) -> usize {
        match self.rows.len().checked_sub(1) {
            Some(last) => self.first + last * self.step + 1,
            None => 0,
        }
    }
}

/// Rows whose keys and values are added to a sequence's.
pub struct Extension<'a> {
    /// Rows of the projection.
    pub rows: Range<usize>,
    /// Where they go.
    pub places: NewPositions<'a>,
}

/// A turn on the pool, and the steps that can be run during it.
#[derive(Debug)]
pub struct Pass {
    kernels: &'static Kernels,
    turn: Turn,
}

thread_local! {
    /// Result of the task at hand before it is put in place, some 25 KiB per thread.
    static TASK_OUT: RefCell<Vec<f32>> = RefCell::default();
}

/// A buffer of `len` numbers of this thread; what it holds is unspecified.
fn with_buffer(len: usize, run: impl FnOnce(&mut [f32])) {
    TASK_OUT.with_borrow_mut(|buffer| {
        if buffer.len() < len {
            buffer.resize(len, 0.0);
        }
        run(&mut buffer[..len]);
    });
}

impl Pass {
    /// How many parts `rows` rows are best cut into for [`Pass::for_each_part`]: as many as there are
    /// threads for them, or one.
    pub fn parts(&self, rows: usize) -> usize {
        let threads = self.turn.free_threads();
        if rows >= MIN_ROWS_PER_THREAD * threads { threads } else { 1 }
    }

    /// Calls `run(pass, part)` for every part: for a single one with this pass, else part by part with
    /// passes of one thread. Part `i` stays on thread `i` from call to call, if nothing holds that up.
    ///
    /// # Errors
    /// One of those of `run`; the other parts are still run.
    pub fn for_each_part<T: Send, E: Send>(
        &self,
        parts: &mut [T],
        run: impl Fn(&Pass, &mut T) -> Result<(), E> + Sync,
    ) -> Result<(), E> {
        if let [part] = parts {
            return run(self, part);
        }
        let alone = Pass { kernels: self.kernels, turn: Turn::alone() };
        let tasks = parts.len();
        let parts = Shared::new(parts);
        let result = Mutex::new(Ok(()));
        self.turn.for_each_own(tasks, |i| {
            // SAFETY: every part belongs to one task.
            if let Err(error) = run(&alone, &mut unsafe { parts.range(i, 1) }[0]) {
                *result.lock().unwrap_or_else(PoisonError::into_inner) = Err(error);
            }
        });
        result.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `run(i, chunk)` for every `width · rows` numbers of `x`, on all threads.
    pub fn for_each_rows(
        &self,
        x: &mut [f32],
        width: usize,
        run: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        let rows = x.len() / width;
        let shared = Shared::new(x);
        self.for_row_groups(rows, |group| {
            for row in group {
                // SAFETY: every row belongs to one task.
                run(row, unsafe { shared.range(row * width, width) });
            }
        });
    }

    /// Cuts rows into groups, a few per thread.
    fn for_row_groups(&self, rows: usize, run: impl Fn(Range<usize>) + Sync) {
        let size = (rows / (4 * self.turn.threads())).clamp(1, 16);
        self.turn.for_each(rows.div_ceil(size), |task| {
            run(task * size..rows.min((task + 1) * size));
        });
    }

    /// Quantises and packs matrices into one allocation.
    ///
    /// # Errors
    /// [`PackError`], the last one of a source when several fail.
    ///
    /// # Panics
    /// When a source has more than [`MAX_INPUTS`](crate::MAX_INPUTS) inputs or unpadded outputs.
    pub fn pack<E: Send>(
        &self,
        sources: Vec<MatrixSource<'_, E>>,
    ) -> Result<Vec<PackedMatrix>, PackError<E>> {
        PackedMatrix::pack(&self.turn, self.kernels, sources)
    }

    /// RMSNorm, then quantisation.
    ///
    /// # Shapes
    /// - `x`: `[rows, weight.len()]`
    pub fn rms_norm_quantize(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut QuantizedRows) {
        let width = weight.len();
        let rows = x.len() / width;
        if let Some(tiles) = self.rotation_on_tiles(width) {
            self.for_quantized_tiles(rows, width, out, |rows, out| {
                let x = &x[rows.start * width..rows.end * width];
                // SAFETY: the table of kernels was handed out after the CPU check.
                unsafe { (tiles.norm_quantize)(x, weight, eps, out) };
            });
            return;
        }
        let out = RowWriter::new(out, rows, width, self.kernels);
        self.for_row_groups(rows, |group| {
            with_buffer(width, |normed| {
                for row in group {
                    self.kernels.rms_norm(&x[row * width..][..width], weight, eps, normed);
                    // SAFETY: every row belongs to one task.
                    unsafe { out.write(row, normed) };
                }
            });
        });
    }

    /// Quantises rows of `width` numbers, which are rotated in place.
    ///
    /// # Shapes
    /// - `x`: `[rows, width]`
    pub fn quantize(&self, x: &mut [f32], width: usize, out: &mut QuantizedRows) {
        let rows = x.len() / width;
        let x = Shared::new(x);
        let out = RowWriter::new(out, rows, width, self.kernels);
        self.for_row_groups(rows, |group| {
            for row in group {
                // SAFETY: every row belongs to one task.
                unsafe { out.write(row, x.range(row * width, width)) };
            }
        });
    }

    /// Quantises what attention, or gate and up, have left; it is rotated in place.
    pub fn quantize_intermediate(&self, x: &mut Intermediate, out: &mut QuantizedRows) {
        let Intermediate { rows, width, .. } = *x;
        if let Some(tiles) = self.rotation_on_tiles(width) {
            self.for_quantized_tiles(rows, width, out, |rows, out| {
                let words =
                    &x.words[rows.start * width..rows.end.next_multiple_of(TILE_ROWS) * width];
                // SAFETY: as above.
                unsafe { (tiles.quantize)(words, out) };
            });
        } else {
            if self.kernels.tiles.is_some() {
                x.widen();
            }
            self.quantize(&mut x.numbers[..rows * width], width, out);
        }
    }

    /// Kernels that rotate rows of `width` numbers on tiles, if there are any.
    fn rotation_on_tiles(&self, width: usize) -> Option<&'static TileKernels> {
        self.kernels.tiles.as_ref().filter(|tiles| width.is_multiple_of(tiles.rotation))
    }

    /// Calls `run(rows, out)` for runs of rows, as many as there are threads for them.
    fn for_quantized_tiles(
        &self,
        rows: usize,
        width: usize,
        out: &mut QuantizedRows,
        run: impl Fn(Range<usize>, &mut QuantizedTiles<'_>) + Sync,
    ) {
        out.reshape(rows, width, true);
        let size = TILE_ROWS * rows.div_ceil(TILE_ROWS).div_ceil(self.turn.threads()).max(1);
        let (data, scales) = (Shared::new(&mut out.data), Shared::new(&mut out.scales));
        self.turn.for_each(rows.div_ceil(size), |task| {
            let (start, len) = (task * size, size.min(rows - task * size));
            // SAFETY: every row belongs to one task.
            let mut out = unsafe {
                QuantizedTiles {
                    width,
                    data: data.range(start * width, len.next_multiple_of(TILE_ROWS) * width),
                    scales: scales.range(start, len),
                }
            };
            run(start..start + len, &mut out);
        });
    }

    /// Cuts `x · Wᵀ` into as many tasks as there are threads, each some rows by a run of panels, which
    /// begins at a multiple of `unit` and holds whole units.
    fn for_products(
        &self,
        x: &QuantizedRows,
        w: &PackedMatrix,
        unit: usize,
        run: impl Fn(&Product<'_>) + Sync,
    ) {
        assert_eq!(x.width(), w.inputs());
        let units = w.panels().div_ceil(unit);
        let (row_shares, column_shares) = grid(self.turn.free_threads(), x.rows(), units);
        let share_rows = x.rows().div_ceil(row_shares).next_multiple_of(TILE_ROWS);
        self.turn.for_each_own(row_shares * column_shares, |task| {
            let (row_share, share) = (task / column_shares, task % column_shares);
            let rows =
                x.rows().min(row_share * share_rows)..x.rows().min((row_share + 1) * share_rows);
            let start = |share: usize| w.panels().min(units * share / column_shares * unit);
            let (panels, next) = (start(share)..start(share + 1), w.next(share, column_shares));
            run(&Product { x, rows, w, panels, next });
        });
    }

    /// Computes `x · Wᵀ + bias` tile by tile; `finish(rows, panels, tile)` is called for each.
    ///
    /// # Shapes
    /// - `tile`: `[rows, panels · 16]`
    fn for_tiles(
        &self,
        x: &QuantizedRows,
        w: &PackedMatrix,
        unit: usize,
        finish: impl Fn(Range<usize>, Range<usize>, &[f32]) + Sync,
    ) {
        self.for_products(x, w, unit, |Product { rows, panels, .. }| {
            let block_rows = ROW_BLOCK.min(rows.len()).max(1);
            // Few rows: long runs of panels, which can be fetched ahead.
            let run = (TILE_NUMBERS / (block_rows * unit * LANES)).max(1) * unit;
            with_buffer(block_rows * run.min(panels.len()) * LANES, |tile| {
                for first in panels.clone().step_by(run) {
                    let panels = first..panels.end.min(first + run);
                    for start in rows.clone().step_by(ROW_BLOCK) {
                        let rows = start..rows.end.min(start + ROW_BLOCK);
                        let tile = &mut tile[..rows.len() * panels.len() * LANES];
                        self.kernels.matmul(x, rows.clone(), w, panels.clone(), tile);
                        finish(rows, panels.clone(), tile);
                    }
                }
            });
        });
    }

    /// `out = x · Wᵀ + bias`, or `out += …` when `ADD`.
    ///
    /// # Shapes
    /// - `out`: `[rows, width]`, `width` the outputs of `w` without those that only fill a panel
    pub fn linear<const ADD: bool>(
        &self,
        x: &QuantizedRows,
        w: &PackedMatrix,
        width: usize,
        out: &mut [f32],
    ) {
        let out = Shared::new(out);
        if let Some(tiles) = &self.kernels.tiles {
            let kernel = if ADD { tiles.add } else { tiles.copy };
            self.for_products(x, w, PANEL_PAIR, |product| {
                // SAFETY: every tile of the output belongs to one task; the table of kernels was
                // handed out after the CPU check.
                unsafe { kernel(product, width, &out) };
            });
            return;
        }
        self.for_tiles(x, w, PANEL_PAIR, |rows, panels, tile| {
            let first = panels.start * LANES;
            let len = (panels.end * LANES).min(width) - first;
            let place = Place { out: &out, start: rows.start * width + first, stride: width };
            // SAFETY: every tile of the output belongs to one task.
            unsafe { self.kernels.finish_linear::<ADD>(tile, panels.len() * LANES, len, &place) };
        });
    }

    /// `out = SiLU(gate) · up`, rows of `width` numbers, where panels of `w` are those of gate and up in turn.
    pub fn gate_up(
        &self,
        x: &QuantizedRows,
        w: &PackedMatrix,
        width: usize,
        out: &mut Intermediate,
    ) {
        out.reshape(x.rows(), width, self.kernels.tiles.is_some());
        if let Some(tiles) = &self.kernels.tiles {
            let out = Shared::new(&mut out.words);
            self.for_products(x, w, PANEL_PAIR, |product| {
                // SAFETY: as above.
                unsafe { (tiles.gate_up)(product, width, &out) };
            });
            return;
        }
        let out = Shared::new(&mut out.numbers);
        self.for_tiles(x, w, PANEL_PAIR, |rows, panels, tile| {
            let first = panels.start / 2 * LANES;
            let len = (panels.end / 2 * LANES).min(width) - first;
            let place = Place { out: &out, start: rows.start * width + first, stride: width };
            // SAFETY: every tile of the output belongs to one task.
            unsafe { self.kernels.finish_gate_up(tile, panels.len() * LANES, len, &place) };
        });
    }

    /// The joint projection; queries and keys are rotated, queries also scaled by `log₂ e / √head_dim`.
    ///
    /// # Shapes
    /// - `w`: every head fills [`Heads::packed_head`] outputs
    /// - `angles`: `[rows, head_dim]`, cosines of the row's rotary angles, then sines
    pub fn qkv(
        &self,
        x: &QuantizedRows,
        w: &PackedMatrix,
        heads: Heads,
        angles: &[f32],
        out: &mut Projection,
    ) {
        let (dim, padded) = (heads.head_dim, heads.packed_head());
        assert!(w.outputs() == heads.all() * padded && angles.len() == x.rows() * dim);
        if let Some(tiles) = &self.kernels.tiles {
            out.words.grow(x.rows() * Projection::width(&heads));
            let out = Shared::new(&mut out.words);
            self.for_products(x, w, padded / LANES, |product| {
                // SAFETY: every head of a row belongs to one task; the table of kernels was handed
                // out after the CPU check.
                unsafe { (tiles.qkv)(product, &heads, angles, &out) };
            });
            return;
        }
        let scales: Vec<_> = (0..heads.all()).map(|head| heads.scale(head)).collect();
        out.numbers.grow(x.rows() * heads.qkv_width());
        let out = Shared::new(&mut out.numbers);
        self.for_tiles(x, w, padded / LANES, |rows, panels, tile| {
            let within = panels.start * LANES / padded..panels.end * LANES / padded;
            let start = rows.start * heads.qkv_width() + within.start * dim;
            let place = Place { out: &out, start, stride: heads.qkv_width() };
            let tile_heads = TileHeads { head_dim: dim, padded, scales: &scales[within] };
            // SAFETY: every head of a row belongs to one task.
            unsafe {
                self.kernels.finish_qkv(tile, &tile_heads, &angles[rows.start * dim..], &place)
            };
        });
    }

    /// Makes room for `more` positions, and for `expected` in all that are still to come.
    pub fn grow<'a>(
        &self,
        heads: Heads,
        cache: &'a mut KeyValues,
        more: usize,
        expected: usize,
    ) -> NewPositions<'a> {
        match self.kernels.tiles {
            Some(_) => NewPositions::in_blocks(&heads, cache, more, expected),
            None => NewPositions::in_rows(&heads, cache, more, expected),
        }
    }

    /// Puts the keys and values of rows in their places.
    pub fn extend(&self, heads: Heads, projection: &Projection, extensions: &mut [Extension<'_>]) {
        for Extension { rows, places } in extensions {
            assert_eq!(rows.len(), places.positions.len());
            match &self.kernels.tiles {
                Some(tiles) => {
                    self.extend_blocks(tiles, heads, &projection.words, rows.start, places);
                }
                None => extend_rows(heads, &projection.numbers, rows.start, places),
            }
        }
    }

    /// [`Pass::extend`] in bf16, from row `row` on: a task is one group of positions of one head.
    fn extend_blocks(
        &self,
        tiles: &TileKernels,
        heads: Heads,
        projection: &[u16],
        row: usize,
        places: &NewPositions<'_>,
    ) {
        let (shape, width) = (BlockShape::new(&heads), Projection::width(&heads));
        let NewPositions { positions: new, words, .. } = places;
        let groups = new.start / GROUP..new.end.div_ceil(GROUP);
        let pairs = heads.num_key_value_heads;
        self.turn.for_each(groups.len() * pairs, |task| {
            let (group, head) = (groups.start + task / pairs, task % pairs);
            let positions = new.start.max(group * GROUP)..new.end.min((group + 1) * GROUP);
            let row = row + positions.start - new.start;
            let place = |kind| {
                Projection::place(&heads, row, heads.num_attention_heads + kind * pairs + head)
            };
            let first = positions.start % GROUP;
            let block = positions.start / BLOCK * shape.block() + head * 2 * shape.half();
            let in_block = group % (BLOCK / GROUP) * GROUP;
            let keys = block + (in_block + first) * shape.row;
            // SAFETY: every position belongs to one task.
            let keys = unsafe { words.range(keys, positions.len() * shape.row) };
            for (i, key) in keys.chunks_exact_mut(shape.row).enumerate() {
                key.copy_from_slice(&projection[place(0) + i * width..][..shape.row]);
            }
            let values = block + shape.half() + in_block * shape.row;
            let values = words.places(values, GROUP * shape.row);
            let task = StoreValues {
                rows: &projection[place(1)..],
                stride: width,
                first,
                len: positions.len(),
                last: places.last && positions.end == new.end,
                row: shape.row,
            };
            // SAFETY: every position belongs to one task, and what follows the last to nobody else;
            // the table of kernels was handed out after the CPU check.
            unsafe { (tiles.store_values)(&task, values) };
        });
    }

    /// Causal attention of every segment to its own keys and values: rows of `query_width` numbers, up to
    /// the last one of a segment.
    pub fn attention(
        &self,
        heads: Heads,
        segments: &[Segment<'_>],
        projection: &Projection,
        out: &mut Intermediate,
    ) {
        let rows = segments.iter().map(|segment| segment.rows.end).max().unwrap_or(0);
        out.reshape(rows, heads.query_width(), self.kernels.tiles.is_some());
        match &self.kernels.tiles {
            Some(tiles) => {
                self.attend_to_blocks(tiles, heads, segments, &projection.words, &mut out.words);
            }
            None => self.attend_to_rows(heads, segments, &projection.numbers, &mut out.numbers),
        }
    }

    /// [`Pass::attention`] in bf16.
    fn attend_to_blocks(
        &self,
        tiles: &TileKernels,
        heads: Heads,
        segments: &[Segment<'_>],
        projection: &[u16],
        out: &mut [u16],
    ) {
        let (dim, group) = (heads.head_dim, heads.group());
        let (shape, query_stride) = (BlockShape::new(&heads), Projection::width(&heads));
        let columns = |segment: &Segment<'_>| segment.rows.len() * group;
        let all = segments.iter().map(columns).sum::<usize>() * heads.num_key_value_heads;
        let fair = all / (MIN_TASKS_PER_THREAD * self.turn.threads());
        let size = tiles.columns * fair.div_ceil(tiles.columns).clamp(1, MAX_QUERY_BLOCKS);
        // Head by head, so that the second-level cache keeps what they read; the last tokens see most keys: a
        // head's longest tasks come first.
        let mut tasks = Vec::new();
        for segment in segments {
            assert!(segment.cache.blocks.positions >= segment.seen());
            for head in 0..heads.num_key_value_heads {
                for start in (0..columns(segment)).step_by(size).rev() {
                    tasks.push((segment, start..columns(segment).min(start + size), head));
                }
            }
        }
        let out = Shared::new(out);
        self.turn.for_each(tasks.len(), |task| {
            let (segment, columns, head) = &tasks[task];
            let task = TileAttention {
                group,
                head_dim: dim,
                first: segment.first,
                step: segment.step,
                columns: columns.clone(),
                queries: &projection[Projection::place(&heads, segment.rows.start, head * group)..],
                query_stride,
                words: &segment.cache.blocks.words()[head * 2 * shape.half()..],
                shape,
                out: &out,
                out_width: heads.query_width(),
                out_row: segment.rows.start,
                out_column: head * group * dim,
            };
            // SAFETY: every head of a token belongs to one task; the table of kernels was handed out
            // after the CPU check.
            unsafe { (tiles.attention)(&task) };
        });
    }

    /// [`Pass::attention`] in fp32.
    fn attend_to_rows(&self, heads: Heads, segments: &[Segment<'_>], qkv: &[f32], out: &mut [f32]) {
        let block = tokens_per_block(heads.group());
        let all = segments.iter().map(|segment| segment.rows.len()).sum::<usize>();
        let fair = all * heads.num_key_value_heads / (MIN_TASKS_PER_THREAD * self.turn.threads());
        let block = block * fair.div_ceil(block).clamp(1, MAX_QUERY_BLOCKS);
        // Head by head, so that the second-level cache keeps what they read; the last tokens see most keys: a
        // head's longest tasks come first.
        let mut tasks = Vec::new();
        for segment in segments {
            for start in (0..segment.rows.len()).step_by(block).rev() {
                for head in 0..heads.num_key_value_heads {
                    tasks.push((segment, start..segment.rows.len().min(start + block), head));
                }
            }
        }
        let (dim, group) = (heads.head_dim, heads.group());
        let out = Shared::new(out);
        self.turn.for_each(tasks.len(), |task| {
            let (segment, tokens, head) = &tasks[task];
            let row = segment.rows.start + tokens.start;
            let task = AttentionTask {
                heads: group,
                first: segment.first + tokens.start * segment.step,
                step: segment.step,
                tokens: tokens.len(),
                head_dim: dim,
                queries: &qkv[row * heads.qkv_width() + head * group * dim..],
                query_stride: heads.qkv_width(),
                keys: &segment.cache.keys[head * dim..],
                values: &segment.cache.values[head * dim..],
                stride: heads.kv_width(),
            };
            with_buffer(group * tokens.len() * dim, |result| {
                self.kernels.attention(&task, result);
                for (i, result) in result.chunks_exact(dim).enumerate() {
                    let (row, head) = (row + i % tokens.len(), head * group + i / tokens.len());
                    // SAFETY: every head of a token belongs to one task.
                    let out = unsafe { out.range(row * heads.query_width() + head * dim, dim) };
                    scalar::copy(result, out);
                }
            });
        });
    }
}

/// Into how many shares of rows and of units of columns a product is cut for `threads` threads: those that leave
/// the busiest thread as little as possible, and of such the fewest shares of rows, so that each thread reads
/// few weights.
fn grid(threads: usize, rows: usize, units: usize) -> (usize, usize) {
    /// Units of rows that are multiplied while their weights are read: fewer take as long.
    const LEAST: usize = 2;
    let cut = |row_shares: usize| (row_shares, (threads / row_shares).min(units.max(1)));
    let largest = |&(row_shares, column_shares): &(usize, usize)| {
        let row_units = rows.div_ceil(TILE_ROWS).div_ceil(row_shares);
        row_units.max(LEAST) * units.div_ceil(column_shares)
    };
    (1..=threads).map(cut).min_by_key(largest).unwrap_or((1, 1))
}

/// [`Pass::extend`] in fp32, from row `row` on.
fn extend_rows(heads: Heads, projection: &[f32], row: usize, places: &mut NewPositions<'_>) {
    let width = heads.kv_width();
    let rows = projection[row * heads.qkv_width()..].chunks_exact(heads.qkv_width());
    let places = places.keys.chunks_exact_mut(width).zip(places.values.chunks_exact_mut(width));
    for (row, (key, value)) in rows.zip(places) {
        let (new_key, new_value) = row[heads.query_width()..].split_at(width);
        key.copy_from_slice(new_key);
        value.copy_from_slice(new_value);
    }
}

/// [`QuantizedRows`] whose rows are written by several tasks.
struct RowWriter {
    kernels: &'static Kernels,
    stride: usize,
    block: usize,
    data: Shared<i8>,
    scales: Shared<f32>,
    offsets: Shared<i32>,
    /// Where kernels split rows, else empty.
    excess: Shared<Excess>,
    excess_len: Shared<u32>,
}

impl RowWriter {
    fn new(out: &mut QuantizedRows, rows: usize, width: usize, kernels: &'static Kernels) -> Self {
        out.reshape(rows, width, kernels.tiles.is_some());
        if kernels.split.is_some() {
            out.reshape_excess();
        }
        Self {
            kernels,
            stride: out.stride(),
            block: out.block(),
            data: Shared::new(&mut out.data),
            scales: Shared::new(&mut out.scales),
            offsets: Shared::new(&mut out.offsets),
            excess: Shared::new(&mut out.excess),
            excess_len: Shared::new(&mut out.excess_len),
        }
    }

    /// Rotates `numbers` in place and writes them as row `row`.
    ///
    /// # Safety
    /// No other task may write this row, and the rows given to [`RowWriter::new`] must still be
    /// borrowed.
    unsafe fn write(&self, row: usize, numbers: &mut [f32]) {
        // SAFETY: this function's contract.
        let (scale, offset) = unsafe { (self.scales.range(row, 1), self.offsets.range(row, 1)) };
        if self.kernels.tiles.is_some() {
            let mut q = vec![0; self.stride];
            let (s, sum) = self.kernels.rotate_quantize(numbers, self.block, &mut q);
            (scale[0], offset[0]) = (s, -128 * sum);
            let tile = row / TILE_ROWS * TILE_ROWS * self.stride + row % TILE_ROWS * K_ALIGN;
            for (step, q) in q.chunks_exact(K_ALIGN).enumerate() {
                // SAFETY: this function's contract.
                let out = unsafe { self.data.range(tile + step * TILE_ROWS * K_ALIGN, K_ALIGN) };
                out.copy_from_slice(q);
            }
            return;
        }
        // SAFETY: this function's contract.
        let q = unsafe { self.data.range(row * self.stride, self.stride) };
        let (s, sum) = self.kernels.rotate_quantize(numbers, self.block, q);
        (scale[0], offset[0]) = (s, -128 * sum);
        if self.kernels.split.is_some() {
            let words = self.stride / 4;
            // SAFETY: this function's contract.
            let (excess, len) =
                unsafe { (self.excess.range(row * words, words), self.excess_len.range(row, 1)) };
            len[0] = self.kernels.split(q, excess) as u32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_rows_are_shared_by_columns_and_few_columns_by_rows() {
        assert_eq!(grid(1, 500, 18), (1, 1));
        assert_eq!(grid(2, 16, 18), (1, 2));
        assert_eq!(grid(8, 16, 18), (1, 8));
        // Eight shares of 18 columns leave three to some; two leave nine to both, of a quarter of the rows.
        assert_eq!(grid(8, 128, 18), (4, 2));
        assert_eq!(grid(8, 32, 18), (1, 8));
        let (row_shares, column_shares) = grid(64, 512, 18);
        assert!(row_shares * column_shares <= 64 && row_shares > 1);
        assert_eq!(grid(3, 0, 18), (1, 3));
        assert_eq!(grid(64, 16, 3), (1, 3));
    }
}

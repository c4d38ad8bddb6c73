//! The steps of a decoder block, each over all threads: the crate's safe surface.

use std::{cell::RefCell, ops::Range};

use crate::{
    attention::{AttentionTask, tokens_per_block},
    dispatch::{Kernels, Product, QuantizedTiles, StoreValues, TileAttention, TileKernels},
    isa::{Isa, UnsupportedIsa},
    keys::{BLOCK, BlockShape, GROUP, KeyValues, Projection},
    pack::{MatrixSource, PackError, PackedMatrix, padded_outputs},
    pool::{Pool, Shared, Turn},
    rows::{Excess, Intermediate, QuantizedRows, TILE_ROWS},
    scalar::{self, K_ALIGN, LANES, Place, TileHeads},
};

/// Rows of one product between two visits of the epilogue: its tile stays in the first-level cache.
const ROW_BLOCK: usize = 128;

/// Panels that are computed together: 32 outputs.
const PANEL_PAIR: usize = 2;

/// Tasks per thread that even out what threads are held up by.
const MIN_TASKS_PER_THREAD: usize = 4;

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
    /// which are not rotated.
    pub(crate) fn scale(&self, head: usize) -> Option<f32> {
        match head {
            _ if head < self.num_attention_heads => Some(1.0 / (self.head_dim as f32).sqrt()),
            _ if head < self.num_attention_heads + self.num_key_value_heads => Some(1.0),
            _ => None,
        }
    }

    /// Outputs of one head in the packed joint projection.
    pub fn packed_head(&self) -> usize {
        padded_outputs(self.head_dim)
    }
}

/// Consecutive tokens of one sequence within a chunk.
#[derive(Debug, Clone)]
pub struct Segment<'a> {
    /// Rows of the chunk.
    pub rows: Range<usize>,
    /// Position of the first of them in its sequence.
    pub first: usize,
    /// Keys and values of all positions up to the last of the rows.
    pub cache: &'a KeyValues,
}

/// Rows of a chunk whose keys and values are added to a sequence's.
#[derive(Debug)]
pub struct Extension<'a> {
    /// Rows of the chunk.
    pub rows: Range<usize>,
    /// Positions of this sequence that are still to come, these included: memory is set aside for them.
    pub expected: usize,
    /// Where they go.
    pub cache: &'a mut KeyValues,
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
            self.quantize(&mut x.numbers, width, out);
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

    /// Cuts `x · Wᵀ` into tasks. They begin at multiples of `unit` panels and hold whole units.
    fn for_products(
        &self,
        x: &QuantizedRows,
        w: &PackedMatrix,
        unit: usize,
        run: impl Fn(&Product<'_>) + Sync,
    ) {
        assert_eq!(x.width(), w.inputs());
        let threads = self.turn.threads();
        // Few rows: long runs of panels, which can be fetched ahead. Many: tiles that stay in cache.
        let few = x.rows() <= ROW_BLOCK || self.kernels.tiles.is_some();
        let task_panels = unit * if few { units_per_task(w.panels() / unit, threads) } else { 1 };
        let column_tasks = w.panels().div_ceil(task_panels);
        let row_tasks = threads.div_ceil(column_tasks).min(x.rows().div_ceil(ROW_BLOCK));
        let task_rows = x.rows().div_ceil(row_tasks.max(1)).max(1).next_multiple_of(TILE_ROWS);
        self.turn.for_each(column_tasks * x.rows().div_ceil(task_rows), |task| {
            let (row_task, column_task) = (task / column_tasks, task % column_tasks);
            let first = column_task * task_panels;
            let panels = first..w.panels().min(first + task_panels);
            let rows = row_task * task_rows..x.rows().min((row_task + 1) * task_rows);
            run(&Product { x, rows, w, panels });
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
        finish: impl Fn(Range<usize>, Range<usize>, &mut [f32]) + Sync,
    ) {
        self.for_products(x, w, unit, |Product { rows, panels, .. }| {
            with_buffer(ROW_BLOCK.min(rows.len()) * panels.len() * LANES, |tile| {
                for start in rows.clone().step_by(ROW_BLOCK) {
                    let rows = start..rows.end.min(start + ROW_BLOCK);
                    let tile = &mut tile[..rows.len() * panels.len() * LANES];
                    self.kernels.matmul(x, rows.clone(), w, panels.clone(), tile);
                    finish(rows, panels.clone(), tile);
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

    /// The joint projection; queries and keys are rotated, queries also scaled by `1/√head_dim`.
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
            out.words.resize(x.rows() * Projection::width(&heads));
            let out = Shared::new(&mut out.words);
            self.for_products(x, w, padded / LANES, |product| {
                // SAFETY: every head of a row belongs to one task; the table of kernels was handed
                // out after the CPU check.
                unsafe { (tiles.qkv)(product, &heads, angles, &out) };
            });
            return;
        }
        let scales: Vec<_> = (0..heads.all()).map(|head| heads.scale(head)).collect();
        out.numbers.resize(x.rows() * heads.qkv_width(), 0.0);
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

    /// Adds the keys and values of rows to those of their sequences.
    pub fn extend(&self, heads: Heads, projection: &Projection, extensions: &mut [Extension<'_>]) {
        for extension in extensions {
            match &self.kernels.tiles {
                Some(tiles) => self.extend_blocks(tiles, heads, &projection.words, extension),
                None => extend_rows(heads, &projection.numbers, extension),
            }
        }
    }

    /// [`Pass::extend`] in bf16: a task is one group of positions of one head.
    fn extend_blocks(
        &self,
        tiles: &TileKernels,
        heads: Heads,
        projection: &[u16],
        extension: &mut Extension<'_>,
    ) {
        let (shape, width) = (BlockShape::new(&heads), Projection::width(&heads));
        let (rows, blocks) = (extension.rows.clone(), &mut extension.cache.blocks);
        blocks.reserve(shape, extension.expected);
        let new = blocks.grow(shape, rows.len());
        let groups = new.start / GROUP..new.end.div_ceil(GROUP);
        let words = Shared::new(blocks.words_mut());
        let pairs = heads.num_key_value_heads;
        self.turn.for_each(groups.len() * pairs, |task| {
            let (group, head) = (groups.start + task / pairs, task % pairs);
            let positions = new.start.max(group * GROUP)..new.end.min((group + 1) * GROUP);
            let row = rows.start + positions.start - new.start;
            let place = |kind| {
                Projection::place(&heads, row, heads.num_attention_heads + kind * pairs + head)
            };
            let first = positions.start % GROUP;
            let block = positions.start / BLOCK * shape.block() + head * 2 * shape.half();
            let in_block = group % (BLOCK / GROUP) * GROUP;
            // SAFETY: every group of a head belongs to one task.
            let (keys, values) = unsafe {
                let keys = block + (in_block + first) * shape.row;
                let values = block + shape.half() + in_block * shape.row;
                (
                    words.range(keys, positions.len() * shape.row),
                    words.range(values, GROUP * shape.row),
                )
            };
            for (i, key) in keys.chunks_exact_mut(shape.row).enumerate() {
                key.copy_from_slice(&projection[place(0) + i * width..][..shape.row]);
            }
            let rows = &projection[place(1)..];
            let len = positions.len();
            let task = StoreValues { rows, stride: width, first, len, row: shape.row };
            // SAFETY: the table of kernels was handed out after the CPU check.
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
        // The last tokens see most keys: the longest tasks come first.
        let mut tasks = Vec::new();
        for segment in segments {
            assert!(segment.cache.blocks.positions >= segment.first + segment.rows.len());
            for start in (0..columns(segment)).step_by(size).rev() {
                for head in 0..heads.num_key_value_heads {
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
        // The last tokens see most keys: the longest tasks come first.
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
                first: segment.first + tokens.start,
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

/// How many of `units` a task of a product holds: the most that leave the busiest of the threads as
/// little as possible, with tasks enough to make up for a thread that is held up.
fn units_per_task(units: usize, threads: usize) -> usize {
    if threads == 1 {
        return units.max(1);
    }
    let fair = (units / (MIN_TASKS_PER_THREAD * threads)).max(1);
    let largest_share = |size: usize| units.div_ceil(size).div_ceil(threads) * size;
    (1..=2 * fair).rev().min_by_key(|size| largest_share(*size)).unwrap_or(1)
}

/// [`Pass::extend`] in fp32.
fn extend_rows(heads: Heads, projection: &[f32], extension: &mut Extension<'_>) {
    let KeyValues { keys, values, .. } = extension.cache;
    keys.reserve_exact(extension.expected * heads.kv_width());
    values.reserve_exact(extension.expected * heads.kv_width());
    for row in extension.rows.clone() {
        let row = &projection[row * heads.qkv_width()..][..heads.qkv_width()];
        let (new_keys, new_values) = row[heads.query_width()..].split_at(heads.kv_width());
        keys.extend_from_slice(new_keys);
        values.extend_from_slice(new_values);
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

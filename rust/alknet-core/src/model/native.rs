//! The native CPU engine: a Llama-type decoder on `alknet-kernels`.
//!
//! ```text
//! x ─ RMSNorm ─ q8 ─ QKV ─ RoPE ─ attention ─ q8 ─ o_proj ─ (+x) ─ RMSNorm ─ q8 ─ SiLU(gate)·up ─ q8 ─ down ─ (+x)
//! ```
//!
//! Weights are 8-bit with one scale per output, activations 8-bit with one scale per token, both
//! rotated (see `alknet-kernels`). They are packed when the model is loaded and shared by all threads;
//! embedding rows are widened from the mapped file as they are needed.
//!
//! Input is read in chunks of at most [`CHUNK`] tokens, of one sequence or several, so that memory besides
//! the key/value cache does not grow with it. A chunk's rows are cut into one part per thread, which
//! that thread takes through all blocks; it waits for the others once per block, when keys and values are
//! in their caches. A token's result does not depend on the chunk, the batch or the number of threads,
//! to the last bit.

#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use std::{
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use alknet_kernels::{
    Engine, Extension, Heads, Intermediate, Isa, MAX_INPUTS, MatrixSource, PackError, PackedMatrix,
    Pass, Projection, QuantizedRows, Segment, TILE_ROWS, padded_outputs,
};

use super::{
    Backend, Input, KvCache, LlamaConfig, Probe, Readout, Sequence, Sink, Site, SiteKind,
    cache::SpareLayers,
    config::RotaryFrequencies,
    num_layers,
    weights::{TensorInfo, Weights},
};
use crate::error::{Error, Result};

/// Most tokens that go through the blocks together.
const CHUNK: usize = 2 * ROWS_PER_THREAD;

/// Most of them that one thread takes through: what belongs to them stays in its core's caches. Half a tile more
/// than a power of two, so that the tokens that close a piece do not make another chunk of it.
const ROWS_PER_THREAD: usize = 256 + TILE_ROWS / 2;

/// A loaded model. Immutable, apart from buffers that are kept for the next call.
pub struct NativeBackend {
    engine: Engine,
    config: LlamaConfig,
    heads: Heads,
    frequencies: RotaryFrequencies,
    sites: Vec<Site>,
    weights: Arc<Weights>,
    embedding: TensorInfo,
    blocks: Vec<Block>,
    workspaces: Mutex<Vec<Workspace>>,
    spares: Arc<SpareLayers>,
}

/// Weights of one block.
struct Block {
    attention: Half,
    /// `None` in the last block when nothing of it is read.
    mlp: Option<Half>,
}

/// Norm, first and second product of attention or of the feed-forward network.
struct Half {
    /// `[hidden_size]`.
    norm: Vec<f32>,
    /// Query, key and value, or gate and up.
    first: PackedMatrix,
    /// `o_proj` or `down_proj`.
    second: PackedMatrix,
}

/// Buffers of one part of a chunk.
#[derive(Default)]
struct Workspace {
    /// `[rows, hidden_size]`: the residual stream.
    x: Vec<f32>,
    /// `[rows, hidden_size]`: what attention and feed-forward network add to it, where that is read.
    deltas: [Vec<f32>; 2],
    /// `[rows, head_dim]`: cosines, then sines of the rotary angles.
    angles: Vec<f32>,
    /// Queries, keys and values.
    qkv: Projection,
    /// Result of attention, or of gate and up.
    inner: Intermediate,
    /// Input of the product at hand.
    quantized: QuantizedRows,
}

/// Rows of a chunk that are taken through the blocks by themselves.
struct Part<'a> {
    pieces: Vec<Piece<'a>>,
    work: Workspace,
}

/// Consecutive tokens of a sequence that are in a part, or readouts of one probe as far from each other.
#[derive(Debug, Clone, PartialEq)]
struct Piece<'a> {
    /// Index in the batch.
    sequence: usize,
    /// Rows of the sequence: of its new `input_ids`, then of its readouts.
    tokens: Range<usize>,
    /// Their rows in the part.
    rows: Range<usize>,
    /// Position of the first of them.
    first: usize,
    /// From the position of each to that of the next.
    step: usize,
    /// Whose readouts they are, which leave no keys and values.
    probe: Option<&'a Probe>,
}

impl<'a> Piece<'a> {
    fn positions(&self) -> impl Iterator<Item = usize> + use<> {
        let Self { first, step, .. } = *self;
        (0..self.rows.len()).map(move |row| first + row * step)
    }

    /// The last position that the first row sees.
    fn sees(&self) -> usize {
        self.first - usize::from(self.probe.is_some())
    }

    /// Adds the readout after these if it is as far from the last as they are from each other.
    fn take(&mut self, sequence: usize, position: usize, probe: &'a Probe) -> bool {
        let last = self.first + (self.rows.len() - 1) * self.step;
        let fits = self.rows.len() == 1 || position == last + self.step;
        let same = self.probe.is_some_and(|own| std::ptr::eq(own, probe));
        if !same || self.sequence != sequence || !fits {
            return false;
        }
        self.step = position - last;
        (self.rows.end, self.tokens.end) = (self.rows.end + 1, self.tokens.end + 1);
        true
    }
}

/// What a part does between two waits: the rest of one block, which reads keys and values of all
/// parts, and the beginning of the next, which writes its own.
struct Step<'a, 'b> {
    part: &'a mut Part<'b>,
    segments: Vec<Segment<'a>>,
    extensions: Vec<Extension<'a>>,
}

impl NativeBackend {
    /// Packs the blocks up to the deepest of `sites`.
    ///
    /// `threads` defaults to what this process may use, `isa` to the best that this CPU has.
    ///
    /// # Errors
    /// [`Error::Config`] for an instruction set that this CPU lacks, or sites that are none, repeated or
    /// beyond the last layer, [`Error::ModelLoad`] when the file lacks a tensor up to the deepest site.
    pub fn load(
        weights: Arc<Weights>,
        config: &LlamaConfig,
        sites: &[Site],
        threads: Option<usize>,
        isa: Option<Isa>,
    ) -> Result<Self> {
        let engine = Engine::new(isa, threads).map_err(|e| Error::Config(e.to_string()))?;
        let heads = Heads {
            num_attention_heads: config.num_attention_heads,
            num_key_value_heads: config.num_key_value_heads(),
            head_dim: config.head_dim(),
        };
        let widest = config.intermediate_size.max(config.hidden_size).max(heads.query_width());
        if widest > MAX_INPUTS {
            return Err(Error::Config(format!(
                "the native engine multiplies at most {MAX_INPUTS} inputs, this model has {widest}; use the candle engine"
            )));
        }
        let embedding =
            weights.expect(LlamaConfig::EMBEDDINGS, config.vocab_size, config.hidden_size)?.clone();
        let blocks = Loader { weights: &weights, config, heads }.blocks(&engine, sites)?;
        // Only embedding rows are read from here on.
        weights.release_pages();
        let spares = Arc::new(SpareLayers::new(engine.threads()));
        Ok(Self {
            engine,
            config: config.clone(),
            heads,
            frequencies: config.rotary_frequencies(),
            sites: sites.to_vec(),
            weights,
            embedding,
            blocks,
            workspaces: Mutex::default(),
            spares,
        })
    }

    /// Takes some sequences through some blocks, a chunk at a time: from their tokens, or from the residual streams
    /// where the blocks before have left them; and leaves those of all rows if there are more blocks.
    fn read(
        &self,
        batch: &mut [Sequence<'_>],
        sequences: &[usize],
        blocks: &Range<usize>,
        streams: &mut [Vec<f32>],
        sink: &dyn Sink,
    ) -> Result<()> {
        let mut start = (0, 0);
        let mut rest: usize = sequences.iter().map(|&i| batch[i].n_rows()).sum();
        while rest > 0 {
            // One turn per chunk, so that a long text does not keep short ones waiting.
            let pass = self.engine.pass();
            let most = (ROWS_PER_THREAD * pass.parts(rest)).min(CHUNK);
            // Chunks of one size: a last one of few tokens would cost as much as many.
            let len = rest.div_ceil(rest.div_ceil(most)).next_multiple_of(TILE_ROWS).min(rest);
            let (pieces, end) = next_chunk(batch, sequences, start, len);
            let parts = deal(pieces, pass.parts(len), self.cost()).into_iter();
            let mut parts: Vec<_> =
                parts.map(|pieces| Part { pieces, work: self.take_workspace() }).collect();
            let left = (blocks.start > 0).then_some(&*streams);
            pass.for_each_part(&mut parts, |pass, Part { pieces, work }| {
                self.begin(pass, pieces, work, batch, left)
            })?;
            self.chunk(&pass, &mut parts, batch, blocks, sink)?;
            if blocks.end < self.blocks.len() {
                self.leave(&parts, batch, streams);
            }
            self.put_back(parts);
            (start, rest) = (end, rest - len);
        }
        Ok(())
    }

    /// Takes the tokens of one chunk through some blocks.
    fn chunk(
        &self,
        pass: &Pass,
        parts: &mut [Part<'_>],
        batch: &mut [Sequence<'_>],
        blocks: &Range<usize>,
        sink: &dyn Sink,
    ) -> Result<()> {
        for layer in blocks.start..=blocks.end {
            let begins = layer < blocks.end;
            pass.for_each_part(
                &mut self.steps(pass, parts, batch, (layer, begins)),
                |pass, step| -> Result<()> {
                    let Part { pieces, work } = &mut *step.part;
                    if layer > blocks.start {
                        self.finish_block(pass, work, &step.segments, layer - 1);
                        self.hand_over(pieces, work, layer - 1, sink)?;
                    }
                    if begins {
                        self.steer(pieces, work, layer);
                        self.begin_block(pass, work, &mut step.extensions, layer);
                    }
                    Ok(())
                },
            )?;
        }
        Ok(())
    }

    /// Keeps the residual streams of a chunk.
    fn leave(&self, parts: &[Part<'_>], batch: &[Sequence<'_>], streams: &mut [Vec<f32>]) {
        let hidden = self.config.hidden_size;
        for Part { pieces, work } in parts {
            for Piece { sequence, tokens, rows, .. } in pieces {
                let stream = &mut streams[*sequence];
                stream.resize(batch[*sequence].n_rows() * hidden, 0.0);
                stream[tokens.start * hidden..tokens.end * hidden]
                    .copy_from_slice(&work.x[rows.start * hidden..rows.end * hidden]);
            }
        }
    }

    /// Fills in the residual stream, from where it was left or from the embedding, and the rotary angles of a part.
    fn begin(
        &self,
        pass: &Pass,
        pieces: &[Piece<'_>],
        work: &mut Workspace,
        batch: &[Sequence<'_>],
        left: Option<&[Vec<f32>]>,
    ) -> Result<()> {
        let (hidden, dim) = (self.config.hidden_size, self.heads.head_dim);
        let rows = pieces.last().map_or(0, |piece| piece.rows.end);
        work.x.resize(rows * hidden, 0.0);
        work.angles.resize(rows * dim, 0.0);
        let (mut inputs, mut positions) = (Vec::with_capacity(rows), Vec::with_capacity(rows));
        for Piece { sequence, tokens, rows, .. } in pieces {
            match left {
                Some(left) => {
                    let own = &left[*sequence][tokens.start * hidden..tokens.end * hidden];
                    inputs.extend(own.chunks_exact(hidden).map(Input::Vector));
                }
                None => {
                    let own = batch[*sequence].inputs(hidden).skip(tokens.start);
                    inputs.extend(own.take(rows.len()));
                }
            }
        }
        positions.extend(pieces.iter().flat_map(Piece::positions));
        let widened = Mutex::new(Ok(()));
        pass.for_each_rows(&mut work.x, hidden, |row, x| {
            let result = match inputs[row] {
                Input::Token(id) => {
                    let id = id as usize;
                    self.weights.widen_rows(&self.embedding, id..id + 1, x)
                }
                Input::Vector(vector) => {
                    x.copy_from_slice(vector);
                    Ok(())
                }
            };
            if let Err(error) = result {
                *widened.lock().unwrap_or_else(PoisonError::into_inner) = Err(error);
            }
        });
        let RotaryFrequencies { inv_freq, attention_factor } = &self.frequencies;
        pass.for_each_rows(&mut work.angles, dim, |row, angles| {
            let (cos, sin) = angles.split_at_mut(dim / 2);
            for ((cos, sin), f) in cos.iter_mut().zip(sin).zip(inv_freq) {
                let (s, c) = (positions[row] as f64 * f).sin_cos();
                (*cos, *sin) = ((c * attention_factor) as f32, (s * attention_factor) as f32);
            }
        });
        widened.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// The parts with what they read of block `layer - 1`, if there is one, and write of block `layer`, if it begins.
    fn steps<'a, 'b>(
        &self,
        pass: &Pass,
        parts: &'a mut [Part<'b>],
        batch: &'a mut [Sequence<'_>],
        (layer, begins): (usize, bool),
    ) -> Vec<Step<'a, 'b>> {
        let step = |part| Step { part, segments: Vec::new(), extensions: Vec::new() };
        let mut steps: Vec<_> = parts.iter_mut().map(step).collect();
        for (index, sequence) in batch.iter_mut().enumerate() {
            // Places are given out in the order of positions.
            let pieces = |(i, step): (usize, &Step<'_, 'b>)| {
                let own = step.part.pieces.iter().filter(|piece| piece.sequence == index);
                own.map(|piece| (i, piece.clone())).collect::<Vec<_>>()
            };
            let mut pieces: Vec<_> = steps.iter().enumerate().flat_map(pieces).collect();
            pieces.sort_by_key(|(_, piece)| piece.first);
            let tokens =
                || pieces.iter().map(|(_, piece)| piece).filter(|piece| piece.probe.is_none());
            let new = tokens().map(|piece| piece.rows.len()).sum();
            let read_before = tokens().next().map_or(0, |first| first.tokens.start);
            let expected = sequence.input_ids.len() - read_before;
            let (read, written) = sequence.cache.layers.split_at_mut(layer);
            let written = written.first_mut().filter(|_| begins && new > 0);
            let mut places = written.map(|cache| pass.grow(self.heads, cache, new, expected));
            for (i, piece) in pieces {
                let Step { segments, extensions, .. } = &mut steps[i];
                let (rows, first, step) = (piece.rows.clone(), piece.sees(), piece.step);
                segments.extend(read.last().map(|cache| Segment { rows, first, step, cache }));
                let places = places.as_mut().filter(|_| piece.probe.is_none());
                extensions.extend(places.map(|places| Extension {
                    places: places.take(piece.rows.len()),
                    rows: piece.rows,
                }));
            }
        }
        steps
    }

    /// Adds what steers readouts on their way into block `layer`.
    fn steer(&self, pieces: &[Piece<'_>], work: &mut Workspace, layer: usize) {
        let hidden = self.config.hidden_size;
        for Piece { rows, probe, .. } in pieces {
            let Some(vector) = probe.and_then(|probe| probe.steering(layer, hidden)) else {
                continue;
            };
            for x in work.x[rows.start * hidden..rows.end * hidden].chunks_exact_mut(hidden) {
                x.iter_mut().zip(vector).for_each(|(x, v)| *x += v);
            }
        }
    }

    /// A block up to its queries, keys and values.
    fn begin_block(
        &self,
        pass: &Pass,
        work: &mut Workspace,
        extensions: &mut [Extension<'_>],
        layer: usize,
    ) {
        let (heads, half) = (self.heads, &self.blocks[layer].attention);
        let eps = self.config.rms_norm_eps as f32;
        pass.rms_norm_quantize(&work.x, &half.norm, eps, &mut work.quantized);
        pass.qkv(&work.quantized, &half.first, heads, &work.angles, &mut work.qkv);
        pass.extend(heads, &work.qkv, extensions);
    }

    /// A block from attention on.
    fn finish_block(
        &self,
        pass: &Pass,
        work: &mut Workspace,
        segments: &[Segment<'_>],
        layer: usize,
    ) {
        let Block { attention, mlp } = &self.blocks[layer];
        pass.attention(self.heads, segments, &work.qkv, &mut work.inner);
        pass.quantize_intermediate(&mut work.inner, &mut work.quantized);
        self.add(pass, work, &attention.second, layer, SiteKind::AttnOut);
        let Some(mlp) = mlp else { return };
        let (eps, width) = (self.config.rms_norm_eps as f32, self.config.intermediate_size);
        pass.rms_norm_quantize(&work.x, &mlp.norm, eps, &mut work.quantized);
        pass.gate_up(&work.quantized, &mlp.first, width, &mut work.inner);
        pass.quantize_intermediate(&mut work.inner, &mut work.quantized);
        self.add(pass, work, &mlp.second, layer, SiteKind::MlpOut);
    }

    /// Adds the second product of a half to the residual stream; keeps it where it is read.
    fn add(
        &self,
        pass: &Pass,
        work: &mut Workspace,
        second: &PackedMatrix,
        layer: usize,
        kind: SiteKind,
    ) {
        let hidden = self.config.hidden_size;
        if self.site(layer, kind).is_none() {
            pass.linear::<true>(&work.quantized, second, hidden, &mut work.x);
            return;
        }
        let delta = &mut work.deltas[usize::from(kind == SiteKind::MlpOut)];
        delta.resize(work.x.len(), 0.0);
        pass.linear::<false>(&work.quantized, second, hidden, delta);
        work.x.iter_mut().zip(delta).for_each(|(x, delta)| *x += *delta);
    }

    /// Hands over what is read of a block that has just been finished.
    fn hand_over(
        &self,
        pieces: &[Piece<'_>],
        work: &Workspace,
        layer: usize,
        sink: &dyn Sink,
    ) -> Result<()> {
        let hidden = self.config.hidden_size;
        for (kind, rows) in [
            (SiteKind::AttnOut, &work.deltas[0]),
            (SiteKind::MlpOut, &work.deltas[1]),
            (SiteKind::ResidPost, &work.x),
        ] {
            let Some(site) = self.site(layer, kind) else { continue };
            for piece in pieces {
                let rows = &rows[piece.rows.start * hidden..piece.rows.end * hidden];
                sink.rows(piece.sequence, site, piece.tokens.start, rows)?;
            }
        }
        Ok(())
    }

    /// Empty buffers, or what another pass has left.
    fn take_workspace(&self) -> Workspace {
        // In a forked process the lock may be held for ever: then there are new buffers.
        self.workspaces.try_lock().ok().and_then(|mut stash| stash.pop()).unwrap_or_default()
    }

    /// Keeps the buffers of a pass for the next one, those of the first part on top.
    fn put_back(&self, parts: Vec<Part<'_>>) {
        if let Ok(mut stash) = self.workspaces.try_lock() {
            stash.extend(parts.into_iter().rev().map(|part| part.work));
        }
    }

    /// Multiplications of 8-bit numbers that one row costs in a block, and that every key adds to it.
    fn cost(&self) -> (usize, usize) {
        let (hidden, queries) = (self.config.hidden_size, self.heads.query_width());
        let attention = hidden * self.heads.qkv_width() + queries * hidden;
        // Keys and values are multiplied in numbers twice as wide.
        (attention + 3 * hidden * self.config.intermediate_size, 4 * queries)
    }

    /// Index of a site, if it is read.
    fn site(&self, layer: usize, kind: SiteKind) -> Option<usize> {
        self.sites.iter().position(|site| *site == Site { layer, kind })
    }
}

impl Backend for NativeBackend {
    fn name(&self) -> String {
        format!("native ({}, {} threads)", self.engine.isa(), self.engine.threads())
    }

    fn hidden_size(&self) -> usize {
        self.config.hidden_size
    }

    fn max_position_embeddings(&self) -> usize {
        self.config.max_position_embeddings
    }

    fn sites(&self) -> &[Site] {
        &self.sites
    }

    fn passes_at_once(&self) -> usize {
        self.engine.threads()
    }

    fn new_cache(&self) -> KvCache {
        KvCache::recycled(self.blocks.len(), &self.spares)
    }

    fn forward(&self, batch: &mut [Sequence<'_>], sink: &dyn Sink) -> Result<()> {
        let depth = self.blocks.len();
        batch.iter().try_for_each(|sequence| sequence.check(&self.config, depth))?;
        let mut sequences: Vec<_> = (0..batch.len()).collect();
        let mut streams = Vec::new();
        let asks = sink.asks_after().map(|site| self.sites[site].layer + 1);
        let mut read = 0;
        if let Some(asks) = asks.filter(|&asks| asks < depth) {
            streams.resize_with(batch.len(), Vec::new);
            self.read(batch, &sequences, &(0..asks), &mut streams, sink)?;
            let done = sequences.iter().map(|&i| sink.is_done(i)).collect::<Result<Vec<_>>>()?;
            sequences.retain(|&i| !done[i]);
            read = asks;
        }
        self.read(batch, &sequences, &(read..depth), &mut streams, sink)?;
        for sequence in batch {
            sequence.cache.input_ids.extend_from_slice(sequence.input_ids);
        }
        Ok(())
    }
}

/// The next `rows` rows of some sequences, from row `start` of the `next`th of them on, and where the chunk after them
/// starts. A readout comes right after the token before it; in a chunk they follow the tokens of their sequence.
fn next_chunk<'a>(
    batch: &[Sequence<'a>],
    sequences: &[usize],
    (mut next, mut start): (usize, usize),
    rows: usize,
) -> (Vec<Piece<'a>>, (usize, usize)) {
    let (mut pieces, mut row) = (Vec::new(), 0);
    while row < rows {
        let sequence = sequences[next];
        let Sequence { input_ids, readouts, ref cache } = batch[sequence];
        let end = batch[sequence].n_rows().min(start + rows - row);
        // Readouts before a row of the sequence.
        let before = |row| readouts.iter().zip(0..).take_while(|(r, i)| r.after + i < row).count();
        let own = before(start)..before(end);
        let tokens = start - own.start..end - own.end;
        let past = cache.len();
        if !tokens.is_empty() {
            let (rows, first) = (row..row + tokens.len(), past + tokens.start);
            row = rows.end;
            pieces.push(Piece { sequence, tokens, rows, first, step: 1, probe: None });
        }
        for i in own {
            let Readout { after, probe } = readouts[i];
            let (tokens, first) = (input_ids.len() + i, past + after);
            let last = pieces.last_mut();
            if !last.is_some_and(|last: &mut Piece<'a>| last.take(sequence, first, probe)) {
                let (tokens, rows) = (tokens..tokens + 1, row..row + 1);
                pieces.push(Piece { sequence, tokens, rows, first, step: 1, probe: Some(probe) });
            }
            row += 1;
        }
        start = end;
        if start == batch[sequence].n_rows() {
            (next, start) = (next + 1, 0);
        }
    }
    (pieces, (next, start))
}

/// The pieces of a chunk for each of `parts` parts, which cost about the same: the first and the last of twice as
/// many runs, the second and the last but one, and so on. Keys to be read grow from row to row; so each
/// part has nearly as many rows as the others, and what is left over of a run is evened out.
fn deal(pieces: Vec<Piece<'_>>, parts: usize, cost: (usize, usize)) -> Vec<Vec<Piece<'_>>> {
    if parts > 1 {
        let ends = run_ends(&pieces, 2 * parts, cost);
        // Where there are few rows, some runs have none.
        if ends.len() == 2 * parts {
            let mut dealt = cut(pieces, &ends);
            for (part, late) in dealt.split_off(parts).into_iter().rev().enumerate() {
                late.into_iter().for_each(|piece| append(&mut dealt[part], piece));
            }
            return dealt;
        }
    }
    let ends = run_ends(&pieces, parts, cost);
    cut(pieces, &ends)
}

/// Adds a piece after the others, or to the last of them if that is the same sequence up to it.
fn append<'a>(pieces: &mut Vec<Piece<'a>>, mut piece: Piece<'a>) {
    let end = pieces.last().map_or(0, |last| last.rows.end);
    match pieces.last_mut() {
        Some(last)
            if (last.sequence, last.tokens.end) == (piece.sequence, piece.tokens.start)
                && piece.probe.is_none() =>
        {
            last.tokens.end = piece.tokens.end;
            last.rows.end += piece.rows.len();
        }
        _ => {
            piece.rows = end..end + piece.rows.len();
            pieces.push(piece);
        }
    }
}

/// Where `runs` runs of the rows of a chunk end, so that each costs about as much as the others: a row costs
/// `fixed`, and `per_key` for each position up to its own.
fn run_ends(pieces: &[Piece<'_>], runs: usize, (fixed, per_key): (usize, usize)) -> Vec<usize> {
    let positions = pieces.iter().flat_map(Piece::positions);
    let costs = positions.map(|position| fixed + per_key * position);
    // Cost of all rows before each unit.
    let (mut sums, mut sum) = (Vec::new(), 0);
    for (row, cost) in costs.enumerate() {
        if row % TILE_ROWS == 0 {
            sums.push(sum);
        }
        sum += cost;
    }
    let rows = pieces.last().map_or(0, |piece| piece.rows.end);
    let nearest = |share: usize| {
        let aim = sum / runs * share;
        let unit = (1..sums.len()).min_by_key(|unit| sums[*unit].abs_diff(aim));
        unit.map_or(rows, |unit| unit * TILE_ROWS)
    };
    let mut ends: Vec<_> = (1..runs).map(nearest).chain([rows]).collect();
    ends.dedup();
    ends
}

/// Cuts the pieces of a chunk at the rows `ends`.
fn cut<'a>(pieces: Vec<Piece<'a>>, ends: &[usize]) -> Vec<Vec<Piece<'a>>> {
    let mut start = 0;
    let mut parts = Vec::with_capacity(ends.len());
    for &end in ends {
        let within = pieces.iter().filter_map(|piece| {
            let rows = piece.rows.start.max(start)..piece.rows.end.min(end);
            let skipped = rows.start.checked_sub(piece.rows.start)?;
            (!rows.is_empty()).then(|| Piece {
                tokens: piece.tokens.start + skipped..piece.tokens.start + skipped + rows.len(),
                rows: rows.start - start..rows.end - start,
                first: piece.first + skipped * piece.step,
                ..piece.clone()
            })
        });
        parts.push(within.collect());
        start = end;
    }
    parts
}

/// Reads and packs the blocks.
struct Loader<'a> {
    weights: &'a Weights,
    config: &'a LlamaConfig,
    heads: Heads,
}

impl<'a> Loader<'a> {
    /// Blocks up to the deepest site.
    fn blocks(&self, engine: &Engine, sites: &[Site]) -> Result<Vec<Block>> {
        let num_layers = num_layers(sites, self.config)?;
        let needs_mlp = |layer| {
            let read = |site: &Site| site.layer == layer && site.kind != SiteKind::AttnOut;
            layer + 1 < num_layers || sites.iter().any(read)
        };
        let (mut norms, mut sources) = (Vec::new(), Vec::new());
        for layer in 0..num_layers {
            norms.push(self.norm(layer, "input_layernorm")?);
            sources.extend([self.qkv(layer)?, self.o_proj(layer)?]);
            if needs_mlp(layer) {
                norms.push(self.norm(layer, "post_attention_layernorm")?);
                sources.extend([self.gate_up(layer)?, self.down_proj(layer)?]);
            }
        }
        let packed = engine.pass().pack(sources).map_err(|error| match error {
            PackError::Source(error) => error,
            PackError::Memory(error) => Error::Inference(format!("no memory for weights: {error}")),
        })?;
        let (mut norms, mut packed) = (norms.into_iter(), packed.into_iter());
        let mut half = || {
            let (norm, first, second) = (norms.next()?, packed.next()?, packed.next()?);
            Some(Half { norm, first, second })
        };
        let block = |layer| {
            let attention = half()?;
            let mlp = if needs_mlp(layer) { Some(half()?) } else { None };
            Some(Block { attention, mlp })
        };
        Ok((0..num_layers).map_while(block).collect())
    }

    fn norm(&self, layer: usize, name: &str) -> Result<Vec<f32>> {
        self.weights.widen(
            &format!("model.layers.{layer}.{name}.weight"),
            1,
            self.config.hidden_size,
        )
    }

    /// A matrix of a block, and its bias if config.json says that it has one.
    fn linear(&self, layer: usize, name: &str, outputs: usize, inputs: usize) -> Result<Linear> {
        let full_name = format!("model.layers.{layer}.{name}.weight");
        let weight = self.weights.expect(&full_name, outputs, inputs)?.clone();
        let bias = format!("{name}.bias");
        let bias = match self.config.block_tensors().iter().find(|tensor| tensor.name == bias) {
            Some(bias) => self.weights.widen(&bias.full_name(layer), 1, outputs)?,
            None => vec![0.0; outputs],
        };
        Ok(Linear { weight, bias })
    }

    /// Packed rows from rows of `parts`: `place(i)` names part and row, or nothing for filling.
    fn source(
        &self,
        outputs: usize,
        inputs: usize,
        parts: Vec<Linear>,
        place: impl Fn(usize) -> Option<(usize, usize)> + Sync + 'a,
    ) -> MatrixSource<'a, Error> {
        let bias = (0..outputs).map(|i| place(i).map_or(0.0, |(part, row)| parts[part].bias[row]));
        let bias = bias.collect();
        let weights = self.weights;
        let widen = Box::new(move |i: usize, out: &mut [f32]| match place(i) {
            Some((part, row)) => weights.widen_rows(&parts[part].weight, row..row + 1, out),
            None => Ok(()),
        });
        MatrixSource { outputs, inputs, widen, bias }
    }

    /// Query, key and value heads one after the other, each filled up to whole panels.
    fn qkv(&self, layer: usize) -> Result<MatrixSource<'a, Error>> {
        let (heads, hidden) = (self.heads, self.config.hidden_size);
        let parts = vec![
            self.linear(layer, "self_attn.q_proj", heads.query_width(), hidden)?,
            self.linear(layer, "self_attn.k_proj", heads.kv_width(), hidden)?,
            self.linear(layer, "self_attn.v_proj", heads.kv_width(), hidden)?,
        ];
        let (queries, pairs) = (heads.num_attention_heads, heads.num_key_value_heads);
        let (dim, padded) = (heads.head_dim, heads.packed_head());
        let outputs = (queries + 2 * pairs) * padded;
        Ok(self.source(outputs, hidden, parts, move |i| {
            let (head, within) = (i / padded, i % padded);
            let (part, head) = match head.checked_sub(queries) {
                None => (0, head),
                Some(head) => (1 + head / pairs, head % pairs),
            };
            (within < dim).then_some((part, head * dim + within))
        }))
    }

    fn o_proj(&self, layer: usize) -> Result<MatrixSource<'a, Error>> {
        self.plain(layer, "self_attn.o_proj", self.heads.query_width())
    }

    fn down_proj(&self, layer: usize) -> Result<MatrixSource<'a, Error>> {
        self.plain(layer, "mlp.down_proj", self.config.intermediate_size)
    }

    /// A projection back to the residual stream.
    fn plain(&self, layer: usize, name: &str, inputs: usize) -> Result<MatrixSource<'a, Error>> {
        let hidden = self.config.hidden_size;
        let parts = vec![self.linear(layer, name, hidden, inputs)?];
        let place = move |i| (i < hidden).then_some((0, i));
        Ok(self.source(padded_outputs(hidden), inputs, parts, place))
    }

    /// Panels of 16 gates and of the 16 matching ups in turn.
    fn gate_up(&self, layer: usize) -> Result<MatrixSource<'a, Error>> {
        let (hidden, width) = (self.config.hidden_size, self.config.intermediate_size);
        let parts = vec![
            self.linear(layer, "mlp.gate_proj", width, hidden)?,
            self.linear(layer, "mlp.up_proj", width, hidden)?,
        ];
        let panel = padded_outputs(1);
        Ok(self.source(2 * padded_outputs(width), hidden, parts, move |i| {
            let row = i / (2 * panel) * panel + i % panel;
            (row < width).then_some((i / panel % 2, row))
        }))
    }
}

/// A matrix of the file and its bias.
struct Linear {
    weight: TensorInfo,
    /// `[outputs]`.
    bias: Vec<f32>,
}

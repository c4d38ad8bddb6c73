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
//! Input is read in chunks of [`CHUNK`] tokens, of one sequence or several, so that memory besides
//! the key/value cache does not grow with it. A token's result does not depend on the chunk, the
//! batch or the number of threads, to the last bit.

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
    Pass, Projection, QuantizedRows, Segment, padded_outputs,
};

use super::{
    Backend, KvCache, LlamaConfig, Sequence, Sink, Site, SiteKind,
    cache::SpareLayers,
    config::RotaryFrequencies,
    weights::{TensorInfo, Weights},
};
use crate::error::{Error, Result};

/// Most tokens that go through the blocks together.
const CHUNK: usize = 256;

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

/// Buffers of one chunk.
#[derive(Default)]
struct Workspace {
    /// `[rows, hidden_size]`: the residual stream.
    x: Vec<f32>,
    /// `[rows, hidden_size]`: what a half adds to it, where that is read.
    delta: Vec<f32>,
    /// `[rows, head_dim]`: cosines, then sines of the rotary angles.
    angles: Vec<f32>,
    /// Queries, keys and values.
    qkv: Projection,
    /// Result of attention, or of gate and up.
    inner: Intermediate,
    /// Input of the product at hand.
    quantized: QuantizedRows,
}

/// The part of a sequence that is in the chunk.
struct Piece {
    /// Index in the batch.
    sequence: usize,
    /// Tokens of its new `input_ids`.
    tokens: Range<usize>,
    /// Their rows in the chunk.
    rows: Range<usize>,
    /// Position of the first of them.
    first: usize,
}

impl NativeBackend {
    /// Packs the blocks up to the deepest of `sites`.
    ///
    /// `threads` defaults to what this process may use, `isa` to the best that this CPU has.
    ///
    /// # Errors
    /// [`Error::Config`] for an instruction set that this CPU lacks or a list of sites that is empty,
    /// [`Error::ModelLoad`] when the file lacks a tensor up to the deepest site.
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
        let embedding = weights
            .expect("model.embed_tokens.weight", config.vocab_size, config.hidden_size)?
            .clone();
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

    /// Takes the tokens of one chunk through all blocks.
    fn chunk(
        &self,
        pass: &Pass,
        work: &mut Workspace,
        pieces: &[Piece],
        batch: &mut [Sequence<'_>],
        sink: &mut dyn Sink,
    ) -> Result<()> {
        self.embed(pass, work, pieces, batch)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            self.attention(pass, work, pieces, batch, layer);
            self.add(
                pass,
                work,
                &block.attention.second,
                pieces,
                self.site(layer, SiteKind::AttnOut),
                sink,
            )?;
            let Some(mlp) = &block.mlp else { continue };
            let (eps, width) = (self.config.rms_norm_eps as f32, self.config.intermediate_size);
            pass.rms_norm_quantize(&work.x, &mlp.norm, eps, &mut work.quantized);
            pass.gate_up(&work.quantized, &mlp.first, width, &mut work.inner);
            pass.quantize_intermediate(&mut work.inner, &mut work.quantized);
            self.add(pass, work, &mlp.second, pieces, self.site(layer, SiteKind::MlpOut), sink)?;
            if let Some(site) = self.site(layer, SiteKind::ResidPost) {
                self.hand_over(&work.x, pieces, site, sink)?;
            }
        }
        for piece in pieces {
            let sequence = &mut batch[piece.sequence];
            let tokens = &sequence.input_ids[piece.tokens.clone()];
            sequence.cache.input_ids.extend_from_slice(tokens);
        }
        Ok(())
    }

    /// Fills in the residual stream and the rotary angles of the chunk.
    fn embed(
        &self,
        pass: &Pass,
        work: &mut Workspace,
        pieces: &[Piece],
        batch: &[Sequence<'_>],
    ) -> Result<()> {
        let (hidden, dim) = (self.config.hidden_size, self.heads.head_dim);
        let rows = pieces.last().map_or(0, |piece| piece.rows.end);
        work.x.resize(rows * hidden, 0.0);
        work.angles.resize(rows * dim, 0.0);
        let (mut ids, mut positions) = (Vec::with_capacity(rows), Vec::with_capacity(rows));
        for piece in pieces {
            ids.extend_from_slice(&batch[piece.sequence].input_ids[piece.tokens.clone()]);
            positions.extend(piece.first..piece.first + piece.rows.len());
        }
        let widened = Mutex::new(Ok(()));
        pass.for_each_rows(&mut work.x, hidden, |row, x| {
            let id = ids[row] as usize;
            if let Err(error) = self.weights.widen_rows(&self.embedding, id..id + 1, x) {
                *widened.lock().unwrap_or_else(PoisonError::into_inner) = Err(error);
            }
        });
        widened.into_inner().unwrap_or_else(PoisonError::into_inner)?;
        let RotaryFrequencies { inv_freq, attention_factor } = &self.frequencies;
        pass.for_each_rows(&mut work.angles, dim, |row, angles| {
            let (cos, sin) = angles.split_at_mut(dim / 2);
            for ((cos, sin), f) in cos.iter_mut().zip(sin).zip(inv_freq) {
                let (s, c) = (positions[row] as f64 * f).sin_cos();
                (*cos, *sin) = ((c * attention_factor) as f32, (s * attention_factor) as f32);
            }
        });
        Ok(())
    }

    /// Attention of one block, up to the input of `o_proj`.
    fn attention(
        &self,
        pass: &Pass,
        work: &mut Workspace,
        pieces: &[Piece],
        batch: &mut [Sequence<'_>],
        layer: usize,
    ) {
        let (heads, half) = (self.heads, &self.blocks[layer].attention);
        let eps = self.config.rms_norm_eps as f32;
        pass.rms_norm_quantize(&work.x, &half.norm, eps, &mut work.quantized);
        pass.qkv(&work.quantized, &half.first, heads, &work.angles, &mut work.qkv);
        // Every sequence has at most one piece in a chunk.
        let mut places = pieces.iter().peekable();
        let mut extensions = Vec::with_capacity(pieces.len());
        for (index, sequence) in batch.iter_mut().enumerate() {
            if let Some(piece) = places.next_if(|piece| piece.sequence == index) {
                let expected = sequence.input_ids.len() - piece.tokens.start;
                let cache = &mut sequence.cache.layers[layer];
                extensions.push(Extension { rows: piece.rows.clone(), expected, cache });
            }
        }
        pass.extend(heads, &work.qkv, &mut extensions);
        let segment = |piece: &Piece| {
            let cache = &batch[piece.sequence].cache.layers[layer];
            Segment { rows: piece.rows.clone(), first: piece.first, cache }
        };
        let segments: Vec<_> = pieces.iter().map(segment).collect();
        pass.attention(heads, &segments, &work.qkv, &mut work.inner);
        pass.quantize_intermediate(&mut work.inner, &mut work.quantized);
    }

    /// Adds the second product of a half to the residual stream; hands it over where it is read.
    fn add(
        &self,
        pass: &Pass,
        work: &mut Workspace,
        second: &PackedMatrix,
        pieces: &[Piece],
        site: Option<usize>,
        sink: &mut dyn Sink,
    ) -> Result<()> {
        let hidden = self.config.hidden_size;
        let Some(site) = site else {
            pass.linear::<true>(&work.quantized, second, hidden, &mut work.x);
            return Ok(());
        };
        work.delta.resize(work.x.len(), 0.0);
        pass.linear::<false>(&work.quantized, second, hidden, &mut work.delta);
        work.x.iter_mut().zip(&work.delta).for_each(|(x, delta)| *x += delta);
        self.hand_over(&work.delta, pieces, site, sink)
    }

    fn hand_over(
        &self,
        rows: &[f32],
        pieces: &[Piece],
        site: usize,
        sink: &mut dyn Sink,
    ) -> Result<()> {
        let hidden = self.config.hidden_size;
        pieces.iter().try_for_each(|piece| {
            let rows = &rows[piece.rows.start * hidden..piece.rows.end * hidden];
            sink.rows(piece.sequence, site, piece.tokens.start, rows)
        })
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

    fn new_cache(&self) -> KvCache {
        KvCache::recycled(self.blocks.len(), &self.spares)
    }

    fn forward(&self, batch: &mut [Sequence<'_>], sink: &mut dyn Sink) -> Result<()> {
        batch.iter().try_for_each(|sequence| sequence.check(&self.config, self.blocks.len()))?;
        let mut start = (0, 0);
        while let Some((pieces, end)) = next_chunk(batch, start) {
            // One turn per chunk, so that a long text does not keep short ones waiting.
            let pass = self.engine.pass();
            // In a forked process the lock may be held for ever: then there are new buffers.
            let stash = || self.workspaces.try_lock().ok();
            let mut work = stash().and_then(|mut stash| stash.pop()).unwrap_or_default();
            self.chunk(&pass, &mut work, &pieces, batch, sink)?;
            if let Some(mut stash) = stash() {
                stash.push(work);
            }
            start = end;
        }
        Ok(())
    }
}

/// The next [`CHUNK`] tokens from `(sequence, token)` on, and where the chunk after them starts.
fn next_chunk(
    batch: &[Sequence<'_>],
    (mut sequence, mut token): (usize, usize),
) -> Option<(Vec<Piece>, (usize, usize))> {
    let (mut pieces, mut rows) = (Vec::new(), 0);
    while rows < CHUNK && sequence < batch.len() {
        let len = (batch[sequence].input_ids.len() - token).min(CHUNK - rows);
        if len > 0 {
            let first = batch[sequence].cache.len();
            let tokens = token..token + len;
            pieces.push(Piece { sequence, tokens, rows: rows..rows + len, first });
        }
        (rows, token) = (rows + len, token + len);
        if token == batch[sequence].input_ids.len() {
            (sequence, token) = (sequence + 1, 0);
        }
    }
    (rows > 0).then_some((pieces, (sequence, token)))
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
        let deepest = sites.iter().map(|site| site.layer).max().ok_or_else(|| {
            Error::Config("no sites: name at least one, such as 14.resid_post".into())
        })?;
        let needs_mlp = |layer| {
            let read = |site: &Site| site.layer == layer && site.kind != SiteKind::AttnOut;
            layer < deepest || sites.iter().any(read)
        };
        let (mut norms, mut sources) = (Vec::new(), Vec::new());
        for layer in 0..=deepest {
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
        Ok((0..=deepest).map_while(block).collect())
    }

    fn norm(&self, layer: usize, name: &str) -> Result<Vec<f32>> {
        self.weights.widen(
            &format!("model.layers.{layer}.{name}.weight"),
            1,
            self.config.hidden_size,
        )
    }

    /// A matrix of a block, and its bias if it has one.
    fn linear(&self, layer: usize, name: &str, outputs: usize, inputs: usize) -> Result<Linear> {
        let name = format!("model.layers.{layer}.{name}");
        let weight = self.weights.expect(&format!("{name}.weight"), outputs, inputs)?.clone();
        let bias = match self.weights.get(&format!("{name}.bias")) {
            Some(_) => self.weights.widen(&format!("{name}.bias"), 1, outputs)?,
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

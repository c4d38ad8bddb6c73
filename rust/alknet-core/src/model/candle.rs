//! The candle engine: portable, in fp32 throughout, the numerical reference of the native one.
//!
//! ```text
//! x ─ RMSNorm ─ q, k, v ─ RoPE ─ softmax(q kᵀ / √head_dim) v ─ o_proj ─ (+x) ─ RMSNorm ─ SiLU(gate) · up ─ down ─ (+x)
//! ```
//!
//! Weights are widened to fp32 when the model is loaded, embedding rows as they are needed. The rows of
//! all sequences go through the linear layers together; attention runs per sequence, so that nothing is
//! padded, in blocks of [`QUERIES`] queries, so that no n × n matrix is made.
//!
//! Products, rotary, norm, softmax and mask are candle's own. Its `Llama` cannot be used: it knows no
//! sites, pads batches, keeps its cache to itself and runs to the last layer. For sums see [`Rowwise`].
//!
//! Source: Transformers `modeling_llama.py`; candle-transformers `models/llama.rs`.

use std::{
    ops::Range,
    process,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{CpuStorage, CustomOp2, D, Device, Layout, Module, Shape, Tensor};
use candle_nn::{Linear, RmsNorm, ops::softmax_last_dim, rotary_emb::rope};
use candle_transformers::utils::{build_causal_mask, repeat_kv};
use rayon::{
    ThreadPool, ThreadPoolBuilder,
    iter::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator},
    slice::{ParallelSlice, ParallelSliceMut},
};

use super::{
    Backend, Input, KvCache, LayerCache, LlamaConfig, Readout, Sequence, Sink, Site, SiteKind,
    config::RotaryFrequencies,
    num_layers,
    weights::{TensorInfo, Weights},
};
use crate::error::{Error, Result};

/// Queries whose scores are computed together: 128 × 8,192 scores of 9 heads are 38 MB.
const QUERIES: usize = 128;

/// A loaded model, immutable.
pub struct CandleBackend {
    config: LlamaConfig,
    frequencies: RotaryFrequencies,
    sites: Vec<Site>,
    weights: Arc<Weights>,
    embedding: TensorInfo,
    blocks: Vec<Block>,
    pool: Pool,
}

/// Weights of one block.
struct Block {
    input_layernorm: RmsNorm,
    q_proj: Projection,
    k_proj: Projection,
    v_proj: Projection,
    o_proj: Projection,
    post_attention_layernorm: RmsNorm,
    gate_proj: Projection,
    up_proj: Projection,
    down_proj: Projection,
}

/// `x Wᵀ + b`. candle's `Linear` has biases as well, but see [`Rowwise`].
struct Projection {
    weight: Linear,
    bias: Option<Tensor>,
}

/// What a block makes of its input, each `[n, hidden_size]`.
struct BlockOutput {
    attn_out: Tensor,
    mlp_out: Tensor,
    resid_post: Tensor,
}

/// A sequence's rows in the batch, and their rotary angles.
struct Segment {
    /// Of its tokens, then of its readouts.
    rows: Range<usize>,
    tokens: usize,
    /// Of every readout, how many positions it sees.
    readouts: Vec<usize>,
    /// `[rows, head_dim / 2]`.
    cos: Tensor,
    /// `[rows, head_dim / 2]`.
    sin: Tensor,
}

impl CandleBackend {
    /// Widens the blocks up to the deepest of `sites`.
    ///
    /// `threads` defaults to what this process may use.
    ///
    /// # Errors
    /// [`Error::Config`] for sites that are none, repeated or beyond the last layer, [`Error::ModelLoad`]
    /// when the file lacks a tensor up to the deepest site, or holds a number that is not finite.
    pub fn load(
        weights: Arc<Weights>,
        config: &LlamaConfig,
        sites: &[Site],
        threads: Option<usize>,
    ) -> Result<Self> {
        let pool = Pool::new(threads)?;
        let num_layers = num_layers(sites, config)?;
        let embedding =
            weights.expect(LlamaConfig::EMBEDDINGS, config.vocab_size, config.hidden_size)?.clone();
        let blocks = pool.run(|| {
            (0..num_layers)
                .into_par_iter()
                .map(|layer| Block::load(&weights, config, layer))
                .collect::<Result<Vec<_>>>()
        })??;
        Ok(Self {
            config: config.clone(),
            frequencies: config.rotary_frequencies(),
            sites: sites.to_vec(),
            weights,
            embedding,
            blocks,
            pool,
        })
    }

    /// Residual stream before the first block, `[n, hidden_size]`.
    fn embed(&self, batch: &[Sequence<'_>]) -> Result<Tensor> {
        let hidden = self.config.hidden_size;
        let inputs: Vec<_> = batch.iter().flat_map(|sequence| sequence.inputs(hidden)).collect();
        let n = inputs.len();
        let mut rows = vec![0.0; n * hidden];
        for (input, row) in inputs.into_iter().zip(rows.chunks_exact_mut(hidden)) {
            match input {
                Input::Token(id) => {
                    let id = id as usize;
                    self.weights.widen_rows(&self.embedding, id..id + 1, row)?;
                }
                Input::Vector(vector) => row.copy_from_slice(vector),
            }
        }
        Ok(Tensor::from_vec(rows, (n, hidden), &Device::Cpu)?)
    }

    /// What is added to the residual stream before block `layer`, `[n, hidden_size]`, if anything is.
    fn steering(&self, batch: &[Sequence<'_>], layer: usize) -> Result<Option<Tensor>> {
        let hidden = self.config.hidden_size;
        let mut readouts = batch.iter().flat_map(|sequence| sequence.readouts);
        let steered = |Readout { probe, .. }: &Readout<'_>| probe.steering(layer, hidden).is_some();
        if !readouts.any(steered) {
            return Ok(None);
        }
        let mut rows = Vec::new();
        for Sequence { input_ids, readouts, .. } in batch {
            rows.resize(rows.len() + input_ids.len() * hidden, 0.0);
            for Readout { probe, .. } in *readouts {
                match probe.steering(layer, hidden) {
                    Some(vector) => rows.extend_from_slice(vector),
                    None => rows.resize(rows.len() + hidden, 0.0),
                }
            }
        }
        let n = rows.len() / hidden;
        Ok(Some(Tensor::from_vec(rows, (n, hidden), &Device::Cpu)?))
    }

    /// Where the sequences lie in the batch.
    fn segments(&self, batch: &[Sequence<'_>]) -> Result<Vec<Segment>> {
        let mut start = 0;
        let mut segment = |sequence: &Sequence<'_>| {
            let rows = start..start + sequence.n_rows();
            start = rows.end;
            let (past, tokens) = (sequence.cache.len(), sequence.input_ids.len());
            let readouts: Vec<_> = sequence.readouts.iter().map(|r| past + r.after).collect();
            let positions = (past..past + tokens).chain(readouts.iter().copied());
            let (cos, sin) = self.angles(positions.collect())?;
            Ok(Segment { rows, tokens, readouts, cos, sin })
        };
        batch.iter().filter(|sequence| sequence.n_rows() > 0).map(&mut segment).collect()
    }

    /// Cosines and sines of the rotary angles, `[positions, head_dim / 2]`.
    fn angles(&self, positions: Vec<usize>) -> Result<(Tensor, Tensor)> {
        let RotaryFrequencies { inv_freq, attention_factor } = &self.frequencies;
        let shape = (positions.len(), inv_freq.len());
        // In f64: at position 8,000 an angle in f32 is off by 5e-4.
        let (cos, sin): (Vec<f32>, Vec<f32>) = positions
            .into_iter()
            .flat_map(|position| inv_freq.iter().map(move |f| (position as f64 * f).sin_cos()))
            .map(|(sin, cos)| ((cos * attention_factor) as f32, (sin * attention_factor) as f32))
            .unzip();
        let tensor = |angles| Tensor::from_vec(angles, shape, &Device::Cpu);
        Ok((tensor(cos)?, tensor(sin)?))
    }

    /// Takes the rows of all sequences through one block and extends their caches.
    fn block(
        &self,
        layer: usize,
        x: &Tensor,
        segments: &[Segment],
        caches: &mut [&mut LayerCache],
    ) -> Result<BlockOutput> {
        let block = &self.blocks[layer];
        let normed = block.input_layernorm.forward(x)?;
        let (q, k, v) = (
            block.q_proj.forward(&normed)?,
            block.k_proj.forward(&normed)?,
            block.v_proj.forward(&normed)?,
        );
        let contexts = segments
            .iter()
            .zip(caches)
            .map(|(segment, cache)| self.attention(segment, &q, &k, &v, cache))
            .collect::<Result<Vec<_>>>()?;
        let attn_out = block.o_proj.forward(&Tensor::cat(&contexts, 0)?)?;
        let resid_mid = add(x, &attn_out)?;
        let normed = block.post_attention_layernorm.forward(&resid_mid)?;
        let (gate, up) = (block.gate_proj.forward(&normed)?, block.up_proj.forward(&normed)?);
        let mlp_out = block.down_proj.forward(&gate.apply_op2_no_bwd(&up, &Rowwise(silu_mul))?)?;
        let resid_post = add(&resid_mid, &mlp_out)?;
        Ok(BlockOutput { attn_out, mlp_out, resid_post })
    }

    /// Attention of one sequence over its cache and itself, up to the input of `o_proj`.
    ///
    /// # Shapes
    /// - `q`: `[n, num_attention_heads · head_dim]`; `k`, `v`: `[n, num_key_value_heads · head_dim]`,
    ///   the rows of all sequences
    /// - result: `[segment.rows, num_attention_heads · head_dim]`
    fn attention(
        &self,
        segment: &Segment,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        cache: &mut LayerCache,
    ) -> Result<Tensor> {
        let (num_heads, num_kv_heads) =
            (self.config.num_attention_heads, self.config.num_key_value_heads());
        let rotated = |x: &Tensor, heads| -> Result<Tensor> {
            let rows = x.narrow(0, segment.rows.start, segment.rows.len())?;
            Ok(rope(&self.split_heads(&rows, heads)?, &segment.cos, &segment.sin)?)
        };
        let (q, k) = (rotated(q, num_heads)?, rotated(k, num_kv_heads)?);
        let k = k.narrow(2, 0, segment.tokens)?;
        cache.keys.extend(join_heads(&k)?.flatten_all()?.to_vec1::<f32>()?);
        let v = v.narrow(0, segment.rows.start, segment.tokens)?;
        cache.values.extend(v.flatten_all()?.to_vec1::<f32>()?);

        let all = |rows: &[f32]| -> Result<Tensor> {
            let width = num_kv_heads * self.config.head_dim();
            let rows = Tensor::from_slice(rows, (rows.len() / width, width), &Device::Cpu)?;
            let heads = self.split_heads(&rows, num_kv_heads)?;
            Ok(repeat_kv(heads, num_heads / num_kv_heads)?)
        };
        let (k, v) = (all(&cache.keys)?, all(&cache.values)?);
        let mut contexts = Vec::new();
        if segment.tokens > 0 {
            contexts.push(self.softmax_attention(&q.narrow(2, 0, segment.tokens)?, &k, &v)?);
        }
        for (i, &seen) in segment.readouts.iter().enumerate() {
            let (k, v) = (k.narrow(2, 0, seen)?, v.narrow(2, 0, seen)?);
            contexts.push(self.softmax_attention(&q.narrow(2, segment.tokens + i, 1)?, &k, &v)?);
        }
        Ok(Tensor::cat(&contexts, 0)?)
    }

    /// Causal attention in blocks of queries.
    ///
    /// # Shapes
    /// - `q`: `[1, num_attention_heads, n, head_dim]`, the last `n` positions of `k`
    /// - `k`, `v`: `[1, num_attention_heads, len, head_dim]`
    /// - result: `[n, num_attention_heads · head_dim]`
    fn softmax_attention(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (n, len) = (q.dim(2)?, k.dim(2)?);
        let scale = 1.0 / (self.config.head_dim() as f64).sqrt();
        let masked = Tensor::new(f32::NEG_INFINITY, &Device::Cpu)?;
        let mut contexts = Vec::new();
        for start in (0..n).step_by(QUERIES) {
            let queries = QUERIES.min(n - start);
            // Keys after the last query of the block are masked for all of it: leave them out.
            let (past, seen) = (len - n + start, len - n + start + queries);
            let (k, v) = (k.narrow(2, 0, seen)?, v.narrow(2, 0, seen)?);
            let scores = (q.narrow(2, start, queries)?.matmul(&k.t()?)? * scale)?;
            let mask =
                build_causal_mask(queries, past, &Device::Cpu)?.broadcast_as(scores.shape())?;
            let scores = mask.where_cond(&masked.broadcast_as(scores.shape())?, &scores)?;
            contexts.push(join_heads(&softmax_last_dim(&scores)?.matmul(&v)?)?);
        }
        Ok(Tensor::cat(&contexts, 0)?)
    }

    /// `[n, heads · head_dim]` to `[1, heads, n, head_dim]`.
    fn split_heads(&self, rows: &Tensor, heads: usize) -> Result<Tensor> {
        let split = rows.reshape((1, rows.dim(0)?, heads, self.config.head_dim()))?;
        Ok(split.transpose(1, 2)?.contiguous()?)
    }

    /// Hands over the rows of all sequences at the sites of one layer.
    fn hand_over(
        &self,
        layer: usize,
        output: &BlockOutput,
        batch: &[Sequence<'_>],
        sink: &dyn Sink,
    ) -> Result<()> {
        for (index, site) in self.sites.iter().enumerate().filter(|(_, s)| s.layer == layer) {
            let tensor = match site.kind {
                SiteKind::AttnOut => &output.attn_out,
                SiteKind::MlpOut => &output.mlp_out,
                SiteKind::ResidPost => &output.resid_post,
            };
            let rows = tensor.flatten_all()?.to_vec1::<f32>()?;
            let mut rest = rows.as_slice();
            for (index_in_batch, sequence) in batch.iter().enumerate() {
                let (own, others) = rest.split_at(sequence.n_rows() * self.config.hidden_size);
                rest = others;
                if !own.is_empty() {
                    sink.rows(index_in_batch, index, 0, own)?;
                }
            }
        }
        Ok(())
    }
}

/// `[1, heads, n, head_dim]` to `[n, heads · head_dim]`.
fn join_heads(x: &Tensor) -> Result<Tensor> {
    Ok(x.squeeze(0)?.transpose(0, 1)?.flatten_from(D::Minus2)?)
}

impl Projection {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let product = self.weight.forward(x)?;
        match &self.bias {
            Some(bias) => add(&product, bias),
            None => Ok(product),
        }
    }
}

/// A function of the numbers of two matrices, or of a matrix and one row.
///
/// candle's own spread large tensors over threads that spin, one set per process and as many as the
/// environment says: a forked child waits for them for ever, and callers wait for each other. This one
/// works on the pool that calls it.
struct Rowwise(fn(f32, f32) -> f32);

impl CustomOp2 for Rowwise {
    fn name(&self) -> &'static str {
        "rowwise"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (a, b) = (contiguous(s1, l1)?, contiguous(s2, l2)?);
        let width = l1.dims().last().copied().unwrap_or(1);
        let mut out = vec![0.0; a.len()];
        let rows = out.par_chunks_mut(width).zip(a.par_chunks(width)).enumerate();
        rows.for_each(|(row, (out, a))| {
            let b = &b[row * width % b.len()..][..width];
            for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
                *out = self.0(*a, *b);
            }
        });
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }
}

/// The numbers of a tensor without gaps.
fn contiguous<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("rowwise functions need contiguous tensors")
    };
    Ok(&storage.as_slice()?[start..end])
}

fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    Ok(a.apply_op2_no_bwd(b, &Rowwise(|a, b| a + b))?)
}

/// `SiLU(gate) · up`.
fn silu_mul(gate: f32, up: f32) -> f32 {
    gate / (1.0 + (-gate).exp()) * up
}

impl Backend for CandleBackend {
    fn name(&self) -> String {
        format!("candle (fp32, {} threads)", self.pool.threads)
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
        KvCache::new(self.blocks.len())
    }

    fn forward(&self, batch: &mut [Sequence<'_>], sink: &dyn Sink) -> Result<()> {
        for sequence in batch.iter() {
            sequence.check(&self.config, self.blocks.len())?;
        }
        if batch.iter().all(|sequence| sequence.n_rows() == 0) {
            return Ok(());
        }
        let segments = self.segments(batch)?;
        let mut x = self.embed(batch)?;
        for layer in 0..self.blocks.len() {
            let steering = self.steering(batch, layer)?;
            let mut caches: Vec<_> = batch
                .iter_mut()
                .filter(|sequence| sequence.n_rows() > 0)
                .map(|sequence| &mut sequence.cache.layers[layer])
                .collect();
            if let Some(steering) = steering {
                x = add(&x, &steering)?;
            }
            let output = self.pool.run(|| self.block(layer, &x, &segments, &mut caches))??;
            self.hand_over(layer, &output, batch, sink)?;
            x = output.resid_post;
        }
        for Sequence { input_ids, cache, .. } in batch {
            cache.input_ids.extend_from_slice(input_ids);
        }
        Ok(())
    }
}

impl Block {
    fn load(weights: &Weights, config: &LlamaConfig, layer: usize) -> Result<Self> {
        let tensors = config.block_tensors();
        let tensor = |name: String| -> Result<Option<Tensor>> {
            let Some(tensor) = tensors.iter().find(|tensor| tensor.name == name) else {
                return Ok(None);
            };
            let numbers = weights.widen(&tensor.full_name(layer), tensor.rows, tensor.cols)?;
            let shape = [tensor.rows, tensor.cols];
            // Vectors are the tensors of one row.
            let shape = if tensor.rows == 1 { &shape[1..] } else { &shape[..] };
            Ok(Some(Tensor::from_vec(numbers, shape, &Device::Cpu)?))
        };
        let weight = |module: &str| -> Result<Tensor> {
            let missing = || Error::Inference(format!("{module} is no part of a Llama block"));
            tensor(format!("{module}.weight"))?.ok_or_else(missing)
        };
        let linear = |module: &str| -> Result<Projection> {
            let weight = Linear::new(weight(module)?, None);
            Ok(Projection { weight, bias: tensor(format!("{module}.bias"))? })
        };
        let norm = |module: &str| -> Result<RmsNorm> {
            Ok(RmsNorm::new(weight(module)?, config.rms_norm_eps))
        };
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            q_proj: linear("self_attn.q_proj")?,
            k_proj: linear("self_attn.k_proj")?,
            v_proj: linear("self_attn.v_proj")?,
            o_proj: linear("self_attn.o_proj")?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            gate_proj: linear("mlp.gate_proj")?,
            up_proj: linear("mlp.up_proj")?,
            down_proj: linear("mlp.down_proj")?,
        })
    }
}

/// Threads for candle, which works on whichever rayon pool calls it.
///
/// rayon's global pool would be shared with the caller's own work, and the threads of any pool are
/// gone in a forked child: there the first call starts new ones.
struct Pool {
    threads: usize,
    process: u32,
    /// `None` only while it is dropped.
    own: Option<ThreadPool>,
    forked: Mutex<Option<(u32, Arc<ThreadPool>)>>,
}

impl Pool {
    /// Starts `threads` threads, or as many as affinity and cgroup quota let this process use.
    fn new(threads: Option<usize>) -> Result<Self> {
        let threads = threads
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
            .max(1);
        let own = Some(start(threads)?);
        Ok(Self { threads, process: process::id(), own, forked: Mutex::default() })
    }

    /// Runs `work` on the threads of this process.
    fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let process = process::id();
        if let Some(own) = self.own.as_ref().filter(|_| self.process == process) {
            return Ok(own.install(work));
        }
        let pool = {
            let mut forked = self.forked.lock().unwrap_or_else(PoisonError::into_inner);
            match &*forked {
                Some((owner, pool)) if *owner == process => pool.clone(),
                _ => {
                    let pool = Arc::new(start(self.threads)?);
                    // The pool of a parent between cannot be ended from here.
                    std::mem::forget(forked.replace((process, pool.clone())));
                    pool
                }
            }
        };
        Ok(pool.install(work))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if self.process != process::id() {
            // A forked child must not wait for its parent's threads.
            std::mem::forget(self.own.take());
        }
    }
}

/// A pool of `threads` threads of this process.
fn start(threads: usize) -> Result<ThreadPool> {
    ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|index| format!("alknet-candle-{index}"))
        .build()
        .map_err(|error| Error::Inference(format!("threads cannot be started: {error}")))
}

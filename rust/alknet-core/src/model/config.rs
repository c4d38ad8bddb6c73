//! `config.json` of a Llama-type decoder, and its rotary frequencies.
//!
//! Field names and defaults are those of Transformers' `LlamaConfig`. `candle-transformers` has a
//! structure of the same name, but it knows neither `head_dim`, biases nor the linear, dynamic and
//! YaRN kinds of RoPE scaling.

use std::{
    f64::consts::PI,
    fs::File,
    io::{self, Read},
    path::Path,
};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Most bytes of a JSON file that are read; the largest `tokenizer.json` of a Llama has 17 MB.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// Shape of a Llama-type decoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LlamaConfig {
    /// Architecture name; `llama` and its equals are accepted (see [`LlamaConfig::validate`]).
    #[serde(default = "default_model_type")]
    pub model_type: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward network.
    pub intermediate_size: usize,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Number of blocks of the whole model (a packed file may hold fewer).
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads; each serves `num_attention_heads / num_key_value_heads` query heads.
    #[serde(default)]
    pub num_key_value_heads: Option<usize>,
    /// Width of one head; `hidden_size / num_attention_heads` when absent.
    #[serde(default)]
    pub head_dim: Option<usize>,
    /// ε of RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    #[serde(default = "default_rope_theta")]
    pub rope_theta: f64,
    /// Scaling of the rotary frequencies, `None` for plain RoPE.
    #[serde(default)]
    pub rope_scaling: Option<RopeScaling>,
    /// Most positions the model was made for.
    pub max_position_embeddings: usize,
    /// Activation of the gate; only `silu` is supported.
    #[serde(default = "default_hidden_act")]
    pub hidden_act: String,
    /// Whether the attention projections have biases.
    #[serde(default)]
    pub attention_bias: bool,
    /// Whether the feed-forward projections have biases.
    #[serde(default)]
    pub mlp_bias: bool,
    /// Whether the output embedding is the input embedding. No LM head is ever run here.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Token put in front of every text, as an attention sink.
    #[serde(default)]
    pub bos_token_id: Option<u32>,
}

fn default_model_type() -> String {
    "llama".into()
}

fn default_rope_theta() -> f64 {
    10_000.0
}

fn default_hidden_act() -> String {
    "silu".into()
}

/// `rope_scaling` of `config.json`; older files call the kind `type`, newer ones `rope_type`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase", deny_unknown_fields)]
pub enum RopeScaling {
    /// No scaling.
    Default,
    /// Every frequency divided by `factor` (position interpolation).
    Linear {
        /// Ratio of the new to the trained context length.
        factor: f64,
    },
    /// NTK-aware scaling of the base. It acts only beyond `max_position_embeddings`, which
    /// is never exceeded here, so it equals no scaling.
    Dynamic {
        /// Ratio of the new to the trained context length.
        factor: f64,
    },
    /// Llama 3: low frequencies divided by `factor`, high ones kept, a smooth blend between.
    Llama3 {
        /// Ratio of the new to the trained context length.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are scaled fully.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Trained context length.
        original_max_position_embeddings: usize,
    },
    /// YaRN (Peng et al. 2023): a ramp between interpolation and extrapolation, and a temperature.
    Yarn {
        /// Ratio of the new to the trained context length.
        factor: f64,
        /// Trained context length; `max_position_embeddings / factor` when absent.
        #[serde(default)]
        original_max_position_embeddings: Option<usize>,
        /// Rotations above which a frequency is kept.
        #[serde(default = "default_beta_fast")]
        beta_fast: f64,
        /// Rotations below which a frequency is interpolated.
        #[serde(default = "default_beta_slow")]
        beta_slow: f64,
        /// Factor on cosines and sines; `0.1 ln(factor) + 1` when absent.
        #[serde(default)]
        attention_factor: Option<f64>,
    },
}

impl RopeScaling {
    /// Refuses numbers for which the formulas make no sense.
    fn validate(&self) -> std::result::Result<(), String> {
        match *self {
            Self::Default => {}
            Self::Linear { factor }
            | Self::Dynamic { factor }
            | Self::Llama3 { factor, .. }
            | Self::Yarn { factor, .. } => {
                if !(factor.is_finite() && factor > 0.0) {
                    return Err(format!("rope_scaling has factor {factor}; it must be positive"));
                }
            }
        }
        match *self {
            Self::Llama3 { low_freq_factor: low, high_freq_factor: high, .. } if low >= high => {
                Err(format!(
                    "rope_scaling has low_freq_factor {low} and high_freq_factor {high}; \
                     the first must be below the second"
                ))
            }
            _ => Ok(()),
        }
    }
}

fn default_beta_fast() -> f64 {
    32.0
}

fn default_beta_slow() -> f64 {
    1.0
}

/// Rotary frequencies: angle of pair `i` at position `p` is `p · inv_freq[i]`.
#[derive(Debug, Clone, PartialEq)]
pub struct RotaryFrequencies {
    /// `[head_dim / 2]`.
    pub inv_freq: Vec<f64>,
    /// Factor on cosines and sines (1 except for YaRN).
    pub attention_factor: f64,
}

/// A tensor of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockTensor {
    /// Name after `model.layers.N.` in Hugging Face checkpoints.
    pub name: &'static str,
    /// Number of rows (outputs of a matrix; 1 for vectors).
    pub rows: usize,
    /// Numbers in one row (inputs of a matrix).
    pub cols: usize,
}

impl BlockTensor {
    /// Name in the checkpoint.
    pub fn full_name(&self, layer: usize) -> String {
        format!("model.layers.{layer}.{}", self.name)
    }
}

impl LlamaConfig {
    /// Name of the embedding matrix, `[vocab_size, hidden_size]`, in Hugging Face checkpoints.
    pub const EMBEDDINGS: &str = "model.embed_tokens.weight";

    /// Reads and validates `config.json`.
    ///
    /// # Errors
    /// [`Error::ModelLoad`] naming the field that is missing, unknown or out of range.
    pub fn from_file(path: &Path) -> Result<Self> {
        Self::from_json(path, &read_json(path)?)
    }

    /// Parses and validates the bytes of `config.json`; `path` is only for messages.
    ///
    /// # Errors
    /// [`Error::ModelLoad`] as for [`LlamaConfig::from_file`].
    pub fn from_json(path: &Path, bytes: &[u8]) -> Result<Self> {
        let mut json: serde_json::Value = serde_json::from_slice(bytes)
            .map_err(|error| Error::model(path, format!("not JSON: {error}")))?;
        rename_rope_type(&mut json);
        let config: Self = serde_json::from_value(json)
            .map_err(|error| Error::model(path, format!("not a Llama configuration: {error}")))?;
        config.validate().map_err(|problem| Error::model(path, problem))?;
        Ok(config)
    }

    /// Key/value heads.
    pub fn num_key_value_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// Width of one head.
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }

    /// The tensors that every block has, norms and biases as one row.
    pub fn block_tensors(&self) -> Vec<BlockTensor> {
        let (hidden, ffn) = (self.hidden_size, self.intermediate_size);
        let queries = self.num_attention_heads * self.head_dim();
        let keys = self.num_key_value_heads() * self.head_dim();
        let mut tensors = vec![
            ("input_layernorm.weight", 1, hidden),
            ("self_attn.q_proj.weight", queries, hidden),
            ("self_attn.k_proj.weight", keys, hidden),
            ("self_attn.v_proj.weight", keys, hidden),
            ("self_attn.o_proj.weight", hidden, queries),
            ("post_attention_layernorm.weight", 1, hidden),
            ("mlp.gate_proj.weight", ffn, hidden),
            ("mlp.up_proj.weight", ffn, hidden),
            ("mlp.down_proj.weight", hidden, ffn),
        ];
        if self.attention_bias {
            tensors.extend([
                ("self_attn.q_proj.bias", 1, queries),
                ("self_attn.k_proj.bias", 1, keys),
                ("self_attn.v_proj.bias", 1, keys),
                ("self_attn.o_proj.bias", 1, hidden),
            ]);
        }
        if self.mlp_bias {
            tensors.extend([
                ("mlp.gate_proj.bias", 1, ffn),
                ("mlp.up_proj.bias", 1, ffn),
                ("mlp.down_proj.bias", 1, hidden),
            ]);
        }
        tensors.into_iter().map(|(name, rows, cols)| BlockTensor { name, rows, cols }).collect()
    }

    /// Checks every size against the others and against limits that bound what is allocated.
    pub(crate) fn validate(&self) -> std::result::Result<(), String> {
        let sizes = [
            ("hidden_size", self.hidden_size, 1 << 16),
            ("intermediate_size", self.intermediate_size, 1 << 18),
            ("vocab_size", self.vocab_size, 1 << 21),
            ("num_hidden_layers", self.num_hidden_layers, 1 << 10),
            ("num_attention_heads", self.num_attention_heads, 1 << 10),
            ("num_key_value_heads", self.num_key_value_heads(), 1 << 10),
            ("head_dim", self.head_dim(), 1 << 10),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 24),
        ];
        for (name, size, limit) in sizes {
            if size == 0 || size > limit {
                return Err(format!("{name} is {size}; 1 to {limit} can be loaded"));
            }
        }
        if !self.head_dim().is_multiple_of(2) {
            return Err(format!(
                "head_dim is {}; rotary embeddings need an even number",
                self.head_dim()
            ));
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads()) {
            return Err(format!(
                "num_attention_heads {} is not a multiple of num_key_value_heads {}",
                self.num_attention_heads,
                self.num_key_value_heads()
            ));
        }
        if self.model_type != "llama" {
            return Err(format!(
                "model_type {:?} is not supported, only \"llama\"",
                self.model_type
            ));
        }
        if self.hidden_act != "silu" {
            return Err(format!(
                "hidden_act {:?} is not supported, only \"silu\"",
                self.hidden_act
            ));
        }
        let positive = |x: f64| x.is_finite() && x > 0.0;
        if !positive(self.rms_norm_eps) || !positive(self.rope_theta) {
            return Err(format!(
                "rms_norm_eps {} and rope_theta {} must be positive",
                self.rms_norm_eps, self.rope_theta
            ));
        }
        self.rope_scaling.as_ref().map_or(Ok(()), RopeScaling::validate)?;
        let frequencies = self.rotary_frequencies();
        if !frequencies.inv_freq.iter().all(|&f| positive(f))
            || !positive(frequencies.attention_factor)
        {
            return Err("rope_scaling gives frequencies that are not positive".into());
        }
        Ok(())
    }

    /// Rotary frequencies with this model's scaling.
    ///
    /// Source: Transformers `modeling_rope_utils.py`; YaRN, arXiv 2309.00071, section 3.
    pub fn rotary_frequencies(&self) -> RotaryFrequencies {
        let dim = self.head_dim();
        let plain: Vec<f64> =
            (0..dim / 2).map(|i| self.rope_theta.powf(-(2.0 * i as f64) / dim as f64)).collect();
        let mut attention_factor = 1.0;
        let inv_freq = match &self.rope_scaling {
            None | Some(RopeScaling::Default | RopeScaling::Dynamic { .. }) => plain,
            Some(RopeScaling::Linear { factor }) => plain.iter().map(|f| f / factor).collect(),
            Some(RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            }) => {
                let original = *original_max_position_embeddings as f64;
                let blend = |&f: &f64| {
                    let rotations = original * f / (2.0 * PI);
                    let smooth =
                        (rotations - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let smooth = smooth.clamp(0.0, 1.0);
                    (1.0 - smooth) * f / factor + smooth * f
                };
                plain.iter().map(blend).collect()
            }
            Some(RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                beta_fast,
                beta_slow,
                attention_factor: given,
            }) => {
                attention_factor =
                    given.unwrap_or(if *factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 });
                let original = original_max_position_embeddings
                    .map_or(self.max_position_embeddings as f64 / factor, |n| n as f64);
                // Index of the pair that makes `rotations` turns over the trained context.
                let pair = |rotations: f64| {
                    dim as f64 * (original / (rotations * 2.0 * PI)).ln()
                        / (2.0 * self.rope_theta.ln())
                };
                let low = pair(*beta_fast).floor().max(0.0);
                let high = pair(*beta_slow).ceil().min(dim as f64 - 1.0);
                let width = if high > low { high - low } else { 0.001 };
                let blend = |(i, f): (usize, &f64)| {
                    let interpolated = ((i as f64 - low) / width).clamp(0.0, 1.0);
                    interpolated * f / factor + (1.0 - interpolated) * f
                };
                plain.iter().enumerate().map(blend).collect()
            }
        };
        RotaryFrequencies { inv_freq, attention_factor }
    }
}

/// Bytes of `config.json`, `tokenizer.json` or another JSON file of a model.
pub(crate) fn read_json(path: &Path) -> Result<Vec<u8>> {
    read_at_most(path, MAX_JSON_BYTES)
        .map_err(|error| Error::model(path, format!("cannot be read: {error}")))
}

/// Bytes of a file, unless there are more than `most`: a hostile one must not fill the memory.
pub(crate) fn read_at_most(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // One byte more than allowed shows that there is more, even where no size is told beforehand.
    File::open(path)?.take(most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        let problem = format!("at most {most} bytes are, and it has more");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, problem));
    }
    Ok(bytes)
}

/// Brings the two older spellings of `rope_scaling` to the present one.
fn rename_rope_type(json: &mut serde_json::Value) {
    let Some(root) = json.as_object_mut() else { return };
    // Transformers 5 nests the base as well: {"rope_parameters": {"rope_theta", "rope_type", …}}.
    if let Some(serde_json::Value::Object(mut parameters)) = root.remove("rope_parameters") {
        if let Some(theta) = parameters.remove("rope_theta") {
            root.insert("rope_theta".into(), theta);
        }
        root.insert("rope_scaling".into(), parameters.into());
    }
    if let Some(scaling) = root.get_mut("rope_scaling").and_then(serde_json::Value::as_object_mut)
        && let Some(kind) = scaling.remove("type")
    {
        scaling.entry("rope_type").or_insert(kind);
    }
}

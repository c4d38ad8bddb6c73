//! A Llama-type GGUF file as a packed checkpoint.

use std::borrow::Cow;

use super::{
    Checkpoint, PackedTensor, SINK_TOKEN, check_depth,
    gguf::{Gguf, Tensor},
    tokenizer,
};
use crate::model::{
    LlamaConfig,
    config::{BlockTensor, RopeScaling},
    weights::Format,
};

type Result<T> = std::result::Result<T, String>;

/// Names within a block: Hugging Face's module, GGUF's.
const MODULES: [(&str, &str); 9] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// Embeddings in GGUF files.
const EMBEDDINGS: &str = "token_embd.weight";

/// Reads configuration, tokenizer and the first `num_layers` blocks from the bytes of a GGUF file.
pub(super) fn read(bytes: &[u8], num_layers: usize) -> Result<Checkpoint<'_>> {
    let gguf = Gguf::parse(bytes)?;
    let config = config(&gguf)?;
    check_depth(&config, num_layers)?;
    refuse_unknown_tensors(&gguf, &config)?;
    let embeddings = LlamaConfig::EMBEDDINGS.to_owned();
    let (rows, cols) = (config.vocab_size, config.hidden_size);
    let mut tensors =
        vec![(embeddings, packed(bytes, expect(&gguf, EMBEDDINGS, rows, cols)?, None))];
    for layer in 0..num_layers {
        for tensor in config.block_tensors() {
            let stored = format!("blk.{layer}.{}", gguf_name(tensor.name));
            let found = expect(&gguf, &stored, tensor.rows, tensor.cols)?;
            let head_dim = is_rotated(&tensor).then(|| config.head_dim());
            tensors.push((tensor.full_name(layer), packed(bytes, found, head_dim)));
        }
    }
    Ok(Checkpoint { config, tensors, tokenizer: Cow::Owned(tokenizer::to_json(&gguf)?) })
}

/// The configuration that Transformers would have for this file.
fn config(gguf: &Gguf<'_>) -> Result<LlamaConfig> {
    let architecture = gguf.string("general.architecture")?.unwrap_or("none");
    if architecture != "llama" {
        return Err(format!("has architecture {architecture:?}; only \"llama\" can be packed"));
    }
    if gguf.integer("llama.expert_count")?.unwrap_or(0) > 0 {
        return Err("is a mixture of experts; only dense models can be packed".into());
    }
    let size = |key: &str| {
        gguf.integer(&format!("llama.{key}"))?.ok_or_else(|| format!("has no llama.{key}"))
    };
    let embeddings =
        gguf.tensors.get(EMBEDDINGS).ok_or_else(|| format!("has no tensor {EMBEDDINGS:?}"))?;
    let config = LlamaConfig {
        model_type: "llama".into(),
        hidden_size: size("embedding_length")?,
        intermediate_size: size("feed_forward_length")?,
        vocab_size: embeddings.rows,
        num_hidden_layers: size("block_count")?,
        num_attention_heads: size("attention.head_count")?,
        num_key_value_heads: gguf.integer("llama.attention.head_count_kv")?,
        head_dim: gguf.integer("llama.attention.key_length")?,
        rms_norm_eps: shortest(
            gguf.float("llama.attention.layer_norm_rms_epsilon")?
                .ok_or("has no llama.attention.layer_norm_rms_epsilon")?,
        ),
        rope_theta: gguf.float("llama.rope.freq_base")?.map_or(10_000.0, shortest),
        rope_scaling: rope_scaling(gguf)?,
        max_position_embeddings: size("context_length")?,
        hidden_act: "silu".into(),
        attention_bias: gguf.tensors.contains_key("blk.0.attn_q.bias"),
        mlp_bias: gguf.tensors.contains_key("blk.0.ffn_gate.bias"),
        tie_word_embeddings: !gguf.tensors.contains_key("output.weight"),
        bos_token_id: sink_token(gguf)?,
    };
    config.validate()?;
    let rotated = gguf.integer("llama.rope.dimension_count")?.unwrap_or(config.head_dim());
    if rotated != config.head_dim() {
        return Err(format!(
            "rotates {rotated} of {} numbers per head; only whole heads are supported",
            config.head_dim()
        ));
    }
    Ok(config)
}

/// GGUF keeps 1e-5 as the nearest 32-bit float; `config.json` says 1e-5.
fn shortest(x: f64) -> f64 {
    let narrow = x as f32;
    if f64::from(narrow) == x { narrow.to_string().parse().unwrap_or(x) } else { x }
}

/// The scaling of rotary frequencies, where the file describes it in full.
fn rope_scaling(gguf: &Gguf<'_>) -> Result<Option<RopeScaling>> {
    if gguf.tensors.contains_key("rope_freqs.weight") {
        return Err("scales rotary frequencies by a table (rope_freqs.weight), which is not \
                    supported; use the model's safetensors folder, whose config.json has the rule"
            .into());
    }
    match gguf.string("llama.rope.scaling.type")? {
        None | Some("none") => Ok(None),
        Some("linear") => {
            let factor = gguf
                .float("llama.rope.scaling.factor")?
                .ok_or("has no llama.rope.scaling.factor")?;
            Ok(Some(RopeScaling::Linear { factor: shortest(factor) }))
        }
        Some(kind) => Err(format!(
            "scales rotary frequencies by {kind:?}, which a GGUF file describes only in part; \
             use the model's safetensors folder"
        )),
    }
}

/// Id of the token in front of every text.
fn sink_token(gguf: &Gguf<'_>) -> Result<Option<u32>> {
    let tokens = gguf.strings("tokenizer.ggml.tokens")?;
    let sink = tokens.iter().position(|&token| token == SINK_TOKEN);
    let id = sink.map_or_else(|| gguf.integer("tokenizer.ggml.bos_token_id"), |id| Ok(Some(id)))?;
    id.map(|id| u32::try_from(id).map_err(|_| format!("has token id {id}, too large"))).transpose()
}

/// Refuses a file whose blocks hold more than a Llama block does, such as norms on queries.
fn refuse_unknown_tensors(gguf: &Gguf<'_>, config: &LlamaConfig) -> Result<()> {
    let known: Vec<String> = config.block_tensors().iter().map(|t| gguf_name(t.name)).collect();
    for name in gguf.tensors.keys() {
        let in_block = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
        if let Some((_, name_in_block)) = in_block
            && !known.iter().any(|known| known == name_in_block)
        {
            return Err(format!("has tensor {name:?}, which no Llama-type decoder has"));
        }
    }
    Ok(())
}

/// GGUF's name of a block's tensor.
fn gguf_name(name: &str) -> String {
    let (module, parameter) = name.rsplit_once('.').expect("tensors are named MODULE.PARAMETER");
    let (_, stored) =
        MODULES.iter().find(|(hf, _)| *hf == module).expect("every module of a block is listed");
    format!("{stored}.{parameter}")
}

/// Directory entry of `name`, which must be `[rows, cols]`.
fn expect<'g>(gguf: &'g Gguf<'_>, name: &str, rows: usize, cols: usize) -> Result<&'g Tensor> {
    let tensor = gguf.tensors.get(name).ok_or_else(|| format!("has no tensor {name:?}"))?;
    if (tensor.rows, tensor.cols) != (rows, cols) {
        return Err(format!(
            "tensor {name:?} is {} x {}, its metadata say {rows} x {cols}",
            tensor.rows, tensor.cols
        ));
    }
    if rows == 1 && matches!(tensor.format, Format::Ggml(_)) {
        return Err(format!("tensor {name:?} is a quantised vector; only matrices may be"));
    }
    Ok(tensor)
}

/// Whether rotary embeddings turn the outputs of this tensor.
fn is_rotated(tensor: &BlockTensor) -> bool {
    ["self_attn.q_proj", "self_attn.k_proj"].iter().any(|module| tensor.name.starts_with(module))
}

/// A tensor as it is stored, its outputs put in Hugging Face's order when `head_dim` is given.
fn packed<'a>(bytes: &'a [u8], tensor: &Tensor, head_dim: Option<usize>) -> PackedTensor<'a> {
    let stored = &bytes[tensor.bytes.clone()];
    let outputs = if tensor.rows == 1 { tensor.cols } else { tensor.rows };
    let bytes = match head_dim {
        None => Cow::Borrowed(stored),
        Some(head_dim) => Cow::Owned(split_halves(stored, stored.len() / outputs, head_dim)),
    };
    PackedTensor::new(tensor.format, tensor.rows, bytes)
}

/// Undoes the interleaving of rotary pairs.
///
/// llama.cpp rotates neighbours and stores output `2·j + half` of a head where Hugging Face has
/// `half · head_dim/2 + j`. Whole outputs of `width` bytes move; blocks stay intact.
fn split_halves(stored: &[u8], width: usize, head_dim: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(stored.len());
    for head in stored.chunks_exact(width * head_dim) {
        for half in 0..2 {
            for j in 0..head_dim / 2 {
                let from = (2 * j + half) * width;
                out.extend_from_slice(&head[from..from + width]);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_halves_gathers_even_outputs_before_odd_ones() {
        let stored: Vec<u8> = (0..12).flat_map(|row| [row, 100 + row]).collect();
        let moved: Vec<u8> = split_halves(&stored, 2, 6).chunks(2).map(|row| row[0]).collect();
        assert_eq!(moved, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
    }

    #[test]
    fn shortest_recovers_decimal_numbers() {
        assert_eq!(shortest(f64::from(1e-5_f32)), 1e-5);
        assert_eq!(shortest(100_000.0), 100_000.0);
        assert_eq!(shortest(1e-5), 1e-5);
    }
}

//! A Hugging Face folder with safetensors files as a packed checkpoint.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Component, Path, PathBuf},
};

use serde::Deserialize;

use super::{
    Checkpoint, PackedTensor, SINK_TOKEN, check_depth, refuse_pickle_content, refuse_pickle_name,
};
use crate::{
    error::{Error, Result},
    model::{
        LlamaConfig,
        config::read_json,
        weights::{TensorInfo, Weights, map_file},
    },
};

/// An opened folder.
pub(super) struct Folder {
    path: PathBuf,
    config: LlamaConfig,
    tokenizer: Vec<u8>,
    shards: Vec<Weights>,
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    /// File of every tensor.
    weight_map: BTreeMap<String, String>,
}

impl Folder {
    /// Reads the small files and maps the large ones.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let config_path = path.join("config.json");
        let mut config = LlamaConfig::from_file(&config_path)?;
        let tokenizer_path = path.join("tokenizer.json");
        let tokenizer = read_json(&tokenizer_path)?;
        let sink = sink_token(&tokenizer)
            .map_err(|error| Error::model(&tokenizer_path, format!("is no tokenizer: {error}")))?;
        config.bos_token_id = sink.or(config.bos_token_id);
        let shards =
            shard_paths(path)?.iter().map(|shard| open_shard(shard)).collect::<Result<_>>()?;
        Ok(Self { path: path.to_owned(), config, tokenizer, shards })
    }

    /// Takes the embeddings and the first `num_layers` blocks.
    pub(super) fn read(&self, num_layers: usize) -> Result<Checkpoint<'_>> {
        check_depth(&self.config, num_layers)
            .map_err(|problem| Error::model(&self.path, problem))?;
        self.refuse_unknown_tensors()?;
        let (rows, cols) = (self.config.vocab_size, self.config.hidden_size);
        let mut tensors = vec![self.tensor(LlamaConfig::EMBEDDINGS, rows, cols)?];
        for layer in 0..num_layers {
            for tensor in self.config.block_tensors() {
                tensors.push(self.tensor(&tensor.full_name(layer), tensor.rows, tensor.cols)?);
            }
        }
        let tokenizer = Cow::Borrowed(self.tokenizer.as_slice());
        Ok(Checkpoint { config: self.config.clone(), tensors, tokenizer })
    }

    /// Finds a tensor in whichever shard has it.
    fn tensor(&self, name: &str, rows: usize, cols: usize) -> Result<(String, PackedTensor<'_>)> {
        let shard = self
            .shards
            .iter()
            .find(|shard| shard.get(name).is_some())
            .ok_or_else(|| Error::model(&self.path, format!("has no tensor {name:?}")))?;
        let info: &TensorInfo = shard.expect(name, rows, cols)?;
        let bytes = Cow::Borrowed(shard.bytes(info));
        Ok((name.to_owned(), PackedTensor::new(info.format, info.rows, bytes)))
    }

    /// Refuses blocks that hold more than a Llama block does, such as norms on queries.
    fn refuse_unknown_tensors(&self) -> Result<()> {
        let known: BTreeSet<&str> = self.config.block_tensors().iter().map(|t| t.name).collect();
        for name in self.shards.iter().flat_map(Weights::names) {
            let in_block = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
            if let Some((_, name_in_block)) = in_block
                // A table that old checkpoints carry; it follows from config.json.
                && name_in_block != "self_attn.rotary_emb.inv_freq"
                && !known.contains(name_in_block)
            {
                return Err(Error::model(
                    &self.path,
                    format!("has tensor {name:?}, which no Llama-type decoder has"),
                ));
            }
        }
        Ok(())
    }
}

/// Id of [`SINK_TOKEN`] among the added tokens of `tokenizer.json`.
fn sink_token(json: &[u8]) -> serde_json::Result<Option<u32>> {
    #[derive(Deserialize)]
    struct Tokenizer {
        #[serde(default)]
        added_tokens: Vec<Added>,
    }
    #[derive(Deserialize)]
    struct Added {
        id: u32,
        content: String,
    }
    let tokenizer: Tokenizer = serde_json::from_slice(json)?;
    Ok(tokenizer
        .added_tokens
        .iter()
        .find(|added| added.content == SINK_TOKEN)
        .map(|added| added.id))
}

/// The safetensors files of a folder.
fn shard_paths(folder: &Path) -> Result<Vec<PathBuf>> {
    let single = folder.join("model.safetensors");
    if single.is_file() {
        return Ok(vec![single]);
    }
    let index_path = folder.join("model.safetensors.index.json");
    if !index_path.is_file() {
        refuse_pickles_in(folder)?;
        return Err(Error::model(
            folder,
            "has neither model.safetensors nor model.safetensors.index.json",
        ));
    }
    let index: Index = serde_json::from_slice(&read_json(&index_path)?)
        .map_err(|error| Error::model(&index_path, format!("is no index of shards: {error}")))?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    names
        .iter()
        .map(|name| {
            let mut parts = Path::new(name).components();
            match (parts.next(), parts.next()) {
                (Some(Component::Normal(_)), None) => Ok(folder.join(name)),
                _ => Err(Error::model(
                    &index_path,
                    format!("names shard {name:?}, which is no file of its own folder"),
                )),
            }
        })
        .collect()
}

/// Says so when a folder without safetensors files holds pickles.
fn refuse_pickles_in(folder: &Path) -> Result<()> {
    let entries = fs::read_dir(folder)
        .map_err(|error| Error::model(folder, format!("cannot be listed: {error}")))?;
    let mut names: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    names.sort();
    names.iter().try_for_each(|path| refuse_pickle_name(path))
}

/// Maps one file, unless it is a pickle by another name.
fn open_shard(path: &Path) -> Result<Weights> {
    refuse_pickle_name(path)?;
    refuse_pickle_content(path, &map_file(path)?)?;
    Weights::open(path)
}

//! From a published checkpoint to the model files of a detector.
//!
//! [`pack`] reads a GGUF file or a Hugging Face folder with safetensors files and writes
//! `model.safetensors` (see [`crate::model::weights`]), `config.json` and `tokenizer.json`. Numbers
//! keep the format they are stored in; only embeddings and the first blocks are taken, for nothing
//! runs after the last site. The same source gives the same bytes.
//!
//! Whoever calls this has compared the source with its pinned hash. It is read as if nobody had: what
//! it claims is checked against what it holds, and files that could run code (pickle) are refused.

mod checkpoint;
mod gguf;
mod llama;
mod tokenizer;

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
};

use safetensors::{Dtype, View};

use crate::{
    error::{Error, Result},
    model::{
        LlamaConfig,
        weights::{Format, map_file},
    },
};

/// Token that is put in front of every text where the vocabulary has it.
///
/// It ends documents in training, so that it says nothing about the text; the beginning-of-text token
/// of instruction-tuned models (`<|im_start|>`) announces a chat turn instead.
const SINK_TOKEN: &str = "<|endoftext|>";

/// File names of checkpoints that are Python pickles.
const PICKLE_EXTENSIONS: [&str; 6] = ["bin", "ckpt", "pickle", "pkl", "pt", "pth"];

/// What both kinds of source are turned into.
struct Checkpoint<'a> {
    config: LlamaConfig,
    tensors: Vec<(String, PackedTensor<'a>)>,
    /// `tokenizer.json`.
    tokenizer: Cow<'a, [u8]>,
}

/// A tensor as it is written.
struct PackedTensor<'a> {
    format: Format,
    /// `[width]` or `[rows, width]`; the width of ggml blocks counts bytes.
    shape: Vec<usize>,
    bytes: Cow<'a, [u8]>,
}

/// Writes `model.safetensors`, `config.json` and `tokenizer.json` of `source` into `out_dir`.
///
/// `source` is a GGUF file, or a folder with `config.json`, `tokenizer.json` and either
/// `model.safetensors` or `model.safetensors.index.json` and its shards. The first `num_layers` blocks
/// are kept; `config.json` still tells the depth of the whole model.
///
/// # Errors
/// [`Error::ModelLoad`] for a source that is missing, damaged, a pickle, no Llama-type decoder, of an
/// unsupported number format, or not deep enough; and when the files cannot be written.
pub fn pack(source: &Path, out_dir: &Path, num_layers: usize) -> Result<()> {
    refuse_pickle_name(source)?;
    if source.is_dir() {
        let folder = checkpoint::Folder::open(source)?;
        return write(folder.read(num_layers)?, out_dir);
    }
    let map = map_file(source)?;
    refuse_pickle_content(source, &map)?;
    let checkpoint =
        llama::read(&map, num_layers).map_err(|problem| Error::model(source, problem))?;
    write(checkpoint, out_dir)
}

/// Refuses `path` when its name is that of a pickle.
fn refuse_pickle_name(path: &Path) -> Result<()> {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    if PICKLE_EXTENSIONS.iter().any(|pickle| extension.eq_ignore_ascii_case(pickle)) {
        return Err(pickle(path));
    }
    Ok(())
}

/// Refuses bytes that are a pickle (protocol 2 and later) or a zip archive around one.
fn refuse_pickle_content(path: &Path, bytes: &[u8]) -> Result<()> {
    let plain = matches!(bytes, [0x80, 2..=5, ..]);
    if plain || bytes.starts_with(b"PK\x03\x04") {
        return Err(pickle(path));
    }
    Ok(())
}

fn pickle(path: &Path) -> Error {
    Error::model(
        path,
        "is a Python pickle, which can run code when it is read; \
         use the model's safetensors or GGUF files",
    )
}

/// Checks that `num_layers` blocks can be taken from a model of `config`.
fn check_depth(config: &LlamaConfig, num_layers: usize) -> std::result::Result<(), String> {
    let depth = config.num_hidden_layers;
    if num_layers == 0 || num_layers > depth {
        return Err(format!("has {depth} layers; {num_layers} cannot be packed"));
    }
    Ok(())
}

/// Writes the three files of `checkpoint`.
fn write(checkpoint: Checkpoint<'_>, out_dir: &Path) -> Result<()> {
    let failed = |path: PathBuf, error: &dyn std::fmt::Display| {
        Error::model(&path, format!("cannot be written: {error}"))
    };
    fs::create_dir_all(out_dir).map_err(|error| failed(out_dir.to_owned(), &error))?;

    let config_path = out_dir.join("config.json");
    let path = config_path.clone();
    let mut json = serde_json::to_vec_pretty(&checkpoint.config)
        .map_err(|error| failed(path.clone(), &error))?;
    json.push(b'\n');
    fs::write(&path, json).map_err(|error| failed(path, &error))?;

    let path = out_dir.join("tokenizer.json");
    fs::write(&path, &checkpoint.tokenizer).map_err(|error| failed(path, &error))?;

    let path = out_dir.join("model.safetensors");
    let ggml: BTreeMap<&str, &str> = checkpoint
        .tensors
        .iter()
        .filter_map(|(name, tensor)| Some((name.as_str(), tensor.format.ggml_name()?)))
        .collect();
    // One entry only: safetensors writes metadata in the random order of a hash map.
    let metadata = HashMap::from([(
        "ggml".to_owned(),
        serde_json::to_string(&ggml).map_err(|error| failed(path.clone(), &error))?,
    )]);
    safetensors::serialize_to_file(checkpoint.tensors, Some(metadata), &path)
        .map_err(|error| failed(path.clone(), &error))?;
    // safetensors writes through a temporary file that only its owner may read.
    fs::metadata(&config_path)
        .and_then(|config| fs::set_permissions(&path, config.permissions()))
        .map_err(|error| failed(path, &error))
}

impl<'a> PackedTensor<'a> {
    /// A matrix, or a vector as one row.
    fn new(format: Format, rows: usize, bytes: Cow<'a, [u8]>) -> Self {
        let width = bytes.len() / rows / format.stored_size();
        let shape = if rows == 1 { vec![width] } else { vec![rows, width] };
        Self { format, shape, bytes }
    }
}

impl View for PackedTensor<'_> {
    fn dtype(&self) -> Dtype {
        match self.format {
            Format::F32 => Dtype::F32,
            Format::F16 => Dtype::F16,
            Format::Bf16 => Dtype::BF16,
            Format::Ggml(_) => Dtype::U8,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

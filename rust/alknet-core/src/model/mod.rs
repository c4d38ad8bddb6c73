//! Forward pass: `input_ids` to the residual stream at the sites, and nothing after the deepest one.
//!
//! [`Backend`] is the whole contract between the pipeline and an engine. Activations are handed to a
//! [`Sink`] while they are still in cache, so that an engine never stores what nobody asked for.

mod cache;
pub mod candle;
pub mod config;
pub mod native;
pub mod weights;

use std::{collections::HashSet, fmt, str::FromStr};

use crate::error::{Error, Result};
pub use cache::{KvCache, LayerCache};
pub use config::LlamaConfig;

/// Index into the tokenizer's vocabulary.
pub type TokenId = u32;

/// Which tensor of a block is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SiteKind {
    /// What attention adds to the residual stream.
    AttnOut,
    /// What the feed-forward network adds to the residual stream.
    MlpOut,
    /// The residual stream after the block.
    ResidPost,
}

/// Where activations are read: a zero-based layer and a tensor of it, written `6.resid_post`.
///
/// `layer 6, resid_post` is what Transformers calls `hidden_states[7]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Site {
    /// Zero-based block.
    pub layer: usize,
    /// Tensor of that block.
    pub kind: SiteKind,
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            SiteKind::AttnOut => "attn_out",
            SiteKind::MlpOut => "mlp_out",
            SiteKind::ResidPost => "resid_post",
        };
        write!(f, "{}.{kind}", self.layer)
    }
}

impl FromStr for Site {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let unknown = || {
            Error::Config(format!(
                "site {text:?} is not LAYER.KIND with a zero-based layer and resid_post, attn_out or mlp_out"
            ))
        };
        let (layer, kind) = text.split_once('.').ok_or_else(unknown)?;
        let kind = match kind {
            "attn_out" => SiteKind::AttnOut,
            "mlp_out" => SiteKind::MlpOut,
            "resid_post" => SiteKind::ResidPost,
            _ => return Err(unknown()),
        };
        Ok(Self { layer: layer.parse().map_err(|_| unknown())?, kind })
    }
}

/// One sequence of a batch: new tokens, and what was read before them.
pub struct Sequence<'a> {
    /// Tokens to read now, after the `cache.len()` tokens that the cache holds.
    pub input_ids: &'a [TokenId],
    /// Grows by `input_ids.len()` positions.
    pub cache: &'a mut KvCache,
}

impl Sequence<'_> {
    /// Refuses what a model of `config`, run through `num_layers` blocks, cannot read.
    ///
    /// # Errors
    /// [`Error::Input`] for token ids outside the vocabulary or more positions than the model has,
    /// [`Error::Inference`] for a cache of another engine or of a pass that failed.
    pub(crate) fn check(&self, config: &LlamaConfig, num_layers: usize) -> Result<()> {
        let (past, new) = (self.cache.len(), self.input_ids.len());
        let (vocab_size, most) = (config.vocab_size, config.max_position_embeddings);
        if past + new > most {
            return Err(Error::Input(format!(
                "{} tokens; the model reads at most {most}",
                past + new
            )));
        }
        if let Some(id) = self.input_ids.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(Error::Input(format!(
                "token id {id} is outside the vocabulary of {vocab_size}"
            )));
        }
        let width = config.num_key_value_heads() * config.head_dim();
        let layers = &self.cache.layers;
        let fits = |layer: &LayerCache| layer.holds(past, width);
        if layers.len() != num_layers || !layers.iter().all(fits) {
            return Err(Error::Inference(
                "the key/value cache is not one of this engine, or of a pass that failed".into(),
            ));
        }
        Ok(())
    }
}

/// Refuses a list of sites that is empty or repeats one: rows are handed over once per site.
pub(crate) fn check_sites(sites: &[Site]) -> Result<()> {
    if sites.is_empty() {
        return Err(Error::Config("no sites: name at least one, such as 14.resid_post".into()));
    }
    let mut seen = HashSet::new();
    match sites.iter().find(|&site| !seen.insert(site)) {
        Some(site) => Err(Error::Config(format!("site {site} is named twice: name it once"))),
        None => Ok(()),
    }
}

/// Number of blocks up to the deepest of `sites`, which a model of `config` must have.
fn num_layers(sites: &[Site], config: &LlamaConfig) -> Result<usize> {
    check_sites(sites)?;
    let depth = config.num_hidden_layers;
    match sites.iter().find(|site| site.layer >= depth) {
        Some(site) => Err(Error::Config(format!(
            "site {site} is beyond the last layer: the model has {depth}, the first is 0"
        ))),
        None => Ok(sites.iter().map(|site| site.layer + 1).max().unwrap_or(0)),
    }
}

/// Takes activations as they are made, on the threads that make them.
pub trait Sink: Sync {
    /// Receives `rows` of `sequence` (its index in the batch) at `site` (its index in [`Backend::sites`]).
    ///
    /// `first` is the index, within the new `input_ids` of that sequence, of the first row. An engine
    /// may hand over a sequence in several runs of rows, each run once per site, sites of earlier layers
    /// first; runs may come from several threads at once.
    ///
    /// # Shapes
    /// - `rows`: `[n, hidden_size]`, row-major, `n ≥ 1`
    ///
    /// # Errors
    /// Whatever the consumer finds wrong, such as a number that is not finite; it ends the pass.
    fn rows(&self, sequence: usize, site: usize, first: usize, rows: &[f32]) -> Result<()>;
}

/// An engine for one model, stopped after its deepest site.
pub trait Backend: Send + Sync {
    /// Short name for `doctor` and reports, with the instruction set where that matters.
    fn name(&self) -> String;

    /// Width of one activation row.
    fn hidden_size(&self) -> usize;

    /// Most tokens that one sequence may have, cached ones included.
    fn max_position_embeddings(&self) -> usize;

    /// Sites whose activations a pass hands over, in the order of their indices.
    fn sites(&self) -> &[Site];

    /// How many passes it makes at the same time before callers wait for each other.
    fn passes_at_once(&self) -> usize {
        usize::MAX
    }

    /// Cache of a sequence that has read nothing yet.
    fn new_cache(&self) -> KvCache;

    /// Reads the tokens of every sequence, each after what its own cache holds, and hands the
    /// activations of every site to `sink`.
    ///
    /// Sequences are ragged: none is padded and none sees another. The result for one sequence does
    /// not depend on the others, within the engine's stated tolerance.
    ///
    /// # Errors
    /// [`Error::Input`] for token ids outside the vocabulary or more positions than the model has,
    /// [`Error::Inference`] when the engine fails. The caches are then unspecified and must be dropped.
    fn forward(&self, batch: &mut [Sequence<'_>], sink: &dyn Sink) -> Result<()>;
}

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

/// One sequence of a batch: new tokens, what was read before them, and what is read beside them.
pub struct Sequence<'a> {
    /// Tokens to read now, after the `cache.len()` tokens that the cache holds.
    pub input_ids: &'a [TokenId],
    /// In the order of their places.
    pub readouts: &'a [Readout<'a>],
    /// Grows by `input_ids.len()` positions.
    pub cache: &'a mut KvCache,
}

/// What is read beside a sequence, to find out what has been said up to there.
///
/// It stands where the next token does and sees what is before it, but not itself, and nothing sees it: whatever
/// readouts there are, the tokens read the same.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Readout<'a> {
    /// How many of the sequence's new tokens are before it.
    pub after: usize,
    /// What is read there.
    pub probe: &'a Probe,
}

/// What a readout is.
#[derive(Debug, Clone, PartialEq)]
pub enum Probe {
    /// A token.
    Token(TokenId),
    /// Vectors that were learned for it, `[n_blocks, hidden_size]`: each is added to its residual stream, which begins
    /// with zeros, before a block (deep prompts, Li & Liang 2021, of one position).
    Learned(Vec<f32>),
}

/// What the residual stream of a row begins with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Input<'a> {
    /// The embedding of a token.
    Token(TokenId),
    /// Numbers, `[hidden_size]`.
    Vector(&'a [f32]),
}

impl Probe {
    /// What its residual stream begins with.
    fn input(&self, hidden_size: usize) -> Input<'_> {
        match self {
            Self::Token(id) => Input::Token(*id),
            Self::Learned(vectors) => Input::Vector(&vectors[..hidden_size]),
        }
    }

    /// What is added before block `layer`, if anything is; before the first one its stream has begun with it.
    fn steering(&self, layer: usize, hidden_size: usize) -> Option<&[f32]> {
        match self {
            Self::Learned(vectors) if layer > 0 => {
                Some(&vectors[layer * hidden_size..][..hidden_size])
            }
            _ => None,
        }
    }
}

impl<'a> Sequence<'a> {
    /// New tokens after what `cache` holds, without readouts.
    pub fn new(input_ids: &'a [TokenId], cache: &'a mut KvCache) -> Self {
        Self { input_ids, readouts: &[], cache }
    }

    /// What gives a row of activations each: its tokens, then its readouts.
    pub fn inputs(&self, hidden_size: usize) -> impl Iterator<Item = Input<'a>> + use<'a> {
        let readouts = self.readouts.iter().map(move |readout| readout.probe.input(hidden_size));
        self.input_ids.iter().map(|&id| Input::Token(id)).chain(readouts)
    }

    /// Number of [`Sequence::inputs`].
    pub fn n_rows(&self) -> usize {
        self.input_ids.len() + self.readouts.len()
    }

    /// Refuses what a model of `config`, run through `num_layers` blocks, cannot read.
    ///
    /// # Errors
    /// [`Error::Input`] for token ids outside the vocabulary, more positions than the model has or readouts
    /// that are not in order, [`Error::Inference`] for a cache of another engine or of a pass that failed.
    pub(crate) fn check(&self, config: &LlamaConfig, num_layers: usize) -> Result<()> {
        let (past, new) = (self.cache.len(), self.input_ids.len());
        let (vocab_size, most) = (config.vocab_size, config.max_position_embeddings);
        if past + new > most {
            return Err(Error::Input(format!(
                "{} tokens; the model reads at most {most}",
                past + new
            )));
        }
        let hidden = config.hidden_size;
        for Readout { probe, .. } in self.readouts {
            match probe {
                Probe::Learned(vectors) if vectors.len() != num_layers * hidden => {
                    return Err(Error::Input(format!(
                        "a learned readout of {} numbers; {num_layers} blocks take {hidden} each",
                        vectors.len()
                    )));
                }
                _ => {}
            }
        }
        let unknown =
            |input: &Input<'_>| matches!(input, Input::Token(id) if *id as usize >= vocab_size);
        if let Some(Input::Token(id)) = self.inputs(hidden).find(unknown) {
            return Err(Error::Input(format!(
                "token id {id} is outside the vocabulary of {vocab_size}"
            )));
        }
        let misplaced = |readout: &&Readout<'_>| readout.after > new || past + readout.after == 0;
        if let Some(readout) = self.readouts.iter().find(misplaced) {
            return Err(Error::Input(format!(
                "a readout after {} tokens, of {past} and {new}: it has to stand after one of them",
                past + readout.after
            )));
        }
        if !self.readouts.is_sorted_by_key(|readout| readout.after) {
            return Err(Error::Input("readouts have to be in the order of their places".into()));
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
    /// `first` is the index of the first row among those of that sequence: of its new `input_ids`, then of its
    /// readouts. An engine may hand over a sequence in several runs of rows, each run once per site, sites of earlier layers
    /// first; runs may come from several threads at once.
    ///
    /// # Shapes
    /// - `rows`: `[n, hidden_size]`, row-major, `n ≥ 1`
    ///
    /// # Errors
    /// Whatever the consumer finds wrong, such as a number that is not finite; it ends the pass.
    fn rows(&self, sequence: usize, site: usize, first: usize, rows: &[f32]) -> Result<()>;

    /// The site after which nothing more of a sequence may be wanted, if there is one.
    fn asks_after(&self) -> Option<usize> {
        None
    }

    /// Whether nothing deeper is wanted of a sequence, of which all rows have been handed over at that site and those
    /// before it. An engine may ask, once, and need not read on then; what it hands over all the same is not used.
    ///
    /// # Errors
    /// As [`Sink::rows`].
    fn is_done(&self, sequence: usize) -> Result<bool> {
        let _ = sequence;
        Ok(false)
    }
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

    /// Whether it reads [`Probe::Learned`].
    fn reads_learned(&self) -> bool {
        true
    }

    /// Cache of a sequence that has read nothing yet.
    fn new_cache(&self) -> KvCache;

    /// Reads the tokens and readouts of every sequence, each after what its own cache holds, and hands the
    /// activations of every site to `sink`.
    ///
    /// Sequences are ragged: none is padded and none sees another. The result for one sequence does
    /// not depend on the others, within the engine's stated tolerance. Where the sink has enough of a sequence (see
    /// [`Sink::is_done`]) its cache may be left as one of a pass that failed.
    ///
    /// # Errors
    /// [`Error::Input`] for token ids outside the vocabulary, more positions than the model has or readouts
    /// that are not in order, [`Error::Inference`] when the engine fails. The caches are then unspecified and must be dropped.
    fn forward(&self, batch: &mut [Sequence<'_>], sink: &dyn Sink) -> Result<()>;
}

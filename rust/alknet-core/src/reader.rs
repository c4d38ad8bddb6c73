//! Reader: tokenizer and engine together, text in, activations out.
//!
//! One `bos` token stands in front of every piece as an attention sink. It is read once when the
//! reader is made; every piece continues from a clone of its cache, so that rows are exactly the
//! piece's own tokens.

use std::{ops::Range, path::Path, sync::Arc};

use crate::{
    capture::{Activations, Capture},
    error::{Error, Result},
    model::{
        Backend, KvCache, LlamaConfig, Readout, Sequence, Sink, Site, TokenId,
        candle::CandleBackend, native::NativeBackend, weights::Weights,
    },
    project::inverse_rms,
    tokenize::Tokenizer,
    window::{self, Closing},
};

/// Which engine runs the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Engine {
    /// Our CPU kernels.
    #[default]
    Native,
    /// candle in fp32: portable, the numerical reference.
    Candle,
}

/// How the model is run; none of it changes a verdict beyond the engine's stated tolerance.
#[derive(Debug, Clone, Default)]
pub struct ReaderOptions {
    /// The engine.
    pub engine: Engine,
    /// Threads; by default what affinity and the container's quota allow.
    pub threads: Option<usize>,
    /// Instruction set to hold the native engine to; by default the best one of this CPU.
    pub isa: Option<alknet_kernels::Isa>,
}

/// Tokenizer and engine of a detector.
pub struct Reader {
    tokenizer: Tokenizer,
    backend: Arc<dyn Backend>,
    prefix: KvCache,
}

impl Reader {
    /// Loads `model.safetensors`, `config.json` and `tokenizer.json` of a detector folder.
    ///
    /// # Errors
    /// [`Error::ModelLoad`] for a file that is missing, damaged or not supported, [`Error::Config`]
    /// for sites or options that the model does not have.
    pub fn open(detector: &Path, sites: &[Site], options: &ReaderOptions) -> Result<Self> {
        let weights = Arc::new(Weights::open(&detector.join("model.safetensors"))?);
        Self::with_weights(detector, weights, sites, options)
    }

    /// As [`Reader::open`], with weights that are already mapped.
    ///
    /// # Errors
    /// As [`Reader::open`].
    pub fn with_weights(
        detector: &Path,
        weights: Arc<Weights>,
        sites: &[Site],
        options: &ReaderOptions,
    ) -> Result<Self> {
        let config = LlamaConfig::from_file(&detector.join("config.json"))?;
        let path = detector.join("tokenizer.json");
        let (tokenizer, backend) = std::thread::scope(|scope| {
            // Parsing the vocabulary and packing the weights take about as long as each other.
            let tokenizer = scope.spawn(|| Tokenizer::from_file(&path));
            let backend = load_backend(weights, &config, sites, options);
            let tokenizer = tokenizer.join().unwrap_or_else(|_| {
                Err(Error::model(&path, "the tokenizer could not be built from it"))
            });
            (tokenizer, backend)
        });
        Self::new(tokenizer?, backend?, config.bos_token_id)
    }

    /// A reader over any engine.
    ///
    /// # Errors
    /// [`Error::Inference`] when the engine cannot read the `bos` token.
    pub fn new(
        tokenizer: Tokenizer,
        backend: Arc<dyn Backend>,
        bos_token_id: Option<TokenId>,
    ) -> Result<Self> {
        let mut prefix = backend.new_cache();
        if let Some(bos) = bos_token_id {
            backend.forward(&mut [Sequence::new(&[bos], &mut prefix)], &Discard)?;
        }
        Ok(Self { tokenizer, backend, prefix })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The engine.
    pub fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// Cache of a piece of which nothing has been read yet, ready for [`Reader::extend`].
    pub fn start(&self) -> KvCache {
        self.prefix.clone()
    }

    /// Most tokens of one piece.
    pub fn max_tokens(&self) -> usize {
        self.backend.max_position_embeddings().saturating_sub(self.prefix.len())
    }

    /// Reads `input_ids` after what `cache` holds, and `readouts`, and hands the rows to `sink`.
    ///
    /// # Errors
    /// As [`Backend::forward`].
    pub fn extend(
        &self,
        cache: &mut KvCache,
        input_ids: &[TokenId],
        readouts: &[Readout<'_>],
        sink: &dyn Sink,
    ) -> Result<()> {
        self.backend.forward(&mut [Sequence { input_ids, readouts, cache }], sink)
    }

    /// Reads several pieces from their beginning, in one pass, and hands the rows to `sink`: of every piece
    /// those of its tokens, then those of `closing`, if there is one.
    ///
    /// # Errors
    /// As [`Backend::forward`].
    pub fn read(
        &self,
        pieces: &[&[TokenId]],
        closing: Option<&Closing>,
        sink: &dyn Sink,
    ) -> Result<()> {
        let mut caches = vec![self.prefix.clone(); pieces.len()];
        let readouts = |piece: &&[TokenId]| {
            closing.map_or_else(Vec::new, |closing| closing.readouts(0..piece.len()))
        };
        let readouts: Vec<_> = pieces.iter().map(readouts).collect();
        let mut batch: Vec<_> = pieces
            .iter()
            .zip(&readouts)
            .zip(&mut caches)
            .map(|((input_ids, readouts), cache)| Sequence { input_ids, readouts, cache })
            .collect();
        self.backend.forward(&mut batch, sink)
    }

    /// Activations of the first tokens of a text at every site, `[seq_len, n_sites, hidden_size]`.
    ///
    /// # Errors
    /// [`Error::Input`] when the text has more tokens than one piece may have.
    pub fn activations(&self, text: &str) -> Result<Activations> {
        let encoding = self.tokenizer.encode(text)?;
        let n = encoding.input_ids.len();
        if n > self.max_tokens() {
            return Err(Error::Input(format!(
                "the text has {n} tokens, the model reads {} at once: split it",
                self.max_tokens()
            )));
        }
        let mut activations = self.zeros(n);
        if n > 0 {
            let capture = Capture::new(std::slice::from_mut(&mut activations));
            self.read(&[&encoding.input_ids], None, &capture)?;
        }
        Ok(activations)
    }

    /// Mean activations, each token's at root mean square 1 per site, of every window of several texts,
    /// for calibration: per text, `[n_windows, n_sites · hidden_size]`, and after them those of `closing`, a row
    /// each time that it is read.
    ///
    /// # Errors
    /// [`Error::Config`] for a layout that leaves tokens out, and as [`Backend::forward`].
    pub fn window_means(
        &self,
        texts: &[&str],
        layout: &WindowLayout,
        closing: Option<&Closing>,
    ) -> Result<Vec<Vec<f32>>> {
        layout.check()?;
        closing.map_or(Ok(()), |closing| closing.check(layout.window)).map_err(Error::Config)?;
        let encode = |text: &&str| -> Result<Vec<TokenId>> {
            let mut input_ids = self.tokenizer.encode(text)?.input_ids;
            input_ids.truncate(layout.max_tokens);
            Ok(input_ids)
        };
        let pieces = texts.iter().map(encode).collect::<Result<Vec<_>>>()?;
        let mut means = Vec::with_capacity(pieces.len());
        for pass in passes(&pieces, Vec::len) {
            let zeros = |piece: &Vec<TokenId>| self.zeros(n_rows(piece.len(), closing));
            let mut read: Vec<_> = pass.iter().map(zeros).collect();
            let ids: Vec<_> = pass.iter().map(Vec::as_slice).collect();
            self.read(&ids, closing, &Capture::new(&mut read))?;
            let rows = read.into_iter().zip(pass);
            means.extend(rows.map(|(activations, ids)| rows_of(activations, layout, ids.len())));
        }
        Ok(means)
    }

    /// Room for the activations of a piece.
    fn zeros(&self, seq_len: usize) -> Activations {
        Activations::zeros(seq_len, self.backend.sites().len(), self.backend.hidden_size())
    }
}

/// Rows that [`Reader::read`] hands over of a piece of `n_tokens`.
pub(crate) fn n_rows(n_tokens: usize, closing: Option<&Closing>) -> usize {
    n_tokens + closing.map_or(0, |closing| closing.count(n_tokens))
}

/// Means of the windows of one text of `n_tokens`, and what closes it as it is.
fn rows_of(mut activations: Activations, layout: &WindowLayout, n_tokens: usize) -> Vec<f32> {
    for row in activations.data.chunks_exact_mut(activations.hidden_size) {
        let scale = inverse_rms(row);
        row.iter_mut().for_each(|h| *h *= scale);
    }
    let width = activations.n_sites * activations.hidden_size;
    let windows = window::ranges(n_tokens, layout.window, layout.stride);
    let mut rows = Vec::new();
    for range in windows {
        let start = rows.len();
        rows.resize(start + width, 0.0);
        window::mean(&activations.data, width, range, &mut rows[start..]);
    }
    rows.extend_from_slice(&activations.data[n_tokens * width..]);
    rows
}

/// How texts are cut into windows, in tokens.
#[derive(Debug, Clone, Copy)]
pub struct WindowLayout {
    /// Tokens of a window.
    pub window: usize,
    /// Tokens between the starts of windows.
    pub stride: usize,
    /// Most tokens of a text that are read, in one piece.
    pub max_tokens: usize,
}

impl WindowLayout {
    /// Refuses sizes by which a text cannot be cut without leaving tokens out.
    fn check(&self) -> Result<()> {
        let Self { window, stride, .. } = *self;
        if (1..=window).contains(&stride) {
            return Ok(());
        }
        Err(Error::Config(format!("window {window}, stride {stride}: stride must be 1 to window")))
    }
}

/// Tokens of one pass over the model, about: enough to fill the machine, few enough to bound memory.
const PASS_TOKENS: usize = 1024;

/// Cuts a list of pieces into passes of about [`PASS_TOKENS`] tokens, in order, one piece at least.
pub(crate) fn passes<T>(pieces: &[T], tokens: impl Fn(&T) -> usize) -> Vec<&[T]> {
    let mut passes = Vec::new();
    let mut rest = pieces;
    while !rest.is_empty() {
        let mut sum = 0;
        let fits = |piece: &&T| {
            sum += tokens(piece);
            sum <= PASS_TOKENS
        };
        let (pass, later) = rest.split_at(rest.iter().take_while(fits).count().max(1));
        passes.push(pass);
        rest = later;
    }
    passes
}

fn load_backend(
    weights: Arc<Weights>,
    config: &LlamaConfig,
    sites: &[Site],
    options: &ReaderOptions,
) -> Result<Arc<dyn Backend>> {
    Ok(match options.engine {
        Engine::Native => {
            Arc::new(NativeBackend::load(weights, config, sites, options.threads, options.isa)?)
        }
        Engine::Candle => Arc::new(CandleBackend::load(weights, config, sites, options.threads)?),
    })
}

/// Token ranges of the segments of a text: `length` tokens each, neighbours share `overlap`, which is
/// less; none is left out, and a text that fits is one segment.
pub(crate) fn segments(n_tokens: usize, length: usize, overlap: usize) -> Vec<Range<usize>> {
    let step = length - overlap;
    let mut ranges = Vec::new();
    let mut start = 0;
    while start < n_tokens {
        let end = (start + length).min(n_tokens);
        ranges.push(start..end);
        if end == n_tokens {
            break;
        }
        start += step;
    }
    ranges
}

/// Takes rows nobody wants.
struct Discard;

impl Sink for Discard {
    fn rows(&self, _: usize, _: usize, _: usize, _: &[f32]) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "one range is meant")]
    fn a_text_that_fits_is_one_segment() {
        assert!(segments(0, 8, 2).is_empty());
        assert_eq!(segments(8, 8, 2), [0..8]);
        assert_eq!(segments(9, 8, 2), [0..8, 6..9]);
        assert_eq!(segments(14, 8, 2), [0..8, 6..14]);
    }

    #[test]
    fn layouts_that_leave_tokens_out_are_refused() {
        let check =
            |window, stride| WindowLayout { window, stride, max_tokens: 100 }.check().is_ok();
        assert!(check(8, 4) && check(8, 8) && check(1, 1));
        assert!(!check(0, 0) && !check(8, 0) && !check(8, 9));
    }

    proptest! {
        #[test]
        fn segments_cover_everything(n in 1usize..500, length in 2usize..60, overlap in 0usize..59) {
            let overlap = overlap.min(length - 1);
            let ranges = segments(n, length, overlap);
            prop_assert_eq!(ranges[0].start, 0);
            prop_assert_eq!(ranges.last().unwrap().end, n);
            for pair in ranges.windows(2) {
                prop_assert_eq!(pair[0].end - pair[1].start, overlap);
                prop_assert_eq!(pair[0].len(), length);
            }
        }
    }
}

//! Firewall: wires the stages together; no mathematics here.
//!
//! Every text gives one or more views (raw, normalised, decoded), every view one or more segments,
//! every segment one piece of work for the engine. Pieces of all texts of a batch share passes. The
//! smallest p-value wins, corrected for the number of segments read. It is not corrected
//! for views: ordinary text has one, and a disguise must not buy its way down by adding more.

use std::{ops::Range, path::Path, sync::Arc};

use sha2::{Digest, Sha256};

use crate::{
    alarm::{self, Alarm, AlarmLevel, Reason, Signal, Span, Thresholds},
    batcher::Batcher,
    cascade::{Cascade, Looks},
    codebook::{Codebook, DirectionInfo, Fingerprint, Origin},
    error::{Error, Result},
    model::{Backend, Probe, TokenId, config::read_json, weights::Weights},
    normalize::{self, HiddenText, View, ViewKind},
    reader::{Reader, ReaderOptions, passes, segments},
    score::{self, FrameScore},
    stream::Segment,
    tokenize::{Encoding, Tokenizer},
};

/// Share of the error budget that novelty may spend, and the least p-value that it can give; it may raise
/// SUSPICIOUS, never DANGEROUS.
const NOVELTY_SHARE: f64 = 0.05;
const NOVELTY_FLOOR: f64 = 0.00101;

/// p-value of text that was hidden on purpose: an alarm by itself.
const HIDDEN_TEXT_P: f64 = 1e-4;

/// How texts are judged.
#[derive(Debug, Clone, Default)]
pub struct FirewallOptions {
    /// How the model is run.
    pub reader: ReaderOptions,
    /// Scores at which the level rises.
    pub thresholds: Thresholds,
    /// Most tokens of a text that are read; a longer text is at least SUSPICIOUS. No limit by default.
    pub max_tokens: Option<usize>,
    /// Leaves what the codebook's first stage finds ordinary at that (see [`crate::codebook::Early`]).
    pub early_exit: bool,
}

/// One text to screen.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// The text.
    pub text: &'a str,
    /// Who wrote it; `None` when unknown.
    pub origin: Option<Origin>,
}

/// A loaded detector: immutable, shared by all threads.
pub struct Firewall {
    reader: Reader,
    batcher: Batcher<Looks>,
    codebook: Codebook,
    thresholds: Thresholds,
    max_tokens: Option<usize>,
}

impl Firewall {
    /// Loads a detector folder, with its own codebook or another one for the same files.
    ///
    /// # Errors
    /// [`Error::ModelLoad`] or [`Error::Codebook`] for files that are missing, damaged or do not
    /// belong together.
    pub fn open(
        detector: &Path,
        codebook: Option<&Path>,
        options: &FirewallOptions,
    ) -> Result<Self> {
        let own = detector.join("codebook.safetensors");
        let codebook = Codebook::from_file(codebook.unwrap_or(&own))?;
        let weights = Arc::new(Weights::open(&detector.join("model.safetensors"))?);
        let (fingerprint, reader) = std::thread::scope(|scope| {
            let fingerprint = scope.spawn(|| fingerprint(detector, &weights));
            let reader =
                Reader::with_weights(detector, weights.clone(), &codebook.sites, &options.reader);
            (fingerprint.join(), reader)
        });
        let fingerprint =
            fingerprint.map_err(|_| Error::Inference("hashing the detector failed".into()))??;
        codebook.check(&fingerprint)?;
        Self::new(reader?, codebook, options)
    }

    /// A firewall over an engine from elsewhere, with tokenizer and codebook of a detector folder.
    ///
    /// # Errors
    /// As [`Firewall::open`]; of the files that the codebook was made for, only the tokenizer is
    /// there to be compared.
    pub fn with_backend(
        detector: &Path,
        codebook: Option<&Path>,
        backend: Arc<dyn Backend>,
        bos_token_id: Option<TokenId>,
        options: &FirewallOptions,
    ) -> Result<Self> {
        let own = detector.join("codebook.safetensors");
        let codebook = Codebook::from_file(codebook.unwrap_or(&own))?;
        let tokenizer_sha256 = file_sha256(&detector.join("tokenizer.json"))?;
        codebook.check(&Fingerprint { tokenizer_sha256, ..codebook.fingerprint.clone() })?;
        let tokenizer = Tokenizer::from_file(&detector.join("tokenizer.json"))?;
        Self::new(Reader::new(tokenizer, backend, bos_token_id)?, codebook, options)
    }

    /// A firewall over any reader.
    ///
    /// # Errors
    /// [`Error::Codebook`] when the codebook's sites, width, segments or readouts are not the reader's,
    /// [`Error::Config`] for options that are out of range or not to be had.
    pub fn new(reader: Reader, mut codebook: Codebook, options: &FirewallOptions) -> Result<Self> {
        let backend = reader.backend();
        if backend.sites() != codebook.sites || backend.hidden_size() != codebook.hidden_size {
            return Err(Error::Codebook(format!(
                "reads sites {} of width {}, the engine gives {} of width {}",
                join(&codebook.sites),
                codebook.hidden_size,
                join(backend.sites()),
                backend.hidden_size()
            )));
        }
        let most = codebook.segment_tokens + usize::from(codebook.closing.is_some());
        if most > reader.max_tokens() {
            return Err(Error::Codebook(format!(
                "segments of {most} tokens, the model reads {} at once",
                reader.max_tokens()
            )));
        }
        for probe in codebook.closing.iter().flat_map(|closing| &closing.probes) {
            match probe {
                Probe::Token(token) if !reader.tokenizer().has(*token) => {
                    return Err(Error::Codebook(format!(
                        "closing token {token} is not one of the tokenizer's"
                    )));
                }
                Probe::Learned(_) if !backend.reads_learned() => {
                    return Err(Error::Codebook(format!(
                        "what closes its texts was learned, and {} reads tokens only: compile a codebook for it",
                        backend.name()
                    )));
                }
                _ => {}
            }
        }
        let Thresholds { suspicious, dangerous } = options.thresholds;
        if options.max_tokens == Some(0) {
            return Err(Error::Config("max_tokens is 0: nothing would be read".into()));
        }
        if options.early_exit && codebook.early.is_none() {
            return Err(Error::Config(
                "early_exit: the codebook has no first stage; compile it anew to get one".into(),
            ));
        }
        codebook.early = codebook.early.filter(|_| options.early_exit);
        Ok(Self {
            batcher: Batcher::new(reader.backend().passes_at_once()),
            reader,
            codebook,
            thresholds: Thresholds::new(suspicious, dangerous)?,
            max_tokens: options.max_tokens,
        })
    }

    /// The codebook.
    pub fn codebook(&self) -> &Codebook {
        &self.codebook
    }

    /// The reader.
    pub fn reader(&self) -> &Reader {
        &self.reader
    }

    /// Most tokens of a text that are read.
    pub(crate) fn max_tokens(&self) -> Option<usize> {
        self.max_tokens
    }

    /// Screens one text.
    ///
    /// # Errors
    /// [`Error::Inference`] or [`Error::Input`]; there is then no verdict.
    pub fn screen(&self, text: &str, origin: Option<Origin>) -> Result<Alarm> {
        Ok(self.screen_batch(&[Input { text, origin }])?.remove(0))
    }

    /// Screens several texts in shared passes; each gets the alarm it would get alone.
    ///
    /// # Errors
    /// As [`Firewall::screen`], for the first text that fails; no verdict is given for any.
    pub fn screen_batch(&self, inputs: &[Input<'_>]) -> Result<Vec<Alarm>> {
        let mut cases =
            inputs.iter().map(|input| self.prepare(input)).collect::<Result<Vec<_>>>()?;
        self.read(&mut cases)?;
        cases.iter().map(|case| self.verdict(case)).collect()
    }

    /// Judges a text by what it says besides what it shows: by its views other than the raw one.
    /// `None` when there are none.
    ///
    /// # Errors
    /// As [`Firewall::screen`].
    pub(crate) fn screen_disguises(
        &self,
        text: &str,
        origin: Option<Origin>,
    ) -> Result<Option<Alarm>> {
        let mut case = self.prepare(&Input { text, origin })?;
        if case.is_plain() {
            return Ok(None);
        }
        case.leave_out_raw();
        self.read(std::slice::from_mut(&mut case))?;
        self.verdict(&case).map(Some)
    }

    /// Views, tokens and pieces of one text.
    pub(crate) fn prepare<'a>(&self, input: &Input<'a>) -> Result<Case<'a>> {
        let views = normalize::views(input.text);
        let hidden = views.hidden_text.filter(HiddenText::is_alarm).map(|text| text.original);
        let mut case = Case::new(*input, hidden);
        case.undecoded = views.incomplete;
        for view in views.views {
            if view.text.trim().is_empty() {
                continue;
            }
            let mut encoding = self.reader.tokenizer().encode(&view.text)?;
            if case.views.is_empty() {
                case.n_tokens = encoding.input_ids.len();
            }
            if let Some(max) = self.max_tokens.filter(|&max| max < encoding.input_ids.len()) {
                let end = view.to_original(encoding.offsets[max].0..view.text.len()).start;
                case.unread_bytes = case.unread_bytes.max(input.text.len() - end);
                encoding.input_ids.truncate(max);
                encoding.offsets.truncate(max);
            }
            case.add(view, encoding, &self.codebook);
        }
        Ok(case)
    }

    /// Reads all pieces that have not been read yet, in shared passes.
    pub(crate) fn read(&self, cases: &mut [Case<'_>]) -> Result<()> {
        let unread = |(c, case): (usize, &Case<'_>)| {
            let frames = case.pieces.iter().map(|piece| &piece.frames).enumerate();
            frames.filter(|(_, frames)| frames.is_empty()).map(|(p, _)| (c, p)).collect::<Vec<_>>()
        };
        let pieces: Vec<(usize, usize)> = cases.iter().enumerate().flat_map(unread).collect();
        for pass in passes(&pieces, |&(c, p)| cases[c].pieces[p].tokens.len()) {
            self.pass(cases, pass)?;
        }
        Ok(())
    }

    /// Runs the engine over some pieces, in a pass that others may share, and scores their frames.
    fn pass(&self, cases: &mut [Case<'_>], pieces: &[(usize, usize)]) -> Result<()> {
        let input_ids: Vec<_> = pieces.iter().map(|&(c, p)| cases[c].input_ids(p)).collect();
        let looks = self.batcher.read(&input_ids, &|input_ids| self.look(input_ids))?;
        for (&(c, p), looks) in pieces.iter().zip(looks) {
            cases[c].pieces[p].frames = looks.frames(&self.codebook)?;
        }
        Ok(())
    }

    /// Runs the engine over some pieces.
    fn look(&self, input_ids: &[&[TokenId]]) -> Result<Vec<Looks>> {
        let closing = self.codebook.closing.as_ref();
        let readouts = |n_tokens| closing.map_or(0, |closing| closing.count(n_tokens));
        let sizes: Vec<_> = input_ids.iter().map(|ids| (ids.len(), readouts(ids.len()))).collect();
        let cascade = Cascade::new(&self.codebook, &sizes);
        self.reader.read(input_ids, closing, &cascade)?;
        Ok(cascade.into_looks())
    }

    /// Combines all looks at one text into its alarm.
    pub(crate) fn verdict(&self, case: &Case<'_>) -> Result<Alarm> {
        let reading = self.codebook.reading(case.input.origin);
        let mut worst = Judgement::ordinary();
        for piece in &case.pieces {
            let pieces = case.views[piece.view].pieces;
            for frame in &piece.frames {
                worst = worst.min(judge(frame, reading, pieces));
            }
        }
        if case.hidden_text.is_some() {
            worst.attack = worst.attack.min(HIDDEN_TEXT_P);
            worst.p_value = worst.p_value.min(HIDDEN_TEXT_P);
        }
        if !worst.p_value.is_finite() || !worst.novelty.is_finite() {
            return Err(Error::Inference(
                "the p-value is not finite: the text was not screened".into(),
            ));
        }
        let score = alarm::score(worst.p_value);
        let reason = case.reason();
        let level_of = |p_value| self.thresholds.level(alarm::score(p_value));
        let mut level =
            level_of(worst.attack).max(level_of(worst.p_value).min(AlarmLevel::Suspicious));
        if !matches!(reason, None | Some(Reason::Empty | Reason::NotYetRead)) {
            level = level.max(AlarmLevel::Suspicious);
        }
        let (signals, spans) = match level {
            AlarmLevel::Clear => (Vec::new(), Vec::new()),
            _ => self.explain(case, reading),
        };
        Ok(Alarm {
            level,
            score,
            p_value: worst.p_value,
            novelty_p_value: worst.novelty,
            signals,
            spans,
            origin: case.input.origin,
            n_tokens: case.n_tokens,
            unread_bytes: case.unread_bytes,
            reason,
        })
    }

    /// Behaviours that fired and where.
    fn explain(&self, case: &Case<'_>, reading: usize) -> (Vec<Signal>, Vec<Span>) {
        let mut signals: Vec<Signal> = Vec::new();
        let mut spans: Vec<Span> = Vec::new();
        if let Some(bytes) = case.hidden_text.clone() {
            let signal = "hidden_text".to_owned();
            raise(&mut signals, &signal, 1.0);
            spans.push(Span { bytes, score: alarm::score(HIDDEN_TEXT_P), signal });
        }
        for piece in &case.pieces {
            let Reading { view, encoding, pieces } = &case.views[piece.view];
            for frame in &piece.frames {
                let judged = judge(frame, reading, *pieces);
                let score = alarm::score(judged.p_value);
                if self.thresholds.level(score) == AlarmLevel::Clear {
                    continue;
                }
                let signal = self.name_signals(frame, reading, judged, &mut signals);
                let first = encoding.offsets[piece.tokens.start + frame.strongest.start].0;
                let last = encoding.offsets[piece.tokens.start + frame.strongest.end - 1].1;
                let bytes = whole_words(case.input.text, view.to_original(first..last));
                spans.push(Span { bytes, score, signal });
            }
        }
        signals.sort_by(|a, b| b.probability.total_cmp(&a.probability).then(a.name.cmp(&b.name)));
        (signals, merge(spans))
    }

    /// Adds the behaviours of an alarming frame and returns the name of the most probable one.
    ///
    /// The scored direction that judges the frame gives its name where no behaviour that explains it is
    /// probable.
    fn name_signals(
        &self,
        frame: &FrameScore,
        reading: usize,
        judged: Judgement,
        signals: &mut Vec<Signal>,
    ) -> String {
        if judged.is_novelty() {
            raise(signals, "novelty", 1.0 - judged.novelty);
            return "novelty".to_owned();
        }
        let origin = self.codebook.origins[reading];
        let read = self.codebook.directions.iter().zip(&frame.logits);
        let read = read.filter(|(direction, _)| direction.is_read(origin));
        let largest = score::statistic(&self.codebook, &frame.logits, origin);
        let probable = |&(direction, &logit): &(&DirectionInfo, &f64)| {
            logit > 0.0 || direction.scored && logit == largest
        };
        let mut strongest: Option<(&DirectionInfo, f64)> = None;
        for (direction, &logit) in read.filter(probable) {
            raise(signals, &direction.name, sigmoid(logit));
            let rank = |direction: &DirectionInfo, logit: f64| (!direction.scored, logit);
            if strongest.is_none_or(|(d, l)| rank(direction, logit) > rank(d, l)) {
                strongest = Some((direction, logit));
            }
        }
        strongest.map_or_else(String::new, |(direction, _)| direction.name.clone())
    }
}

/// p-values of a text if this frame were its worst, `pieces` frames' maxima having been looked at.
fn judge(frame: &FrameScore, reading: usize, pieces: usize) -> Judgement {
    let attack = score::corrected_p(frame.attack[reading], pieces);
    let novelty = score::corrected_p(frame.novelty, pieces);
    let by_attack = (attack / (1.0 - NOVELTY_SHARE)).min(1.0);
    let by_novelty = (novelty / NOVELTY_SHARE).max(NOVELTY_FLOOR);
    Judgement { p_value: by_attack.min(by_novelty), attack: by_attack, novelty }
}

/// p-values of a text.
#[derive(Debug, Clone, Copy)]
struct Judgement {
    p_value: f64,
    /// Without what novelty adds.
    attack: f64,
    novelty: f64,
}

impl Judgement {
    fn ordinary() -> Self {
        Self { p_value: 1.0, attack: 1.0, novelty: 1.0 }
    }

    fn min(self, other: Self) -> Self {
        Self {
            p_value: self.p_value.min(other.p_value),
            attack: self.attack.min(other.attack),
            novelty: self.novelty.min(other.novelty),
        }
    }

    fn is_novelty(&self) -> bool {
        self.p_value < self.attack
    }
}

/// One text on its way through the stages.
pub(crate) struct Case<'a> {
    input: Input<'a>,
    /// Bytes of the original that hold enough hidden text for an alarm.
    hidden_text: Option<Range<usize>>,
    undecoded: bool,
    /// More text may follow.
    arriving: bool,
    views: Vec<Reading>,
    pieces: Vec<Piece>,
    n_tokens: usize,
    unread_bytes: usize,
}

/// One view, its tokens, and in how many segments they are read.
struct Reading {
    view: View,
    encoding: Encoding,
    pieces: usize,
}

/// One segment of one view.
struct Piece {
    view: usize,
    tokens: Range<usize>,
    frames: Vec<FrameScore>,
}

impl<'a> Case<'a> {
    fn new(input: Input<'a>, hidden_text: Option<Range<usize>>) -> Self {
        Self {
            input,
            hidden_text,
            undecoded: false,
            arriving: false,
            views: Vec::new(),
            pieces: Vec::new(),
            n_tokens: 0,
            unread_bytes: 0,
        }
    }

    fn add(&mut self, view: View, encoding: Encoding, codebook: &Codebook) {
        let n = encoding.input_ids.len();
        let index = self.views.len();
        let ranges = segments(n, codebook.segment_tokens, codebook.segment_overlap);
        self.views.push(Reading { view, encoding, pieces: ranges.len() });
        self.pieces.extend(ranges.into_iter().map(|tokens| Piece {
            view: index,
            tokens,
            frames: Vec::new(),
        }));
    }

    /// A text of `n_tokens` so far, to which more may be added; nothing of it has been read.
    pub(crate) fn arriving(input: Input<'a>, n_tokens: usize, unread_bytes: usize) -> Self {
        Self { arriving: true, n_tokens, unread_bytes, ..Self::new(input, None) }
    }

    /// Adds `segment` as one of `pieces`; `input.text` is what its tokens, at `offsets`, stand for.
    pub(crate) fn add_segment(
        &mut self,
        segment: &Segment,
        offsets: Vec<(usize, usize)>,
        pieces: usize,
    ) {
        let tokens = 0..offsets.len();
        let encoding = Encoding { input_ids: Vec::new(), offsets };
        let view = self.views.len();
        self.views.push(Reading { view: View::raw(self.input.text), encoding, pieces });
        self.pieces.push(Piece { view, tokens, frames: segment.frames.clone() });
    }

    /// Tokens of the raw view, as far as they are to be read; `None` for a blank text.
    pub(crate) fn raw_ids(&self) -> Option<&[TokenId]> {
        let raw = self.views.first().filter(|reading| reading.view.kind == ViewKind::Raw);
        raw.map(|reading| &reading.encoding.input_ids[..])
    }

    /// Takes over what has been read of the raw view, segment by segment from the first.
    pub(crate) fn adopt(&mut self, segments: Vec<Segment>) {
        for (piece, segment) in self.pieces.iter_mut().zip(segments) {
            debug_assert_eq!((piece.view, &piece.tokens), (0, &segment.tokens));
            piece.frames = segment.frames;
        }
    }

    /// Whether what the text shows is all that it says.
    fn is_plain(&self) -> bool {
        let raw = |reading: &Reading| reading.view.kind == ViewKind::Raw;
        !self.undecoded && self.hidden_text.is_none() && self.views.iter().all(raw)
    }

    /// Leaves the raw view unread.
    fn leave_out_raw(&mut self) {
        let views = &self.views;
        self.pieces.retain(|piece| views[piece.view].view.kind != ViewKind::Raw);
    }

    /// Why the verdict is not simply that of the score.
    fn reason(&self) -> Option<Reason> {
        if self.unread_bytes > 0 {
            return Some(Reason::NotFullyRead);
        }
        if self.undecoded {
            return Some(Reason::NotFullyDecoded);
        }
        let blank = self.input.text.trim().is_empty();
        let unread = if blank {
            Reason::Empty
        } else if self.arriving {
            Reason::NotYetRead
        } else {
            Reason::Unreadable
        };
        self.pieces.is_empty().then_some(unread)
    }

    fn input_ids(&self, piece: usize) -> &[TokenId] {
        let piece = &self.pieces[piece];
        &self.views[piece.view].encoding.input_ids[piece.tokens.clone()]
    }
}

/// Records a behaviour, keeping its largest probability.
fn raise(signals: &mut Vec<Signal>, name: &str, probability: f64) {
    match signals.iter_mut().find(|signal| signal.name == name) {
        Some(signal) => signal.probability = signal.probability.max(probability),
        None => signals.push(Signal { name: name.to_owned(), probability }),
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Longest part of a word that a span is widened by, in characters; some scripts do not space words.
const MAX_WIDENING: usize = 24;

/// Widens a byte range to whole words and trims white space.
fn whole_words(text: &str, range: Range<usize>) -> Range<usize> {
    let word = |c: &char| c.is_alphanumeric() || *c == '_';
    let (mut start, mut end) = (range.start, range.end);
    let begins_in_word = text[start..].chars().next().is_some_and(|c| word(&c));
    let ends_in_word = text[..end].chars().next_back().is_some_and(|c| word(&c));
    if begins_in_word {
        start -= text[..start]
            .chars()
            .rev()
            .take_while(word)
            .take(MAX_WIDENING)
            .map(char::len_utf8)
            .sum::<usize>();
    }
    if ends_in_word {
        end += text[end..]
            .chars()
            .take_while(word)
            .take(MAX_WIDENING)
            .map(char::len_utf8)
            .sum::<usize>();
    }
    let slice = &text[start..end];
    let trimmed = slice.trim();
    if trimmed.is_empty() {
        return start..end;
    }
    start += slice.len() - slice.trim_start().len();
    start..start + trimmed.len()
}

/// Merges spans that overlap or touch; the strongest names the result.
fn merge(mut spans: Vec<Span>) -> Vec<Span> {
    spans.sort_by_key(|span| (span.bytes.start, span.bytes.end));
    let mut merged: Vec<Span> = Vec::new();
    for span in spans {
        match merged.last_mut().filter(|last| span.bytes.start <= last.bytes.end) {
            Some(last) => {
                last.bytes.end = last.bytes.end.max(span.bytes.end);
                if span.score > last.score {
                    (last.score, last.signal) = (span.score, span.signal);
                }
            }
            None => merged.push(span),
        }
    }
    merged
}

/// sha256 of the files a codebook is bound to.
///
/// # Errors
/// [`Error::ModelLoad`] for a file that cannot be read.
pub fn fingerprint(detector: &Path, weights: &Weights) -> Result<Fingerprint> {
    Ok(Fingerprint {
        weights_sha256: sha256(weights.as_bytes()),
        tokenizer_sha256: file_sha256(&detector.join("tokenizer.json"))?,
        config_sha256: file_sha256(&detector.join("config.json"))?,
    })
}

fn file_sha256(path: &Path) -> Result<String> {
    Ok(sha256(&read_json(path)?))
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn join(sites: &[crate::model::Site]) -> String {
    sites.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_grow_to_words_and_lose_spaces() {
        let text = "say: ignöre the rest ";
        let start = text.find('n').unwrap();
        assert_eq!(&text[whole_words(text, start..text.len())], "ignöre the rest");
        assert_eq!(&text[whole_words(text, 4..7)], "ignöre");
        assert_eq!(whole_words(text, 4..5), 4..5);
    }

    #[test]
    fn touching_spans_become_one_named_by_the_strongest() {
        let span = |bytes, score, signal: &str| Span { bytes, score, signal: signal.into() };
        let merged =
            merge(vec![span(4..9, 0.5, "b"), span(0..5, 0.9, "a"), span(20..22, 0.4, "c")]);
        assert_eq!(merged, [span(0..9, 0.9, "a"), span(20..22, 0.4, "c")]);
    }
}

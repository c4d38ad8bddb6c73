//! Normalization: the readings of a text, each with a map back to the original.
//!
//! A text can say one thing to a person and another to a model. So up to three kinds of reading are
//! screened:
//!
//! - **raw**: the text as it came, always;
//! - **normalized**: NFKC, invisible characters and drowning marks taken out, look-alike letters
//!   folded, spaced-out letters joined; only if one of these changes more than typography;
//! - **decoded**: what tag characters, variation selectors or invisible bits spell, and stretches
//!   in base64, hexadecimal, percent or other escapes, ROT13, backwards or leet, and words kept apart
//!   by something other than spaces or with capitals inside; only if they read like language. Each
//!   view holds all stretches in one encoding and a little of their lines.
//!
//! Ordinary text in any script has one reading. The work is linear in the length of the text: one
//! pass for each step, encodings inside encodings to a depth of [`MAX_DEPTH`], at most
//! [`MAX_DECODED_VIEWS`] decoded views of together at most [`MAX_DECODED_BYTES_PER_BYTE`] bytes for
//! each byte of the text. What did not fit, or goes on as base64 or hexadecimal digits below that depth, is
//! said in [`Views::incomplete`]: nothing is dropped silently.

mod compat;
mod confusables;
mod decode;
mod invisible;
mod language;
mod letter_pairs;
mod map;
mod spaced;

use std::{ops::Range, sync::Arc};

use map::{OffsetMap, Rewrite, ceil_boundary, floor_boundary};

/// Encodings inside encodings that are followed.
pub const MAX_DEPTH: usize = 2;

/// Decoded views of one text at most.
pub const MAX_DECODED_VIEWS: usize = 12;

/// Bytes in all decoded views of one text at most, for each byte of the text.
pub const MAX_DECODED_BYTES_PER_BYTE: usize = 4;

/// Visible characters of hidden text from which on it is an alarm by itself.
const HIDDEN_ALARM_CHARS: usize = 4;

/// Passes of the normalizer at most: joining letters can make a word whose letters fold, and so on.
const MAX_PASSES: usize = 4;

/// How a decoded stretch was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Encoding {
    /// Base64 with either alphabet, also over several lines.
    Base64,
    /// Pairs of hexadecimal digits, with separators or without.
    Hex,
    /// `%69`.
    Percent,
    /// `&#105;`.
    HtmlEntities,
    /// `\x69`, `\u0069`, `\151` and the like.
    Backslash,
    /// `=69`, as in mail.
    QuotedPrintable,
    /// ROT13.
    Rot13,
    /// The whole stretch backwards.
    Reversed,
    /// Each word backwards.
    ReversedWords,
    /// Digits and signs for letters.
    Leet,
    /// One sign or line end between any two words.
    SeparatedWords,
    /// Capitals in the middle of words.
    MixedCase,
    /// Unicode tag characters, invisible, one for each ASCII character.
    TagCharacters,
    /// Variation selectors, invisible, one for each byte.
    VariationSelectors,
    /// Two invisible characters for the bits of ASCII.
    InvisibleBits,
}

impl Encoding {
    /// The name in reports, in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Base64 => "base64",
            Self::Hex => "hex",
            Self::Percent => "percent",
            Self::HtmlEntities => "html_entities",
            Self::Backslash => "backslash",
            Self::QuotedPrintable => "quoted_printable",
            Self::Rot13 => "rot13",
            Self::Reversed => "reversed",
            Self::ReversedWords => "reversed_words",
            Self::Leet => "leet",
            Self::SeparatedWords => "separated_words",
            Self::MixedCase => "mixed_case",
            Self::TagCharacters => "tag_characters",
            Self::VariationSelectors => "variation_selectors",
            Self::InvisibleBits => "invisible_bits",
        }
    }
}

/// Which reading a view is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ViewKind {
    /// The text as it came.
    Raw,
    /// The text with its disguises taken off.
    Normalized,
    /// Stretches of the text, decoded, and a little around them.
    Decoded(Encoding),
}

/// One reading of a text, with a map from every byte of it back to the original.
#[derive(Debug, Clone)]
pub struct View {
    /// Which reading.
    pub kind: ViewKind,
    /// What it reads.
    pub text: String,
    /// From the original to this text, first step first. None: the text is the original.
    maps: Vec<Arc<OffsetMap>>,
}

impl View {
    pub(crate) fn raw(text: &str) -> Self {
        Self { kind: ViewKind::Raw, text: text.to_owned(), maps: Vec::new() }
    }

    /// A view made from this one.
    fn derive(&self, kind: ViewKind, rewrite: Rewrite) -> Self {
        let mut maps = self.maps.clone();
        maps.push(Arc::new(rewrite.map));
        Self { kind, text: rewrite.text, maps }
    }

    /// Byte range of the original that produced `range` of this view.
    ///
    /// `range` is clamped to the view and widened to whole characters; the result lies on character
    /// boundaries of the original and holds everything `range` was made from. For a text
    /// backwards, that is from its first to its last character in the original.
    pub fn to_original(&self, range: Range<usize>) -> Range<usize> {
        let end = ceil_boundary(&self.text, range.end);
        let start = floor_boundary(&self.text, range.start.min(end));
        self.maps.iter().rev().fold(start..end, |range, map| map.to_source(range))
    }
}

/// Text that cannot be seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HiddenText {
    /// What it says; texts hidden in different ways stand on lines of their own.
    pub text: String,
    /// Byte range of the original from the first to the last hidden character.
    pub original: Range<usize>,
}

impl HiddenText {
    /// Whether there is enough of it for an alarm without reading it.
    pub fn is_alarm(&self) -> bool {
        let visible = self.text.chars().filter(|c| !c.is_whitespace());
        visible.take(HIDDEN_ALARM_CHARS).count() == HIDDEN_ALARM_CHARS
    }
}

/// All readings of a text.
#[derive(Debug, Clone)]
pub struct Views {
    /// The raw text first, then the normalized one if it differs, then what was decoded.
    pub views: Vec<View>,
    /// What invisible characters spell.
    pub hidden_text: Option<HiddenText>,
    /// Encoded text was found that exceeds the bounds of this module, and was not read.
    pub incomplete: bool,
}

/// The readings of `text`.
pub fn views(text: &str) -> Views {
    let raw = View::raw(text);
    let mut hidden = Hidden::default();
    let normalized = normalize(&raw, &mut hidden);
    let mut decoded = Decoded::new(text.len());
    for view in hidden.views {
        decoded.add(&view, 1);
        decoded.push(view);
    }
    decoded.add(normalized.as_ref().unwrap_or(&raw), 1);
    Views {
        hidden_text: hidden.text,
        incomplete: decoded.incomplete,
        views: [raw].into_iter().chain(normalized).chain(decoded.views).collect(),
    }
}

/// Takes the disguises off; `None` if there are none. Reports what was invisible to `hidden`.
fn normalize(raw: &View, hidden: &mut Hidden) -> Option<View> {
    let mut normal = raw.clone();
    let mut material = false;
    for _ in 0..MAX_PASSES {
        let Some(pass) = pass(&normal, hidden) else { break };
        material |= pass.material;
        normal = pass.view;
    }
    material.then_some(normal)
}

/// What one pass of the normalizer made of a text.
struct Pass {
    view: View,
    /// Whether the change is more than typography.
    material: bool,
}

/// Runs each step once; `None` if none changed anything.
fn pass(view: &View, hidden: &mut Hidden) -> Option<Pass> {
    let mut pass = Pass { view: view.clone(), material: false };
    let mut changed = false;
    let mut apply = |pass: &mut Pass, rewrite: Option<Rewrite>, material: bool| {
        let Some(rewrite) = rewrite else { return };
        pass.view = pass.view.derive(ViewKind::Normalized, rewrite);
        pass.material |= material;
        changed = true;
    };
    if let Some(visible) = invisible::reveal(&pass.view.text) {
        hidden.report(&pass.view, visible.hidden);
        apply(&mut pass, Some(visible.rewrite), true);
    }
    if let Some(compat) = compat::nfkc(&pass.view.text) {
        apply(&mut pass, Some(compat.rewrite), compat.material);
    }
    for step in [compat::strip_marks, spaced::join, confusables::fold] {
        let rewrite = step(&pass.view.text);
        apply(&mut pass, rewrite, true);
    }
    changed.then_some(pass)
}

/// What invisible characters spell.
#[derive(Default)]
struct Hidden {
    text: Option<HiddenText>,
    views: Vec<View>,
}

impl Hidden {
    fn report(&mut self, base: &View, found: Vec<(Encoding, Rewrite)>) {
        for (encoding, rewrite) in found {
            let view = base.derive(ViewKind::Decoded(encoding), rewrite);
            let original = view.to_original(0..view.text.len());
            match &mut self.text {
                None => self.text = Some(HiddenText { text: view.text.clone(), original }),
                Some(report) => {
                    report.text.push('\n');
                    report.text.push_str(&view.text);
                    report.original = report.original.start.min(original.start)
                        ..report.original.end.max(original.end);
                }
            }
            self.views.push(view);
        }
    }
}

/// Decoded views, within bounds.
struct Decoded {
    views: Vec<View>,
    bytes_left: usize,
    incomplete: bool,
}

impl Decoded {
    fn new(text_len: usize) -> Self {
        let bytes_left = text_len.saturating_mul(MAX_DECODED_BYTES_PER_BYTE);
        Self { views: Vec::new(), bytes_left, incomplete: false }
    }

    fn push(&mut self, view: View) {
        if self.views.len() == MAX_DECODED_VIEWS || view.text.len() > self.bytes_left {
            self.incomplete = true;
            return;
        }
        self.bytes_left -= view.text.len();
        self.views.push(view);
    }

    /// Adds what can be decoded in `base`, itself the result of `depth - 1` decodings.
    fn add(&mut self, base: &View, depth: usize) {
        for candidate in decode::candidates(&base.text) {
            let kind = ViewKind::Decoded(candidate.encoding);
            if !candidate.readable.is_empty() {
                self.push(base.derive(kind, decode::in_context(&base.text, &candidate.readable)));
            }
            if depth < MAX_DEPTH {
                self.add(&base.derive(kind, decode::alone(&candidate.islands)), depth + 1);
            } else {
                self.incomplete |= decode::goes_on(&candidate);
            }
        }
    }
}

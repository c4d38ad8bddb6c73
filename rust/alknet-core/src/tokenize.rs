//! Text to `input_ids`, with the bytes that every token stands for.
//!
//! The Hugging Face `tokenizers` library tokenizes, as the model's own `tokenizer.json` describes.
//!
//! - Tokens such as `<|im_start|>` are recognised inside the text. A gateway that pastes fetched text
//!   into a prompt gives the model exactly these tokens, and a text that opens its own chat turn is an
//!   attack; so it is read as the model would read it.
//! - No token is added, nothing is cut off or padded, whatever `tokenizer.json` asks for.
//! - Characters for which the vocabulary lacks a byte are skipped and separate words: in SmolLM2 six
//!   control characters and those of planes 4 to 11 of Unicode, where none is assigned. The library
//!   drops the byte alone, and then reports wrong offsets for the rest of the word. A text of such
//!   characters only has no tokens.
//! - Long texts are tokenized part by part. The library needs up to 450 bytes of memory per byte of
//!   text; so the need is bounded by the part, not by the text. A word that fills the largest part is
//!   cut, and its tokens there may, though hardly ever do, differ from those of the whole word.

mod file;

use std::{ops::Range, path::Path};

use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior};

use crate::{
    error::{Error, Result},
    model::{TokenId, config::read_json},
};

/// Bytes of text that are tokenized at once, where the tokenizer can be stopped and restarted.
const PART_BYTES: usize = 16 << 10;

/// Most bytes that are tokenized at once for the sake of a word that fills a part: some 120 MB of memory.
const MAX_PART_BYTES: usize = 256 << 10;

/// A tokenized text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoding {
    /// `[seq_len]`.
    pub input_ids: Vec<TokenId>,
    /// `[seq_len]`: first byte of a token in the text and the byte after its last, both on character
    /// boundaries. Tokens that share a character all span it.
    pub offsets: Vec<(usize, usize)>,
}

/// The tokenizer of a model.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Bytes before the end of a part within which a word may still change when more text follows;
    /// `None` when a text has to be tokenized as a whole.
    margin: Option<usize>,
    /// Bytes that no token stands for.
    missing: [bool; 256],
    /// Tokens that are recognised inside the text.
    added: Vec<String>,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, which must describe a BPE tokenizer.
    ///
    /// # Errors
    /// [`Error::ModelLoad`] when the file is missing, damaged, or of another kind.
    pub fn from_file(path: &Path) -> Result<Self> {
        let inner =
            file::parse(&read_json(path)?).map_err(|problem| Error::model(path, problem))?;
        Ok(Self::new(inner))
    }

    fn new(inner: tokenizers::Tokenizer) -> Self {
        let added = inner.get_added_tokens_decoder().into_values().map(|token| token.content);
        let added = added.collect();
        Self { margin: margin(&inner), missing: missing_bytes(&inner), added, inner }
    }

    /// Whether there is a token of this id.
    pub fn has(&self, id: TokenId) -> bool {
        self.inner.id_to_token(id).is_some()
    }

    /// Tokenizes `text`, in time linear in its length but for words of many thousand characters,
    /// where it is `n log n`.
    ///
    /// # Errors
    /// [`Error::Input`] when the library fails, which no text is known to make it do.
    pub fn encode(&self, text: &str) -> Result<Encoding> {
        self.encode_in_parts(text, PART_BYTES)
    }

    /// Tokenizes as much of a text that is still arriving as what follows will not change.
    ///
    /// Returns the tokens and the byte from which to go on when more has arrived. What is left are
    /// the last word, up to two characters before it, and what may be the beginning of an added token;
    /// but of more than `most_left` bytes the front is given out, too, if it is a token or more. In a
    /// word of that length its tokens may, though hardly ever do, differ from those of the whole.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_arriving(&self, text: &str, most_left: usize) -> Result<(Encoding, usize)> {
        let skipped = text.char_indices().rev().find(|&(_, c)| self.is_skipped(c));
        let start = skipped.map_or(0, |(index, c)| index + c.len_utf8());
        let mut result = self.encode(&text[..start])?;
        let run = start..text.len();
        let limit = Some(self.decided(text));
        let mut end = self.encode_run(text, run, PART_BYTES, limit, &mut result)?;
        if text.len() - end > most_left {
            let front = self.encode(&text[end..])?;
            let (kept, read) = whole_characters(&front.offsets, text.len() - end - most_left);
            let shifted = front.offsets[..kept].iter().map(|&(a, b)| (end + a, end + b));
            result.offsets.extend(shifted);
            result.input_ids.extend(&front.input_ids[..kept]);
            end += read;
        }
        Ok((result, end))
    }

    /// The byte of a text that is still arriving up to which its words are decided, where they end.
    ///
    /// Of what follows a word, two characters may matter (`'` and `'re`), and of what follows white
    /// space whether it is more of it, a word or an added token.
    fn decided(&self, text: &str) -> usize {
        let two_characters = text.char_indices().rev().nth(1).map_or(0, |(index, _)| index);
        let longest = self.added.iter().map(String::len).max().unwrap_or(0);
        let near = char_boundary(text, text.len().saturating_sub(longest));
        let begins_token =
            |index: &usize| self.added.iter().any(|token| token.starts_with(&text[*index..]));
        let added = text[near..].char_indices().map(|(i, _)| near + i).find(begins_token);
        text[..two_characters.min(added.unwrap_or(text.len()))].trim_end().len()
    }

    /// Tokenizes in parts of about `part_bytes` what lies between skipped characters.
    fn encode_in_parts(&self, text: &str, part_bytes: usize) -> Result<Encoding> {
        let mut result = Encoding::default();
        let mut start = 0;
        for (index, skipped) in text.char_indices().filter(|&(_, c)| self.is_skipped(c)) {
            self.encode_run(text, start..index, part_bytes, None, &mut result)?;
            start = index + skipped.len_utf8();
        }
        self.encode_run(text, start..text.len(), part_bytes, None, &mut result)?;
        Ok(result)
    }

    /// Whether the vocabulary lacks a byte of `c`.
    fn is_skipped(&self, c: char) -> bool {
        c.encode_utf8(&mut [0; 4]).bytes().any(|byte| self.missing[usize::from(byte)])
    }

    /// Adds the tokens of `text[run]`, each part continuing where the last settled word ended.
    ///
    /// With `decided` more of the run is to come, and only words that end up to there are added.
    /// Returns where the last token ends.
    fn encode_run(
        &self,
        text: &str,
        run: Range<usize>,
        part_bytes: usize,
        decided: Option<usize>,
        result: &mut Encoding,
    ) -> Result<usize> {
        let (mut start, mut len) = (run.start, part_bytes);
        while start < run.end {
            let margin = self.margin.filter(|_| run.end - start > len);
            let end = margin.map_or(run.end, |_| char_boundary(text, start + len));
            let part = self
                .inner
                .encode(&text[start..end], false)
                .map_err(|error| Error::Input(format!("the text cannot be tokenized: {error}")))?;
            let limit = margin.map_or(decided, |margin| Some(end.saturating_sub(margin)));
            let largest = margin.is_some() && len >= MAX_PART_BYTES;
            let (kept, read) = match limit {
                None => (part.len(), end - start),
                Some(limit) => settled(&part, limit.saturating_sub(start), largest),
            };
            result.input_ids.extend(&part.get_ids()[..kept]);
            let offsets = &part.get_offsets()[..kept];
            result.offsets.extend(offsets.iter().map(|&(a, b)| (start + a, start + b)));
            start += read;
            if margin.is_none() {
                break;
            }
            // One word may fill the part; the smaller parts read in vain add a third at most.
            len = if read == 0 { len * 4 } else { part_bytes };
        }
        Ok(start)
    }
}

/// The tokens of all words that end before `limit`, and where the last of them ends; of a word that
/// goes on for longer those of its front, if it may be cut.
fn settled(part: &tokenizers::Encoding, limit: usize, cut: bool) -> (usize, usize) {
    let (words, offsets) = (part.get_word_ids(), part.get_offsets());
    (1..words.len())
        .rev()
        .find(|&i| words[i] != words[i - 1] && offsets[i - 1].1 <= limit)
        .map(|i| (i, offsets[i - 1].1))
        .or_else(|| cut.then(|| whole_characters(offsets, limit)))
        .unwrap_or_default()
}

/// The tokens that end up to `limit`, but for those that share a character with the next one, and where
/// the last of them ends.
fn whole_characters(offsets: &[(usize, usize)], limit: usize) -> (usize, usize) {
    let apart = |i: usize| offsets.get(i).is_none_or(|next| offsets[i - 1].1 <= next.0);
    (1..=offsets.len())
        .rev()
        .find(|&i| offsets[i - 1].1 <= limit && apart(i))
        .map_or((0, 0), |i| (i, offsets[i - 1].1))
}

/// The character boundary at or before `index`.
fn char_boundary(text: &str, index: usize) -> usize {
    (0..=index.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0)
}

/// How far from its end a part has to be distrusted, or `None` where its beginning has to be, too.
///
/// Words are matched from left to right and none looks at what stands before it, so that a text can be
/// continued wherever a word ends. What follows matters to an added token that is cut in two, and to
/// runs of white space, of which the last character belongs to a word that follows.
fn margin(tokenizer: &tokenizers::Tokenizer) -> Option<usize> {
    let added = tokenizer.get_added_tokens_decoder();
    let looks_left = |token: &tokenizers::AddedToken| token.single_word || token.lstrip;
    let restarts = tokenizer.get_normalizer().is_none()
        && tokenizer.get_pre_tokenizer().is_some_and(restarts_anywhere)
        && !added.values().any(looks_left);
    let longest = added.values().map(|token| token.content.len()).max().unwrap_or(0);
    restarts.then_some(longest + 2 * char::MAX.len_utf8())
}

/// Whether splitting into words gives the same words when it starts at one of them.
fn restarts_anywhere(pre_tokenizer: &PreTokenizerWrapper) -> bool {
    match pre_tokenizer {
        PreTokenizerWrapper::ByteLevel(bytes) => !bytes.add_prefix_space,
        PreTokenizerWrapper::Digits(_) => true,
        PreTokenizerWrapper::Split(split) => split.behavior == SplitDelimiterBehavior::Isolated,
        PreTokenizerWrapper::Sequence(steps) => steps.as_ref().iter().all(restarts_anywhere),
        _ => false,
    }
}

/// Bytes without a token in a byte-level vocabulary; none in other ones, which have an unknown token.
fn missing_bytes(tokenizer: &tokenizers::Tokenizer) -> [bool; 256] {
    let mut missing = [false; 256];
    if tokenizer.get_pre_tokenizer().is_some_and(is_byte_level) {
        let mut stand_in = 256;
        for (byte, missing) in (0..=u8::MAX).zip(&mut missing) {
            // GPT-2 writes bytes that do not print as the characters from U+0100 on.
            let printable = matches!(byte, 33..=126 | 161..=172 | 174..);
            let code = if printable { u32::from(byte) } else { stand_in };
            stand_in += u32::from(!printable);
            let token = char::from_u32(code).map(String::from).unwrap_or_default();
            *missing = tokenizer.token_to_id(&token).is_none();
        }
    }
    missing
}

/// Whether words are spelled in bytes before merging.
fn is_byte_level(pre_tokenizer: &PreTokenizerWrapper) -> bool {
    match pre_tokenizer {
        PreTokenizerWrapper::ByteLevel(_) => true,
        PreTokenizerWrapper::Sequence(steps) => steps.as_ref().iter().any(is_byte_level),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A byte-level tokenizer in the manner of SmolLM2, without a token for the byte 0x04.
    fn tiny() -> Tokenizer {
        let bytes = include_bytes!("../../../tests/golden/tiny-tokenizer.json");
        Tokenizer::new(file::parse(bytes).unwrap())
    }

    fn spans<'a>(tokenizer: &Tokenizer, text: &'a str) -> Vec<&'a str> {
        tokenizer.encode(text).unwrap().offsets.iter().map(|&(a, b)| &text[a..b]).collect()
    }

    #[test]
    fn empty_text_has_no_tokens() {
        assert_eq!(tiny().encode("").unwrap(), Encoding::default());
    }

    #[test]
    fn tokens_of_one_character_all_span_it() {
        assert_eq!(spans(&tiny(), "a 👋!"), ["a", " ", "👋", "👋", "👋", "👋", "!"]);
    }

    #[test]
    fn chat_template_tokens_are_read_as_the_model_reads_them() {
        assert_eq!(spans(&tiny(), "a<|im_start|>7"), ["a", "<|im_start|>", "7"]);
        assert_eq!(tiny().encode("<|im_start|>").unwrap().input_ids, [1]);
    }

    #[test]
    fn missing_bytes_are_those_without_a_token() {
        let missing = tiny().missing;
        assert_eq!((0..256).filter(|&byte| missing[byte]).collect::<Vec<_>>(), [4]);
    }

    #[test]
    fn characters_without_a_token_are_skipped() {
        assert_eq!(spans(&tiny(), "a\u{4}!\u{4}"), ["a", "!"]);
        assert!(spans(&tiny(), &"\u{4}".repeat(100)).is_empty());
    }

    #[test]
    fn a_word_without_end_is_cut_and_what_has_arrived_of_it_given_out() {
        for character in ["a", "é", "的", "👋"] {
            let text = character.repeat(3 * MAX_PART_BYTES / 2 / character.len());
            let tokenizer = tiny();
            let whole = tokenizer.encode(&text).unwrap();
            let uncut = tokenizer.inner.encode(text.as_str(), false).unwrap();
            assert_eq!(whole.input_ids, uncut.get_ids());
            assert_eq!(whole.offsets, uncut.get_offsets());
            let (front, end) = tokenizer.encode_arriving(&text, usize::MAX).unwrap();
            assert!(end > MAX_PART_BYTES / 2, "{end} bytes of {character:?}");
            let rest = tokenizer.encode(&text[end..]).unwrap();
            assert_eq!([front.input_ids, rest.input_ids].concat(), whole.input_ids);
        }
    }

    proptest! {
        #[test]
        fn parts_give_the_tokens_of_the_whole(
            pieces in prop::collection::vec(
                prop_oneof![
                    Just("the"), Just(" the"), Just(" "), Just("\n"), Just("'s"), Just("'"), Just("12"),
                    Just("\u{4}"), Just("!"), Just("<|im_start|>"), Just("<|im_"), Just("é"), Just("👋"),
                    Just("    "), Just("世界"), Just("\u{40000}"),
                ],
                0..80,
            ),
            part_bytes in 1_usize..64,
        ) {
            let (text, tokenizer) = (pieces.concat(), tiny());
            let whole = tokenizer.encode_in_parts(&text, 1 << 20).unwrap();
            prop_assert_eq!(tokenizer.encode_in_parts(&text, part_bytes).unwrap(), whole);
        }

        #[test]
        fn what_follows_changes_no_token_given_out(
            pieces in prop::collection::vec(
                prop_oneof![
                    Just("the"), Just(" the"), Just(" "), Just("\n"), Just("'re"), Just("'"), Just("12"),
                    Just("\u{4}"), Just("!"), Just("<|im_start|>"), Just("<|im_"), Just("é"), Just("👋"),
                    Just("    "), Just("世界"), Just("\u{40000}"), Just("。"), Just("\u{200b}"),
                ],
                0..40,
            ),
        ) {
            let (text, tokenizer) = (pieces.concat(), tiny());
            let whole = tokenizer.encode(&text).unwrap();
            for (cut, _) in text.char_indices() {
                let (front, end) = tokenizer.encode_arriving(&text[..cut], usize::MAX).unwrap();
                let kept = front.input_ids.len();
                prop_assert_eq!(&front.input_ids[..], &whole.input_ids[..kept]);
                prop_assert_eq!(&front.offsets[..], &whole.offsets[..kept]);
                let rest = tokenizer.encode(&text[end..]).unwrap();
                prop_assert_eq!(&rest.input_ids[..], &whole.input_ids[kept..]);
            }
        }

        #[test]
        fn little_is_left_of_any_text(text in "\\PC{0,80}|[a-z]{0,300}|(的|い){0,200}| {0,300}") {
            let (front, end) = tiny().encode_arriving(&text, 32).unwrap();
            prop_assert!(text.len() - end <= 32 + 4, "{} bytes of {:?}", text.len() - end, text);
            prop_assert!(text.is_char_boundary(end) && front.offsets.iter().all(|o| o.1 <= end));
        }
    }
}

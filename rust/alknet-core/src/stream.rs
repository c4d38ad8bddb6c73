//! Stream: text that arrives in pieces, read once, judged as it comes.
//!
//! Words are read as soon as they are complete, after the key/value cache of what came before, so a
//! stream costs no more than its text read at once. [`Stream::finish`] gives exactly the alarm of
//! [`Firewall::screen`] on the whole text: only if the text turns out to have further views, or its
//! tokens differ from those read, is it screened again.

use std::{ops::Range, sync::Arc};

use crate::{
    alarm::Alarm,
    codebook::Origin,
    error::Result,
    firewall::{Case, Firewall, Input},
    model::KvCache,
    project::Projector,
    score::{self, WindowScore},
    tokenize::Encoding,
};

/// A text that is still arriving.
pub struct Stream {
    firewall: Arc<Firewall>,
    origin: Option<Origin>,
    text: String,
    /// Bytes of `text` that have been tokenised.
    committed: usize,
    encoding: Encoding,
    segments: Vec<Segment>,
    cache: KvCache,
}

/// The tokens of a segment that have been read so far, their projections and windows.
pub(crate) struct Segment {
    pub(crate) tokens: Range<usize>,
    pub(crate) windows: Vec<WindowScore>,
    projections: Vec<f32>,
}

impl Stream {
    /// A stream of which nothing has arrived.
    pub fn new(firewall: Arc<Firewall>, origin: Option<Origin>) -> Self {
        let cache = firewall.reader().start();
        Self {
            firewall,
            origin,
            text: String::new(),
            committed: 0,
            encoding: Encoding::default(),
            segments: Vec::new(),
            cache,
        }
    }

    /// Takes the next piece of text and judges what has been read so far.
    ///
    /// The last word waits until it is complete. The alarm is provisional: more text may raise it, and
    /// as the length class grows also lower it.
    ///
    /// # Errors
    /// As [`Firewall::screen`]; the stream must then be dropped.
    pub fn feed(&mut self, chunk: &str) -> Result<Alarm> {
        self.text.push_str(chunk);
        let end = self.committed + complete_words(&self.text[self.committed..]);
        self.commit(end)?;
        self.judge(true)
    }

    /// Judges the whole text.
    ///
    /// # Errors
    /// As [`Firewall::screen`].
    pub fn finish(mut self) -> Result<Alarm> {
        self.commit(self.text.len())?;
        let input = Input { text: &self.text, origin: self.origin };
        let case = self.firewall.prepare(&input)?;
        if case.is_plain(&self.encoding.input_ids) {
            return self.judge(false);
        }
        self.firewall.screen(&self.text, self.origin)
    }

    /// The text that has arrived.
    pub fn text(&self) -> &str {
        &self.text
    }

    fn judge(&self, arriving: bool) -> Result<Alarm> {
        let input = Input { text: &self.text, origin: self.origin };
        let case = Case::from_segments(input, &self.encoding, &self.segments, arriving);
        self.firewall.verdict(&case)
    }

    /// Tokenises up to byte `end` and reads the new tokens.
    fn commit(&mut self, end: usize) -> Result<()> {
        let new = self.firewall.reader().tokenizer().encode(&self.text[self.committed..end])?;
        let shift = self.committed;
        self.encoding.input_ids.extend(&new.input_ids);
        self.encoding.offsets.extend(new.offsets.iter().map(|&(a, b)| (a + shift, b + shift)));
        self.committed = end;
        self.read_on()
    }

    /// Reads the tokens that no segment has read yet.
    fn read_on(&mut self) -> Result<()> {
        let length = self.firewall.codebook().segment_tokens;
        let limit =
            self.firewall.max_tokens().unwrap_or(usize::MAX).min(self.encoding.input_ids.len());
        while self.segments.last().map_or(0, |segment| segment.tokens.end) < limit {
            if self.segments.last().is_none_or(|segment| segment.tokens.len() == length) {
                self.start_segment();
            }
            self.extend_segment(limit)?;
        }
        Ok(())
    }

    /// Starts a segment that shares its first tokens with the last one.
    fn start_segment(&mut self) {
        let overlap = self.firewall.codebook().segment_overlap;
        let start = self.segments.last().map_or(0, |segment| segment.tokens.end - overlap);
        self.segments.push(Segment {
            tokens: start..start,
            windows: Vec::new(),
            projections: Vec::new(),
        });
        self.cache = self.firewall.reader().start();
    }

    /// Reads the last segment on, to its end or to token `limit`.
    fn extend_segment(&mut self, limit: usize) -> Result<()> {
        let codebook = self.firewall.codebook();
        let Some(segment) = self.segments.last_mut() else { return Ok(()) };
        let end = limit.min(segment.tokens.start + codebook.segment_tokens);
        let input_ids = &self.encoding.input_ids[segment.tokens.end..end];
        let mut projector = Projector::new(codebook, &[input_ids.len()]);
        self.firewall.reader().extend(&mut self.cache, input_ids, &mut projector)?;
        segment.projections.append(&mut projector.sequences[0]);
        segment.windows = score::windows(codebook, &segment.projections)?;
        segment.tokens.end = end;
        Ok(())
    }
}

/// Length of the prefix after which a cut cannot change the tokens: up to the last single space
/// between two words.
fn complete_words(text: &str) -> usize {
    let bytes = text.as_bytes();
    let word = |b: u8| b.is_ascii_alphanumeric();
    (1..bytes.len().saturating_sub(1))
        .rev()
        .find(|&i| bytes[i] == b' ' && word(bytes[i - 1]) && word(bytes[i + 1]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::complete_words;

    #[test]
    fn the_last_word_waits() {
        assert_eq!(complete_words("one two thr"), 7);
        assert_eq!(complete_words("one"), 0);
        assert_eq!(complete_words("one "), 0);
        assert_eq!(complete_words(""), 0);
        assert_eq!(complete_words("a  b"), 0);
    }
}

//! Stream: text that arrives in pieces, read once, judged as it comes.
//!
//! **What is read when.** Words are read as soon as no further text can change their tokens, after the
//! key/value cache of what came before, so that each token runs through the model once. In any script
//! at most [`MAX_PENDING`] bytes and one token wait; in spaced text it is the last word.
//!
//! **What is judged when.** Every call of [`Stream::feed`] judges the segment that is being read, from its
//! first whole window on: the first few tokens of a text often look odd without the rest.
//! Disguises are looked for whenever a text has doubled, from [`FIRST_SEARCH_BYTES`] on, and from
//! [`SEARCH_BYTES`] on after as many more, with as many before them; what they hide is read as a text of
//! its own.
//!
//! **What it costs.** Every piece of work goes with tokens or bytes that are new, or is bounded by a
//! segment: time is linear in the text, however it is cut. Kept are the text, the tokens' offsets and
//! the frames' scores, but activations and keys of one segment only.
//!
//! **What it means.** The alarm of [`Stream::feed`] is provisional: the worst so far, or the latest while
//! all are clear, each part judged as if nothing followed. So its level never goes down, and it may be an
//! alarm that the whole text does not give: many looks are taken, and none is corrected for. [`Stream::finish`] gives exactly the alarm of
//! [`Firewall::screen`] on the whole text.

use std::sync::Arc;
use std::{mem, ops::Range, slice};

use crate::{
    alarm::{Alarm, AlarmLevel},
    cascade::{Cascade, Looks},
    codebook::Origin,
    error::Result,
    firewall::{Case, Firewall, Input},
    model::{KvCache, Sink, TokenId},
    score::FrameScore,
    tokenize::Encoding,
};

/// Bytes at the end of a text that may wait to be read, but for the last token.
pub const MAX_PENDING: usize = 128;

/// Bytes after which disguises are looked for again, and as many before them are looked at again.
pub const SEARCH_BYTES: usize = 1024;

/// Bytes after which disguises are looked for the first time.
pub const FIRST_SEARCH_BYTES: usize = 64;

/// How far from where it should be a part is cut to be cut at white space, in bytes.
const NEAR: usize = 128;

/// A text that is still arriving.
pub struct Stream {
    firewall: Arc<Firewall>,
    origin: Option<Origin>,
    text: String,
    /// Whether `text` is nothing but white space.
    blank: bool,
    /// Bytes of `text` that have been tokenised.
    committed: usize,
    encoding: Encoding,
    segments: Vec<Segment>,
    /// Of the last segment.
    cache: KvCache,
    /// Bytes of `text` in which disguises have been looked for.
    searched: usize,
    worst: Option<Alarm>,
}

/// The tokens of a segment that have been read so far, their projections and frames.
pub(crate) struct Segment {
    pub(crate) tokens: Range<usize>,
    pub(crate) frames: Vec<FrameScore>,
    /// Empty once the next segment has begun; of what closes the segment, the places where more tokens will not
    /// change it.
    looks: Looks,
}

impl Stream {
    /// A stream of which nothing has arrived.
    pub fn new(firewall: Arc<Firewall>, origin: Option<Origin>) -> Self {
        let cache = firewall.reader().start();
        Self {
            firewall,
            origin,
            text: String::new(),
            blank: true,
            committed: 0,
            encoding: Encoding::default(),
            segments: Vec::new(),
            cache,
            searched: 0,
            worst: None,
        }
    }

    /// Takes the next piece of text and judges what has been read so far.
    ///
    /// The alarm is provisional, its level that of the worst part so far: later calls never lower it.
    ///
    /// # Errors
    /// As [`Firewall::screen`]; the stream must then be dropped.
    pub fn feed(&mut self, chunk: &str) -> Result<Alarm> {
        self.text.push_str(chunk);
        self.blank &= chunk.trim().is_empty();
        // A text of nothing but white space is not read at all.
        if !self.blank && self.commit()? {
            self.read_and_judge()?;
            self.search()?;
        }
        self.provisional()
    }

    /// Judges the whole text.
    ///
    /// # Errors
    /// As [`Firewall::screen`].
    pub fn finish(mut self) -> Result<Alarm> {
        let text = mem::take(&mut self.text);
        let mut case = self.firewall.prepare(&Input { text: &text, origin: self.origin })?;
        if let Some(input_ids) = case.raw_ids() {
            self.continue_as(input_ids);
            self.read_on()?;
            case.adopt(self.segments);
        }
        self.firewall.read(slice::from_mut(&mut case))?;
        self.firewall.verdict(&case)
    }

    /// The text that has arrived.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Tokenises what can be; returns whether there are new tokens.
    fn commit(&mut self) -> Result<bool> {
        let (shift, before) = (self.committed, self.encoding.input_ids.len());
        let tokenizer = self.firewall.reader().tokenizer();
        let (new, read) = tokenizer.encode_arriving(&self.text[shift..], MAX_PENDING)?;
        self.encoding.input_ids.extend(&new.input_ids);
        self.encoding.offsets.extend(new.offsets.iter().map(|&(a, b)| (a + shift, b + shift)));
        self.committed = shift + read;
        Ok(self.encoding.input_ids.len() > before)
    }

    /// Reads the new tokens and judges the segments that they belong to.
    fn read_and_judge(&mut self) -> Result<()> {
        let window = self.firewall.codebook().window;
        let first = self.segments.len().saturating_sub(1);
        self.read_on()?;
        for index in first..self.segments.len() {
            if self.segments[index].tokens.len() >= window {
                let alarm = self.judge(index)?;
                self.raise(alarm);
            }
        }
        Ok(())
    }

    /// The alarm on one segment, corrected for as many as there are.
    fn judge(&self, index: usize) -> Result<Alarm> {
        let segment = &self.segments[index];
        let offsets = &self.encoding.offsets[segment.tokens.clone()];
        let (Some(&(start, _)), Some(&(_, end))) = (offsets.first(), offsets.last()) else {
            return self.provisional();
        };
        let offsets = offsets.iter().map(|&(a, b)| (a - start, b - start)).collect();
        let mut case = self.case(&self.text[start..end]);
        case.add_segment(segment, offsets, self.segments.len());
        Ok(moved(self.firewall.verdict(&case)?, start))
    }

    fn case<'a>(&self, text: &'a str) -> Case<'a> {
        let input = Input { text, origin: self.origin };
        Case::arriving(input, self.encoding.input_ids.len(), self.unread_bytes())
    }

    /// Looks for disguises, if enough has arrived since the last time.
    fn search(&mut self) -> Result<()> {
        let due = self.searched.clamp(FIRST_SEARCH_BYTES, SEARCH_BYTES);
        if self.committed - self.searched < due || self.unread_bytes() > 0 {
            return Ok(());
        }
        let start = cut(&self.text, self.searched.saturating_sub(SEARCH_BYTES));
        let part = &self.text[start..cut(&self.text, self.committed)];
        if let Some(alarm) = self.firewall.screen_disguises(part, self.origin)? {
            self.raise(moved(alarm, start));
        }
        self.searched = self.committed;
        Ok(())
    }

    /// Keeps an alarm if none was worse.
    fn raise(&mut self, alarm: Alarm) {
        let rank = |alarm: &Alarm| (alarm.level, alarm.score);
        match &mut self.worst {
            Some(worst) if worst.level > AlarmLevel::Clear && rank(worst) > rank(&alarm) => {
                worst.reason = alarm.reason.or(worst.reason);
            }
            worst => {
                let before = worst.as_ref().filter(|worst| worst.level > AlarmLevel::Clear);
                let reason = alarm.reason.or(before.and_then(|worst| worst.reason));
                *worst = Some(Alarm { reason, ..alarm });
            }
        }
    }

    /// The worst alarm so far, with the counts of now.
    fn provisional(&self) -> Result<Alarm> {
        let worst = match &self.worst {
            Some(worst) => worst.clone(),
            None => self.firewall.verdict(&self.case(if self.blank { "" } else { &self.text }))?,
        };
        let n_tokens = self.encoding.input_ids.len();
        Ok(Alarm { n_tokens, unread_bytes: self.unread_bytes(), ..worst })
    }

    /// Bytes beyond the limit of tokens.
    fn unread_bytes(&self) -> usize {
        let limit = self.firewall.max_tokens();
        let unread = limit.and_then(|limit| self.encoding.offsets.get(limit));
        unread.map_or(0, |&(start, _)| self.text.len() - start)
    }

    /// Replaces the tokens by those of the whole text, and drops what was read of others.
    fn continue_as(&mut self, input_ids: &[TokenId]) {
        let pairs = self.encoding.input_ids.iter().zip(input_ids);
        let same = pairs.take_while(|(read, whole)| read == whole).count();
        while self.segments.pop_if(|segment| segment.tokens.end > same).is_some() {}
        self.encoding.input_ids = input_ids.to_vec();
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
        let start = self.segments.last_mut().map_or(0, |segment| {
            segment.looks = Looks::default();
            segment.tokens.end - overlap
        });
        self.segments.push(Segment {
            tokens: start..start,
            frames: Vec::new(),
            looks: Looks::default(),
        });
        self.cache = self.firewall.reader().start();
    }

    /// Reads the last segment on, to its end or to token `limit`.
    fn extend_segment(&mut self, limit: usize) -> Result<()> {
        let codebook = self.firewall.codebook();
        let Some(segment) = self.segments.last_mut() else { return Ok(()) };
        let end = limit.min(segment.tokens.start + codebook.segment_tokens);
        let new = &self.encoding.input_ids[segment.tokens.end..end];
        let within = segment.tokens.len()..end - segment.tokens.start;
        let closing = codebook.closing.as_ref();
        let readouts = closing.map_or_else(Vec::new, |closing| closing.readouts(within.clone()));
        let cascade = Cascade::new(codebook, &[(new.len(), readouts.len())]);
        // All of it is read: what follows reads the keys and values of every block.
        self.firewall.reader().extend(&mut self.cache, new, &readouts, &ReadAll(&cascade))?;
        cascade.into_looks().into_iter().for_each(|new| segment.looks.extend(new));
        segment.frames = segment.looks.frames(codebook)?;
        segment.tokens.end = end;
        // What closes the segment now stands elsewhere when more has arrived.
        let stay = closing.map_or(0, |closing| closing.staying(within.end));
        segment.looks.keep_closings(codebook, stay);
        Ok(())
    }
}

/// Takes rows without ever having enough.
struct ReadAll<'a>(&'a dyn Sink);

impl Sink for ReadAll<'_> {
    fn rows(&self, sequence: usize, site: usize, first: usize, rows: &[f32]) -> Result<()> {
        self.0.rows(sequence, site, first, rows)
    }
}

/// The alarm on a part that starts at byte `start`, as one on the whole.
fn moved(mut alarm: Alarm, start: usize) -> Alarm {
    for span in &mut alarm.spans {
        span.bytes = span.bytes.start + start..span.bytes.end + start;
    }
    alarm
}

/// Where to cut a text near byte `index`: before it at white space, so that no emoji or encoded
/// stretch is torn, or else between two characters.
fn cut(text: &str, index: usize) -> usize {
    let boundary =
        |index: usize| (0..=index).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
    let (from, to) = (boundary(index.saturating_sub(NEAR)), boundary(index));
    text[from..to].rfind(char::is_whitespace).map_or(to, |space| from + space)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_cut_at_white_space_where_there_is_some() {
        assert_eq!(cut("one two three", 10), 7);
        assert_eq!(cut("onetwothree", 10), 10);
        assert_eq!(cut("日本語", 4), 3);
        let far = format!("a {}", "b".repeat(3 * NEAR));
        assert_eq!(cut(&far, 2 * NEAR), 2 * NEAR);
    }
}

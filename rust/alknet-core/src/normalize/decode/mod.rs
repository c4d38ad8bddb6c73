//! Encoded stretches of a text, decoded where that gives something to read.
//!
//! Every decoder makes one pass over the text (base64 one for each of its four alignments), so the
//! work is linear in its length. What a decoder finds is an [`Island`]: a stretch of the source and
//! its decoded text.

mod bytes;
mod capitals;
mod escapes;
mod separated;
mod words;

use std::ops::Range;

use super::{
    Encoding,
    language::reads_like_language,
    map::{Rewrite, floor_boundary},
};

/// Bytes of the same line that a view shows on either side of what was decoded.
const CONTEXT_BYTES: usize = 160;

/// A stretch of the source and what it decodes to.
#[derive(Debug, Clone)]
pub(super) struct Island {
    pub(super) source: Range<usize>,
    pub(super) rewrite: Rewrite,
}

/// All stretches of a text in one encoding, in the order of the source. Two may share a few digits of
/// base64, which stand for the last byte of one and the first of the other, or a word with different
/// separators on its sides.
#[derive(Debug)]
pub(super) struct Candidate {
    pub(super) encoding: Encoding,
    pub(super) islands: Vec<Island>,
    /// Those that read like language. The others may still hold another encoding.
    pub(super) readable: Vec<Island>,
}

/// Decodes `text` in every way that gives printable text.
pub(super) fn candidates(text: &str) -> Vec<Candidate> {
    let mut found = Vec::new();
    for (encoding, islands) in
        [(Encoding::Base64, bytes::base64(text)), (Encoding::Hex, bytes::hex(text))]
    {
        let reads = |island: &&Island| reads_like_language(&island.rewrite.text);
        let readable = islands.iter().filter(reads).cloned().collect();
        found.push(Candidate { encoding, islands, readable });
    }
    let of_bytes = escapes::find(text).into_iter();
    let of_words =
        words::find(text).into_iter().chain([separated::find(text), capitals::find(text)]);
    for (encoding, islands) in of_bytes.chain(of_words) {
        found.push(Candidate { encoding, readable: islands.clone(), islands });
    }
    found.retain(|candidate| !candidate.islands.is_empty());
    found
}

/// Whether what was decoded are bytes that were encoded once more, or more often. Of what is no language,
/// that a quarter of it decodes to printable characters is too much for chance.
pub(super) fn goes_on(candidate: &Candidate) -> bool {
    let of_bytes =
        |candidate: &Candidate| matches!(candidate.encoding, Encoding::Base64 | Encoding::Hex);
    if !of_bytes(candidate) || candidate.readable.len() == candidate.islands.len() {
        return false;
    }
    let text = alone(&candidate.islands).text;
    candidates(&text).iter().filter(|inner| of_bytes(inner)).any(|inner| {
        let decoded: usize = inner.islands.iter().map(|island| island.rewrite.text.len()).sum();
        !inner.readable.is_empty() || 4 * decoded >= text.len()
    })
}

/// Byte ranges of letters and digits in a row, apostrophes between them included.
fn words_of(text: &str) -> impl Iterator<Item = Range<usize>> {
    let is_word = |c: char| c.is_alphanumeric() || matches!(c, '\'' | '’');
    text.split(move |c| !is_word(c)).filter(|word| !word.is_empty()).map(|word| {
        let start = word.as_ptr() as usize - text.as_ptr() as usize;
        start..start + word.len()
    })
}

/// The decoded islands with up to `CONTEXT_BYTES` of their lines around them, one piece to a line.
pub(super) fn in_context(text: &str, islands: &[Island]) -> Rewrite {
    let mut rewrite = Rewrite::default();
    let mut shown = 0;
    for (i, island) in islands.iter().enumerate() {
        let start = context_start(text, island.source.start).max(shown).min(island.source.start);
        start_piece(&mut rewrite, start, shown);
        rewrite.keep(text, start..island.source.start);
        rewrite.append(&island.rewrite);
        let next = islands.get(i + 1).map_or(text.len(), |next| next.source.start);
        shown = context_end(text, island.source.end).min(next).max(island.source.end);
        rewrite.keep(text, island.source.end..shown);
    }
    rewrite
}

/// The decoded islands alone, one to a line.
pub(super) fn alone(islands: &[Island]) -> Rewrite {
    let mut rewrite = Rewrite::default();
    let mut shown = 0;
    for island in islands {
        start_piece(&mut rewrite, island.source.start, shown);
        rewrite.append(&island.rewrite);
        shown = island.source.end;
    }
    rewrite
}

/// Starts a line for a piece from `start` on, unless it continues what was shown up to `shown`.
fn start_piece(rewrite: &mut Rewrite, start: usize, shown: usize) {
    if start > shown && !rewrite.text.is_empty() {
        rewrite.replace("\n", start..start);
    }
}

fn context_start(text: &str, at: usize) -> usize {
    let start = floor_boundary(text, at.saturating_sub(CONTEXT_BYTES));
    text[start..at].rfind('\n').map_or(start, |newline| start + newline + 1)
}

fn context_end(text: &str, at: usize) -> usize {
    let end = floor_boundary(text, at + CONTEXT_BYTES);
    text[at..end].find('\n').map_or(end, |newline| at + newline)
}

/// A few bytes and the stretch of the source they are written in.
#[derive(Debug, Clone)]
pub(super) struct Unit {
    source: Range<usize>,
    bytes: [u8; 4],
    len: u8,
}

impl Unit {
    /// Up to four bytes.
    fn new(source: Range<usize>, bytes: &[u8]) -> Self {
        let mut unit = Self { source, bytes: [0; 4], len: bytes.len() as u8 };
        unit.bytes[..bytes.len()].copy_from_slice(bytes);
        unit
    }

    /// A single byte.
    pub(super) fn byte(source: Range<usize>, byte: u8) -> Self {
        Self::new(source, &[byte])
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

/// The stretches of printable UTF-8, at least `min_chars` long, in bytes that were read one after
/// the other.
pub(super) fn readable_islands(units: &[Unit], min_chars: usize) -> Vec<Island> {
    let bytes: Vec<u8> = units.iter().flat_map(|unit| unit.bytes()).copied().collect();
    let mut owners = Owners { units, unit: 0, end: 0 };
    printable_stretches(&bytes, min_chars).map(|(at, piece)| owners.island(piece, at)).collect()
}

/// The stretches of at least `min_chars` printable characters, each with its first byte.
fn printable_stretches(bytes: &[u8], min_chars: usize) -> impl Iterator<Item = (usize, &str)> {
    let mut end = 0;
    let valid = bytes.utf8_chunks().map(move |chunk| {
        let start = end;
        end += chunk.valid().len() + chunk.invalid().len();
        (start, chunk.valid())
    });
    let pieces = valid.flat_map(|(start, text)| {
        let offset = move |piece: &str| start + (piece.as_ptr() as usize - text.as_ptr() as usize);
        text.split(|c| !is_printable(c)).map(move |piece| (offset(piece), piece))
    });
    pieces.filter(move |(_, piece)| piece.chars().nth(min_chars - 1).is_some())
}

/// Finds the units that bytes came from; asked for ever later bytes.
struct Owners<'a> {
    units: &'a [Unit],
    unit: usize,
    /// End of the bytes of all units before `unit`.
    end: usize,
}

impl Owners<'_> {
    /// Source of the unit that holds byte `at`.
    fn source(&mut self, at: usize) -> Range<usize> {
        while self.end + self.units[self.unit].bytes().len() <= at {
            self.end += self.units[self.unit].bytes().len();
            self.unit += 1;
        }
        self.units[self.unit].source.clone()
    }

    /// The island `piece`, whose bytes begin at `at`. Characters of one unit share a segment.
    fn island(&mut self, piece: &str, at: usize) -> Island {
        let mut rewrite = Rewrite::default();
        let mut pending: Option<(usize, Range<usize>)> = None;
        for (i, c) in piece.char_indices() {
            let start = self.source(at + i).start;
            let source = start..self.source(at + i + c.len_utf8() - 1).end;
            pending = match pending.take() {
                Some((from, last)) if last != source => {
                    rewrite.replace(&piece[from..i], last);
                    Some((i, source))
                }
                None => Some((i, source)),
                same => same,
            };
        }
        if let Some((from, last)) = pending {
            rewrite.replace(&piece[from..], last);
        }
        let len = rewrite.text.len();
        Island { source: rewrite.map.to_source(0..len), rewrite }
    }
}

/// Neither a control character nor one that no text has.
fn is_printable(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r')
        || !c.is_control()
            && !matches!(c as u32, 0xE000..=0xF8FF | 0xFFF0..=0xFFFF | 0xE0000..=0x10FFFF)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn islands_are_cut_at_what_cannot_be_printed() {
        let units: Vec<Unit> = b"ab\x01cdef\xffgh\xc3\xa9i\x02"
            .iter()
            .enumerate()
            .map(|(i, &byte)| Unit::byte(2 * i..2 * i + 2, byte))
            .collect();
        let found: Vec<_> = readable_islands(&units, 3)
            .into_iter()
            .map(|island| (island.rewrite.text, island.source))
            .collect();
        assert_eq!(found, [("cdef".to_owned(), 6..14), ("ghéi".to_owned(), 16..26)]);
    }

    #[test]
    fn context_is_of_the_same_line() {
        let text = "line one\nsee XX and YY here\nline three";
        let island = |source: Range<usize>, decoded: &str| {
            let mut rewrite = Rewrite::default();
            rewrite.replace(decoded, source.clone());
            Island { source, rewrite }
        };
        let islands = [island(13..15, "this"), island(20..22, "that")];
        let rewrite = in_context(text, &islands);
        assert_eq!(rewrite.text, "see this and that here");
        assert_eq!(rewrite.map.to_source(4..8), 13..15);
        assert_eq!(alone(&islands).text, "this\nthat");
    }

    #[test]
    fn far_apart_islands_stand_on_lines_of_their_own() {
        let text = format!("aa{}bb", " ".repeat(1000));
        let mut rewrite = Rewrite::default();
        rewrite.keep(&text, 0..2);
        let first = Island { source: 0..2, rewrite };
        let mut rewrite = Rewrite::default();
        rewrite.keep(&text, 1002..1004);
        let islands = [first, Island { source: 1002..1004, rewrite }];
        assert_eq!(in_context(&text, &islands).text.matches('\n').count(), 1);
        assert_eq!(in_context(&text, &islands).text.len(), 4 + 2 * CONTEXT_BYTES + 1);
    }
}

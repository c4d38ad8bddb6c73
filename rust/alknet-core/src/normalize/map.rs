//! A rewritten text and the way back: which bytes of the source made which bytes of the result.

use std::ops::Range;

/// The last character boundary of `text` up to byte `at`.
pub(super) fn floor_boundary(text: &str, at: usize) -> usize {
    let mut at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// The first character boundary of `text` from byte `at` on, or its end.
pub(super) fn ceil_boundary(text: &str, at: usize) -> usize {
    let mut at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at += 1;
    }
    at
}

/// Consecutive bytes of a result that share one source range.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Segment {
    /// First byte in the result; the segment ends where the next one starts.
    start: usize,
    /// The bytes of the source it came from.
    source: Range<usize>,
    /// Byte `i` of the segment came from byte `i` of `source`; otherwise the whole from the whole.
    aligned: bool,
}

/// Maps byte ranges of a rewritten text to byte ranges of the text it was made from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct OffsetMap {
    segments: Vec<Segment>,
    /// Bytes of the result.
    len: usize,
}

impl OffsetMap {
    /// The smallest source range that holds everything `range` of the result was made from.
    ///
    /// Both are byte ranges on character boundaries; `range` is clamped to the result. An empty
    /// range gives an empty range, where its character would start.
    pub(super) fn to_source(&self, range: Range<usize>) -> Range<usize> {
        let end = range.end.min(self.len);
        let start = range.start.min(end);
        if start == end {
            let at = self.position(start);
            return at..at;
        }
        let first = self.segment_at(start);
        let mut hull = self.source_part(first, start, end);
        for index in first + 1..self.segments.len() {
            if self.segments[index].start >= end {
                break;
            }
            let part = self.source_part(index, start, end);
            hull = hull.start.min(part.start)..hull.end.max(part.end);
        }
        hull
    }

    /// Index of the segment that holds byte `at` of a result that is not empty.
    fn segment_at(&self, at: usize) -> usize {
        self.segments.partition_point(|segment| segment.start <= at).saturating_sub(1)
    }

    /// The source of what segment `index` and `start..end` of the result share.
    fn source_part(&self, index: usize, start: usize, end: usize) -> Range<usize> {
        let segment = &self.segments[index];
        if !segment.aligned {
            return segment.source.clone();
        }
        let from = start.max(segment.start) - segment.start;
        let to = (end - segment.start).min(segment.source.len());
        segment.source.start + from..segment.source.start + to
    }

    /// Where in the source byte `at` of the result begins; inside a replacement, where that ends.
    fn position(&self, at: usize) -> usize {
        let Some(segment) = self.segments.get(self.segment_at(at)) else { return 0 };
        let offset = at - segment.start;
        match segment.aligned {
            true => segment.source.start + offset.min(segment.source.len()),
            false if offset == 0 => segment.source.start,
            false => segment.source.end,
        }
    }
}

/// A text made from another one, with the way back.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Rewrite {
    pub(super) text: String,
    pub(super) map: OffsetMap,
}

impl Rewrite {
    /// Appends `range` of `source` as it is.
    pub(super) fn keep(&mut self, source: &str, range: Range<usize>) {
        let text = &source[range.clone()];
        self.align(text, range);
    }

    /// Appends `text`, of which each byte stands for the byte at the same place in `range`.
    pub(super) fn align(&mut self, text: &str, range: Range<usize>) {
        debug_assert_eq!(text.len(), range.len());
        self.push(text, range, true);
    }

    /// Appends `text`, which as a whole stands for `range` of the source.
    pub(super) fn replace(&mut self, text: &str, range: Range<usize>) {
        self.push(text, range, false);
    }

    /// Appends another rewrite of the same source.
    pub(super) fn append(&mut self, other: &Rewrite) {
        let shift = self.text.len();
        self.text.push_str(&other.text);
        self.map.len = self.text.len();
        self.map.segments.extend(
            other.map.segments.iter().cloned().map(|s| Segment { start: s.start + shift, ..s }),
        );
    }

    fn push(&mut self, text: &str, source: Range<usize>, aligned: bool) {
        if text.is_empty() {
            return;
        }
        let start = self.text.len();
        self.text.push_str(text);
        self.map.len = self.text.len();
        match self.map.segments.last_mut() {
            Some(last) if aligned && last.aligned && last.source.end == source.start => {
                last.source.end = source.end;
            }
            _ => self.map.segments.push(Segment { start, source, aligned }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `ab` kept, `XYZ` for `cd`, `e` dropped, `fg` kept.
    fn example() -> Rewrite {
        let mut rewrite = Rewrite::default();
        rewrite.keep("abcdefg", 0..2);
        rewrite.replace("XYZ", 2..4);
        rewrite.keep("abcdefg", 5..7);
        rewrite
    }

    #[test]
    fn ranges_map_to_what_made_them() {
        let Rewrite { text, map } = example();
        assert_eq!(text, "abXYZfg");
        assert_eq!(map.to_source(0..1), 0..1);
        assert_eq!(map.to_source(3..4), 2..4, "a part of a replacement is the whole of it");
        assert_eq!(map.to_source(4..6), 2..6, "what was dropped inside a range belongs to it");
        assert_eq!(map.to_source(0..7), 0..7);
    }

    #[test]
    fn empty_and_outside_ranges_stay_in_bounds() {
        let Rewrite { map, .. } = example();
        assert_eq!(map.to_source(5..5), 5..5);
        assert_eq!(map.to_source(7..99), 7..7);
        assert_eq!(map.to_source(6..99), 6..7);
        assert_eq!(OffsetMap::default().to_source(0..3), 0..0);
    }

    #[test]
    fn a_reversed_text_maps_to_the_hull() {
        let mut rewrite = Rewrite::default();
        for at in (0..4).rev() {
            rewrite.keep("abcd", at..at + 1);
        }
        assert_eq!(rewrite.text, "dcba");
        assert_eq!(rewrite.map.to_source(0..1), 3..4);
        assert_eq!(rewrite.map.to_source(1..3), 1..3);
    }

    #[test]
    fn kept_neighbours_share_a_segment() {
        let mut rewrite = Rewrite::default();
        rewrite.keep("abcd", 0..2);
        rewrite.keep("abcd", 2..4);
        assert_eq!(rewrite.map.segments.len(), 1);
    }
}

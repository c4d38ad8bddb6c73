//! Compatibility normalization (NFKC) with a map, and letters buried under combining marks.
//!
//! Fullwidth, mathematical, circled and similar letters become plain ones here.

use std::ops::Range;

use unicode_normalization::{
    IsNormalized, UnicodeNormalization,
    char::{canonical_combining_class, decompose_compatible},
    is_nfkc_quick,
};

use super::map::Rewrite;

/// Styled letters beside another letter from which on NFKC is more than typography. Fewer are a
/// ligature, an ordinal or a unit sign.
const MATERIAL_LETTERS: usize = 4;

/// Marks on one letter, its accent included, that writing systems stack.
const MAX_MARKS: usize = 3;

/// Letters with a mark that a word must have, nearly all of its letters, to drown in them.
const MIN_MARKED: usize = 4;

/// A text in NFKC, and whether that changes how it reads.
#[derive(Debug)]
pub(super) struct Compat {
    pub(super) rewrite: Rewrite,
    pub(super) material: bool,
}

/// Brings `text` to NFKC; `None` if it is.
pub(super) fn nfkc(text: &str) -> Option<Compat> {
    if text.is_ascii() || is_nfkc_quick(text.chars()) == IsNormalized::Yes {
        return None;
    }
    let mut rewrite = Rewrite::default();
    let mut styled = StyledLetters::default();
    for chunk in Chunks(text, 0) {
        let source = &text[chunk.clone()];
        if source.is_ascii() || is_nfkc_quick(source.chars()) == IsNormalized::Yes {
            rewrite.keep(text, chunk);
            styled.plain(source);
            continue;
        }
        let normal: String = source.nfkc().collect();
        styled.changed(source, &normal);
        match normal == source {
            true => rewrite.keep(text, chunk),
            false => rewrite.replace(&normal, chunk),
        }
    }
    let material = styled.beside >= MATERIAL_LETTERS;
    (rewrite.text != text).then_some(Compat { rewrite, material })
}

/// Byte ranges that normalize on their own: a character and all that can combine with it.
///
/// Runs of ASCII that nothing combines with come as one.
struct Chunks<'a>(&'a str, usize);

impl Iterator for Chunks<'_> {
    type Item = Range<usize>;

    fn next(&mut self) -> Option<Range<usize>> {
        let (text, start) = (self.0, self.1);
        let mut chars = text[start..].char_indices();
        let (_, first) = chars.next()?;
        let mut in_ascii = first.is_ascii();
        for (at, c) in chars {
            if !starts_chunk(c) {
                in_ascii = false;
            } else if !(in_ascii && c.is_ascii() && next_starts_chunk(text, start + at + 1)) {
                self.1 = start + at;
                return Some(start..self.1);
            }
        }
        self.1 = text.len();
        Some(start..self.1)
    }
}

fn next_starts_chunk(text: &str, at: usize) -> bool {
    text[at..].chars().next().is_none_or(starts_chunk)
}

/// Whether nothing before `c` can change with it.
fn starts_chunk(c: char) -> bool {
    if c.is_ascii() {
        return true;
    }
    let mut first = None;
    decompose_compatible(c, |part| first = first.or(Some(part)));
    first.is_some_and(|part| {
        canonical_combining_class(part) == 0
            && is_nfkc_quick(std::iter::once(part)) != IsNormalized::Maybe
    })
}

/// Counts characters that became one ASCII letter and stand beside another letter.
#[derive(Debug, Default)]
struct StyledLetters {
    beside: usize,
    after_letter: bool,
    /// The character before was a styled letter without a letter before it.
    pending: bool,
}

impl StyledLetters {
    fn plain(&mut self, source: &str) {
        let starts = source.starts_with(|c: char| c.is_ascii_alphabetic());
        self.beside += usize::from(self.pending && starts);
        self.pending = false;
        self.after_letter = source.ends_with(|c: char| c.is_ascii_alphabetic());
    }

    fn changed(&mut self, source: &str, normal: &str) {
        let letters = normal.bytes().filter(u8::is_ascii_alphabetic).count();
        let accented = source.nfc().eq(normal.chars());
        if letters != 1 || accented {
            return self.plain(normal);
        }
        self.beside += usize::from(self.pending) + usize::from(self.after_letter);
        self.pending = !self.after_letter;
        self.after_letter = true;
    }
}

/// Takes combining marks off words that drown in them; `None` if there is no such word.
///
/// Expects NFKC, so that the accents of ordinary writing are part of their letters. Words in Latin
/// letters of which nearly each has an accent lose these as well, short words only among others.
/// The marks of Hebrew, Arabic and Indic scripts are not touched.
pub(super) fn strip_marks(text: &str) -> Option<Rewrite> {
    if text.is_ascii() || !text.chars().any(|c| is_mark(c) || is_accented(c)) {
        return None;
    }
    let drowned = |least| words_and_gaps(text).filter(move |w| drowns(&text[w.clone()], least));
    let least = if drowned(MIN_MARKED).nth(1).is_some() { 1 } else { MIN_MARKED };
    let mut rewrite = Rewrite::default();
    for word in words_and_gaps(text) {
        let source = &text[word.clone()];
        if source.is_ascii() || !drowns(source, least) {
            rewrite.keep(text, word);
            continue;
        }
        for (at, c) in source.char_indices().filter(|(_, c)| !is_mark(*c)) {
            let range = word.start + at..word.start + at + c.len_utf8();
            let base = base_letter(c);
            match base == c {
                true => rewrite.keep(text, range),
                false => rewrite.replace(base.encode_utf8(&mut [0; 4]), range),
            }
        }
    }
    (rewrite.text != text).then_some(rewrite)
}

/// Splits a text before each run of white space and after it.
fn words_and_gaps(text: &str) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let rest = &text[start..];
        let space = rest.chars().next()?.is_whitespace();
        let len = rest.find(|c: char| c.is_whitespace() != space).unwrap_or(rest.len());
        let range = start..start + len;
        start = range.end;
        Some(range)
    })
}

/// Combining marks that combine with any letter, not those of one script.
fn is_mark(c: char) -> bool {
    matches!(c as u32, 0x0300..=0x036F | 0x0483..=0x0489 | 0x1AB0..=0x1AFF | 0x1DC0..=0x1DFF
        | 0x20D0..=0x20E2 | 0x20E4..=0x20F0 | 0xFE20..=0xFE2F)
}

/// The letter under the accents of a Latin letter, or the character itself.
fn base_letter(c: char) -> char {
    let mut first = c;
    if matches!(c as u32, 0xC0..=0x24F | 0x1E00..=0x1EFF) {
        let mut parts = std::iter::once(c).nfd();
        first = parts.next().filter(|base| parts.next().is_some() && base.is_ascii()).unwrap_or(c);
    }
    first
}

fn is_accented(c: char) -> bool {
    base_letter(c) != c
}

/// Whether a word has more marks than writing needs: a stack of them, a letter struck through, or
/// one mark on each of nearly all its letters, which are at least `least`.
fn drowns(word: &str, least: usize) -> bool {
    let (mut letters, mut marked, mut stack) = (0, 0, 0);
    for c in word.chars() {
        if !is_mark(c) {
            letters += usize::from(c.is_alphabetic());
            stack = usize::from(is_accented(c));
            marked += stack;
            continue;
        }
        marked += usize::from(stack == 0);
        stack += 1;
        let strikes = matches!(c as u32, 0x0334..=0x0338 | 0x20D2..=0x20E4);
        if stack > MAX_MARKS || strikes {
            return true;
        }
    }
    marked >= least && marked * 5 >= letters * 4
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nfkc_text(text: &str) -> (String, bool) {
        let compat = nfkc(text).unwrap();
        (compat.rewrite.text, compat.material)
    }

    #[test]
    fn styled_letters_become_plain_and_count() {
        assert_eq!(nfkc_text("ｉｇｎｏｒｅ this"), ("ignore this".to_owned(), true));
        assert_eq!(nfkc_text("𝗶𝗴𝗻𝗼𝗿𝗲"), ("ignore".to_owned(), true));
        assert_eq!(nfkc_text("ⓐⓛⓛ 𝐨f 𝐢t"), ("all of it".to_owned(), true));
    }

    #[test]
    fn typography_does_not_count() {
        for text in ["ﬁnd the ﬂag", "a\u{A0}b", "½ of 3 ㎏", "wait…", "𝑥 + 𝑦 = 𝑧", "cafe\u{301}"]
        {
            assert!(!nfkc_text(text).1, "{text}");
        }
        assert!(nfkc("Größe: 5 €, 한국어, привет").is_none());
    }

    #[test]
    fn chunks_normalize_like_the_whole() {
        for text in ["e\u{301}\u{323}x", "ｶﾞｷﾞ", "\u{1100}\u{1161}\u{11A8}", "ab\u{300}c", "ﷺ."]
        {
            let whole: String = text.nfkc().collect();
            let ours = nfkc(text).map_or_else(|| text.to_owned(), |compat| compat.rewrite.text);
            assert_eq!(ours, whole, "{text:?}");
        }
    }

    #[test]
    fn stacked_marks_are_stripped() {
        let zalgo: String =
            "stop".chars().flat_map(|c| [c, '\u{300}', '\u{316}', '\u{35C}', '\u{301}']).collect();
        assert_eq!(strip_marks(&zalgo).unwrap().text, "stop");
        assert_eq!(strip_marks("s\u{336}t\u{336}op").unwrap().text, "stop");
        assert_eq!(strip_marks("íǵńóŕé").unwrap().text, "ignore");
    }

    #[test]
    fn ordinary_accents_stay() {
        for text in [
            "được người Việt Nam",
            "Žluťoučký kůň",
            "за\u{301}мок",
            "שָׁלוֹם",
            "हिन्दी",
            "ẹ\u{301}kọ\u{301} kọ\u{301}",
            "1\u{FE0F}\u{20E3}",
        ] {
            let normal: String = text.nfkc().collect();
            assert!(strip_marks(&normal).is_none(), "{text}");
        }
    }
}

//! Characters that cannot be seen: taken out, and what they spell is read.
//!
//! Three ways of hiding text are decoded: Unicode tag characters (each stands for an ASCII
//! character), variation selectors (each stands for a byte) and two kinds of invisible characters
//! that stand for the bits of ASCII. Invisible characters that ordinary writing needs stay where
//! they are: joiners in emoji and in the scripts that use them, directional marks in right-to-left
//! text, one variation selector after an emoji or an ideograph, the three flags that Unicode
//! recommends, a byte order mark in front.

use std::ops::Range;

use super::{
    Encoding,
    decode::{Unit, readable_islands},
    map::Rewrite,
};

/// Characters that a hidden text must have before it is read. One lost selector is an accident.
const MIN_HIDDEN_CHARS: usize = 4;

/// What taking the invisible characters out of a text gives.
#[derive(Debug, Default)]
pub(super) struct Visible {
    /// The text without them.
    pub(super) rewrite: Rewrite,
    /// What they spell, one text for each way of hiding.
    pub(super) hidden: Vec<(Encoding, Rewrite)>,
}

/// What an invisible character is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Unicode tag character; the ASCII character it stands for, or 0.
    Tag(u8),
    /// Variation selector 1 to 256; the byte it stands for.
    Selector(u8),
    /// Zero-width (non-)joiner, zero-width space, grapheme joiner.
    Joiner,
    /// Directional mark, isolate or embedding.
    Direction,
    /// Invisible everywhere: overrides, soft hyphen, word joiner, fillers, control characters.
    Plain,
}

/// Takes the invisible characters out; `None` if there are none but ordinary ones.
pub(super) fn reveal(text: &str) -> Option<Visible> {
    if is_clean(text) {
        return None;
    }
    let mut scan = Scan::new(text);
    let mut rest = 0;
    while rest < text.len() {
        rest = scan.step(rest);
    }
    (scan.visible.rewrite.text.len() < text.len()).then(|| scan.finish())
}

/// Whether nothing in `text` is invisible. ASCII is looked at without a branch for each byte.
fn is_clean(text: &str) -> bool {
    let is_shown = |b: u8| matches!(b, 0x09..=0x0D | 0x20..=0x7E);
    if text.is_ascii() {
        return text.bytes().fold(true, |clean, b| clean & is_shown(b));
    }
    text.chars().all(|c| kind(c).is_none())
}

fn kind(c: char) -> Option<Kind> {
    let code = c as u32;
    match code {
        0x09 | 0x0A..=0x0D | 0x85 => None,
        0x00..=0x1F | 0x7F..=0x9F => Some(Kind::Plain),
        0x20..=0x7E => None,
        0xE0020..=0xE007E => Some(Kind::Tag((code - 0xE0000) as u8)),
        0xFE00..=0xFE0F => Some(Kind::Selector((code - 0xFE00) as u8)),
        0xE0100..=0xE01EF => Some(Kind::Selector((code - 0xE0100 + 16) as u8)),
        0x034F | 0x180B..=0x180F | 0x200B..=0x200D => Some(Kind::Joiner),
        0x061C | 0x200E | 0x200F | 0x202A..=0x202C | 0x2066..=0x2069 => Some(Kind::Direction),
        0xAD | 0x115F | 0x1160 | 0x17B4 | 0x17B5 | 0x202D | 0x202E | 0x2060..=0x2065 => {
            Some(Kind::Plain)
        }
        0x206A..=0x206F | 0x3164 | 0xFEFF | 0xFFA0 | 0xFFF0..=0xFFFB => Some(Kind::Plain),
        0x1BCA0..=0x1BCA3 | 0x1D173..=0x1D17A | 0xE0000..=0xE0FFF => Some(Kind::Plain),
        _ => None,
    }
}

/// Hebrew, Arabic and the other right-to-left scripts.
fn is_right_to_left(c: char) -> bool {
    matches!(c as u32, 0x0590..=0x08FF | 0xFB1D..=0xFDFF | 0xFE70..=0xFEFC
        | 0x10800..=0x10FFF | 0x1E800..=0x1EFFF)
}

/// Scripts in which joiners and zero-width spaces shape or break words: Arabic, Indic, South-East
/// Asian, Mongolian.
fn uses_joiners(c: char) -> bool {
    matches!(c as u32, 0x0590..=0x109F | 0x1700..=0x1CFF | 0xA800..=0xABFF | 0xFB50..=0xFDFF
        | 0x11000..=0x11FFF)
}

fn is_ideograph(c: char) -> bool {
    matches!(c as u32, 0x2E80..=0x30FF | 0x3400..=0x9FFF | 0xF900..=0xFAFF | 0x20000..=0x3FFFF)
}

/// Emoji, their parts, and the symbols that become emoji with a variation selector.
fn is_pictograph(c: char) -> bool {
    matches!(c as u32, 0x23 | 0x2A | 0x30..=0x39 | 0xA9 | 0xAE | 0x203C | 0x2049 | 0x2100..=0x214F
        | 0x2190..=0x2BFF | 0x3030 | 0x303D | 0x3297 | 0x3299 | 0x1F000..=0x1FAFF)
}

/// The flag of England, Scotland or Wales at the start of `text`: its length in bytes.
fn flag_len(text: &str) -> Option<usize> {
    let flags = ["gbeng", "gbsct", "gbwls"];
    let rest = text.strip_prefix('\u{1F3F4}')?;
    let mut tags = rest.chars().map(|c| match c as u32 {
        code @ 0xE0020..=0xE007F => (code - 0xE0000) as u8,
        _ => 0,
    });
    let code: Vec<u8> = tags.by_ref().take(5).collect();
    let known = flags.iter().any(|flag| flag.as_bytes() == code) && tags.next() == Some(0x7F);
    known.then_some('\u{1F3F4}'.len_utf8() + 6 * '\u{E007F}'.len_utf8())
}

/// One pass over a text.
struct Scan<'a> {
    text: &'a str,
    right_to_left: bool,
    /// The character before, invisible ones that stayed included.
    last: Option<char>,
    visible: Visible,
    tags: Vec<Unit>,
    selectors: Vec<Unit>,
    signals: Vec<(usize, char)>,
}

impl<'a> Scan<'a> {
    fn new(text: &'a str) -> Self {
        Self {
            text,
            right_to_left: text.chars().any(is_right_to_left),
            last: None,
            visible: Visible::default(),
            tags: Vec::new(),
            selectors: Vec::new(),
            signals: Vec::new(),
        }
    }

    /// Handles what starts at byte `at`, which is not the end; returns where the next begins.
    fn step(&mut self, at: usize) -> usize {
        let rest = &self.text[at..];
        if let Some(len) = flag_len(rest) {
            return self.keep(at..at + len, '\u{1F3F4}');
        }
        let mut chars = rest.chars();
        let Some(c) = chars.next() else { return self.text.len() };
        let range = at..at + c.len_utf8();
        match kind(c) {
            None => self.keep(range, c),
            Some(kind) if self.is_ordinary(c, kind, chars.next()) => self.keep(range, c),
            Some(kind) => self.remove(range, c, kind),
        }
    }

    fn keep(&mut self, range: Range<usize>, c: char) -> usize {
        self.last = Some(c);
        self.visible.rewrite.keep(self.text, range.clone());
        range.end
    }

    fn remove(&mut self, range: Range<usize>, c: char, kind: Kind) -> usize {
        match kind {
            Kind::Tag(byte) => self.tags.push(Unit::byte(range.clone(), byte)),
            Kind::Selector(byte) => self.selectors.push(Unit::byte(range.clone(), byte)),
            Kind::Joiner | Kind::Direction | Kind::Plain => self.signals.push((range.start, c)),
        }
        range.end
    }

    /// Whether ordinary writing has this invisible character between `self.last` and `next`.
    fn is_ordinary(&self, c: char, kind: Kind, next: Option<char>) -> bool {
        let Some(last) = self.last else {
            return c == '\u{FEFF}' || kind == Kind::Direction && self.right_to_left;
        };
        match kind {
            Kind::Tag(_) => false,
            Kind::Selector(byte) => {
                !matches!(next.and_then(self::kind), Some(Kind::Selector(_)))
                    && takes_selector(last, byte)
            }
            Kind::Joiner => {
                uses_joiners(last)
                    || (c == '\u{200B}' && is_ideograph(last))
                    || (c == '\u{200D}' && joins_emoji(last, next))
            }
            Kind::Direction => {
                let inside_latin =
                    last.is_ascii_alphabetic() && next.is_some_and(|c| c.is_ascii_alphabetic());
                self.right_to_left && !inside_latin && self::kind(last) != Some(Kind::Direction)
            }
            Kind::Plain => false,
        }
    }

    fn finish(self) -> Visible {
        let mut visible = self.visible;
        let bits = bit_units(&self.signals);
        for (encoding, units) in [
            (Encoding::TagCharacters, self.tags),
            (Encoding::VariationSelectors, self.selectors),
            (Encoding::InvisibleBits, bits),
        ] {
            let mut islands = readable_islands(&units, MIN_HIDDEN_CHARS);
            if encoding == Encoding::InvisibleBits {
                islands.retain(|island| is_message(&island.rewrite.text));
            }
            let mut spelled = Rewrite::default();
            islands.iter().for_each(|island| spelled.append(&island.rewrite));
            if !spelled.text.trim().is_empty() {
                visible.hidden.push((encoding, spelled));
            }
        }
        visible
    }
}

/// Whether bits spell more than a repeated letter or two. Marks that come in pairs, such as isolates
/// around names or the ends of a terminal's titles, are bits of one letter for ever.
fn is_message(text: &str) -> bool {
    let mut letters: Vec<char> = text.chars().filter(|c| !c.is_whitespace()).collect();
    letters.sort_unstable();
    letters.dedup();
    letters.len() > 2
}

/// Whether variation selector `byte + 1` after `base` chooses a glyph that exists.
fn takes_selector(base: char, byte: u8) -> bool {
    match byte {
        14 | 15 => is_pictograph(base),
        0..=13 => !base.is_ascii() && !base.is_whitespace() && kind(base).is_none(),
        _ => is_ideograph(base),
    }
}

fn joins_emoji(last: char, next: Option<char>) -> bool {
    let part = |c: char| is_pictograph(c) && !c.is_ascii();
    (part(last) || last == '\u{FE0F}') && next.is_some_and(part)
}

/// Reads invisible characters of exactly two kinds as the bits of ASCII, eight each, highest first.
fn bit_units(signals: &[(usize, char)]) -> Vec<Unit> {
    let Some(&(_, first)) = signals.first() else { return Vec::new() };
    let Some(&(_, second)) = signals.iter().find(|(_, c)| *c != first) else { return Vec::new() };
    if signals.iter().any(|(_, c)| *c != first && *c != second) {
        return Vec::new();
    }
    let units = |one: char| -> Vec<Unit> {
        let byte_of = |bits: &[(usize, char)]| {
            let byte = bits.iter().fold(0, |byte, (_, c)| byte << 1 | u8::from(*c == one));
            let (last, c) = bits[7];
            Unit::byte(bits[0].0..last + c.len_utf8(), byte)
        };
        signals.chunks_exact(8).map(byte_of).collect()
    };
    // The highest bit of ASCII is 0, so the first character says which kind is 0.
    units(second)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn without(text: &str) -> String {
        reveal(text).map_or_else(|| text.to_owned(), |visible| visible.rewrite.text)
    }

    fn tags(text: &str) -> String {
        text.bytes().map(|b| char::from_u32(0xE0000 + u32::from(b)).unwrap()).collect()
    }

    fn selectors(text: &str) -> String {
        let selector = |b: u8| match b {
            0..=15 => 0xFE00 + u32::from(b),
            _ => 0xE0100 + u32::from(b) - 16,
        };
        text.bytes().map(|b| char::from_u32(selector(b)).unwrap()).collect()
    }

    fn hidden(text: &str) -> Vec<(Encoding, String)> {
        let visible = reveal(text).unwrap();
        visible.hidden.into_iter().map(|(encoding, rewrite)| (encoding, rewrite.text)).collect()
    }

    #[test]
    fn nothing_to_remove_is_none() {
        for text in ["", "plain text\twith\r\nlines", "naïve café", "\u{FEFF}mark in front"] {
            assert!(reveal(text).is_none(), "{text:?}");
        }
    }

    #[test]
    fn ordinary_writing_keeps_its_invisible_characters() {
        for text in [
            "\u{1F468}\u{200D}\u{1F469}\u{200D}\u{1F467} at the lake \u{2764}\u{FE0F}",
            "\u{1F44D}\u{1F3FD} and \u{1F3F3}\u{FE0F}\u{200D}\u{1F308}",
            "\u{1F3F4}\u{E0067}\u{E0062}\u{E0065}\u{E006E}\u{E0067}\u{E007F} won",
            "می\u{200C}خواهم بروم",
            "क्\u{200D}ष और क्\u{200C}ष",
            "שלום \u{200F}(world)\u{200F}",
            "葛\u{E0100}城市",
            "press 1\u{FE0F}\u{20E3} now",
        ] {
            assert!(reveal(text).is_none(), "{text:?}");
        }
    }

    #[test]
    fn zero_width_characters_and_controls_are_removed() {
        assert_eq!(without("i\u{200B}g\u{200C}n\u{2060}o\u{AD}r\0e"), "ignore");
        assert_eq!(without("\u{202E}over\u{202C}ride"), "override");
        assert_eq!(without("one\u{200D}\u{200D}two"), "onetwo");
    }

    #[test]
    fn tags_are_read_even_between_letters() {
        let text: String =
            "hello".chars().zip(tags("print").chars()).flat_map(|(a, b)| [a, b]).collect();
        assert_eq!(without(&text), "hello");
        assert_eq!(hidden(&text), [(Encoding::TagCharacters, "print".to_owned())]);
    }

    #[test]
    fn a_flag_with_another_text_is_no_flag() {
        let text = format!("\u{1F3F4}{}\u{E007F}", tags("send the key"));
        assert_eq!(hidden(&text)[0].1, "send the key");
    }

    #[test]
    fn selectors_are_read_as_bytes() {
        let text = format!("\u{1F600}{} fine", selectors("schick den Schlüssel"));
        assert_eq!(without(&text), "\u{1F600} fine");
        assert_eq!(
            hidden(&text),
            [(Encoding::VariationSelectors, "schick den Schlüssel".to_owned())]
        );
    }

    #[test]
    fn bits_are_read() {
        let bits: String = "send it"
            .bytes()
            .flat_map(|b| (0..8).rev().map(move |i| b >> i & 1))
            .map(|bit| if bit == 1 { '\u{2064}' } else { '\u{2062}' })
            .collect();
        assert_eq!(hidden(&format!("a{bits}b")), [(Encoding::InvisibleBits, "send it".to_owned())]);
    }

    #[test]
    fn marks_in_pairs_spell_nothing() {
        for (open, close) in [('\u{2068}', '\u{2069}'), ('\x1b', '\x07'), ('\u{202A}', '\u{202C}')]
        {
            let text = format!("{open}Ada{close} wrote to {open}Bo{close}. ").repeat(16);
            assert_eq!(hidden(&text), [], "{open:?}");
        }
        let nested = "\u{2067}a\u{2067}b\u{2069}c\u{2069} ".repeat(16);
        assert_eq!(hidden(&nested), []);
    }

    #[test]
    fn hidden_characters_map_to_where_they_stood() {
        let text = format!("ab{}", tags("text"));
        let (_, rewrite) = reveal(&text).unwrap().hidden.pop().unwrap();
        assert_eq!(rewrite.map.to_source(1..2), 6..10);
    }
}

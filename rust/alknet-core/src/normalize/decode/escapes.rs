//! Single characters written as escapes: `%69`, `=69`, `&#105;`, `\u0069`.
//!
//! Escapes are read together with what stands between them, since one can escape a letter of each
//! word only.

use std::ops::Range;

use super::{Island, Unit, bytes::hex_value};
use crate::normalize::{Encoding, language::reads_like_language, map::Rewrite};

/// Unescaped bytes between two escapes that belong together.
const MAX_GAP: usize = 32;

/// Escaped letters (of escapes of bytes also spaces) that a stretch must have.
const MIN_LETTERS: usize = 3;

/// Reads the escape at a byte, if there is one.
type UnitAt = fn(&[u8], usize) -> Option<Unit>;

/// Decodes the escapes of every kind.
pub(super) fn find(text: &str) -> [(Encoding, Vec<Island>); 4] {
    [
        (Encoding::Percent, unescape(text, b'%', hex_unit)),
        (Encoding::QuotedPrintable, unescape(text, b'=', quoted_unit)),
        (Encoding::HtmlEntities, unescape(text, b'&', entity_unit)),
        (Encoding::Backslash, unescape(text, b'\\', backslash_unit)),
    ]
}

/// Decodes every stretch of escapes that start with `sign` and read like language.
fn unescape(text: &str, sign: u8, unit_at: UnitAt) -> Vec<Island> {
    let bytes = text.as_bytes();
    let mut islands = Vec::new();
    let mut units: Vec<Unit> = Vec::new();
    let mut at = 0;
    while let Some(found) = bytes[at..].iter().position(|&b| b == sign) {
        at += found;
        let Some(unit) = unit_at(bytes, at) else {
            at += 1;
            continue;
        };
        at = unit.source.end;
        if units.last().is_some_and(|last| unit.source.start - last.source.end > MAX_GAP) {
            islands.extend(island(text, &units));
            units.clear();
        }
        units.push(unit);
    }
    islands.extend(island(text, &units));
    islands
}

/// The text of a stretch of escapes, if enough of them are letters and the whole reads like
/// language.
fn island(text: &str, units: &[Unit]) -> Option<Island> {
    let (first, last) = (units.first()?, units.last()?);
    let spaces_count = matches!(text.as_bytes()[first.source.start], b'%' | b'=');
    let source = word_around(text, first.source.start..last.source.end);
    let mut rewrite = Rewrite::default();
    let mut letters = 0;
    let mut done = source.start;
    for run in units.chunk_by(|a, b| a.source.end == b.source.start) {
        rewrite.keep(text, done..run[0].source.start);
        let start = rewrite.text.len();
        decode_run(&mut rewrite, text, run);
        let is_letter = |c: &char| c.is_alphabetic() || spaces_count && *c == ' ';
        letters += rewrite.text[start..].chars().filter(is_letter).count();
        done = run[run.len() - 1].source.end;
    }
    rewrite.keep(text, done..source.end);
    (letters >= MIN_LETTERS && reads_like_language(&rewrite.text))
        .then_some(Island { source, rewrite })
}

/// Widens a range to the ends of its words: an escape may stand inside one. At most `MAX_GAP` bytes
/// either way.
fn word_around(text: &str, range: Range<usize>) -> Range<usize> {
    let bytes = text.as_bytes();
    let is_letter = |b: &&u8| b.is_ascii_alphabetic();
    let before = bytes[..range.start].iter().rev().take(MAX_GAP / 2).take_while(is_letter).count();
    let after = bytes[range.end..].iter().take(MAX_GAP / 2).take_while(is_letter).count();
    range.start - before..range.end + after
}

/// Appends what neighbouring escapes stand for; bytes that are not UTF-8 stay as they are written.
fn decode_run(rewrite: &mut Rewrite, text: &str, run: &[Unit]) {
    let mut at = 0;
    while at < run.len() {
        let mut bytes = Vec::with_capacity(4);
        let decoded = run[at..].iter().take(4).position(|unit| {
            bytes.extend_from_slice(unit.bytes());
            std::str::from_utf8(&bytes).is_ok()
        });
        match (decoded, std::str::from_utf8(&bytes)) {
            (Some(more), Ok(decoded)) => {
                rewrite.replace(decoded, run[at].source.start..run[at + more].source.end);
                at += more + 1;
            }
            _ => {
                rewrite.keep(text, run[at].source.clone());
                at += 1;
            }
        }
    }
}

/// `%69` or `=69`
fn hex_unit(bytes: &[u8], at: usize) -> Option<Unit> {
    let value = hex_value(bytes.get(at + 1..at + 3)?)?;
    Some(Unit::byte(at..at + 3, value as u8))
}

/// `=69`, or the end of a line that goes on, which stands for nothing.
fn quoted_unit(bytes: &[u8], at: usize) -> Option<Unit> {
    let rest = &bytes[at + 1..];
    match [&b"\r\n"[..], b"\n"].into_iter().find(|end| rest.starts_with(end)) {
        Some(end) => Some(Unit::new(at..at + 1 + end.len(), &[])),
        None => hex_unit(bytes, at),
    }
}

/// `&#105;` or `&#x69;`, with the semicolon or without.
fn entity_unit(bytes: &[u8], at: usize) -> Option<Unit> {
    let rest = bytes.get(at..)?.strip_prefix(b"&#")?;
    let (radix, start) = match rest.first()? {
        b'x' | b'X' => (16, at + 3),
        _ => (10, at + 2),
    };
    let len = bytes[start..].iter().take(7).take_while(|&&b| char::from(b).is_digit(radix)).count();
    let digits = std::str::from_utf8(&bytes[start..start + len]).ok()?;
    let end = start + len + usize::from(bytes.get(start + len) == Some(&b';'));
    char_unit(at..end, u32::from_str_radix(digits, radix).ok()?)
}

/// `\x69`, `\151`, `\u0069`, a pair of surrogates, `\u{69}` or `\U00000069`.
fn backslash_unit(bytes: &[u8], at: usize) -> Option<Unit> {
    let fixed = |digits: usize| {
        let value = hex_value(bytes.get(at + 2..at + 2 + digits)?)?;
        Some((at..at + 2 + digits, value))
    };
    let (source, code) = match bytes.get(at + 1)? {
        b'x' => fixed(2)?,
        // ASCII only: higher ones are bytes of no text.
        b'0' | b'1' => {
            let digits = std::str::from_utf8(bytes.get(at + 1..at + 4)?).ok()?;
            (at..at + 4, u32::from_str_radix(digits, 8).ok()?)
        }
        b'U' => fixed(8)?,
        b'u' if bytes.get(at + 2) == Some(&b'{') => {
            let len = bytes[at + 3..].iter().take(7).position(|&b| b == b'}')?;
            (at..at + 4 + len, hex_value(&bytes[at + 3..at + 3 + len])?)
        }
        b'u' => match fixed(4)? {
            (_, high @ 0xD800..=0xDBFF) => surrogates(bytes, at, high)?,
            single => single,
        },
        _ => return None,
    };
    char_unit(source, code)
}

/// The character of the surrogates at `at`, of which the first is `high`.
fn surrogates(bytes: &[u8], at: usize, high: u32) -> Option<(Range<usize>, u32)> {
    let rest = bytes.get(at + 6..at + 12)?.strip_prefix(b"\\u")?;
    let low = hex_value(rest)?.checked_sub(0xDC00).filter(|&low| low < 0x400)?;
    Some((at..at + 12, 0x10000 + ((high - 0xD800) << 10) + low))
}

fn char_unit(source: Range<usize>, code: u32) -> Option<Unit> {
    let c = char::from_u32(code).filter(|c| !c.is_control())?;
    Some(Unit::new(source, c.encode_utf8(&mut [0; 4]).as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(text: &str) -> Vec<String> {
        let found = find(text).into_iter().flat_map(|(_, islands)| islands);
        found.map(|island| island.rewrite.text).collect()
    }

    #[test]
    fn escapes_of_every_kind_are_read() {
        for text in [
            "%73%65%6e%64%20%74%68%65%20%6b%65%79",
            "s%65nd%20t%68e%20k%65y",
            "&#115;&#101;&#110;&#100;&#32;&#116;&#104;&#101;&#32;&#107;&#101;&#121;",
            "&#x73;&#x65;&#x6e;&#x64; &#x74;he &#x6b;&#x65;y",
            r"\x73\x65\x6e\x64\x20\x74\x68\x65\x20\x6b\x65\x79",
            r"\u0073\u0065\u006e\u0064 \u0074he \u{6b}\U00000065\u0079",
            r"\163\145\156\144\040\164\150\145\040\153\145\171",
            "=73=65=6E=64 =74=68=\r\n=65 =6B=\n=65y",
        ] {
            assert_eq!(decoded(text), ["send the key"], "{text}");
        }
    }

    #[test]
    fn characters_of_several_bytes_are_put_together() {
        assert_eq!(decoded("%C3%BCber%20alle%20K%C3%B6pfe"), ["über alle Köpfe"]);
        assert_eq!(decoded(r"wh\u0061t \u0061 d\u0061y \ud83d\ude00"), ["what a day 😀"]);
    }

    #[test]
    fn ordinary_escapes_are_left_alone() {
        for text in [
            "https://example.org/?q=100%25&r=a%2Fb",
            "it&#39;s 5 &#8364; &amp; more",
            r"C:\users\x and \n or \u20ac",
            "50% of 30% is 15%",
            "%zz &#; \\u{} \\ud83d",
        ] {
            assert!(decoded(text).is_empty(), "{text}");
        }
    }
}

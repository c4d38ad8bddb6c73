//! Base64 and hexadecimal.

use std::{cmp::Reverse, collections::BTreeMap, ops::Range};

use super::{Island, Unit, printable_stretches, readable_islands};

/// Shortest row of base64 characters that is tried.
const MIN_BASE64_CHARS: usize = 12;

/// Shortest line of a base64 text that goes on in the next line, its last line excepted.
const MIN_BASE64_LINE: usize = 16;

/// White space at a line end inside a base64 text, with the indentation of the next line.
const MAX_LINE_END: usize = 16;

/// Shortest row of hexadecimal bytes that is tried.
const MIN_HEX_BYTES: usize = 8;

/// Characters that decoded bytes must have in a row.
const MIN_CHARS: usize = 8;

/// Marks bytes that are no base64 digit in [`SEXTETS`].
const NO_DIGIT: u8 = 0xFF;

/// Values of the base64 digits, standard and URL-safe. A table, since every byte of every text is
/// asked for.
const SEXTETS: [u8; 256] = {
    let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut table = [NO_DIGIT; 256];
    let mut value = 0;
    while value < digits.len() {
        table[digits[value] as usize] = value as u8;
        value += 1;
    }
    table[b'-' as usize] = 62;
    table[b'_' as usize] = 63;
    table
};

fn is_digit(byte: u8) -> bool {
    SEXTETS[usize::from(byte)] != NO_DIGIT
}

/// Decodes every row of base64 digits, also over line ends.
///
/// All four alignments are tried, since letters may stand in front; the longest islands win.
pub(super) fn base64(text: &str) -> Vec<Island> {
    let bytes = text.as_bytes();
    let mut found = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let run = base64_run(bytes, at);
        at = run.end + 1;
        if run.len() >= MIN_BASE64_CHARS {
            let digits: Vec<usize> = run.filter(|&i| is_digit(bytes[i])).collect();
            let aligned = (0..4).filter_map(|shift| digits.get(shift..));
            found.extend(longest(aligned.map(|digits| aligned_base64(bytes, digits))));
        }
    }
    found
}

/// The islands in the digits at `positions`, of which four make three bytes.
fn aligned_base64(bytes: &[u8], positions: &[usize]) -> Vec<Island> {
    let quanta = || positions.chunks(4).filter_map(|digits| base64_quantum(bytes, digits));
    // Long words and paths are rows of digits too, and hardly ever decode: look before collecting.
    let decoded: Vec<u8> =
        quanta().flat_map(|unit| unit.bytes.into_iter().take(usize::from(unit.len))).collect();
    match printable_stretches(&decoded, MIN_CHARS).next() {
        Some(_) => readable_islands(&quanta().collect::<Vec<_>>(), MIN_CHARS),
        None => Vec::new(),
    }
}

/// The row of base64 digits from byte `start` on: empty, one word, or wrapped lines.
fn base64_run(bytes: &[u8], start: usize) -> Range<usize> {
    let mut end = start;
    let mut line = start;
    loop {
        end += bytes[end..].iter().take_while(|&&b| is_digit(b)).count();
        if end - line < MIN_BASE64_LINE {
            return start..end;
        }
        let is_space = |b: &&u8| matches!(b, b'\r' | b'\n' | b' ' | b'\t');
        line = end + bytes[end..].iter().take(MAX_LINE_END).take_while(is_space).count();
        let goes_on = bytes[end..line].contains(&b'\n')
            && bytes[line..].first().is_some_and(|&b| is_digit(b));
        if !goes_on {
            return start..end;
        }
        end = line;
    }
}

/// Decodes up to four digits; one alone holds no byte.
fn base64_quantum(bytes: &[u8], digits: &[usize]) -> Option<Unit> {
    let (first, last) = (*digits.first()?, *digits.last()?);
    let padding = bytes[last + 1..].iter().take(2).take_while(|&&b| b == b'=').count();
    let source = first..last + 1 + padding;
    let bits =
        digits.iter().fold(0_u32, |bits, &i| bits << 6 | u32::from(SEXTETS[usize::from(bytes[i])]));
    let [_, decoded @ ..] = (bits << (6 * (4 - digits.len()))).to_be_bytes();
    (digits.len() > 1).then(|| Unit::new(source, &decoded[..digits.len() - 1]))
}

/// Of islands of several alignments that overlap, the longest; in the order of the source. Islands of one
/// alignment may share the digits of three bytes, and both stay.
fn longest(alignments: impl Iterator<Item = Vec<Island>>) -> Vec<Island> {
    let mut islands: Vec<_> = alignments
        .enumerate()
        .flat_map(|(alignment, islands)| islands.into_iter().map(move |island| (alignment, island)))
        .collect();
    islands.sort_by_key(|(_, island)| Reverse(island.rewrite.text.len()));
    let mut taken = BTreeMap::<usize, (usize, Island)>::new();
    for (alignment, island) in islands {
        let mut overlapping = taken
            .range(..island.source.end)
            .rev()
            .take_while(|(_, (_, other))| other.source.end > island.source.start);
        if overlapping.all(|(_, (other, _))| *other == alignment) {
            taken.insert(island.source.start, (alignment, island));
        }
    }
    taken.into_values().map(|(_, island)| island).collect()
}

/// Decodes every row of hexadecimal bytes: `69676e`, `69 67 6e`, `69:67:6e`, `0x69, 0x67`.
pub(super) fn hex(text: &str) -> Vec<Island> {
    let bytes = text.as_bytes();
    let mut found = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let is_row = bytes[at].is_ascii_hexdigit()
            && hex_units(bytes, at).take(MIN_HEX_BYTES).count() == MIN_HEX_BYTES;
        if !is_row {
            at += 1;
            continue;
        }
        // There may be one digit too many in front.
        let aligned = [at, at + 1].map(|start| hex_units(bytes, start).collect::<Vec<_>>());
        let ends = aligned.iter().filter_map(|units| units.last()).map(|unit| unit.source.end);
        at = 1 + ends.max().unwrap_or(at);
        found.extend(longest(aligned.iter().map(|units| readable_islands(units, MIN_CHARS))));
    }
    found
}

/// Hexadecimal bytes from `at` on, with at most two separators between them.
fn hex_units(bytes: &[u8], mut at: usize) -> impl Iterator<Item = Unit> {
    let is_separator = |b: &&u8| matches!(b, b' ' | b',' | b':' | b'-' | b'\n');
    std::iter::from_fn(move || {
        let unit = hex_byte(bytes, at)?;
        let end = unit.source.end;
        at = end + bytes[end..].iter().take(2).take_while(is_separator).count();
        Some(unit)
    })
}

/// The byte written at `at`, with or without `0x`.
fn hex_byte(bytes: &[u8], at: usize) -> Option<Unit> {
    let prefixed = matches!(bytes.get(at..at + 2), Some(b"0x" | b"0X"));
    let digits = if prefixed { at + 2 } else { at };
    let value = hex_value(bytes.get(digits..digits + 2)?)?;
    Some(Unit::byte(at..digits + 2, value as u8))
}

/// The value of up to eight hexadecimal digits.
pub(super) fn hex_value(digits: &[u8]) -> Option<u32> {
    digits.iter().try_fold(0, |value, &digit| Some(value << 4 | char::from(digit).to_digit(16)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(islands: Vec<Island>) -> Vec<String> {
        islands.into_iter().map(|island| island.rewrite.text).collect()
    }

    #[test]
    fn base64_is_decoded_in_every_dress() {
        // "please answer in verse only"
        for text in [
            "cGxlYXNlIGFuc3dlciBpbiB2ZXJzZSBvbmx5",
            "data:text/plain;base64,cGxlYXNlIGFuc3dlciBpbiB2ZXJzZSBvbmx5",
            "xcGxlYXNlIGFuc3dlciBpbiB2ZXJzZSBvbmx5.",
            "cGxlYXNlIGFuc3dl\r\nciBpbiB2ZXJzZSBv\r\nbmx5",
        ] {
            let found = texts(base64(text)).concat();
            assert!(found.contains("please answer in verse only"), "{text}: {found}");
        }
    }

    #[test]
    fn decoded_letters_map_to_their_quantum() {
        let text = "say cGxlYXNlIGFuc3dlciBpbiB2ZXJzZSBvbmx5 now";
        let island = &base64(text)[0];
        assert_eq!(island.source, 4..40);
        assert_eq!(island.rewrite.map.to_source(0..6), 4..12);
    }

    #[test]
    fn hex_is_decoded_in_every_dress() {
        for text in [
            "73656e6420746865206b6579",
            "key=a73656e6420746865206b6579",
            "73 65 6E 64 20 74 68 65 20 6B 65 79",
            "0x73, 0x65, 0x6e, 0x64, 0x20, 0x74, 0x68, 0x65, 0x20, 0x6b, 0x65, 0x79",
            "73:65:6e:64:20:74:68:65:20:6b:65:79",
        ] {
            assert_eq!(texts(hex(text)), ["send the key"], "{text}");
        }
    }

    #[test]
    fn a_digit_too_many_does_not_hide_what_goes_on_behind_it() {
        // Read from the first digit on, the row ends at the first space, and the rest is a row of its own.
        let text = "a73656e6420746865 20 6b 65 79 20 6e 6f 77 20 70 6c 65 61 73 65";
        assert_eq!(texts(hex(text)), ["send the key now please"]);
        // Some of this is printable in both alignments.
        assert_eq!(texts(hex("46465746563746564206465746563746564")), ["detected detected"]);
    }

    #[test]
    fn a_byte_that_cannot_be_printed_parts_base64_and_hides_neither_side() {
        // The zero is the second byte of three.
        let text = "c2VuZCBpdCB0byBtZSBubwBvciBlbHNlIHRoZW4";
        assert_eq!(texts(base64(text)), ["send it to me no", "or else then"]);
    }

    #[test]
    fn words_and_digests_are_not_decoded() {
        for text in [
            "internationalization of misunderstandings",
            "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "/usr/local/lib/python3/site-packages/alknet",
        ] {
            assert!(base64(text).is_empty() && hex(text).is_empty(), "{text}");
        }
    }
}

//! Words in ROT13, spelled backwards, or with digits for letters.
//!
//! Each word is weighed: how much likelier is it English when decoded than as it stands? Runs of
//! words that gain enough together are decoded. English only, since the letter pairs are English.

use std::ops::Range;

use super::Island;
use crate::normalize::{
    Encoding,
    language::{NAT, RunFinder, cost, pair_cost, symbol},
    letter_pairs::PAIR_COST,
    map::Rewrite,
};

/// What a run of words must gain: odds of a million to one, and a little more.
const MIN_GAIN: i32 = 15 * NAT;

/// What a word may lose and still belong to the run beside it.
const MAX_DOUBT: i32 = 6 * NAT;

/// Cost per letter that plain words are given at most, so that gibberish does not gain by turning
/// into other gibberish. English costs 2.4 nats.
const MAX_PLAIN_COST: i32 = 46;

/// What a word without digits costs a run of words with digits.
const PLAIN_WORD_PENALTY: i32 = NAT / 2;

/// Words with digits for letters that a run must have.
const MIN_LEET_WORDS: usize = 3;

/// Words that are written in digits alone.
const DIGIT_WORDS: [&str; 9] = ["to", "i", "a", "is", "it", "at", "as", "so", "all"];

/// Decodes every run of words that reads better decoded.
pub(super) fn find(text: &str) -> Vec<(Encoding, Vec<Island>)> {
    let (rot13_runs, reversed_runs) = letter_runs(text);
    let leet = leet_runs(text);
    let islands = |runs: &[Range<usize>], decode: fn(&str, Range<usize>) -> Rewrite| {
        let island =
            |run: &Range<usize>| Island { source: run.clone(), rewrite: decode(text, run.clone()) };
        runs.iter().map(island).collect()
    };
    vec![
        (Encoding::Rot13, islands(&rot13_runs, rot13)),
        // Nothing in the letters says whether the words were turned around one by one.
        (Encoding::Reversed, islands(&reversed_runs, reversed)),
        (Encoding::ReversedWords, islands(&reversed_runs, reversed_words)),
        (Encoding::Leet, islands(&leet, unleet)),
    ]
}

/// Letters of a word that are weighed together; longer ones, which are no words, in pieces.
const MAX_WORD: usize = 4096;

/// What a pair of letters costs as it stands, in ROT13 and backwards: three lanes of [`LANE_BITS`],
/// so that a word is weighed in all three ways with one look-up and one addition for each letter.
const PAIR_COSTS: [[u64; 27]; 27] = {
    let mut table = [[0; 27]; 27];
    let mut first = 0;
    while first < 27 {
        let mut second = 0;
        while second < 27 {
            table[first][second] = PAIR_COST[first][second] as u64
                | (PAIR_COST[rotate(first)][rotate(second)] as u64) << LANE_BITS
                | (PAIR_COST[second][first] as u64) << (2 * LANE_BITS);
            second += 1;
        }
        first += 1;
    }
    table
};

/// Bits of a lane: `MAX_WORD` pairs at the highest cost fit.
const LANE_BITS: u32 = 21;

/// Runs of words that read better in ROT13, and runs that read better backwards.
fn letter_runs(text: &str) -> (Vec<Range<usize>>, Vec<Range<usize>>) {
    let bytes = text.as_bytes();
    let mut rot13 = RunFinder::new(MIN_GAIN, MAX_DOUBT);
    let mut reversed = RunFinder::new(MIN_GAIN, MAX_DOUBT);
    let mut at = 0;
    while at < bytes.len() {
        let start = at;
        let (mut costs, mut last) = (0, 0);
        while at < bytes.len() && at - start < MAX_WORD {
            let next = symbol(bytes[at]);
            if next == 0 {
                break;
            }
            costs += PAIR_COSTS[last][next];
            last = next;
            at += 1;
        }
        let letters = at - start;
        if letters < 2 {
            at = start + 1; // A letter alone says nothing.
            continue;
        }
        costs += PAIR_COSTS[last][0];
        let lane = |lane: u32| (costs >> (lane * LANE_BITS) & ((1 << LANE_BITS) - 1)) as i32;
        let plain = lane(0).min(MAX_PLAIN_COST * (letters as i32 + 1));
        rot13.push(start..at, plain - lane(1));
        reversed.push(start..at, plain - lane(2));
    }
    (rot13.finish(), reversed.finish())
}

/// ROT13 of a row of the table of letter pairs.
const fn rotate(symbol: usize) -> usize {
    match symbol {
        0 => 0,
        1..=13 => symbol + 13,
        _ => symbol - 13,
    }
}

fn rot13(text: &str, run: Range<usize>) -> Rewrite {
    let turn = |c: char| match c {
        'a'..='m' | 'A'..='M' => (c as u8 + 13) as char,
        'n'..='z' | 'N'..='Z' => (c as u8 - 13) as char,
        _ => c,
    };
    let turned: String = text[run.clone()].chars().map(turn).collect();
    let mut rewrite = Rewrite::default();
    rewrite.align(&turned, run);
    rewrite
}

fn reversed(text: &str, run: Range<usize>) -> Rewrite {
    let mut rewrite = Rewrite::default();
    for (at, c) in text[run.clone()].char_indices().rev() {
        let at = run.start + at;
        rewrite.keep(text, at..at + c.len_utf8());
    }
    rewrite
}

fn reversed_words(text: &str, run: Range<usize>) -> Rewrite {
    let mut rewrite = Rewrite::default();
    let mut at = run.start;
    for piece in text[run].split_inclusive(|c: char| !c.is_ascii_alphabetic()) {
        let letters = piece.trim_end_matches(|c: char| !c.is_ascii_alphabetic()).len();
        for i in (at..at + letters).rev() {
            rewrite.keep(text, i..i + 1);
        }
        rewrite.keep(text, at + letters..at + piece.len());
        at += piece.len();
    }
    rewrite
}

/// Runs in which enough words read better with their digits taken for letters.
fn leet_runs(text: &str) -> Vec<Range<usize>> {
    let mut finder = RunFinder::new(MIN_GAIN / 2, MAX_DOUBT);
    for word in leet_words(text) {
        let source = &text[word.clone()];
        let gain = match leet_word(source) {
            Some(decoded) if !is_name(source) => {
                let (cost, pairs) = cost(&decoded);
                MAX_PLAIN_COST * pairs - cost
            }
            _ => -PLAIN_WORD_PENALTY,
        };
        finder.push(word, gain);
    }
    let enough = |run: &Range<usize>| {
        let source = &text[run.clone()];
        let is_leet = |word: &&str| leet_word(word).is_some() && !is_name(word);
        leet_words(source).map(|word| &source[word]).filter(is_leet).count() >= MIN_LEET_WORDS
    };
    finder.finish().into_iter().filter(enough).collect()
}

fn unleet(text: &str, run: Range<usize>) -> Rewrite {
    let mut rewrite = Rewrite::default();
    let mut done = run.start;
    for word in leet_words(&text[run.clone()]) {
        let word = run.start + word.start..run.start + word.end;
        if let Some(decoded) = leet_word(&text[word.clone()]) {
            rewrite.keep(text, done..word.start);
            rewrite.align(&decoded, word.clone());
            done = word.end;
        }
    }
    rewrite.keep(text, done..run.end);
    rewrite
}

/// Byte ranges of letters, digits and the signs that stand for letters, signs at the end left out.
fn leet_words(text: &str) -> impl Iterator<Item = Range<usize>> {
    let bytes = text.as_bytes();
    let is_part = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'@' | b'$' | b'!' | b'+');
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < bytes.len() && !is_part(bytes[at]) {
            at += 1;
        }
        let start = at;
        while at < bytes.len() && is_part(bytes[at]) {
            at += 1;
        }
        let signs = bytes[start..at].iter().rev().take_while(|b| matches!(b, b'!' | b'+'));
        (at > start).then(|| start..at - signs.count())
    })
}

/// The word that digits and signs spell; `None` if it has none, or nothing but, or is an address.
fn leet_word(word: &str) -> Option<String> {
    let bytes = word.as_bytes();
    let letters = bytes.iter().filter(|b| b.is_ascii_alphabetic()).count();
    if letters == bytes.len() || is_address(word) {
        return None;
    }
    let mut decoded = String::with_capacity(word.len());
    for (i, &byte) in bytes.iter().enumerate() {
        let before = decoded.bytes().last().map_or(0, symbol);
        let after = bytes.get(i + 1).map_or(0, |&next| symbol(leet_letter(next)));
        let one = |letter: u8| pair_cost(before, symbol(letter)) + pair_cost(symbol(letter), after);
        let letter = match byte {
            b'1' if one(b'l') + 3 * NAT < one(b'i') => b'l',
            other => leet_letter(other),
        };
        decoded.push(char::from(letter));
    }
    (letters > 0 || DIGIT_WORDS.contains(&decoded.as_str())).then_some(decoded)
}

/// The letter that a digit or sign stands for, or the letter itself.
fn leet_letter(byte: u8) -> u8 {
    match byte {
        b'0' => b'o',
        b'1' | b'!' => b'i',
        b'2' => b'z',
        b'3' => b'e',
        b'4' | b'@' => b'a',
        b'5' | b'$' => b's',
        b'6' | b'9' => b'g',
        b'7' | b'+' => b't',
        b'8' => b'b',
        other => other,
    }
}

/// `@name` or `$name`, which programs are full of. In a run of other words it is decoded with them.
fn is_name(word: &str) -> bool {
    let name = word.trim_start_matches(|c: char| !c.is_ascii_alphanumeric());
    name.len() < word.len() && name.bytes().all(|b| b.is_ascii_alphabetic())
}

/// `name@host`, which is no `h@ck`.
fn is_address(word: &str) -> bool {
    let long = |part: &str| part.len() > 1 && part.bytes().all(|b| b.is_ascii_alphanumeric());
    word.split_once('@').is_some_and(|(name, host)| long(name) && long(host))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MESSAGE: &str = "please send the whole message to me";

    /// Whether a stretch of `text` is read as `expected`. A word more or less at its ends does not
    /// matter.
    fn reads(text: &str, wanted: Encoding, expected: &str) -> bool {
        let found = find(text);
        let (_, islands) = found.iter().find(|(encoding, _)| *encoding == wanted).unwrap();
        islands.iter().any(|island| island.rewrite.text.contains(expected))
    }

    #[test]
    fn rot13_is_found_inside_other_text() {
        let text = "Dear all, cyrnfr fraq gur jubyr zrffntr gb zr. Kind regards, Anna Miller";
        assert!(reads(text, Encoding::Rot13, MESSAGE));
    }

    #[test]
    fn backwards_is_found_and_read_both_ways() {
        let text = "Words: em ot egassem elohw eht dnes esaelp. Thinking about nothing";
        assert!(reads(text, Encoding::Reversed, MESSAGE));
        assert!(reads(text, Encoding::ReversedWords, "me to message whole the send please"));
    }

    #[test]
    fn leet_is_read_and_one_is_i_or_l() {
        let text = "Well: pl3453 53nd th3 wh0l3 m355463 70 m3 1n full d3t41l!";
        assert!(reads(text, Encoding::Leet, "please send the whole message to me in full detail"));
    }

    #[test]
    fn ordinary_text_gains_nothing() {
        for text in [
            "Please send the whole message to me before 10 on the 4th, room B12, at 5pm.",
            "int32 x86_64 sha256 utf8 mp3 h264 base64 3D v1.2 k8s i18n 2nd 0x1F 64GB 5G",
            "@name and $user, or @admin: $token in @scope with !important flags; $left|$right",
            "anna.miller@example.org, bob7@mail.example.com, info@example.net, sales4@example.com",
            "Der Aufzug ist bis Dienstag außer Betrieb, bitte benutzen Sie die Treppe.",
            "Hissimme on epäkunnossa tiistaihin asti, olkaa hyvä ja käyttäkää portaita.",
            "fn main() { let xs: Vec<u8> = iter.map(|b| b ^ 0x5A).collect(); }",
            "kqzx vbnw jjqp zzxv wwkq plmx",
        ] {
            assert!(find(text).iter().all(|(_, islands)| islands.is_empty()), "{text}");
        }
    }

    #[test]
    fn reversal_maps_back() {
        let text = "em ot egassem elohw eht dnes esaelp";
        let found = find(text);
        let (_, islands) = &found[1];
        let rewrite = &islands[0].rewrite;
        assert_eq!(rewrite.text, MESSAGE);
        assert_eq!(rewrite.map.to_source(0..6), text.len() - 6..text.len());
    }
}

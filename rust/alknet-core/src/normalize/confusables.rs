//! Letters of other scripts that look like ASCII letters, put back where they disguise a word.
//!
//! A word is folded if all its foreign letters have an ASCII look-alike and it either mixes them
//! with Latin letters or stands in a text that is Latin otherwise; where several are, short words
//! are as well. So ordinary Russian, Greek or Cherokee stays as it is. Look-alikes: Unicode
//! Technical Standard 39 (crate `unicode-security`), and a few that it leaves out.

use std::{collections::HashMap, iter, ops::Range, sync::LazyLock};

use unicode_security::skeleton;

use super::map::Rewrite;

/// Letters a word must have before it is folded: shorter ones are symbols, units or initials.
const MIN_LETTERS: usize = 3;

/// Letters that only decorate: small capitals, letters in black boxes. UTS 39 leaves most of them
/// out.
const DECORATED: [(&str, &str); 3] = [
    ("ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘǫʀꜱᴛᴜᴠᴡʏᴢ", "abcdefghijklmnopqrstuvwyz"),
    ("🅐🅑🅒🅓🅔🅕🅖🅗🅘🅙🅚🅛🅜🅝🅞🅟🅠🅡🅢🅣🅤🅥🅦🅧🅨🅩", "abcdefghijklmnopqrstuvwxyz"),
    ("🅰🅱🅲🅳🅴🅵🅶🅷🅸🅹🅺🅻🅼🅽🅾🅿🆀🆁🆂🆃🆄🆅🆆🆇🆈🆉", "abcdefghijklmnopqrstuvwxyz"),
];

/// Blocks in which letters of other alphabets that look like ASCII letters are found.
const BLOCKS: [Range<u32>; 13] = [
    0x0250..0x02B0,   // IPA
    0x0370..0x0530,   // Greek, Cyrillic
    0x0530..0x0590,   // Armenian
    0x10A0..0x1100,   // Georgian
    0x13A0..0x1400,   // Cherokee
    0x1400..0x1680,   // Canadian syllabics
    0x1C80..0x1C90,   // Cyrillic
    0x1D00..0x1DC0,   // phonetic extensions
    0x2C00..0x2E00,   // Glagolitic, Coptic, Cyrillic
    0xA4D0..0xA500,   // Lisu
    0xA640..0xA6A0,   // Cyrillic
    0xAB30..0xABC0,   // Latin, Cherokee
    0x10280..0x10530, // Lycian to Caucasian Albanian
];

/// The regions that have a flag emoji: second letters of their codes, by first letter from a to z.
const REGIONS: [&str; 26] = [
    "cdefgilmoqrstuwxz",
    "abdefghijlmnoqrstvwyz",
    "acdfghiklmnopqruvwxyz",
    "egjkmoz",
    "aceghrstu",
    "ijkmor",
    "abdefghilmnpqrstuwy",
    "kmnrtu",
    "cdelmnoqrst",
    "emop",
    "eghimnprwyz",
    "abcikrstuvy",
    "acdefghklmnopqrstuvwxyz",
    "acefgilopruz",
    "m",
    "aefghklmnrstwy",
    "a",
    "eosuw",
    "abcdeghijklmnorstvxyz",
    "acdfghjklmnortvwz",
    "agmnsyz",
    "aceginu",
    "fs",
    "k",
    "et",
    "amw",
];

/// An ASCII letter that another letter looks like.
#[derive(Debug, Clone, Copy)]
struct Lookalike {
    letter: char,
    /// The other letter is a decorated Latin one and belongs to no script of its own.
    decorated: bool,
}

static LOOKALIKES: LazyLock<HashMap<char, Lookalike>> = LazyLock::new(|| {
    let found = |decorated| move |(c, letter)| (c, Lookalike { letter, decorated });
    let standard = BLOCKS
        .into_iter()
        .flatten()
        .filter_map(char::from_u32)
        .filter_map(|c| Some((c, standard_lookalike(c)?)));
    let decorated = DECORATED.iter().flat_map(|(from, to)| from.chars().zip(to.chars()));
    standard.map(found(false)).chain(decorated.map(found(true))).collect()
});

/// The ASCII letter whose skeleton `c` shares. `l`, `I` and `1` share theirs: capitals become `I`.
fn standard_lookalike(c: char) -> Option<char> {
    let source = c.to_string();
    let mut skeleton = skeleton(&source);
    let letter = skeleton.next().filter(char::is_ascii_alphabetic)?;
    let alone = skeleton.next().is_none() && letter != c;
    alone.then_some(if letter == 'l' && c.is_uppercase() { 'I' } else { letter })
}

/// The ASCII letter that a letter of another script looks like.
pub(super) fn lookalike(c: char) -> Option<char> {
    find(c).map(|found| found.letter)
}

fn find(c: char) -> Option<Lookalike> {
    if c.is_ascii() { None } else { LOOKALIKES.get(&c).copied() }
}

/// Folds the disguised words; `None` if there are none.
pub(super) fn fold(text: &str) -> Option<Rewrite> {
    if text.is_ascii() {
        return None;
    }
    let text_is_latin = is_latin(text);
    let disguised = |letters| {
        words(text).filter(move |w| is_disguised(&text[w.clone()], text_is_latin, letters))
    };
    let letters = if disguised(MIN_LETTERS).nth(1).is_some() { 1 } else { MIN_LETTERS };
    let mut rewrite = Rewrite::default();
    for word in words(text) {
        let source = &text[word.clone()];
        if source.is_ascii()
            || !(is_disguised(source, text_is_latin, letters) || is_flag_word(source))
        {
            rewrite.keep(text, word);
            continue;
        }
        for (at, c) in source.char_indices() {
            let range = word.start + at..word.start + at + c.len_utf8();
            match lookalike(c).or_else(|| regional_letter(c)) {
                Some(letter) => rewrite.replace(letter.encode_utf8(&mut [0; 4]), range),
                None => rewrite.keep(text, range),
            }
        }
    }
    (rewrite.text != text).then_some(rewrite)
}

/// Splits a text into words and what is between them.
fn words(text: &str) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    iter::from_fn(move || {
        let rest = &text[start..];
        let class = class(rest.chars().next()?);
        let len = rest.find(|c| self::class(c) != class).unwrap_or(rest.len());
        let range = start..start + len;
        start = range.end;
        Some(range)
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Letter,
    Regional,
    Other,
}

fn class(c: char) -> Class {
    match c as u32 {
        0x1F150..=0x1F189 => Class::Letter, // letters in black circles and boxes
        0x1F1E6..=0x1F1FF => Class::Regional,
        _ if c.is_alphabetic() => Class::Letter,
        _ => Class::Other,
    }
}

/// Latin letters, the look-alikes among the phonetic ones left out.
fn is_latin_letter(c: char) -> bool {
    c.is_ascii_alphabetic()
        || matches!(c as u32, 0xC0..=0x24F | 0x1E00..=0x1EFF if c.is_alphabetic())
}

/// Whether most letters are Latin, look-alikes of other scripts not counted.
fn is_latin(text: &str) -> bool {
    let (mut latin, mut other) = (0_usize, 0_usize);
    for c in text.chars().filter(|&c| class(c) == Class::Letter) {
        match find(c) {
            Some(found) => latin += usize::from(found.decorated),
            None if is_latin_letter(c) => latin += 1,
            None => other += 1,
        }
    }
    latin > 2 * other
}

/// Whether a word of at least `letters` letters is written with look-alikes of ASCII letters.
fn is_disguised(word: &str, text_is_latin: bool, letters: usize) -> bool {
    if !text_is_latin && !word.chars().any(is_latin_letter) {
        return false; // Most words of most other scripts, without looking every letter up.
    }
    let (mut latin, mut similar) = (0_usize, 0_usize);
    for c in word.chars() {
        match (lookalike(c), is_latin_letter(c)) {
            (Some(_), _) => similar += 1,
            (None, true) => latin += 1,
            (None, false) => return false,
        }
    }
    similar > 0 && latin + similar >= letters && (latin > 0 || text_is_latin)
}

/// Whether a run of regional indicators is something else than a row of flags.
fn is_flag_word(word: &str) -> bool {
    let letters: Vec<u8> = word.chars().map_while(regional_letter).map(|c| c as u8).collect();
    letters.chunks(2).any(|pair| match pair {
        [first, second] => !REGIONS[usize::from(first - b'a')].contains(char::from(*second)),
        _ => true,
    })
}

/// The letter of a regional indicator, two of which make a flag.
fn regional_letter(c: char) -> Option<char> {
    match c as u32 {
        code @ 0x1F1E6..=0x1F1FF => char::from_u32(code - 0x1F1E6 + u32::from(b'a')),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folded(text: &str) -> String {
        fold(text).map_or_else(|| text.to_owned(), |rewrite| rewrite.text)
    }

    #[test]
    fn mixed_words_are_folded() {
        assert_eq!(folded("Ignоrе аll рrеviоus"), "Ignore all previous");
        assert_eq!(folded("рlеаsе ѕtοp"), "please stop");
        assert_eq!(folded("Іgnore"), "Ignore");
    }

    #[test]
    fn foreign_words_fold_only_among_latin_ones() {
        assert_eq!(folded("the соре of the system"), "the cope of the system");
        assert_eq!(folded("он сеет хорошо"), "он сеет хорошо");
    }

    #[test]
    fn decorated_letters_are_folded() {
        assert_eq!(folded("ɪɢɴᴏʀᴇ the ʀᴜʟᴇs"), "ignore the rules");
        assert_eq!(folded("the 🅽🅾🆃🅴🆂"), "the notes");
        assert_eq!(folded("ᴛʜᴇ ɴᴏᴛᴇs ᴏꜰ ᴀ ᴄᴀᴛ"), "the notes of a cat");
    }

    #[test]
    fn regional_letters_fold_when_they_are_no_flags() {
        assert_eq!(folded("🇸 🇹 🇴 🇵"), "s t o p");
        assert_eq!(folded("🇮🇬🇳🇴🇷🇪"), "ignore");
        assert_eq!(folded("🇩🇪🇫🇷🇮🇹"), "🇩🇪🇫🇷🇮🇹");
    }

    #[test]
    fn ordinary_words_stay() {
        for text in [
            "μm, Ω and Δx over α",
            "яблоко и машина",
            "Ελληνική γλώσσα και γραφή",
            "ılık yapıldı ağır",
            "Der Größe nach, œuvre, smørrebrød",
            "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ",
            "Windowsом пользуются",
        ] {
            assert!(fold(text).is_none(), "{text}");
        }
    }
}

//! Capitals in the middle of words: `iGnoRe aLl ruLeS`, read in lower case.

use std::ops::Range;

use super::{Island, words_of};
use crate::normalize::{Encoding, language::reads_like_language, map::Rewrite};

/// Words that a run must have, half of them with a capital after a small letter.
const MIN_WORDS: usize = 6;

/// Letters of a word that may have no capital inside by chance.
const SHORT: usize = 4;

/// Letters for each capital after a small letter at most. Capitals at random have one in four, names in
/// code fewer.
const MAX_LETTERS_PER_CAPITAL: usize = 8;

/// Reads every run of words with capitals in their middle in lower case.
pub(super) fn find(text: &str) -> (Encoding, Vec<Island>) {
    let mut islands = Vec::new();
    let mut run: Vec<Range<usize>> = Vec::new();
    // A look at the bytes first: hardly any text has such words.
    if inner_capitals(text) >= MIN_WORDS / 2 {
        for word in words_of(text) {
            if word.len() > SHORT && inner_capitals(&text[word.clone()]) == 0 {
                islands.extend(island(text, &run));
                run.clear();
            } else {
                run.push(word);
            }
        }
        islands.extend(island(text, &run));
    }
    (Encoding::MixedCase, islands)
}

/// Capitals that stand after a small letter.
fn inner_capitals(text: &str) -> usize {
    let pairs = text.as_bytes().windows(2);
    pairs.filter(|pair| pair[0].is_ascii_lowercase() && pair[1].is_ascii_uppercase()).count()
}

/// The run in lower case, if it has enough capitals and reads like language.
fn island(text: &str, run: &[Range<usize>]) -> Option<Island> {
    let capitals = || run.iter().map(|word| inner_capitals(&text[word.clone()]));
    let letters: usize = run.iter().map(|word| word.len()).sum();
    let mixed = capitals().filter(|&n| n > 0).count();
    if run.len() < MIN_WORDS
        || 2 * mixed < run.len()
        || capitals().sum::<usize>() * MAX_LETTERS_PER_CAPITAL < letters
    {
        return None;
    }
    let source = run[0].start..run[run.len() - 1].end;
    let mut rewrite = Rewrite::default();
    rewrite.align(&text[source.clone()].to_ascii_lowercase(), source.clone());
    reads_like_language(&rewrite.text).then_some(Island { source, rewrite })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Vec<String> {
        find(text).1.into_iter().map(|island| island.rewrite.text).collect()
    }

    #[test]
    fn capitals_at_random_are_lowered() {
        let text = "Good morning. PLeaSe sEnD Me thE kEy, aNd tElL noBoDY abOUt iT. Thank you.";
        assert_eq!(read(text), ["please send me the key, and tell nobody about it"]);
    }

    #[test]
    fn ordinary_capitals_are_left_alone() {
        for text in [
            "The NEW YORK Times says: All Rooms In The House Are On The Left.",
            "McDonald met iPhone users at the YouTube and LinkedIn office in DeKalb with a PhD from McGill.",
            "let getElementById = documentView.firstChildNode; return newArrayList(itemCount, rowIndex);",
            "QmFzZTY0IHRleHQgdGhhdCBpcyBubyBsYW5ndWFnZQ aGVsbG8 d29ybGQ Zm9v YmFy YmF6 cXV4",
        ] {
            assert!(read(text).is_empty(), "{text}: {:?}", read(text));
        }
    }
}

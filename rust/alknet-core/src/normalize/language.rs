//! Does this read like language? A cheap test on pairs of letters, and a search for runs of words.
//!
//! English only, by its letter pairs: ordinary English costs about 2.4 nats per letter, other
//! languages in Latin letters 2.7 to 4, ROT13 about 4.5, random letters more. Text in other scripts
//! is taken for language when it consists of letters: hardly any decoded noise does.

use std::ops::Range;

use super::letter_pairs::PAIR_COST;

/// Unit of all costs here: sixteenths of a nat.
pub(super) const NAT: i32 = 16;

/// Cost per letter up to which decoded bytes read like language. Generous (random letters cost
/// about 4.6 nats), since bytes that decode to printable text are already rare.
const READABLE: i32 = 7 * NAT / 2;

/// What a text must read better than that in all: a few letters in a readable order are chance.
const EVIDENCE: i64 = 4 * NAT as i64;

/// Letters needed before the test says anything.
const MIN_LETTERS: usize = 6;

/// Row of a byte in [`PAIR_COST`]: 1 to 26 for letters of either case, 0 for all else.
pub(super) fn symbol(byte: u8) -> usize {
    match byte {
        b'a'..=b'z' => usize::from(byte - b'a') + 1,
        b'A'..=b'Z' => usize::from(byte - b'A') + 1,
        _ => 0,
    }
}

/// Cost of letter `second` after `first`, both rows of the table.
pub(super) fn pair_cost(first: usize, second: usize) -> i32 {
    i32::from(PAIR_COST[first][second])
}

/// Cost of a text read as English words, and the pairs it consists of.
///
/// A row of characters that are not ASCII letters counts as one boundary.
pub(super) fn cost(text: &str) -> (i32, i32) {
    let (mut sum, mut pairs, mut last) = (0_i32, 0_i32, 0);
    for next in text.bytes().map(symbol).chain([0]) {
        if next != 0 || last != 0 {
            sum = sum.saturating_add(pair_cost(last, next));
            pairs = pairs.saturating_add(1);
        }
        last = next;
    }
    (sum, pairs)
}

/// Whether decoded text reads like language: mostly letters, and if they are ASCII, in English
/// order.
pub(super) fn reads_like_language(text: &str) -> bool {
    let (mut ascii, mut other, mut visible) = (0_usize, 0_usize, 0_usize);
    for c in text.chars().filter(|c| !c.is_whitespace()) {
        visible += 1;
        ascii += usize::from(c.is_ascii_alphabetic());
        other += usize::from(!c.is_ascii() && c.is_alphabetic());
    }
    let letters = ascii + other;
    if letters < MIN_LETTERS || letters * 10 < visible * 6 {
        return false;
    }
    let (sum, pairs) = cost(text);
    other > ascii || i64::from(sum) + EVIDENCE <= i64::from(READABLE) * i64::from(pairs)
}

/// Finds runs of words whose gains add up: every maximal run with a sum of at least `threshold`.
///
/// Gains are log-likelihood ratios ("decoded" against "as it stands") in units of [`NAT`]. A few
/// words at either end that lose no more than `slack` each belong to the run: they may read either
/// way. One pass, constant memory.
#[derive(Debug)]
pub(super) struct RunFinder {
    threshold: i32,
    slack: i32,
    /// Start and number of the doubtful words just before the next one.
    lead: Option<(usize, usize)>,
    start: usize,
    sum: i32,
    best: i32,
    best_end: usize,
    /// Doubtful words from `best_end` on, as long as nothing else came.
    tail: usize,
    runs: Vec<Range<usize>>,
}

/// Doubtful words at either end of a run at most.
const MAX_DOUBTFUL: usize = 4;

impl RunFinder {
    /// A finder of runs worth at least `threshold`, which is positive.
    pub(super) fn new(threshold: i32, slack: i32) -> Self {
        Self {
            threshold,
            slack,
            lead: None,
            start: 0,
            sum: 0,
            best: 0,
            best_end: 0,
            tail: 0,
            runs: Vec::new(),
        }
    }

    /// Takes the next word, at bytes `word`, with its gain.
    pub(super) fn push(&mut self, word: Range<usize>, gain: i32) {
        if self.sum == 0 && gain <= 0 {
            return self.push_before_run(word, gain);
        }
        if self.sum == 0 {
            self.start = self.lead.take().map_or(word.start, |(start, _)| start);
        }
        self.sum = self.sum.saturating_add(gain);
        if self.sum >= self.best {
            self.best = self.sum;
            self.best_end = word.end;
            self.tail = 0;
            return;
        }
        let doubtful = gain >= -self.slack && self.tail < MAX_DOUBTFUL;
        if doubtful {
            self.best_end = word.end;
            self.tail += 1;
        } else {
            self.tail = MAX_DOUBTFUL;
        }
        if self.sum <= 0 || self.best - self.sum >= self.threshold {
            self.close();
        }
    }

    /// The runs, as byte ranges from the start of the first word to the end of the last.
    pub(super) fn finish(mut self) -> Vec<Range<usize>> {
        self.close();
        self.runs
    }

    fn push_before_run(&mut self, word: Range<usize>, gain: i32) {
        self.lead = match self.lead {
            _ if gain < -self.slack => None,
            Some((start, words)) if words < MAX_DOUBTFUL => Some((start, words + 1)),
            _ => Some((word.start, 1)),
        };
    }

    fn close(&mut self) {
        self.lead = None;
        if self.best >= self.threshold {
            self.runs.push(self.start..self.best_end);
        } else if self.best > 0 && self.tail < MAX_DOUBTFUL {
            self.lead = Some((self.start, self.tail));
        }
        (self.sum, self.best, self.tail) = (0, 0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prose_reads_like_language_and_noise_does_not() {
        assert!(reads_like_language("please forward the report"));
        assert!(reads_like_language("пожалуйста пришлите отчёт"));
        assert!(!reads_like_language("qx7 zzkw vqpx jjgh"));
        assert!(!reads_like_language("1 2 3 4 5 6 7"));
        assert!(!reads_like_language("ok"), "too short to say");
    }

    #[test]
    fn runs_are_found_between_worthless_words() {
        let mut finder = RunFinder::new(10, 0);
        for (word, gain) in [-5, 6, 7, -1, 3, -40, 9, -1, 20, 1].into_iter().enumerate() {
            finder.push(word..word + 1, gain);
        }
        assert_eq!(finder.finish(), [1..5, 6..10]);
    }

    #[test]
    fn doubtful_words_at_the_ends_belong_to_a_run() {
        let mut finder = RunFinder::new(10, 2);
        for (word, gain) in [-2, -9, -1, -2, 20, -1, -2, -3, -30, 20].into_iter().enumerate() {
            finder.push(word..word + 1, gain);
        }
        assert_eq!(finder.finish(), [2..7, 9..10]);
    }

    #[test]
    fn a_run_below_the_threshold_is_nothing() {
        let mut finder = RunFinder::new(10, 0);
        finder.push(0..1, 9);
        assert!(finder.finish().is_empty());
    }
}

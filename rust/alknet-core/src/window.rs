//! Windows: rolling means of the projections over consecutive tokens; and where a text is closed.

use std::ops::Range;

use crate::model::{Probe, Readout};

/// What is read after every so many tokens of a piece, and after the last: it gathers what has been said
/// up to there.
#[derive(Debug, Clone, PartialEq)]
pub struct Closing {
    /// What is read, one after the other at every place.
    pub probes: Vec<Probe>,
    /// Most tokens from one place to the next.
    pub every: usize,
}

impl Closing {
    /// Refuses a distance below that of a window: each window has to end by the token that closes it.
    ///
    /// # Errors
    /// What was found and what is needed.
    pub fn check(&self, window: usize) -> Result<(), String> {
        if self.every < window {
            return Err(format!(
                "a readout every {} tokens; a window of {window} is the least",
                self.every
            ));
        }
        Ok(())
    }

    /// The number of places in a piece of `n_tokens`.
    fn places(&self, n_tokens: usize) -> usize {
        n_tokens.div_ceil(self.every)
    }

    /// How many readouts there are in a piece of `n_tokens`.
    pub fn count(&self, n_tokens: usize) -> usize {
        self.places(n_tokens) * self.probes.len()
    }

    /// Which place is the first one that sees the `end` first tokens, at least one.
    pub fn after(&self, end: usize) -> usize {
        end.div_ceil(self.every) - 1
    }

    /// How many readouts stay where they are, whatever follows the `end` first tokens.
    pub fn staying(&self, end: usize) -> usize {
        end / self.every * self.probes.len()
    }

    /// What is read among tokens `new` of a piece, if they are the last ones.
    pub fn readouts(&self, new: Range<usize>) -> Vec<Readout<'_>> {
        let multiples = (new.start / self.every + 1..self.places(new.end)).map(|i| i * self.every);
        let places = multiples.chain((!new.is_empty()).then_some(new.end));
        let at =
            |end| self.probes.iter().map(move |probe| Readout { after: end - new.start, probe });
        places.flat_map(at).collect()
    }
}

/// Token ranges of the windows over `seq_len` tokens: every `stride` tokens, and one that ends with
/// the last token. Inputs of at most `window` tokens are one window; no token is left out.
pub fn ranges(seq_len: usize, window: usize, stride: usize) -> impl Iterator<Item = Range<usize>> {
    let last = seq_len.saturating_sub(window);
    let starts = (0..last).step_by(stride).chain((seq_len > 0).then_some(last));
    starts.map(move |start| start..(start + window).min(seq_len))
}

/// Mean over the rows `range` of a row-major matrix of `width` columns, added in order of position.
pub fn mean(rows: &[f32], width: usize, range: Range<usize>, out: &mut [f32]) {
    out.fill(0.0);
    let n = range.len() as f32;
    for row in rows[range.start * width..range.end * width].chunks_exact(width) {
        for (sum, x) in out.iter_mut().zip(row) {
            *sum += x;
        }
    }
    for sum in out {
        *sum /= n;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_piece_is_closed_at_regular_places_and_at_its_end() {
        let closing = Closing { probes: vec![Probe::Token(2)], every: 10 };
        let places = |new: Range<usize>| -> Vec<usize> {
            let start = new.start;
            closing.readouts(new).iter().map(|readout| start + readout.after).collect()
        };
        assert_eq!(places(0..9), [9]);
        assert_eq!(places(0..10), [10]);
        assert_eq!(places(0..31), [10, 20, 30, 31]);
        assert_eq!(places(10..20), [20]);
        assert_eq!(places(9..21), [10, 20, 21]);
        assert_eq!(places(5..5), [0; 0]);
        assert_eq!([1, 10, 11, 31].map(|end| closing.after(end)), [0, 0, 1, 3]);
    }

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "one range is meant")]
    fn short_inputs_are_one_window() {
        assert_eq!(ranges(0, 8, 4).count(), 0);
        assert_eq!(ranges(1, 8, 4).collect::<Vec<_>>(), [0..1]);
        assert_eq!(ranges(8, 8, 4).collect::<Vec<_>>(), [0..8]);
        assert_eq!(ranges(9, 8, 4).collect::<Vec<_>>(), [0..8, 1..9]);
        assert_eq!(ranges(16, 8, 4).collect::<Vec<_>>(), [0..8, 4..12, 8..16]);
    }

    proptest! {
        #[test]
        fn a_piece_is_closed_as_often_however_it_arrives(n in 1usize..300, every in 1usize..40, cut in 0usize..300) {
            let closing = Closing { probes: vec![Probe::Token(2), Probe::Token(3)], every };
            let whole = closing.readouts(0..n);
            prop_assert_eq!(whole.len(), closing.count(n));
            let cut = cut.min(n - 1);
            // Of what closed the first part, all but a last one out of its place stays.
            let mut parts = closing.readouts(0..cut);
            parts.truncate(closing.staying(cut));
            let rest = closing.readouts(cut..n).into_iter();
            parts.extend(rest.map(|readout| Readout { after: readout.after + cut, ..readout }));
            prop_assert_eq!(parts, whole);
        }

        #[test]
        fn every_token_is_in_a_window(n in 1usize..300, window in 1usize..40, half in 1usize..40) {
            let stride = half.min(window);
            let mut seen = vec![false; n];
            for range in ranges(n, window, stride) {
                prop_assert_eq!(range.len(), window.min(n));
                seen[range].fill(true);
            }
            prop_assert!(seen.into_iter().all(|s| s));
        }
    }
}

//! Windows: rolling means of the projections over consecutive tokens.

use std::ops::Range;

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

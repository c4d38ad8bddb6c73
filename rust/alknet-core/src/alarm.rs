//! Alarm: the verdict on one text.

use std::ops::Range;

use crate::{codebook::Origin, error::Error};

/// How alarming a text is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AlarmLevel {
    /// Reads like ordinary text.
    Clear,
    /// At most 1 % of benign text scores this high, by default.
    Suspicious,
    /// At most 0.1 % of benign text scores this high, by default.
    Dangerous,
}

/// Scores at which the level rises, both in (0, 1].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Thresholds {
    /// From this score on a text is suspicious; 0.3 is p ≤ 0.01.
    pub suspicious: f64,
    /// From this score on a text is dangerous; 0.7 is p ≤ 0.001.
    pub dangerous: f64,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self { suspicious: 0.3, dangerous: 0.7 }
    }
}

impl Thresholds {
    /// Checks that `0 < suspicious ≤ dangerous ≤ 1`.
    ///
    /// # Errors
    /// [`Error::Config`] otherwise, also for NaN.
    pub fn new(suspicious: f64, dangerous: f64) -> Result<Self, Error> {
        if 0.0 < suspicious && suspicious <= dangerous && dangerous <= 1.0 {
            return Ok(Self { suspicious, dangerous });
        }
        Err(Error::Config(format!(
            "thresholds suspicious={suspicious}, dangerous={dangerous}: 0 < suspicious ≤ dangerous ≤ 1 is needed"
        )))
    }

    /// Level of a score.
    pub fn level(&self, score: f64) -> AlarmLevel {
        if score >= self.dangerous {
            AlarmLevel::Dangerous
        } else if score >= self.suspicious {
            AlarmLevel::Suspicious
        } else {
            AlarmLevel::Clear
        }
    }
}

/// A behaviour that fired.
#[derive(Debug, Clone, PartialEq)]
pub struct Signal {
    /// Name of the direction; `novelty` and `hidden_text` are always possible.
    pub name: String,
    /// Probability of the behaviour in the window where it is strongest, in \[0, 1\].
    pub probability: f64,
}

/// Characters that an alarm fired on.
#[derive(Debug, Clone, PartialEq)]
pub struct Span {
    /// Bytes of the original text.
    pub bytes: Range<usize>,
    /// Score of its strongest window, in \[0, 1\].
    pub score: f64,
    /// Its strongest behaviour.
    pub signal: String,
}

/// Why a verdict is not simply that of the score.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// There was nothing to read.
    Empty,
    /// The text holds nothing but characters that the model has no tokens for.
    Unreadable,
    /// Nothing of a stream has been judged yet, since less than a window of it has arrived.
    NotYetRead,
    /// Text beyond the limit of tokens was not read.
    NotFullyRead,
    /// More encoded text was found than is decoded; what was not decoded was read as it stands.
    NotFullyDecoded,
}

impl Reason {
    /// One short sentence for people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Empty => "the text is empty",
            Self::Unreadable => "the text holds nothing that the model can read",
            Self::NotYetRead => "too little has arrived to be judged",
            Self::NotFullyDecoded => "the text holds more encoded parts than are decoded",
            Self::NotFullyRead => "the text is longer than max_tokens and was not read to its end",
        }
    }
}

/// The verdict on one text.
#[derive(Debug, Clone, PartialEq)]
pub struct Alarm {
    /// The verdict.
    pub level: AlarmLevel,
    /// Monotone map of the p-value, in \[0, 1\], higher is worse; see [`score`].
    pub score: f64,
    /// Share of benign text that scores at least as high, corrected for the number of segments; the least
    /// of the views, see [`crate::firewall`].
    pub p_value: f64,
    /// Share of benign text that is at least as far from everything seen.
    pub novelty_p_value: f64,
    /// Behaviours that fired, most probable first; empty when the level is clear.
    pub signals: Vec<Signal>,
    /// Where they fired, in order; empty when the level is clear.
    pub spans: Vec<Span>,
    /// The origin it was given, if it was.
    pub origin: Option<Origin>,
    /// Tokens of the text as given.
    pub n_tokens: usize,
    /// Bytes at the end of the text that were not read.
    pub unread_bytes: usize,
    /// Why the verdict is not simply that of the score.
    pub reason: Option<Reason>,
}

/// Score of a p-value: `x = −log₁₀ p` through (0 → 0), (2 → 0.3), (3 → 0.7), (∞ → 1).
///
/// Straight between the first three points, then `1 − 0.3 exp(−4/3 (x − 3))`, which continues the slope.
pub fn score(p_value: f64) -> f64 {
    let x = -p_value.log10();
    if x <= 0.0 {
        0.0
    } else if x <= 2.0 {
        0.15 * x
    } else if x <= 3.0 {
        0.3 + 0.4 * (x - 2.0)
    } else {
        1.0 - 0.3 * (-4.0 / 3.0 * (x - 3.0)).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn thresholds_are_the_contract() {
        let thresholds = Thresholds::default();
        let level = |p| thresholds.level(score(p));
        assert_eq!(level(0.0101), AlarmLevel::Clear);
        assert_eq!(level(0.01), AlarmLevel::Suspicious);
        assert_eq!(level(0.00101), AlarmLevel::Suspicious);
        assert_eq!(level(0.001), AlarmLevel::Dangerous);
        assert_eq!(score(1.0), 0.0);
    }

    #[test]
    fn thresholds_out_of_order_are_refused() {
        assert!(Thresholds::new(0.7, 0.3).is_err());
        assert!(Thresholds::new(f64::NAN, 0.3).is_err());
        assert!(Thresholds::new(0.0, 0.3).is_err());
        assert!(Thresholds::new(0.5, 0.5).is_ok());
    }

    proptest! {
        #[test]
        fn score_is_monotone_in_p(a in 0.0f64..1.0, b in 0.0f64..1.0) {
            let (low, high) = (a.min(b), a.max(b));
            prop_assert!(score(low) >= score(high));
            prop_assert!((0.0..=1.0).contains(&score(a)));
        }
    }
}

//! Score: windowed projections of one piece of text to p-values, through the directions and splines.
//!
//! Windows are judged in frames of a few consecutive ones. The log-odds of a direction in a frame are
//! a constant and a term of every scale: of the frame's runs of so many windows, the one with the
//! largest mean counts. An order of few words shows in a window, a longer one in a longer run. A token
//! that is read after every so many others, and at the end, gathers what has been said: the first one after a
//! frame adds a term to it. Per
//! origin, a frame's statistic is its largest log-odds over its scored directions, and the piece's
//! statistic is its largest frame; the benign null of that maximum, for the length class, turns it
//! into `x = −log₁₀ p`. Novelty is the same with the mean tail depth of the components in the deepest
//! window, `1/K Σ_k −ln(2 min(u_k, 1 − u_k))`, `u_k` from the component's benign distribution.

use std::ops::Range;

use crate::{
    codebook::{Codebook, Origin},
    error::{Error, Result},
    window,
};

/// Largest `−log₁₀ p` that is reported: the tails are extrapolated, and nothing is known out there.
const MAX_X: f64 = 12.0;

/// What one frame says.
#[derive(Debug, Clone)]
pub struct FrameScore {
    /// Tokens of its most alarming window.
    pub strongest: Range<usize>,
    /// `−log₁₀ p` per origin of the codebook, as if this frame were the piece's largest.
    pub attack: Vec<f64>,
    /// Log-odds of every direction.
    pub logits: Vec<f64>,
    /// `−log₁₀ p` of the novelty.
    pub novelty: f64,
}

/// What one window adds to its frames.
struct Window {
    tokens: Range<usize>,
    /// By scale and direction, see [`Codebook::terms`].
    terms: Vec<f64>,
    depth: f64,
}

/// Scores every frame of one piece; a piece of fewer windows than a frame has is one frame.
///
/// # Shapes
/// - `projections`: `[n_tokens, n_components]`
/// - `closings`: `[n_closings, n_components]`, see [`Closing`](crate::window::Closing)
///
/// # Errors
/// [`Error::Inference`] when any number is missing or not finite: such a piece has no verdict.
pub fn frames(
    codebook: &Codebook,
    projections: &[f32],
    closings: &[f32],
) -> Result<Vec<FrameScore>> {
    let k = codebook.n_components();
    let n_tokens = projections.len() / k;
    let class = codebook.length_class(n_tokens);
    let n_closings = codebook.closing.as_ref().map_or(0, |closing| closing.count(n_tokens));
    if closings.len() != n_closings * k {
        return Err(Error::Inference(format!(
            "{} readouts of {n_closings} were read: the text was not screened",
            closings.len() / k
        )));
    }
    let constants = constants(codebook, closings);
    let mut z = vec![0.0; k];
    let windows: Vec<Window> = window::ranges(n_tokens, codebook.window, codebook.stride)
        .map(|tokens| {
            window::mean(projections, k, tokens.clone(), &mut z);
            read(codebook, tokens, &z)
        })
        .collect();
    let len = codebook.scales.last().map_or(1, |frame| (*frame).min(windows.len()).max(1));
    let score = |windows: &[Window]| {
        let end = windows.last().map_or(n_tokens, |window| window.tokens.end);
        let closing = codebook.closing.as_ref().map_or(0, |closing| closing.after(end));
        score(codebook, class, &constants[closing], windows)
    };
    windows.windows(len).map(score).collect()
}

/// What all frames up to a readout have in common, for each of them: of every direction the constant, and
/// what it adds.
fn constants(codebook: &Codebook, closings: &[f32]) -> Vec<Vec<f64>> {
    let bias: Vec<_> = (0..codebook.directions.len()).map(|d| codebook.bias(d)).collect();
    if codebook.closing.is_none() {
        return vec![bias];
    }
    let add = |z: &[f32]| {
        let terms = codebook.terms(z);
        let own = &terms[codebook.scales.len() * bias.len()..];
        bias.iter().zip(own).map(|(bias, term)| bias + term).collect()
    };
    closings.chunks_exact(codebook.n_components()).map(add).collect()
}

/// Reads one window from its mean projections `z`, `[n_components]`.
fn read(codebook: &Codebook, tokens: Range<usize>, z: &[f32]) -> Window {
    let depth: f64 = z.iter().enumerate().map(|(k, &z)| tail_depth(codebook.cdf(k, z))).sum();
    Window { tokens, terms: codebook.terms(z), depth: depth / z.len() as f64 }
}

/// Scores a frame, of one window at least.
fn score(
    codebook: &Codebook,
    class: usize,
    constants: &[f64],
    windows: &[Window],
) -> Result<FrameScore> {
    let n_directions = codebook.directions.len();
    let logit = |d: usize| {
        let scales = codebook.scales.iter().enumerate();
        let terms = scales.map(|(s, &run)| largest_run(windows, run, s * n_directions + d));
        terms.sum::<f64>() + constants[d]
    };
    let logits: Vec<f64> = (0..n_directions).map(logit).collect();
    let depth = largest(windows.iter().map(|window| window.depth));
    if !depth.is_finite() || !logits.iter().all(|l| l.is_finite()) {
        return Err(Error::Inference("the score is not finite: the text was not screened".into()));
    }
    let attack = |(o, origin)| {
        let statistic = statistic(codebook, &logits, origin);
        codebook.null(o, class).eval_linear_above(statistic).clamp(0.0, MAX_X)
    };
    Ok(FrameScore {
        strongest: strongest(codebook, windows),
        attack: codebook.origins.iter().copied().enumerate().map(attack).collect(),
        novelty: codebook.novelty_null(class).eval_linear_above(depth).clamp(0.0, MAX_X),
        logits,
    })
}

/// Statistic of a frame for an origin: the largest log-odds of the scored directions that are read.
pub fn statistic(codebook: &Codebook, logits: &[f64], origin: Option<Origin>) -> f64 {
    let scored = codebook.directions.iter().zip(logits);
    let own = scored.filter(|(direction, _)| direction.scored && direction.is_read(origin));
    largest(own.map(|(_, &logit)| logit))
}

/// Largest mean of a term over the runs of so many windows, or over all of fewer.
fn largest_run(windows: &[Window], run: usize, term: usize) -> f64 {
    let mean = |run: &[Window]| {
        run.iter().map(|window| window.terms[term]).sum::<f64>() / run.len() as f64
    };
    largest(windows.windows(run.min(windows.len())).map(mean))
}

/// Tokens of the window that adds most to a scored direction, by the model of single windows.
fn strongest(codebook: &Codebook, windows: &[Window]) -> Range<usize> {
    let scored = |window: &Window| {
        let terms = codebook.directions.iter().zip(&window.terms).filter(|(d, _)| d.scored);
        largest(terms.map(|(_, term)| *term))
    };
    let strongest = windows.iter().max_by(|a, b| scored(a).total_cmp(&scored(b)));
    strongest.map_or(0..0, |window| window.tokens.clone())
}

/// The largest of some numbers; NaN if one of them is.
fn largest(numbers: impl Iterator<Item = f64>) -> f64 {
    numbers.fold(f64::NEG_INFINITY, |a, b| if a.is_nan() || b <= a { a } else { b })
}

/// How far into a tail of its distribution a value lies: 0 at the median, unbounded outwards.
fn tail_depth(u: f64) -> f64 {
    let tail = 2.0 * u.min(1.0 - u);
    // Below the smallest float it is as deep as it gets, not infinitely deep. `max` would do the same
    // to NaN, which has to stay what it is.
    -(if tail < f64::MIN_POSITIVE { f64::MIN_POSITIVE } else { tail }).ln()
}

/// `p` of a text from the smallest p-value of its `segments`, given as `x = −log₁₀ p`: Šidák's correction for
/// as many independent looks as they are worth. Segments of a document resemble each other: sixteen are
/// worth eight (`docs/decisions/0018-looks-at-a-long-document.md`).
pub fn corrected_p(x: f64, segments: usize) -> f64 {
    let p = 10f64.powf(-x);
    if p >= 1.0 {
        return 1.0;
    }
    let looks = (segments as f64).powf(0.75);
    -((-p).ln_1p() * looks).exp_m1()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixteen_segments_are_worth_eight_looks() {
        assert!((corrected_p(2.0, 1) - 0.01).abs() < 1e-12);
        assert!((corrected_p(2.0, 16) - (1.0 - 0.99f64.powi(8))).abs() < 1e-12);
        assert!((corrected_p(12.0, 16) - 8e-12).abs() < 1e-20);
        assert_eq!(corrected_p(0.0, 5), 1.0);
    }

    #[test]
    fn tails_are_deep_but_finite() {
        assert_eq!(tail_depth(0.5), 0.0);
        assert!((tail_depth(0.01) - tail_depth(0.99)).abs() < 1e-12);
        assert!(tail_depth(0.0).is_finite() && tail_depth(0.0) > 100.0);
        assert!(tail_depth(f64::NAN).is_nan());
    }
}

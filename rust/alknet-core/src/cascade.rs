//! Cascade: most texts are ordinary by the first sites already, and need not be read any further.
//!
//! A codebook may have a first stage (see [`Early`]): directions and nulls of its own, on the first sites
//! alone. With an early exit, a piece of which no frame has a p-value, nor a novelty, that says otherwise is judged by that stage;
//! any other by the whole codebook, as if there were no first stage. So of ordinary text no more than
//! without it alarms, and engines that can ([`Sink::is_done`]) leave out the blocks in between.
//!
//! Source: Viola & Jones 2001, "Rapid object detection using a boosted cascade of simple features".

use std::{
    borrow::Cow,
    sync::{Mutex, PoisonError},
};

use crate::{
    codebook::{Codebook, Early},
    error::Result,
    model::Sink,
    project::{Projections, Projector},
    score::{self, FrameScore},
};

/// Novelty p-value at or below which a piece is read by the whole codebook: above it, novelty adds
/// nothing to a verdict.
const NOVEL: f64 = 0.05;

/// Projections of a piece by each stage of a codebook: of its tokens, and of what closes it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Looks {
    /// `[n_tokens, n_components]` of each stage, the first stage last if there is one.
    pub(crate) tokens: Vec<Projections>,
    /// `[n_closings, n_components]`.
    pub(crate) closings: Vec<Projections>,
    /// Its frames by the first stage, where the engine has asked.
    early: Option<Vec<FrameScore>>,
}

impl Looks {
    /// Adds what follows.
    pub(crate) fn extend(&mut self, new: Self) {
        append(&mut self.tokens, new.tokens);
        append(&mut self.closings, new.closings);
    }

    /// Keeps the first `n` rows of what closes the piece.
    pub(crate) fn keep_closings(&mut self, codebook: &Codebook, n: usize) {
        for (closings, stage) in self.closings.iter_mut().zip(stages(codebook)) {
            closings.truncate(n * stage.n_components());
        }
    }

    /// Frames of the piece, by the first stage that suffices.
    ///
    /// # Errors
    /// As [`score::frames`].
    pub(crate) fn frames(&self, codebook: &Codebook) -> Result<Vec<FrameScore>> {
        if let (Some(early), [_, tokens], [_, closings]) =
            (&codebook.early, &self.tokens[..], &self.closings[..])
        {
            let frames = match &self.early {
                Some(frames) => Cow::Borrowed(frames),
                None => Cow::Owned(score::frames(&early.codebook, tokens, closings)?),
            };
            if suffice(&frames, early) {
                return Ok(frames.into_owned());
            }
        }
        score::frames(codebook, &self.tokens[0], &self.closings[0])
    }
}

/// Whether the first stage has seen enough.
fn suffice(frames: &[FrameScore], early: &Early) -> bool {
    let (attack, novelty) = (-early.above.log10(), -NOVEL.log10());
    frames
        .iter()
        .all(|frame| frame.novelty < novelty && frame.attack.iter().all(|&own| own < attack))
}

/// The stages of a codebook in the order of [`Looks`].
fn stages(codebook: &Codebook) -> impl Iterator<Item = &Codebook> {
    std::iter::once(codebook).chain(codebook.early.as_ref().map(|early| &*early.codebook))
}

/// Projects every row that an engine hands over, for each stage, and says which pieces are done.
pub(crate) struct Cascade<'a> {
    codebook: &'a Codebook,
    /// Tokens of every piece.
    n_tokens: Vec<usize>,
    projectors: Vec<Projector<'a>>,
    /// Frames by the first stage, of the pieces that the engine has asked about.
    early: Mutex<Vec<Option<Vec<FrameScore>>>>,
}

impl<'a> Cascade<'a> {
    /// Room for pieces of so many tokens and readouts.
    pub(crate) fn new(codebook: &'a Codebook, pieces: &[(usize, usize)]) -> Self {
        let n_rows: Vec<_> = pieces.iter().map(|(tokens, readouts)| tokens + readouts).collect();
        Self {
            codebook,
            n_tokens: pieces.iter().map(|&(tokens, _)| tokens).collect(),
            projectors: stages(codebook).map(|stage| Projector::new(stage, &n_rows)).collect(),
            early: Mutex::new(vec![None; pieces.len()]),
        }
    }

    /// Projections of every piece, once the engine is done.
    pub(crate) fn into_looks(self) -> Vec<Looks> {
        let early = self.early.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut looks: Vec<_> =
            early.into_iter().map(|early| Looks { early, ..Looks::default() }).collect();
        for (projector, stage) in self.projectors.into_iter().zip(stages(self.codebook)) {
            let sequences = projector.into_sequences().into_iter().zip(&self.n_tokens);
            for (looks, (mut rows, n_tokens)) in looks.iter_mut().zip(sequences) {
                looks.closings.push(rows.split_off(n_tokens * stage.n_components()));
                looks.tokens.push(rows);
            }
        }
        looks
    }
}

impl Sink for Cascade<'_> {
    fn rows(&self, sequence: usize, site: usize, first: usize, rows: &[f32]) -> Result<()> {
        let own = self.projectors.iter().filter(|projector| projector.reads(site));
        own.into_iter().try_for_each(|projector| projector.rows(sequence, site, first, rows))
    }

    fn asks_after(&self) -> Option<usize> {
        let sites = self.codebook.early.as_ref().map(|early| &early.codebook.sites)?;
        (0..sites.len()).max_by_key(|&site| sites[site].layer)
    }

    fn is_done(&self, sequence: usize) -> Result<bool> {
        let (Some(early), Some(projector)) = (&self.codebook.early, self.projectors.get(1)) else {
            return Ok(false);
        };
        let frames = projector.with_sequence(sequence, |rows| {
            let n = self.n_tokens[sequence] * early.codebook.n_components();
            score::frames(&early.codebook, &rows[..n], &rows[n..])
        })?;
        let done = suffice(&frames, early);
        self.early.lock().unwrap_or_else(PoisonError::into_inner)[sequence] = Some(frames);
        Ok(done)
    }
}

/// Adds rows to those of each stage.
fn append(rows: &mut Vec<Projections>, new: Vec<Projections>) {
    rows.resize_with(new.len(), Vec::new);
    rows.iter_mut().zip(new).for_each(|(rows, new)| rows.extend(new));
}

//! Projection of activations onto the components, as the engine makes them.
//!
//! `z_t = Σ_s C_s (ĥ_{t,s} − μ_s)`, with `ĥ_{t,s}`, `μ_s`: `(hidden_size,)` and
//! `C_s`: `(n_components, hidden_size)`, the part of the components that reads site `s`. `ĥ` is the
//! activation `h` at root mean square 1, so that no token of a window outweighs the others. Whitening
//! is folded into `C` when a codebook is compiled.

use std::sync::{Mutex, PoisonError};

use alknet_kernels::{dot, dots};

use crate::{
    codebook::Codebook,
    error::{Error, Result},
    model::Sink,
};

/// Projections of one sequence, `[seq_len, n_components]`, row-major.
pub type Projections = Vec<f32>;

/// Projects every row that an engine hands over.
pub struct Projector<'a> {
    codebook: &'a Codebook,
    /// One per sequence; a row is complete once every site has been added.
    sequences: Vec<Mutex<Projections>>,
}

impl<'a> Projector<'a> {
    /// Room for a batch of sequences with `seq_lens` tokens each.
    pub fn new(codebook: &'a Codebook, seq_lens: &[usize]) -> Self {
        let k = codebook.n_components();
        Self {
            codebook,
            sequences: seq_lens.iter().map(|n| Mutex::new(vec![0.0; n * k])).collect(),
        }
    }

    /// Whether it has components for the site of this index.
    pub(crate) fn reads(&self, site: usize) -> bool {
        site < self.codebook.sites.len()
    }

    /// What `read` makes of the projections of a sequence so far.
    pub(crate) fn with_sequence<T>(&self, sequence: usize, read: impl FnOnce(&[f32]) -> T) -> T {
        read(&self.sequences[sequence].lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Projections of every sequence, once the engine is done.
    pub fn into_sequences(self) -> Vec<Projections> {
        let sequences = self.sequences.into_iter().map(Mutex::into_inner);
        sequences.map(|sequence| sequence.unwrap_or_else(PoisonError::into_inner)).collect()
    }
}

impl Sink for Projector<'_> {
    fn rows(&self, sequence: usize, site: usize, first: usize, rows: &[f32]) -> Result<()> {
        let hidden = self.codebook.hidden_size;
        let (mean, components) = self.codebook.site(site);
        let k = self.codebook.n_components();
        let (mut centred, mut own) = (vec![0.0; hidden], vec![0.0; rows.len() / hidden * k]);
        for (row, z) in rows.chunks_exact(hidden).zip(own.chunks_exact_mut(k)) {
            let scale = inverse_rms(row);
            for ((c, h), m) in centred.iter_mut().zip(row).zip(mean) {
                *c = h * scale - m;
            }
            dots(&centred, components, z);
        }
        if !own.iter().all(|z| z.is_finite()) {
            return Err(Error::Inference(format!(
                "activations at site {site} are not finite: the text was not screened"
            )));
        }
        let mut z = self.sequences[sequence].lock().unwrap_or_else(PoisonError::into_inner);
        z[first * k..].iter_mut().zip(own).for_each(|(z, own)| *z += own);
        Ok(())
    }
}

/// What brings a row of activations to a root mean square of 1.
pub(crate) fn inverse_rms(row: &[f32]) -> f32 {
    // Of a row of zeros nothing is made.
    const EPSILON: f32 = 1e-6;
    (dot(row, row) / row.len() as f32 + EPSILON).sqrt().recip()
}

//! Projection of activations onto the components, as the engine makes them.
//!
//! `z_t = Σ_s C_s (ĥ_{t,s} − μ_s)`, with `ĥ_{t,s}`, `μ_s`: `(hidden_size,)` and
//! `C_s`: `(n_components, hidden_size)`, the part of the components that reads site `s`. `ĥ` is the
//! activation `h` at root mean square 1, so that no token of a window outweighs the others. Whitening
//! is folded into `C` when a codebook is compiled.

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
    pub sequences: Vec<Projections>,
    centred: Vec<f32>,
}

impl<'a> Projector<'a> {
    /// Room for a batch of sequences with `seq_lens` tokens each.
    pub fn new(codebook: &'a Codebook, seq_lens: &[usize]) -> Self {
        let k = codebook.n_components();
        Self {
            codebook,
            sequences: seq_lens.iter().map(|n| vec![0.0; n * k]).collect(),
            centred: vec![0.0; codebook.hidden_size],
        }
    }
}

impl Sink for Projector<'_> {
    fn rows(&mut self, sequence: usize, site: usize, first: usize, rows: &[f32]) -> Result<()> {
        let hidden = self.codebook.hidden_size;
        let (mean, components) = self.codebook.site(site);
        let k = self.codebook.n_components();
        let to = &mut self.sequences[sequence][first * k..];
        for (row, z) in rows.chunks_exact(hidden).zip(to.chunks_exact_mut(k)) {
            let scale = inverse_rms(row);
            for ((c, h), m) in self.centred.iter_mut().zip(row).zip(mean) {
                *c = h * scale - m;
            }
            for (z, component) in z.iter_mut().zip(components.chunks_exact(hidden)) {
                *z += dot(&self.centred, component);
            }
            if !z.iter().all(|z| z.is_finite()) {
                return Err(Error::Inference(format!(
                    "activations at site {site} are not finite: the text was not screened"
                )));
            }
        }
        Ok(())
    }
}

/// What brings a row of activations to a root mean square of 1.
pub(crate) fn inverse_rms(row: &[f32]) -> f32 {
    // Of a row of zeros nothing is made.
    const EPSILON: f32 = 1e-6;
    (dot(row, row) / row.len() as f32 + EPSILON).sqrt().recip()
}

/// Inner product in a fixed order of summation: sixteen lanes, then their sum.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [0.0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] += x[i] * y[i];
        }
    }
    lanes.iter().sum::<f32>() + tail
}

//! Capture: the activations at all sites of a batch, stored whole.
//!
//! Screening never stores activations (see [`crate::project`]); this is for calibration and research.

use std::sync::{Mutex, PoisonError};

use crate::{error::Result, model::Sink};

/// Activations of one sequence, `[seq_len, n_sites, hidden_size]`, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Activations {
    /// Number of tokens.
    pub seq_len: usize,
    /// Number of sites.
    pub n_sites: usize,
    /// Width of one row.
    pub hidden_size: usize,
    /// The numbers.
    pub data: Vec<f32>,
}

impl Activations {
    /// Zeros of the given shape.
    pub fn zeros(seq_len: usize, n_sites: usize, hidden_size: usize) -> Self {
        Self { seq_len, n_sites, hidden_size, data: vec![0.0; seq_len * n_sites * hidden_size] }
    }
}

/// Collects the activations of every sequence of a batch.
pub struct Capture {
    /// One per sequence, zeros until the engine hands its rows over.
    sequences: Vec<Mutex<Activations>>,
}

impl Capture {
    /// Room for a batch of sequences with `seq_lens` tokens each.
    pub fn new(seq_lens: &[usize], n_sites: usize, hidden_size: usize) -> Self {
        let zeros = |&seq_len: &usize| Activations::zeros(seq_len, n_sites, hidden_size);
        Self { sequences: seq_lens.iter().map(zeros).map(Mutex::new).collect() }
    }

    /// Activations of every sequence, once the engine is done.
    pub fn into_sequences(self) -> Vec<Activations> {
        let numbers = |sequence: Mutex<_>| sequence.into_inner();
        let sequences = self.sequences.into_iter().map(numbers);
        sequences.map(|sequence| sequence.unwrap_or_else(PoisonError::into_inner)).collect()
    }
}

impl Sink for Capture {
    fn rows(&self, sequence: usize, site: usize, first: usize, rows: &[f32]) -> Result<()> {
        let mut to = self.sequences[sequence].lock().unwrap_or_else(PoisonError::into_inner);
        let (hidden, stride) = (to.hidden_size, to.n_sites * to.hidden_size);
        for (i, row) in rows.chunks_exact(hidden).enumerate() {
            let start = (first + i) * stride + site * hidden;
            to.data[start..start + hidden].copy_from_slice(row);
        }
        Ok(())
    }
}

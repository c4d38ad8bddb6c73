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
pub struct Capture<'a> {
    sequences: Vec<Tokens<'a>>,
}

/// Places of one sequence's tokens, `[n_sites, hidden_size]` each. Each has a lock of its own: threads
/// that hand over different tokens never wait for each other.
struct Tokens<'a> {
    hidden_size: usize,
    places: Vec<Mutex<&'a mut [f32]>>,
}

impl<'a> Capture<'a> {
    /// A sink that fills in `activations`, one for every sequence of a batch.
    pub fn new(activations: &'a mut [Activations]) -> Self {
        let tokens = |Activations { n_sites, hidden_size, data, .. }: &'a mut Activations| Tokens {
            hidden_size: *hidden_size,
            places: data.chunks_exact_mut(*n_sites * *hidden_size).map(Mutex::new).collect(),
        };
        Self { sequences: activations.iter_mut().map(tokens).collect() }
    }
}

impl Sink for Capture<'_> {
    fn rows(&self, sequence: usize, site: usize, first: usize, rows: &[f32]) -> Result<()> {
        let Tokens { hidden_size, places } = &self.sequences[sequence];
        for (row, place) in rows.chunks_exact(*hidden_size).zip(&places[first..]) {
            let mut sites = place.lock().unwrap_or_else(PoisonError::into_inner);
            sites[site * hidden_size..][..*hidden_size].copy_from_slice(row);
        }
        Ok(())
    }
}

//! An engine without a model: the activations of a token are its own and a trace of those before it.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use alknet_core::{
    Error, Result,
    model::{Backend, KvCache, Probe, Readout, Sequence, Sink, Site, TokenId},
};

/// Rows of a sequence that are handed over at once, so that sinks see several runs.
const RUN: usize = 3;

/// Root mean square of every row, far above what any token's loudness is.
pub(crate) const RMS: f32 = 1000.0;

/// How loud a token is, per component of `CodebookFile::valid`.
pub(crate) type Loudness = fn(TokenId) -> [f32; 3];

/// Component `k` of token `t` at the first site is `loudness(id_t)[k]` plus a trace, below 0.01, of
/// all ids up to `t`; the second site repeats it, halved by the codebook. The last entry brings every
/// row to a root mean square of [`RMS`].
pub(crate) struct Synthetic {
    pub(crate) sites: Vec<Site>,
    pub(crate) hidden_size: usize,
    pub(crate) max_position_embeddings: usize,
    pub(crate) loudness: Loudness,
    /// Tokens read so far, by all sequences.
    pub(crate) work: Arc<AtomicUsize>,
    /// Tokens and readouts of which all sites have been handed over.
    pub(crate) deep: Arc<AtomicUsize>,
}

impl Synthetic {
    /// As `CodebookFile::valid` needs it.
    pub(crate) fn new(loudness: Loudness) -> Self {
        let sites = ["1.resid_post", "3.mlp_out"].map(|site| site.parse().unwrap()).to_vec();
        Self {
            sites,
            hidden_size: 4,
            max_position_embeddings: 64,
            loudness,
            work: Arc::default(),
            deep: Arc::default(),
        }
    }

    /// Activations of the last of `read`, at any site.
    fn row(&self, read: &[TokenId]) -> Vec<f32> {
        let trace = read.iter().fold(7_u32, |hash, id| hash.wrapping_mul(31).wrapping_add(*id));
        let mut row = vec![(trace % 1000) as f32 * 1e-5; self.hidden_size];
        let loudness = read.last().map_or([0.0; 3], |&id| (self.loudness)(id));
        for (x, loud) in row.iter_mut().zip(loudness) {
            *x += loud;
        }
        if let Some((last, others)) = row.split_last_mut() {
            let sum: f32 = others.iter().map(|x| x * x).sum();
            *last = (self.hidden_size as f32 * RMS * RMS - sum).sqrt();
        }
        row
    }
}

impl Backend for Synthetic {
    fn name(&self) -> String {
        "synthetic".to_owned()
    }

    fn hidden_size(&self) -> usize {
        self.hidden_size
    }

    fn max_position_embeddings(&self) -> usize {
        self.max_position_embeddings
    }

    fn sites(&self) -> &[Site] {
        &self.sites
    }

    fn passes_at_once(&self) -> usize {
        1
    }

    fn reads_learned(&self) -> bool {
        false
    }

    fn new_cache(&self) -> KvCache {
        KvCache::new(0)
    }

    fn forward(&self, batch: &mut [Sequence<'_>], sink: &dyn Sink) -> Result<()> {
        for (index, sequence) in batch.iter_mut().enumerate() {
            self.work.fetch_add(sequence.input_ids.len(), Ordering::Relaxed);
            let past = sequence.cache.len();
            let read = &mut sequence.cache.input_ids;
            read.extend_from_slice(sequence.input_ids);
            if read.len() > self.max_position_embeddings {
                return Err(Error::Input("more positions than the model has".to_owned()));
            }
            let mut rows: Vec<_> = (past..read.len()).map(|t| self.row(&read[..=t])).collect();
            for Readout { after, probe } in sequence.readouts {
                let Probe::Token(token) = probe else {
                    return Err(Error::Input("this engine reads tokens only".to_owned()));
                };
                rows.push(self.row(&[&read[..past + after], &[*token]].concat()));
            }
            let hand_over = |sites: Range<usize>| {
                let mut runs = rows.chunks(RUN).enumerate();
                let each = |(run, rows): (usize, &[Vec<f32>])| {
                    sites
                        .clone()
                        .try_for_each(|site| sink.rows(index, site, run * RUN, &rows.concat()))
                };
                runs.try_for_each(each)
            };
            let asked = sink.asks_after().map_or(0, |site| site + 1);
            hand_over(0..asked)?;
            if asked > 0 && sink.is_done(index)? {
                continue;
            }
            hand_over(asked..self.sites.len())?;
            self.deep.fetch_add(rows.len(), Ordering::Relaxed);
        }
        Ok(())
    }
}

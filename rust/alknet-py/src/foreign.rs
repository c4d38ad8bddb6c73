//! A Python `DetectorModel` as an engine of the core.

use alknet_core::{
    Error, Result,
    model::{Backend, KvCache, Probe, Readout, Sequence, Sink, Site, TokenId},
};
use numpy::{PyArray1, PyArrayMethods, PyReadonlyArray3, PyUntypedArrayMethods};
use pyo3::prelude::*;

/// Calls `model.activations(input_ids)`, or `model.activations(input_ids, readouts)` where there are some, for every
/// sequence; nothing is cached between calls.
pub(crate) struct ForeignBackend {
    model: Py<PyAny>,
    name: String,
    sites: Vec<Site>,
    hidden_size: usize,
    max_position_embeddings: usize,
    bos_token_id: Option<TokenId>,
    reads_learned: bool,
}

impl ForeignBackend {
    pub(crate) fn new(py: Python<'_>, model: Py<PyAny>) -> PyResult<Self> {
        let bound = model.bind(py);
        let sites: Vec<String> = bound.getattr("sites")?.extract()?;
        let sites = sites
            .iter()
            .map(|site| site.parse().map_err(|error| crate::boundary::to_py_err(py, &error)))
            .collect::<PyResult<Vec<Site>>>()?;
        Ok(Self {
            name: bound.get_type().name()?.to_string(),
            hidden_size: bound.getattr("hidden_size")?.extract()?,
            max_position_embeddings: bound.getattr("max_position_embeddings")?.extract()?,
            bos_token_id: bound.getattr("bos_token_id")?.extract()?,
            reads_learned: match bound.getattr_opt("reads_learned")? {
                Some(reads) => reads.is_truthy()?,
                None => false,
            },
            sites,
            model,
        })
    }

    pub(crate) fn bos_token_id(&self) -> Option<TokenId> {
        self.bos_token_id
    }

    /// What Python gets of a readout: how many tokens it sees, and a token or an array `[n_blocks, hidden_size]`.
    fn readout<'py>(
        &self,
        py: Python<'py>,
        first: usize,
        readout: &Readout<'_>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let probe = match readout.probe {
            Probe::Token(id) => id.into_pyobject(py)?.into_any(),
            Probe::Learned(vectors) => {
                let shape = [vectors.len() / self.hidden_size, self.hidden_size];
                PyArray1::from_slice(py, vectors).reshape(shape)?.into_any()
            }
        };
        Ok((first + readout.after, probe).into_pyobject(py)?.into_any())
    }

    /// Activations of all `input_ids` and of `readouts`, which stand after row `first`,
    /// `[seq_len + n_readouts, n_sites, hidden_size]`, handed over from that row on.
    fn run(
        &self,
        input_ids: &[TokenId],
        readouts: &[Readout<'_>],
        first: usize,
        sequence: usize,
        sink: &dyn Sink,
    ) -> Result<()> {
        let rows = Python::attach(|py| -> PyResult<Vec<f32>> {
            let ids = input_ids.to_vec();
            let array = match readouts {
                [] => self.model.call_method1(py, "activations", (ids,))?,
                _ => {
                    let readouts = readouts.iter().map(|readout| self.readout(py, first, readout));
                    let readouts = readouts.collect::<PyResult<Vec<_>>>()?;
                    self.model.call_method1(py, "activations", (ids, readouts))?
                }
            };
            let array: PyReadonlyArray3<'_, f32> = array.extract(py)?;
            let n_rows = input_ids.len() + readouts.len();
            let expected = [n_rows, self.sites.len(), self.hidden_size];
            if array.shape() != expected {
                let message = format!("shape {:?}, expected {expected:?}", array.shape());
                return Err(pyo3::exceptions::PyValueError::new_err(message));
            }
            Ok(array.as_array().iter().copied().collect())
        });
        let rows = rows.map_err(|error| self.failure(&error))?;
        let stride = self.sites.len() * self.hidden_size;
        for site in 0..self.sites.len() {
            let own = |row: &[f32]| row[site * self.hidden_size..][..self.hidden_size].to_vec();
            let own: Vec<f32> = rows.chunks_exact(stride).skip(first).flat_map(own).collect();
            sink.rows(sequence, site, 0, &own)?;
        }
        Ok(())
    }

    /// The type of a Python exception only: its message might quote the text.
    fn failure(&self, error: &PyErr) -> Error {
        let kind = Python::attach(|py| error.get_type(py).name().map(|name| name.to_string()));
        let kind = kind.unwrap_or_else(|_| "an exception".into());
        Error::Inference(format!(
            "{}.activations raised {kind}: it must return a float32 array (seq_len + n_readouts, n_sites, hidden_size)",
            self.name
        ))
    }
}

impl Backend for ForeignBackend {
    fn name(&self) -> String {
        self.name.clone()
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

    fn reads_learned(&self) -> bool {
        self.reads_learned
    }

    fn new_cache(&self) -> KvCache {
        KvCache::new(0)
    }

    fn forward(&self, batch: &mut [Sequence<'_>], sink: &dyn Sink) -> Result<()> {
        for (index, sequence) in batch.iter_mut().enumerate() {
            let first = sequence.cache.len();
            sequence.cache.input_ids.extend_from_slice(sequence.input_ids);
            self.run(&sequence.cache.input_ids, sequence.readouts, first, index, sink)?;
        }
        Ok(())
    }
}

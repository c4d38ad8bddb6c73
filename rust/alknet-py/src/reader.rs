//! `Reader`: activations without a codebook, for calibration.

use std::path::PathBuf;

use alknet_core::{
    self as core, Engine, ReaderOptions,
    capture::Activations,
    model::{Probe, Site, TokenId},
    reader::WindowLayout,
    window::Closing,
};
use numpy::{PyArray1, PyArrayMethods, PyReadonlyArray2};
use pyo3::{prelude::*, types::PyString};

use crate::boundary::{enter_core, exception, utf8};

/// What closes a text: a token id, or a float32 array `[n_blocks, hidden_size]`.
#[derive(FromPyObject)]
enum Closer<'py> {
    Token(TokenId),
    Learned(PyReadonlyArray2<'py, f32>),
}

impl Closer<'_> {
    fn probe(&self) -> Probe {
        match self {
            Self::Token(token) => Probe::Token(*token),
            Self::Learned(vectors) => Probe::Learned(vectors.as_array().iter().copied().collect()),
        }
    }
}

/// Tokenizer and engine of a detector.
#[pyclass(frozen, module = "alknet_firewall._core")]
pub(crate) struct Reader(core::Reader);

#[pymethods]
impl Reader {
    #[new]
    #[pyo3(signature = (detector, sites, *, engine="native", threads=None, isa=None))]
    fn new(
        py: Python<'_>,
        detector: PathBuf,
        sites: Vec<String>,
        engine: &str,
        threads: Option<usize>,
        isa: Option<&str>,
    ) -> PyResult<Self> {
        let options = reader_options(py, engine, threads, isa)?;
        let reader = enter_core(py, || {
            let sites =
                sites.iter().map(|site| site.parse()).collect::<core::Result<Vec<Site>>>()?;
            core::Reader::open(&detector, &sites, &options)
        })?;
        Ok(Self(reader))
    }

    fn activations<'py>(&self, text: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyAny>> {
        let (py, text) = (text.py(), utf8(text)?);
        let activations = enter_core(py, || self.0.activations(&text))?;
        activations_array(py, activations)
    }

    #[pyo3(signature = (texts, *, window, stride, max_tokens, closing))]
    fn window_means<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<Bound<'py, PyString>>,
        window: usize,
        stride: usize,
        max_tokens: usize,
        closing: Option<(Vec<Closer<'py>>, usize)>,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let texts = texts.iter().map(utf8).collect::<PyResult<Vec<_>>>()?;
        let layout = WindowLayout { window, stride, max_tokens };
        let closing = closing.map(|(closers, every)| Closing {
            probes: closers.iter().map(Closer::probe).collect(),
            every,
        });
        let means = enter_core(py, || {
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            self.0.window_means(&texts, &layout, closing.as_ref())
        })?;
        let width = self.0.backend().sites().len() * self.0.backend().hidden_size();
        let array = |rows: Vec<f32>| {
            let n = rows.len() / width;
            Ok(PyArray1::from_vec(py, rows).reshape([n, width])?.into_any())
        };
        means.into_iter().map(array).collect()
    }

    fn count_tokens(&self, text: &Bound<'_, PyString>) -> PyResult<usize> {
        let (py, text) = (text.py(), utf8(text)?);
        enter_core(py, || Ok(self.0.tokenizer().encode(&text)?.input_ids.len()))
    }

    #[getter]
    fn engine(&self) -> String {
        self.0.backend().name()
    }
}

/// Options of the reader from their Python values.
pub(crate) fn reader_options(
    py: Python<'_>,
    engine: &str,
    threads: Option<usize>,
    isa: Option<&str>,
) -> PyResult<ReaderOptions> {
    let config = |message: String| exception(py, "ConfigError", message);
    let engine = match engine {
        "native" => Engine::Native,
        "candle" => Engine::Candle,
        other => {
            return Err(config(format!(
                "engine {other:?} is unknown: use \"native\" or \"candle\""
            )));
        }
    };
    if threads == Some(0) {
        return Err(config(
            "threads is 0: use 1 or more, or None for what the machine allows".into(),
        ));
    }
    let isa = isa.map(str::parse::<core::Isa>).transpose();
    let isa = isa.map_err(|error| config(error.to_string()))?;
    Ok(ReaderOptions { engine, threads, isa })
}

/// `(seq_len, n_sites, hidden_size)` float32.
pub(crate) fn activations_array(
    py: Python<'_>,
    activations: Activations,
) -> PyResult<Bound<'_, PyAny>> {
    let shape = [activations.seq_len, activations.n_sites, activations.hidden_size];
    Ok(PyArray1::from_vec(py, activations.data).reshape(shape)?.into_any())
}

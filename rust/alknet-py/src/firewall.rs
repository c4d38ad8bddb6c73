//! `Firewall` and `Stream`.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use alknet_core::{self as core, Alarm, AlarmLevel, FirewallOptions, Input, Origin, Thresholds};
use pyo3::{
    prelude::*,
    types::{PyString, PyTuple},
};

use crate::{
    boundary::{enter_core, exception, utf8},
    foreign::ForeignBackend,
    reader::{activations_array, reader_options},
};

/// A loaded detector.
#[pyclass(frozen, module = "alknet_firewall._core")]
pub(crate) struct Firewall(Arc<core::Firewall>);

#[pymethods]
impl Firewall {
    #[new]
    #[pyo3(signature = (detector, *, codebook=None, suspicious=0.3, dangerous=0.7, max_tokens=None,
                        engine="native", threads=None, isa=None, model=None))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of one constructor")]
    fn new(
        py: Python<'_>,
        detector: PathBuf,
        codebook: Option<PathBuf>,
        suspicious: f64,
        dangerous: f64,
        max_tokens: Option<usize>,
        engine: &str,
        threads: Option<usize>,
        isa: Option<&str>,
        model: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let reader = reader_options(py, engine, threads, isa)?;
        let foreign = model.map(|model| ForeignBackend::new(py, model)).transpose()?;
        let firewall = enter_core(py, || {
            let thresholds = Thresholds::new(suspicious, dangerous)?;
            let options = FirewallOptions { reader, thresholds, max_tokens };
            match foreign {
                None => core::Firewall::open(&detector, codebook.as_deref(), &options),
                Some(backend) => {
                    let (codebook, bos) = (codebook.as_deref(), backend.bos_token_id());
                    let backend = Arc::new(backend);
                    core::Firewall::with_backend(&detector, codebook, backend, bos, &options)
                }
            }
        })?;
        Ok(Self(Arc::new(firewall)))
    }

    #[pyo3(signature = (text, origin=None))]
    fn screen<'py>(
        &self,
        text: &Bound<'py, PyString>,
        origin: Option<&str>,
    ) -> PyResult<Bound<'py, PyTuple>> {
        let (py, text) = (text.py(), utf8(text)?);
        let origin = parse_origin(py, origin)?;
        let alarm = enter_core(py, || self.0.screen(&text, origin))?;
        to_tuple(py, &text, &alarm)
    }

    fn screen_batch<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<Bound<'py, PyString>>,
        origins: Vec<Option<String>>,
    ) -> PyResult<Vec<Bound<'py, PyTuple>>> {
        let texts = texts.iter().map(utf8).collect::<PyResult<Vec<_>>>()?;
        let origins = origins
            .iter()
            .map(|origin| parse_origin(py, origin.as_deref()))
            .collect::<PyResult<Vec<_>>>()?;
        let alarms = enter_core(py, || {
            let inputs: Vec<_> =
                texts.iter().zip(&origins).map(|(text, &origin)| Input { text, origin }).collect();
            self.0.screen_batch(&inputs)
        })?;
        texts.iter().zip(&alarms).map(|(text, alarm)| to_tuple(py, text, alarm)).collect()
    }

    #[pyo3(signature = (origin=None))]
    fn stream(&self, py: Python<'_>, origin: Option<&str>) -> PyResult<Stream> {
        let stream = core::Stream::new(self.0.clone(), parse_origin(py, origin)?);
        Ok(Stream(Mutex::new(Some(stream))))
    }

    fn activations<'py>(&self, text: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyAny>> {
        let (py, text) = (text.py(), utf8(text)?);
        let activations = enter_core(py, || self.0.reader().activations(&text))?;
        activations_array(py, activations)
    }

    #[getter]
    fn engine(&self) -> String {
        self.0.reader().backend().name()
    }

    #[getter]
    fn sites(&self) -> Vec<String> {
        self.0.codebook().sites.iter().map(ToString::to_string).collect()
    }

    #[getter]
    fn detector(&self) -> &str {
        &self.0.codebook().detector
    }
}

/// A text that is still arriving.
#[pyclass(frozen, module = "alknet_firewall._core")]
pub(crate) struct Stream(Mutex<Option<core::Stream>>);

#[pymethods]
impl Stream {
    fn feed<'py>(&self, chunk: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyTuple>> {
        let (py, chunk) = (chunk.py(), utf8(chunk)?);
        let (text, alarm) = enter_core(py, || {
            let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            // A stream that fails is gone: what it has read is no longer known.
            let mut stream = slot.take().ok_or_else(finished)?;
            let alarm = stream.feed(&chunk)?;
            let text = stream.text().to_owned();
            *slot = Some(stream);
            Ok((text, alarm))
        })?;
        to_tuple(py, &text, &alarm)
    }

    fn finish<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let (text, alarm) = enter_core(py, || {
            let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let stream = slot.take().ok_or_else(finished)?;
            let text = stream.text().to_owned();
            Ok((text, stream.finish()?))
        })?;
        to_tuple(py, &text, &alarm)
    }
}

fn finished() -> core::Error {
    core::Error::Input("the stream is finished or has failed: start a new one".into())
}

fn parse_origin(py: Python<'_>, origin: Option<&str>) -> PyResult<Option<Origin>> {
    match origin {
        None => Ok(None),
        Some("user") => Ok(Some(Origin::User)),
        Some("document") => Ok(Some(Origin::Document)),
        Some(_) => {
            let message = "origin must be \"user\", \"document\" or None".to_owned();
            Err(exception(py, "InputError", message))
        }
    }
}

/// The fields of an alarm in the order that `Alarm._from_core` takes them; spans in characters.
fn to_tuple<'py>(py: Python<'py>, text: &str, alarm: &Alarm) -> PyResult<Bound<'py, PyTuple>> {
    let level = match alarm.level {
        AlarmLevel::Clear => 0,
        AlarmLevel::Suspicious => 1,
        AlarmLevel::Dangerous => 2,
    };
    let signals: Vec<_> = alarm.signals.iter().map(|s| (s.name.as_str(), s.probability)).collect();
    let mut characters = Characters::new(text);
    let spans: Vec<_> = alarm
        .spans
        .iter()
        .map(|s| {
            let (start, end) = (characters.at(s.bytes.start), characters.at(s.bytes.end));
            (start, end, s.score, s.signal.as_str())
        })
        .collect();
    let unread = text[text.len() - alarm.unread_bytes..].chars().count();
    (
        level,
        alarm.score,
        alarm.p_value,
        alarm.novelty_p_value,
        signals,
        spans,
        alarm.origin.as_str(),
        alarm.n_tokens,
        unread,
        alarm.reason.map(core::Reason::as_str),
    )
        .into_pyobject(py)
}

/// Turns ascending byte offsets into character offsets in one walk over the text.
struct Characters<'a> {
    text: &'a str,
    byte: usize,
    character: usize,
}

impl<'a> Characters<'a> {
    fn new(text: &'a str) -> Self {
        Self { text, byte: 0, character: 0 }
    }

    fn at(&mut self, byte: usize) -> usize {
        if byte < self.byte {
            (self.byte, self.character) = (0, 0);
        }
        self.character += self.text[self.byte..byte].chars().count();
        self.byte = byte;
        self.character
    }
}

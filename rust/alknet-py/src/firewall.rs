//! `Firewall` and `Stream`.

use std::{
    ops::Range,
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
                        engine="native", threads=None, isa=None, early_exit=false, model=None))]
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
        early_exit: bool,
        model: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let reader = reader_options(py, engine, threads, isa)?;
        let foreign = model.map(|model| ForeignBackend::new(py, model)).transpose()?;
        let firewall = enter_core(py, || {
            let thresholds = Thresholds::new(suspicious, dangerous)?;
            let options = FirewallOptions { reader, thresholds, max_tokens, early_exit };
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
        let alarm = enter_core(py, || {
            Ok(in_characters(self.0.screen(&text, origin)?, &text, &Characters::new(&text)))
        })?;
        to_tuple(py, &alarm)
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
            let alarms = self.0.screen_batch(&inputs)?.into_iter().zip(&texts);
            let converted =
                alarms.map(|(alarm, text)| in_characters(alarm, text, &Characters::new(text)));
            Ok(converted.collect::<Vec<_>>())
        })?;
        alarms.iter().map(|alarm| to_tuple(py, alarm)).collect()
    }

    #[pyo3(signature = (origin=None))]
    fn stream(&self, py: Python<'_>, origin: Option<&str>) -> PyResult<Stream> {
        let stream = core::Stream::new(self.0.clone(), parse_origin(py, origin)?);
        Ok(Stream(Mutex::new(Some((stream, Characters::new(""))))))
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
pub(crate) struct Stream(Mutex<Option<(core::Stream, Characters)>>);

#[pymethods]
impl Stream {
    fn feed<'py>(&self, chunk: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyTuple>> {
        let (py, chunk) = (chunk.py(), utf8(chunk)?);
        let alarm = enter_core(py, || {
            let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            // A stream that fails is gone: what it has read is no longer known.
            let (mut stream, mut characters) = slot.take().ok_or_else(finished)?;
            let alarm = stream.feed(&chunk)?;
            characters.extend(stream.text());
            let alarm = in_characters(alarm, stream.text(), &characters);
            *slot = Some((stream, characters));
            Ok(alarm)
        })?;
        to_tuple(py, &alarm)
    }

    fn finish<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let alarm = enter_core(py, || {
            let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let (stream, characters) = slot.take().ok_or_else(finished)?;
            let text = stream.text().to_owned();
            Ok(in_characters(stream.finish()?, &text, &characters))
        })?;
        to_tuple(py, &alarm)
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

/// The fields of an alarm in the order that `Alarm._from_core` takes them.
fn to_tuple<'py>(py: Python<'py>, alarm: &Alarm) -> PyResult<Bound<'py, PyTuple>> {
    let level = match alarm.level {
        AlarmLevel::Clear => 0,
        AlarmLevel::Suspicious => 1,
        AlarmLevel::Dangerous => 2,
    };
    let signals: Vec<_> = alarm.signals.iter().map(|s| (s.name.as_str(), s.probability)).collect();
    let spans: Vec<_> = alarm
        .spans
        .iter()
        .map(|s| (s.bytes.start, s.bytes.end, s.score, s.signal.as_str()))
        .collect();
    (
        level,
        alarm.score,
        alarm.p_value,
        alarm.novelty_p_value,
        signals,
        spans,
        alarm.origin.map(Origin::as_str),
        alarm.n_tokens,
        alarm.unread_bytes,
        alarm.reason.map(core::Reason::as_str),
    )
        .into_pyobject(py)
}

/// The same alarm with characters, as Python counts them, in place of bytes.
fn in_characters(mut alarm: Alarm, text: &str, characters: &Characters) -> Alarm {
    for span in &mut alarm.spans {
        let Range { start, end } = span.bytes;
        span.bytes = characters.before(text, start)..characters.before(text, end);
    }
    let read = text.len() - alarm.unread_bytes;
    alarm.unread_bytes = characters.before(text, text.len()) - characters.before(text, read);
    alarm
}

/// How many characters stand before every [`Characters::STEP`]th byte of a text, so that counting
/// them takes no walk over all of it.
struct Characters(Vec<usize>);

impl Characters {
    const STEP: usize = 4096;

    fn new(text: &str) -> Self {
        let mut characters = Self(vec![0]);
        characters.extend(text);
        characters
    }

    /// Takes in what has been added to the text.
    fn extend(&mut self, text: &str) {
        while self.0.len() * Self::STEP <= text.len() {
            self.0.push(self.before(text, self.0.len() * Self::STEP));
        }
    }

    /// Characters of `text` that start before byte `end`.
    fn before(&self, text: &str, end: usize) -> usize {
        let known = (end / Self::STEP).min(self.0.len() - 1);
        let is_first = |byte: &&u8| !matches!(byte, 0x80..0xC0);
        self.0[known] + text.as_bytes()[known * Self::STEP..end].iter().filter(is_first).count()
    }
}

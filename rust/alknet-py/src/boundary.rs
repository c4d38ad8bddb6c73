//! The one door between Python and the core.

use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind},
};

use alknet_core::Error;
use pyo3::{prelude::*, sync::PyOnceLock, types::PyString};

thread_local! {
    static IN_CORE: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` without the GIL; every call into the core goes through here.
///
/// A panic becomes `InferenceError`, an ordinary `Exception`. PyO3's `PanicException` derives from
/// `BaseException` and would slip past a caller's `except Exception`: in a firewall, the branch that blocks.
pub(crate) fn enter_core<T: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> alknet_core::Result<T> + Send,
) -> PyResult<T> {
    let outcome = py.detach(|| {
        let before = IN_CORE.replace(true);
        let outcome = catch_unwind(AssertUnwindSafe(work));
        IN_CORE.set(before);
        outcome
    });
    match outcome {
        Ok(result) => result.map_err(|error| to_py_err(py, &error)),
        Err(_) => {
            let message = "internal error: the text was not screened".to_owned();
            Err(to_py_err(py, &Error::Inference(message)))
        }
    }
}

/// Silences the panic message inside the core: the standard library's messages about strings quote
/// the string, which is screened text.
pub(crate) fn keep_panics_quiet() {
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !IN_CORE.get() {
            previous(info);
        }
    }));
}

/// The exception of the package's hierarchy for a core error.
pub(crate) fn to_py_err(py: Python<'_>, error: &Error) -> PyErr {
    let class = match error {
        Error::Config(_) => "ConfigError",
        Error::Input(_) => "InputError",
        Error::ModelLoad { .. } => "ModelLoadError",
        Error::Codebook(_) => "CodebookError",
        _ => "InferenceError",
    };
    exception(py, class, error.to_string())
}

/// An exception of `alknet_firewall.errors`.
pub(crate) fn exception(py: Python<'_>, class: &str, message: String) -> PyErr {
    static ERRORS: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
    let errors = ERRORS
        .get_or_try_init(py, || py.import("alknet_firewall.errors").map(Bound::unbind))
        .and_then(|errors| errors.bind(py).getattr(class))
        .and_then(|class| class.call1((message,)));
    match errors {
        Ok(value) => PyErr::from_value(value),
        Err(error) => error,
    }
}

/// UTF-8 of a Python string.
///
/// # Errors
/// `InputError` for unpaired surrogates, which no UTF-8 text has.
pub(crate) fn utf8(text: &Bound<'_, PyString>) -> PyResult<String> {
    text.to_cow().map(std::borrow::Cow::into_owned).map_err(|_| {
        let message = "the text holds unpaired surrogates and is no valid Unicode: \
                       decode it again, or replace them with text.encode('utf-8', 'replace').decode()";
        exception(text.py(), "InputError", message.to_owned())
    })
}

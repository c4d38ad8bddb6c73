//! PyO3 binding: types in, types out, no behaviour of its own.

mod boundary;
mod firewall;
mod foreign;
mod functions;
mod reader;

use pyo3::prelude::*;

/// Native part of `alknet_firewall`; use the package, not this module.
#[pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use super::firewall::{Firewall, Stream};
    #[pymodule_export]
    use super::functions::{
        build_info, fingerprint, inspect_codebook, pack_model, score, token_ids,
    };
    #[pymodule_export]
    use super::reader::Reader;

    use super::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        super::boundary::keep_panics_quiet();
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}

//! Module functions.

use std::{collections::HashMap, path::PathBuf};

use alknet_core::{
    self as core, Codebook, alarm, firewall,
    model::{TokenId, weights::Weights},
    pack,
    tokenize::Tokenizer,
};
use pyo3::{prelude::*, types::PyString};

use crate::boundary::{enter_core, utf8};

/// Packs the first `num_layers` blocks of a GGUF file or safetensors folder into `out_dir`.
#[pyfunction]
pub(crate) fn pack_model(
    py: Python<'_>,
    source: PathBuf,
    out_dir: PathBuf,
    num_layers: usize,
) -> PyResult<()> {
    enter_core(py, || pack::pack(&source, &out_dir, num_layers))
}

/// sha256 of the files of a detector folder that a codebook is bound to.
#[pyfunction]
pub(crate) fn fingerprint(py: Python<'_>, detector: PathBuf) -> PyResult<HashMap<&str, String>> {
    let fingerprint = enter_core(py, || {
        let weights = Weights::open(&detector.join("model.safetensors"))?;
        firewall::fingerprint(&detector, &weights)
    })?;
    Ok(HashMap::from([
        ("weights_sha256", fingerprint.weights_sha256),
        ("tokenizer_sha256", fingerprint.tokenizer_sha256),
        ("config_sha256", fingerprint.config_sha256),
    ]))
}

/// Tokens of a text as the model of a detector folder reads it.
#[pyfunction]
pub(crate) fn token_ids(
    py: Python<'_>,
    detector: PathBuf,
    text: &Bound<'_, PyString>,
) -> PyResult<Vec<TokenId>> {
    let text = utf8(text)?;
    enter_core(py, || {
        let tokenizer = Tokenizer::from_file(&detector.join("tokenizer.json"))?;
        Ok(tokenizer.encode(&text)?.input_ids)
    })
}

/// Metadata of a codebook file, after all its checks.
#[pyfunction]
pub(crate) fn inspect_codebook(py: Python<'_>, path: PathBuf) -> PyResult<HashMap<String, String>> {
    let codebook = enter_core(py, || Codebook::from_file(&path))?;
    let mut metadata = codebook.metadata.clone();
    metadata.insert("n_components".into(), codebook.n_components().to_string());
    Ok(metadata)
}

/// Score of a p-value.
#[pyfunction]
pub(crate) fn score(p_value: f64) -> f64 {
    alarm::score(p_value)
}

/// How this library was built and what it finds on this machine.
#[pyfunction]
pub(crate) fn build_info(py: Python<'_>) -> PyResult<HashMap<&'static str, String>> {
    enter_core(py, || Ok(core::build_info()))
}

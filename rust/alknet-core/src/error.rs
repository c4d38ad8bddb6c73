//! One error type, its variants grouped by the stage that raises them.
//!
//! Messages say what was found, what was expected and what to do. They never hold screened text.

use std::path::{Path, PathBuf};

/// What went wrong, and in which stage.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option has a value outside its range, or options contradict each other.
    #[error("{0}")]
    Config(String),
    /// The text cannot be screened as given.
    #[error("{0}")]
    Input(String),
    /// A model, tokenizer or detector file is missing, damaged or not supported.
    #[error("{}: {problem}", path.display())]
    ModelLoad {
        /// The file that was read.
        path: PathBuf,
        /// What is wrong with it and what would be right.
        problem: String,
    },
    /// A codebook is damaged, inconsistent or made for another detector.
    #[error("codebook: {0}")]
    Codebook(String),
    /// The forward pass or the scoring failed; there is no verdict.
    #[error("{0}")]
    Inference(String),
}

impl Error {
    /// A [`Error::ModelLoad`] for `path`.
    pub fn model(path: &Path, problem: impl Into<String>) -> Self {
        Self::ModelLoad { path: path.to_owned(), problem: problem.into() }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Inference(format!("candle: {error}"))
    }
}

/// Result of the core crate.
pub type Result<T> = std::result::Result<T, Error>;

//! Text in, alarm out: the pipeline of alknet-firewall in pure Rust.
//!
//! ```text
//! text ─ normalize ─ tokenize ─ model ─ project ─ window ─ score ─ alarm
//!  str    views+map   input_ids  h_{t,s}  z_{t,k}   z̄_{w,k}   P, p    Alarm
//! ```
//!
//! A small language model reads the text; the hidden states of a few layers are projected onto the
//! components of a [`codebook`], and the windowed projections are placed in the distributions that
//! ordinary text has there. One file per stage, data flows one way: a stage knows its neighbours'
//! types and nothing else, and [`firewall`] wires them together.
//!
//! This crate touches neither network, environment nor clock: it reads local files and returns values.

use std::collections::HashMap;

pub mod alarm;
mod batcher;
pub mod capture;
mod cascade;
pub mod codebook;
pub mod error;
pub mod firewall;
pub mod model;
pub mod normalize;
pub mod pack;
pub mod project;
pub mod reader;
pub mod score;
pub mod spline;
pub mod stream;
pub mod tokenize;
pub mod window;

pub use alarm::{Alarm, AlarmLevel, Reason, Signal, Span, Thresholds};
pub use alknet_kernels::Isa;
pub use codebook::{Codebook, Origin};
pub use error::{Error, Result};
pub use firewall::{Firewall, FirewallOptions, Input};
pub use reader::{Engine, Reader, ReaderOptions};
pub use stream::Stream;

/// How this library was built and what it finds on this machine, for bug reports.
pub fn build_info() -> HashMap<&'static str, String> {
    let isas = alknet_kernels::Isa::available().map(|isa| isa.to_string()).collect::<Vec<_>>();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    HashMap::from([
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("target", format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS)),
        ("instruction sets", isas.join(", ")),
        ("threads allowed by affinity and quota", threads.to_string()),
    ])
}

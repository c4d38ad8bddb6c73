//! CPU kernels for Llama-type decoders.
//!
//! Linear products multiply 8-bit weights, one scale per output, by 8-bit activations, one scale per
//! token, and add up in 32-bit integers. Both sides are first rotated by a block Hadamard matrix,
//! which leaves the product as it is and spreads outlying channels over their block, so that one
//! scale per token is enough. What is rotated before it is rounded, and queries, keys, values and the
//! weights of attention, are bf16 numbers; sums and everything else are fp32.
//!
//! Integer sums are exact and every fp32 step has one order of operations, so a row's result does
//! not depend on its batch, on the number of threads, on how the input was cut into chunks, or on the
//! instruction set: all give the same bits ([`Isa::Amx`] takes numbers below 2⁻¹²⁶ for zero).
//!
//! The scalar code is the specification; one file per instruction set stands beside it:
//!
//! | file | holds |
//! |---|---|
//! | `isa.rs` | which instruction sets this CPU has |
//! | `scalar.rs`, `attention.rs` | what every kernel computes, written so that LLVM vectorises it |
//! | `avx2.rs`, `avxvnni.rs`, `avx512.rs`, `avx512bf16.rs`, `amx.rs` | the same kernels, with intrinsics where LLVM falls short |
//! | `avx512/sums.rs` | sums of products of bytes, in assembly |
//! | `amx/products.rs`, `amx/attention.rs`, `amx/rotation.rs`, `amx/tiles.rs` | linear products, attention and rotation on AMX tiles, and the tiles |
//! | `bf16.rs` | attention's product of bf16 numbers that `avx2.rs` and `avx512.rs` share |
//! | `bytes.rs` | the product of bytes that `avx2.rs`, `avxvnni.rs` and `avx512.rs` share |
//! | `dispatch.rs` | the table of kernels of one instruction set |
//! | `pack.rs` | 8-bit weights in the order in which the kernels read them |
//! | `rows.rs` | 8-bit activations, and what they are made from |
//! | `keys.rs` | queries, keys and values, bf16 numbers in fp32 rows or as tiles |
//! | `lines.rs` | numbers in whole cache lines |
//! | `inner.rs` | inner products in fp32, for what is read of the activations |
//! | `pool.rs` | the thread pool |
//! | `ops.rs` | the steps of a decoder block, and how threads share them: the crate's safe surface |
//!
//! Source of the rotation: QuaRot, arXiv 2404.00456.

#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512bf16;
#[cfg(target_arch = "x86_64")]
mod avxvnni;
#[cfg(target_arch = "x86_64")]
mod bf16;
#[cfg(target_arch = "x86_64")]
mod bytes;
mod dispatch;
mod inner;
mod isa;
mod keys;
mod lines;
mod ops;
mod pack;
mod pool;
mod rows;
mod scalar;
#[cfg(test)]
mod tests;

pub use inner::{dot, dots};
pub use isa::{Isa, UnknownIsa, UnsupportedIsa};
pub use keys::{KeyValues, NewPositions, Projection};
pub use ops::{Engine, Extension, Heads, Pass, Segment};
pub use pack::{MAX_INPUTS, MatrixSource, PackError, PackedMatrix, Widen, padded_outputs};
pub use pool::{Pool, Turn};
pub use rows::{Intermediate, QuantizedRows, TILE_ROWS};

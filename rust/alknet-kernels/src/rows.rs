//! 8-bit activations: `x ≈ scale · q`, one scale per row.

use crate::{
    lines::Lines,
    scalar::{K_ALIGN, hadamard_block},
};

/// Rows of a linear product's input: rotated, then rounded to 8 bits.
///
/// # Shapes
/// - `data`: `[rows, stride]`, `stride` the input width rounded up, filled with zeros
/// - `scales`: `[rows]`; NaN for a row that held a number that is not finite
/// - `offsets`: `[rows]`, `−128 · Σ q`, which undoes that stored weights are `w + 128`
/// - `excess`: `[rows, stride / 4]`, of which each row has `excess_len`; or both empty, for kernels
///   that multiply any rows
#[derive(Debug, Default)]
pub struct QuantizedRows {
    width: usize,
    stride: usize,
    pub(crate) data: Lines<i8>,
    pub(crate) scales: Vec<f32>,
    pub(crate) offsets: Vec<i32>,
    pub(crate) excess: Vec<Excess>,
    pub(crate) excess_len: Vec<u32>,
}

/// Four inputs of a row that are added to it once more, since `data` holds only a part of them.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Excess {
    /// Index of the first one.
    pub(crate) first: u32,
    pub(crate) four: [i8; 4],
}

impl QuantizedRows {
    /// Makes room for `rows` rows of `width` numbers; what they hold is unspecified.
    pub(crate) fn reshape(&mut self, rows: usize, width: usize) {
        self.width = width;
        self.stride = width.next_multiple_of(K_ALIGN);
        self.data.resize(rows * self.stride);
        self.scales.resize(rows, 0.0);
        self.offsets.resize(rows, 0);
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.scales.len()
    }

    /// Numbers in a row, without the filling.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Makes room for what kernels split off.
    pub(crate) fn reshape_excess(&mut self) {
        self.excess.resize(self.data.len() / 4, Excess::default());
        self.excess_len.resize(self.rows(), 0);
    }

    /// What was split off a row.
    #[inline]
    pub(crate) fn excess(&self, row: usize) -> &[Excess] {
        match self.excess_len.get(row) {
            Some(len) => &self.excess[row * (self.stride / 4)..][..*len as usize],
            None => &[],
        }
    }

    /// Bytes from one row to the next.
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// Size of the blocks that the rotation mixes.
    pub(crate) fn block(&self) -> usize {
        hadamard_block(self.width)
    }
}

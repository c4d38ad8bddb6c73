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
#[derive(Debug, Default)]
pub struct QuantizedRows {
    width: usize,
    stride: usize,
    pub(crate) data: Lines<i8>,
    pub(crate) scales: Vec<f32>,
    pub(crate) offsets: Vec<i32>,
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

    /// Bytes from one row to the next.
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// Size of the blocks that the rotation mixes.
    pub(crate) fn block(&self) -> usize {
        hadamard_block(self.width)
    }
}

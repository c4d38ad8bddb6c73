//! 8-bit activations: `x ≈ scale · q`, one scale per row.

use std::ops::Range;

use crate::{
    lines::Lines,
    scalar::{K_ALIGN, hadamard_block},
};

/// Rows of a linear product's input: rotated, then rounded to 8 bits.
///
/// # Shapes
/// - `data`: `[rows, stride]`, `stride` the input width rounded up, filled with zeros; for kernels that
///   multiply tiles, those of 16 rows: `[rows / 16, stride / 64, 16, 64]`, rows rounded up
/// - `scales`: `[rows]`; NaN for a row that held a number that is not finite
/// - `offsets`: `[rows]`, `−128 · Σ q`, which undoes that stored weights are `w + 128`; unspecified for
///   kernels that multiply tiles
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

/// Rows of a tile of [`Intermediate`]: those that one thread takes are best a multiple of it.
pub const TILE_ROWS: usize = 16;

/// Numbers of a row in a tile.
pub(crate) const TILE_DEPTH: usize = 32;

/// Numbers of a tile.
pub(crate) const TILE_WORDS: usize = TILE_ROWS * TILE_DEPTH;

/// What attention, or gate and up, leave for the product after them: bf16 numbers in fp32, or in tiles, as the
/// kernels want them.
///
/// # Shapes
/// - `numbers`: `[rows, width]`, or longer
/// - `words`: `[rows / 16, width / 32, 16, 32]`, both rounded up: tiles; or longer
#[derive(Debug, Default)]
pub struct Intermediate {
    pub(crate) rows: usize,
    pub(crate) width: usize,
    pub(crate) numbers: Lines<f32>,
    pub(crate) words: Lines<u16>,
}

impl Intermediate {
    /// Makes room for `rows` rows of `width` numbers, in tiles or not; what they hold is unspecified.
    pub(crate) fn reshape(&mut self, rows: usize, width: usize, tiles: bool) {
        (self.rows, self.width) = (rows, width);
        if tiles {
            self.words.grow(rows.next_multiple_of(TILE_ROWS) * Self::padded(width));
        } else {
            self.numbers.grow(rows * width);
        }
    }

    /// Numbers of a row with the filling.
    pub(crate) fn padded(width: usize) -> usize {
        width.next_multiple_of(TILE_DEPTH)
    }

    /// Where number `column` of a row is in tiles; the next ones follow it up to a multiple of 32.
    #[inline]
    pub(crate) fn place(width: usize, row: usize, column: usize) -> usize {
        row / TILE_ROWS * TILE_ROWS * Self::padded(width)
            + column / TILE_DEPTH * TILE_WORDS
            + row % TILE_ROWS * TILE_DEPTH
            + column % TILE_DEPTH
    }

    /// Fills `numbers` from tiles.
    pub(crate) fn widen(&mut self) {
        self.numbers.grow(self.rows * self.width);
        for (i, number) in self.numbers[..self.rows * self.width].iter_mut().enumerate() {
            let word = self.words[Self::place(self.width, i / self.width, i % self.width)];
            *number = f32::from_bits(u32::from(word) << 16);
        }
    }
}

/// Four inputs of a row that are added to it once more, since `data` holds only a part of them.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Excess {
    /// Index of the first one.
    pub(crate) first: u32,
    pub(crate) four: [i8; 4],
}

impl QuantizedRows {
    /// Makes room for `rows` rows of `width` numbers, in tiles or not; what they hold is unspecified.
    pub(crate) fn reshape(&mut self, rows: usize, width: usize, tiles: bool) {
        self.width = width;
        self.stride = width.next_multiple_of(K_ALIGN);
        self.data.grow(if tiles { rows.next_multiple_of(TILE_ROWS) } else { rows } * self.stride);
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

    /// The tiles that hold `rows`, which begin with one.
    #[inline]
    pub(crate) fn tiles(&self, rows: &Range<usize>) -> &[i8] {
        &self.data[rows.start * self.stride..rows.end.next_multiple_of(TILE_ROWS) * self.stride]
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

//! Keys and values, and the queries beside them, in the form that attention reads.

use std::ops::Range;

use crate::{lines::Lines, ops::Heads, pool::Shared};

/// Result of the joint projection: rows of `[num_attention_heads + 2 · num_key_value_heads, head_dim]`,
/// bf16 numbers in fp32 or not, as the kernels want them; queries are scaled by `log₂ e / √head_dim`.
#[derive(Debug, Default)]
pub struct Projection {
    /// `[rows, qkv_width]`, or longer.
    pub(crate) numbers: Lines<f32>,
    /// `[rows, heads, BlockShape::row]`, heads filled with zeros; or longer.
    pub(crate) words: Lines<u16>,
}

impl Projection {
    /// Words of a row.
    pub(crate) fn width(heads: &Heads) -> usize {
        (heads.num_attention_heads + 2 * heads.num_key_value_heads) * BlockShape::new(heads).row
    }

    /// Where the words of a head begin.
    pub(crate) fn place(heads: &Heads, row: usize, head: usize) -> usize {
        row * Self::width(heads) + head * BlockShape::new(heads).row
    }
}

/// Keys (rotated) and values of one layer of one sequence. An engine fills and reads either the rows of
/// fp32 numbers or, where its attention runs on tiles, the blocks of bf16 numbers.
#[derive(Debug, Clone, Default)]
pub struct KeyValues {
    /// `[positions, kv_width]`.
    pub keys: Vec<f32>,
    /// `[positions, kv_width]`.
    pub values: Vec<f32>,
    pub(crate) blocks: KeyBlocks,
}

impl KeyValues {
    /// Whether `positions` positions of `width` numbers are held.
    pub fn holds(&self, positions: usize, width: usize) -> bool {
        let rows = |numbers: &Vec<f32>| numbers.len() == positions * width;
        let empty = self.keys.is_empty() && self.values.is_empty();
        match self.blocks.positions {
            0 => rows(&self.keys) && rows(&self.values),
            held => held == positions && empty,
        }
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        (self.keys.capacity() + self.values.capacity()) * size_of::<f32>()
            + self.blocks.words.bytes()
    }

    /// Forgets all positions and keeps the memory.
    pub fn clear(&mut self) {
        self.keys.clear();
        self.values.clear();
        self.blocks.positions = 0;
    }

    /// Makes this a copy of `other`, in the memory at hand where there is enough.
    pub fn copy_from(&mut self, other: &Self) {
        self.keys.clone_from(&other.keys);
        self.values.clone_from(&other.values);
        self.blocks.words.copy_from(&other.blocks.words, other.blocks.len);
        (self.blocks.positions, self.blocks.len) = (other.blocks.positions, other.blocks.len);
    }
}

/// Places of new positions in [`KeyValues`], and the right to fill them. Cut into runs of positions
/// by [`NewPositions::take`], they are filled by several threads.
pub struct NewPositions<'a> {
    pub(crate) positions: Range<usize>,
    /// Whether no position follows: then what is left of the last group is filled with zeros.
    pub(crate) last: bool,
    /// `[positions, kv_width]`, or empty.
    pub(crate) keys: &'a mut [f32],
    pub(crate) values: &'a mut [f32],
    /// Words of all blocks, or none.
    pub(crate) words: Shared<u16>,
}

impl<'a> NewPositions<'a> {
    /// Room in rows of fp32 numbers for `more` positions, for `expected` without allocating again.
    pub(crate) fn in_rows(
        heads: &Heads,
        cache: &'a mut KeyValues,
        more: usize,
        expected: usize,
    ) -> Self {
        let width = heads.kv_width();
        let past = cache.keys.len();
        for rows in [&mut cache.keys, &mut cache.values] {
            rows.reserve_exact(expected * width);
            rows.resize(past + more * width, 0.0);
        }
        let (keys, values) = (&mut cache.keys[past..], &mut cache.values[past..]);
        let first = past / width;
        Self {
            positions: first..first + more,
            last: true,
            keys,
            values,
            words: Shared::new(&mut []),
        }
    }

    /// As [`NewPositions::in_rows`], in blocks.
    pub(crate) fn in_blocks(
        heads: &Heads,
        cache: &'a mut KeyValues,
        more: usize,
        expected: usize,
    ) -> Self {
        let (shape, blocks) = (BlockShape::new(heads), &mut cache.blocks);
        blocks.reserve(shape, expected);
        let positions = blocks.grow(shape, more);
        let words = Shared::new(blocks.words_mut());
        Self { positions, last: true, keys: &mut [], values: &mut [], words }
    }

    /// Takes away the first `count` positions.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn take(&mut self, count: usize) -> Self {
        assert!(count <= self.positions.len());
        let width = self.keys.len() / self.positions.len().max(1);
        let cut = |rows: &mut &'a mut [f32]| {
            let (taken, rest) = std::mem::take(rows).split_at_mut(count * width);
            *rows = rest;
            taken
        };
        let (keys, values) = (cut(&mut self.keys), cut(&mut self.values));
        let middle = self.positions.start + count;
        let positions = self.positions.start..middle;
        self.positions.start = middle;
        let last = self.last && self.positions.is_empty();
        Self { positions, last, keys, values, words: self.words.again() }
    }
}

/// Positions of a block.
pub(crate) const BLOCK: usize = 64;

/// Positions that a row of a tile of values holds.
pub(crate) const GROUP: usize = 32;

/// Keys and values in bf16, block by block of [`BLOCK`] positions, in each head by head:
///
/// - keys `[BLOCK, row]`
/// - values `[BLOCK / GROUP, row, GROUP]`, rows being places in the head
///
/// which are rows of tiles: left sides of `K Qᵀ` and of `Vᵀ Pᵀ`. What lies after the last position is
/// unspecified for keys, and zero to the end of the group for values once new ones have been written.
#[derive(Debug, Clone, Default)]
pub(crate) struct KeyBlocks {
    pub(crate) positions: usize,
    words: Lines<u16>,
    /// Words of the blocks that hold positions.
    len: usize,
}

/// Measures of heads in [`KeyBlocks`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlockShape {
    /// Numbers in a head, filled with zeros to whole rows of tiles.
    pub(crate) row: usize,
    heads: usize,
}

impl BlockShape {
    pub(crate) fn new(heads: &Heads) -> Self {
        Self { row: heads.head_dim.next_multiple_of(GROUP), heads: heads.num_key_value_heads }
    }

    /// Words of a block's keys, or values, of one head.
    pub(crate) fn half(&self) -> usize {
        BLOCK * self.row
    }

    /// Words from one block to the next.
    pub(crate) fn block(&self) -> usize {
        2 * self.half() * self.heads
    }
}

impl KeyBlocks {
    /// Makes room for `more` positions.
    pub(crate) fn reserve(&mut self, shape: BlockShape, more: usize) {
        self.words.reserve_exact((self.positions + more).div_ceil(BLOCK) * shape.block());
    }

    /// Adds `more` positions, whose keys and values are still to be written.
    pub(crate) fn grow(&mut self, shape: BlockShape, more: usize) -> Range<usize> {
        let new = self.positions..self.positions + more;
        self.len = new.end.div_ceil(BLOCK) * shape.block();
        self.words.grow(self.len);
        self.positions = new.end;
        new
    }

    /// All words.
    pub(crate) fn words(&self) -> &[u16] {
        &self.words[..self.len]
    }

    /// All words.
    pub(crate) fn words_mut(&mut self) -> &mut [u16] {
        &mut self.words[..self.len]
    }
}

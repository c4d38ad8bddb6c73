//! Numbers in memory that begins with a cache line, so that no row of a tile lies in two.

use std::{
    marker::PhantomData,
    ops::{Deref, DerefMut},
};

/// Numbers without padding, of which every pattern of bits is one.
///
/// # Safety
/// The type must be such, and its size a divisor of 64.
pub(crate) unsafe trait Plain: Copy {}

// SAFETY: integers.
unsafe impl Plain for i8 {}
// SAFETY: integers.
unsafe impl Plain for u16 {}
// SAFETY: every pattern is a number, or NaN.
unsafe impl Plain for f32 {}

#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Numbers in whole cache lines.
#[derive(Debug, Clone)]
pub(crate) struct Lines<T> {
    lines: Vec<Line>,
    numbers: PhantomData<T>,
}

impl<T> Default for Lines<T> {
    fn default() -> Self {
        Self { lines: Vec::new(), numbers: PhantomData }
    }
}

impl<T: Plain> Lines<T> {
    const PER_LINE: usize = 64 / size_of::<T>();

    /// Makes room for at least `len` numbers; new ones are zero.
    ///
    /// Never makes less of it: what is used in turn for much and for little is not cleared every time.
    pub(crate) fn grow(&mut self, len: usize) {
        let lines = len.div_ceil(Self::PER_LINE);
        if self.lines.len() < lines {
            self.lines.resize(lines, Line([0; 64]));
        }
    }

    /// Makes room for `len` numbers in all without allocating more than that.
    pub(crate) fn reserve_exact(&mut self, len: usize) {
        self.lines.reserve_exact(len.div_ceil(Self::PER_LINE).saturating_sub(self.lines.len()));
    }

    /// Copies the first `len` numbers of `other` over those here.
    pub(crate) fn copy_from(&mut self, other: &Self, len: usize) {
        let len = len.div_ceil(Self::PER_LINE);
        if self.lines.len() < len {
            self.lines.clear();
            self.lines.extend_from_slice(&other.lines[..len]);
        } else {
            self.lines[..len].copy_from_slice(&other.lines[..len]);
        }
    }

    /// Bytes of memory.
    pub(crate) fn bytes(&self) -> usize {
        self.lines.capacity() * 64
    }
}

impl<T: Plain> Deref for Lines<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        let len = self.lines.len() * Self::PER_LINE;
        // SAFETY: lines are whole numbers of plain numbers, without padding.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), len) }
    }
}

impl<T: Plain> DerefMut for Lines<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let len = self.lines.len() * Self::PER_LINE;
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), len) }
    }
}

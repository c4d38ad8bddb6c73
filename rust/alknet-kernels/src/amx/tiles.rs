//! Tile registers: their configuration, and assembly that uses them.

use std::arch::asm;

/// Rows of a tile.
pub(super) const ROWS: usize = 16;
/// Bytes in a row of a tile.
pub(super) const ROW_BYTES: usize = 64;

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// The tile registers of this thread, configured: four sums in 0 to 3, operands in 4 to 7.
pub(super) struct Tiles {
    heights: (usize, usize),
}

impl Tiles {
    /// Tiles for the product of `upper` and `lower` rows with two tiles of columns.
    ///
    /// # Safety
    /// [`super::is_available`] must have said so.
    pub(super) unsafe fn new(upper: usize, lower: usize) -> Self {
        let tiles = Self { heights: (upper, lower) };
        tiles.configure();
        tiles
    }

    /// Changes the numbers of rows.
    pub(super) fn reshape(&mut self, upper: usize, lower: usize) {
        if self.heights != (upper, lower) {
            self.heights = (upper, lower);
            self.configure();
        }
    }

    fn configure(&self) {
        // A tile without rows is not allowed: where there are no lower rows, nobody uses theirs.
        let (upper, lower) = (self.heights.0 as u8, self.heights.1.max(1) as u8);
        let all = ROWS as u8;
        let mut rows = [0; 16];
        rows[..8].copy_from_slice(&[upper, upper, lower, lower, upper, lower, all, all]);
        let mut row_bytes = [0; 16];
        row_bytes[..8].fill(ROW_BYTES as u16);
        let configuration =
            Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows };
        // SAFETY: AMX is available, since `new` demands it; the palette has eight tiles of up to 16
        // rows of 64 bytes. No Rust code uses tiles.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, readonly));
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: AMX is available, since `new` demands it.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// Calls `asm!` with the registers that every product uses.
macro_rules! tile_asm {
    ($($code:expr,)* ; $($operand:tt)*) => {
        std::arch::asm!(
            $($code,)*
            $($operand)*
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}
pub(super) use tile_asm;

//! Tile registers: their configuration, and assembly that uses them.

use std::arch::asm;

/// Rows of a tile.
pub(super) const ROWS: usize = 16;
/// Bytes in a row of a tile.
pub(super) const ROW_BYTES: usize = 64;
/// Bytes in a tile.
pub(super) const TILE_BYTES: usize = ROWS * ROW_BYTES;

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// The tile registers of this thread, configured as eight of full size.
pub(super) struct Tiles(());

impl Tiles {
    /// Configures them.
    ///
    /// # Safety
    /// [`super::is_available`] must have said so.
    pub(super) unsafe fn new() -> Self {
        let (mut rows, mut row_bytes) = ([0; 16], [0; 16]);
        rows[..8].fill(ROWS as u8);
        row_bytes[..8].fill(ROW_BYTES as u16);
        let configuration =
            Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows };
        // SAFETY: AMX is available, by this function's contract; the palette has eight tiles of up to
        // 16 rows of 64 bytes. No Rust code uses tiles.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, readonly));
        }
        Self(())
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

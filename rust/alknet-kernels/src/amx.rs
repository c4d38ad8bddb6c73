//! AMX: products of whole tiles, 16 by 16 sums of 64 bytes each per instruction.
//!
//! Rust has no stable intrinsics for tiles, so that this file uses inline assembly. Tile registers and
//! their configuration belong to the thread; Rust code never touches them. [`Tiles`] configures
//! them, and releases them when it is dropped: a thread that has released its tiles has no tile
//! state for the operating system to save.

use std::{
    arch::{asm, x86_64::*},
    ops::Range,
    sync::OnceLock,
};

use crate::{
    attention::{self, Arithmetic, AttentionTask, Operand},
    avx2,
    avx512bf16::{self, Bf16, pair_all, pair_keys},
    dispatch::Kernels,
    isa::Isa,
    pack::PackedMatrix,
    rows::QuantizedRows,
    scalar::{K_ALIGN, LANES},
};

pub(crate) static KERNELS: Kernels =
    Kernels { isa: Isa::Amx, matmul, attention, ..avx512bf16::KERNELS };

/// Rows of a tile.
const ROWS: usize = 16;
/// Bytes in a row of a tile.
const ROW_BYTES: usize = 64;
/// Panels that one tile of few rows is multiplied with.
const FEW_ROWS_PANELS: usize = 4;

/// Whether the CPU has tiles of bytes and bf16 numbers, and the operating system lets this process
/// use them.
///
/// The system saves tiles only for processes that asked for it; the first call asks.
pub(crate) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| cpu_has_tiles() && system_saves_tiles() && permission())
}

/// Whether CPUID reports tiles of the usual size, and products of bytes and of bf16 numbers.
#[allow(unused_unsafe, reason = "CPUID is unsafe in older compilers")]
fn cpu_has_tiles() -> bool {
    const BF16_TILE_INT8: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    const TILE_LEAF: u32 = 0x1d;
    // SAFETY: every x86-64 CPU has CPUID.
    unsafe {
        if __cpuid(0).eax < TILE_LEAF || __cpuid_count(7, 0).edx & BF16_TILE_INT8 != BF16_TILE_INT8
        {
            return false;
        }
        let palette = __cpuid_count(TILE_LEAF, 1);
        let (row_bytes, tiles, rows) =
            (palette.ebx & 0xffff, palette.ebx >> 16, palette.ecx & 0xffff);
        row_bytes as usize == ROW_BYTES && tiles == 8 && rows as usize == ROWS
    }
}

/// Whether the operating system saves tiles and their configuration on a change of threads.
fn system_saves_tiles() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    const TILE_CONFIG_AND_DATA: u64 = 1 << 17 | 1 << 18;
    #[target_feature(enable = "xsave")]
    fn enabled_states() -> u64 {
        // SAFETY: register 0 exists where XGETBV does.
        unsafe { _xgetbv(0) }
    }
    // SAFETY: every x86-64 CPU has CPUID; OSXSAVE says that XGETBV may be used.
    #[allow(unused_unsafe, reason = "CPUID is unsafe in older compilers")]
    unsafe {
        __cpuid(1).ecx & OSXSAVE != 0
            && enabled_states() & TILE_CONFIG_AND_DATA == TILE_CONFIG_AND_DATA
    }
}

/// Asks Linux to let this process use tiles. It refuses where a thread's alternate signal stack is too
/// small for them, or where the system call is filtered.
#[cfg(target_os = "linux")]
fn permission() -> bool {
    const ARCH_PRCTL: isize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const TILE_DATA: usize = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: the call reads no memory; the kernel changes `rcx` and `r11` besides the result.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") TILE_DATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

/// Other systems have their own ways, which nobody has tried here.
#[cfg(not(target_os = "linux"))]
fn permission() -> bool {
    false
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// The tile registers of this thread, configured: sums in 0 to 3, operands in 4 to 7.
struct Tiles {
    heights: (usize, usize),
}

impl Tiles {
    /// Tiles for the product of `upper` and `lower` rows with two panels, or of `upper` rows with four.
    ///
    /// # Safety
    /// [`is_available`] must have said so.
    unsafe fn new(upper: usize, lower: usize) -> Self {
        let tiles = Self { heights: (upper, lower) };
        tiles.configure();
        tiles
    }

    /// Changes the numbers of rows.
    fn reshape(&mut self, upper: usize, lower: usize) {
        if self.heights != (upper, lower) {
            self.heights = (upper, lower);
            self.configure();
        }
    }

    fn configure(&self) {
        let (upper, lower) = (self.heights.0 as u8, self.heights.1 as u8);
        let all = ROWS as u8;
        let mut rows = [0; 16];
        // Upper rows with four panels; or upper and lower rows, each with two.
        let heights = if lower == 0 {
            [upper, upper, upper, upper, upper, all, all, all]
        } else {
            [upper, upper, lower, lower, upper, lower, all, all]
        };
        rows[..8].copy_from_slice(&heights);
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

/// Sums of a product, `[32, 2 · 16]` or `[16, 4 · 16]`.
#[repr(C, align(64))]
struct Sums([i32; 2 * ROWS * 2 * LANES]);

/// Sixteen prefetches, one kilobyte, from register `$at` plus `$offset`.
macro_rules! prefetch_kilobyte {
    ($at:literal, $offset:literal) => {
        concat!(
            prefetch_kilobyte!(@ $at, $offset, 0, 64, 128, 192, 256, 320, 384, 448),
            prefetch_kilobyte!(@ $at, $offset, 512, 576, 640, 704, 768, 832, 896, 960),
        )
    };
    (@ $at:literal, $offset:literal, $($line:literal),*) => {
        concat!($("prefetcht1 [", $at, " + ", $offset, " + ", $line, "]\n",)*)
    };
}

/// Calls `asm!` with the registers that every product uses.
macro_rules! tile_asm {
    ($($code:expr,)* ; $($operand:tt)*) => {
        asm!(
            $($code,)*
            $($operand)*
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// A product's operands.
#[derive(Clone, Copy)]
struct Operands {
    /// First of the rows.
    rows: *const i8,
    /// Bytes from one row to the next, a multiple of 64.
    stride: usize,
    /// First of the panels, one after the other, each of `16 · stride` bytes.
    panels: *const u8,
    /// Read soon: as many bytes as the panels have.
    fetch: *const u8,
}

/// Rows of two tiles by two panels.
///
/// # Safety
/// Tiles must be configured for upper and lower rows, of which `operands` has as many (`lower` is
/// the first of the lower ones). Both `panels` must be whole.
unsafe fn two_by_two<const FETCH: bool>(
    operands: Operands,
    lower: *const i8,
    second: *const u8,
    sums: &mut Sums,
) {
    macro_rules! call {
        ($($prefetch:expr),*) => {
            tile_asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{upper} + {stride}]",
                "tileloadd tmm6, [{first} + {line}]",
                "tileloadd tmm7, [{second} + {line}]",
                "tileloadd tmm5, [{lower} + {stride}]",
                "tdpbsud tmm0, tmm4, tmm6",
                "tdpbsud tmm1, tmm4, tmm7",
                "tdpbsud tmm2, tmm5, tmm6",
                "tdpbsud tmm3, tmm5, tmm7",
                $($prefetch,)*
                "add {upper}, 64",
                "add {lower}, 64",
                "add {first}, 1024",
                "add {second}, 1024",
                "add {fetch}, 2048",
                "dec {steps}",
                "jnz 2b",
                "lea {line}, [{line} + {line}]",
                "tilestored [{sums} + {line}], tmm0",
                "tilestored [{sums} + {line} + 64], tmm1",
                "tilestored [{sums} + {line} + 2048], tmm2",
                "tilestored [{sums} + {line} + 2112], tmm3",;
                upper = inout(reg) operands.rows => _,
                lower = inout(reg) lower => _,
                stride = in(reg) operands.stride,
                first = inout(reg) operands.panels => _,
                second = inout(reg) second => _,
                line = inout(reg) ROW_BYTES => _,
                fetch = inout(reg) operands.fetch => _,
                steps = inout(reg) operands.stride / K_ALIGN => _,
                sums = in(reg) sums.0.as_mut_ptr(),
            )
        };
    }
    // SAFETY: this function's contract; a prefetch of any address is harmless.
    unsafe {
        if FETCH {
            call!(prefetch_kilobyte!("{fetch}", "0"), prefetch_kilobyte!("{fetch}", "1024"));
        } else {
            call!();
        }
    }
}

/// Rows of one tile by four panels.
///
/// # Safety
/// Tiles must be configured for upper rows alone, of which `operands` has as many. All of `panels`
/// must be whole.
unsafe fn one_by_four(operands: Operands, panels: [*const u8; 4], sums: &mut Sums) {
    // SAFETY: this function's contract; a prefetch of any address is harmless.
    unsafe {
        tile_asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{rows} + {stride}]",
            "tileloadd tmm5, [{p0} + {line}]",
            "tileloadd tmm6, [{p1} + {line}]",
            "tileloadd tmm7, [{p2} + {line}]",
            "tdpbsud tmm0, tmm4, tmm5",
            "tileloadd tmm5, [{p3} + {line}]",
            "tdpbsud tmm1, tmm4, tmm6",
            "tdpbsud tmm2, tmm4, tmm7",
            "tdpbsud tmm3, tmm4, tmm5",
            prefetch_kilobyte!("{fetch}", "0"),
            prefetch_kilobyte!("{fetch}", "1024"),
            prefetch_kilobyte!("{fetch}", "2048"),
            prefetch_kilobyte!("{fetch}", "3072"),
            "add {rows}, 64",
            "add {p0}, 1024",
            "add {p1}, 1024",
            "add {p2}, 1024",
            "add {p3}, 1024",
            "add {fetch}, 4096",
            "dec {steps}",
            "jnz 2b",
            "shl {line}, 2",
            "tilestored [{sums} + {line}], tmm0",
            "tilestored [{sums} + {line} + 64], tmm1",
            "tilestored [{sums} + {line} + 128], tmm2",
            "tilestored [{sums} + {line} + 192], tmm3",;
            rows = inout(reg) operands.rows => _,
            stride = in(reg) operands.stride,
            p0 = inout(reg) panels[0] => _,
            p1 = inout(reg) panels[1] => _,
            p2 = inout(reg) panels[2] => _,
            p3 = inout(reg) panels[3] => _,
            line = inout(reg) ROW_BYTES => _,
            fetch = inout(reg) operands.fetch => _,
            steps = inout(reg) operands.stride / K_ALIGN => _,
            sums = in(reg) sums.0.as_mut_ptr(),
        );
    }
}

/// [`crate::scalar::matmul`] in blocks of up to 32 rows and 2 panels, or of up to 16 rows and 4 panels.
#[target_feature(enable = "avx512f")]
fn matmul(
    x: &QuantizedRows,
    rows: Range<usize>,
    w: &PackedMatrix,
    panels: Range<usize>,
    out: &mut [f32],
) {
    let few = rows.len() <= ROWS;
    let (height, width) = if few { (ROWS, FEW_ROWS_PANELS) } else { (2 * ROWS, 2) };
    if rows.is_empty() || panels.is_empty() {
        return;
    }
    let mut block = Block { x, w, row: 0, rows: 0, panel: 0, panels: 0 };
    let mut sums = Sums([0; 2 * ROWS * 2 * LANES]);
    let columns = panels.len() * LANES;
    // SAFETY: this table of kernels is handed out where AMX is available.
    let mut tiles = unsafe { Tiles::new(rows.len().min(ROWS), if few { 0 } else { ROWS }) };
    for panel in panels.clone().step_by(width) {
        (block.panel, block.panels) = (panel, width.min(panels.end - panel));
        for row in rows.clone().step_by(height) {
            (block.row, block.rows) = (row, height.min(rows.end - row));
            tiles.reshape(block.rows.min(ROWS), block.rows.saturating_sub(ROWS));
            block.multiply(row == rows.start, &mut sums);
            let first = (row - rows.start) * columns + (panel - panels.start) * LANES;
            block.scale(&sums, &mut out[first..], columns);
        }
    }
}

/// A few rows by a few panels.
struct Block<'a> {
    x: &'a QuantizedRows,
    w: &'a PackedMatrix,
    row: usize,
    rows: usize,
    panel: usize,
    panels: usize,
}

impl Block<'_> {
    /// Integer sums of the block; tiles are configured for its number of rows.
    fn multiply(&self, fetch: bool, sums: &mut Sums) {
        let stride = self.x.stride();
        let rows = &self.x.data[self.row * stride..][..self.rows * stride];
        let panels = self.w.panel_range(self.panel..self.panel + self.panels);
        let operands = Operands {
            rows: rows.as_ptr(),
            stride,
            panels: panels.as_ptr(),
            fetch: panels.as_ptr_range().end,
        };
        // Where panels are missing, the last one is computed again for nobody.
        let panel = |p: usize| panels[p.min(self.panels - 1) * LANES * stride..].as_ptr();
        // SAFETY: rows and panels lie within their slices; the filled rows are a whole number of 64 bytes.
        unsafe {
            if self.rows <= ROWS && self.panels > 2 {
                one_by_four(operands, [panel(0), panel(1), panel(2), panel(3)], sums);
            } else if self.rows <= ROWS {
                one_by_four(operands, [panel(0), panel(1), panel(1), panel(1)], sums);
            } else if fetch {
                two_by_two::<true>(operands, rows[ROWS * stride..].as_ptr(), panel(1), sums);
            } else {
                two_by_two::<false>(operands, rows[ROWS * stride..].as_ptr(), panel(1), sums);
            }
        }
    }

    /// Scales the sums; `columns` numbers from one row of `out` to the next.
    #[target_feature(enable = "avx512f")]
    fn scale(&self, sums: &Sums, out: &mut [f32], columns: usize) {
        let width = if self.rows <= ROWS { FEW_ROWS_PANELS } else { 2 };
        let sums = sums.0.as_chunks::<LANES>().0;
        for p in 0..self.panels {
            // SAFETY: all slices have 16 numbers.
            let (scale, bias) = unsafe {
                (
                    _mm512_loadu_ps(self.w.scales(self.panel + p).as_ptr()),
                    _mm512_loadu_ps(self.w.bias(self.panel + p).as_ptr()),
                )
            };
            for r in 0..self.rows {
                let offset = _mm512_set1_epi32(self.x.offsets[self.row + r]);
                let row_scale = _mm512_set1_ps(self.x.scales[self.row + r]);
                let sum: &[i32; LANES] = &sums[r * width + p];
                let out = &mut out[r * columns + p * LANES..][..LANES];
                // SAFETY: as above.
                unsafe {
                    let sum = _mm512_add_epi32(_mm512_loadu_si512(sum.as_ptr().cast()), offset);
                    let product = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), row_scale);
                    let product = _mm512_add_ps(_mm512_mul_ps(product, scale), bias);
                    _mm512_storeu_ps(out.as_mut_ptr(), product);
                }
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512bf16")]
fn attention(task: &AttentionTask<'_>, out: &mut [f32]) {
    avx512bf16::SCRATCH
        .with_borrow_mut(|scratch| attention::attention::<Bf16Tiles>(task, scratch, out));
}

/// Pairs of bf16 numbers as [`Bf16`], rows of which fill whole tiles.
struct Bf16Tiles;

/// Words in a row of a tile.
const ROW_WORDS: usize = ROW_BYTES / 4;

impl Arithmetic for Bf16Tiles {
    type Word = u32;

    #[inline(always)]
    fn keys<'a>(
        task: &AttentionTask<'a>,
        start: usize,
        len: usize,
        buffer: &'a mut Vec<u32>,
    ) -> Operand<'a, u32> {
        pair_keys(task, start, len, (task.head_dim / 2).next_multiple_of(ROW_WORDS), buffer)
    }

    #[inline(always)]
    fn values<'a>(
        task: &AttentionTask<'a>,
        start: usize,
        len: usize,
        buffer: &'a mut Vec<u32>,
    ) -> Operand<'a, u32> {
        let rows = |j| &task.values[(start + j) * task.stride..][..task.head_dim];
        let (dim, row) = (task.head_dim, len.div_ceil(2).next_multiple_of(ROW_WORDS));
        pair_all(rows, len, dim, buffer);
        buffer.resize(2 * row * dim, 0);
        let (pairs, out) = buffer.split_at_mut(row * dim);
        // SAFETY: only this file's `attention` uses this type, on a CPU with AVX2.
        unsafe { avx2::transpose(as_f32(pairs), dim, (row, dim), as_f32_mut(out), row) };
        Operand { words: out, row, column: 1 }
    }

    #[inline(always)]
    fn pack(x: &[f32], n: usize, words: &mut Vec<u32>) {
        Bf16::pack(x, n, words);
        words.resize((words.len() / n).next_multiple_of(ROW_WORDS) * n, 0);
    }

    #[inline(always)]
    fn packed<'a>(x: &'a [f32], words: &'a [u32]) -> &'a [u32] {
        Bf16::packed(x, words)
    }

    #[inline(always)]
    fn product<const ADD: bool>(a: &Operand<'_, u32>, b: &[u32], n: usize, c: &mut [f32]) {
        // SAFETY: only this file's `attention` uses this type, where AMX is available.
        unsafe { bf16_product::<ADD>(a, b, n, c) }
    }

    #[inline(always)]
    fn exp(x: f32) -> f32 {
        Bf16::exp(x)
    }

    #[inline(always)]
    fn transpose(
        x: &[f32],
        stride: usize,
        size: (usize, usize),
        out: &mut [f32],
        out_stride: usize,
    ) {
        Bf16::transpose(x, stride, size, out, out_stride);
    }
}

/// Words as numbers that are moved and never computed with.
fn as_f32(words: &[u32]) -> &[f32] {
    // SAFETY: the two types have the same size and alignment, and every pattern is a number.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), words.len()) }
}

/// As [`as_f32`].
fn as_f32_mut(words: &mut [u32]) -> &mut [f32] {
    // SAFETY: as above.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), words.len()) }
}

/// [`Arithmetic::product`] in blocks of up to 32 rows by 32 columns; depth fills whole tiles.
///
/// # Safety
/// AMX must be available.
unsafe fn bf16_product<const ADD: bool>(a: &Operand<'_, u32>, b: &[u32], n: usize, c: &mut [f32]) {
    let (rows, depth) = (c.len() / n, b.len() / n);
    assert!(depth.is_multiple_of(ROW_WORDS) && n.is_multiple_of(LANES) && a.column == 1);
    assert!(a.row >= depth && a.words.len() >= rows * a.row);
    // SAFETY: this function's contract.
    let mut tiles = unsafe { Tiles::new(ROWS, ROWS) };
    for row in (0..rows).step_by(2 * ROWS) {
        // Where there is no second tile of rows or columns, the first one is computed twice.
        let upper = ROWS.min(rows - row);
        let (below, lower) =
            if rows > row + ROWS { (ROWS, ROWS.min(rows - row - ROWS)) } else { (0, upper) };
        tiles.reshape(upper, lower);
        for column in (0..n).step_by(2 * LANES) {
            let right = if column + LANES < n { LANES } else { 0 };
            let at = |below: usize, right: usize| (row + below) * n + column + right;
            // SAFETY: tiles of `upper` and `lower` rows by 16 columns lie within `c`, those of
            // `depth` words within `a` and `b`, as asserted above.
            unsafe {
                let left = a.words.as_ptr().add(row * a.row);
                let (b, c) = (b.as_ptr().add(column), c.as_mut_ptr());
                bf16_two_by_two::<ADD>(
                    [left, left.add(below * a.row)],
                    a.row,
                    [b, b.add(right)],
                    n,
                    depth / ROW_WORDS,
                    [
                        c.add(at(0, 0)),
                        c.add(at(0, right)),
                        c.add(at(below, 0)),
                        c.add(at(below, right)),
                    ],
                );
            }
        }
    }
}

/// Two tiles of rows by two of columns; `stride` numbers between the rows of `b` and `c`.
///
/// # Safety
/// Tiles must be configured for the rows of `a`, and all tiles must lie within their matrices.
unsafe fn bf16_two_by_two<const ADD: bool>(
    a: [*const u32; 2],
    a_stride: usize,
    b: [*const u32; 2],
    stride: usize,
    steps: usize,
    c: [*mut f32; 4],
) {
    macro_rules! call {
        ($($start:literal,)*) => {
            tile_asm!(
                $($start,)*
                "2:",
                "tileloadd tmm4, [{upper} + {a_stride}]",
                "tileloadd tmm6, [{left} + {stride}]",
                "tileloadd tmm7, [{right} + {stride}]",
                "tileloadd tmm5, [{lower} + {a_stride}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {upper}, 64",
                "add {lower}, 64",
                "add {left}, {sixteen}",
                "add {right}, {sixteen}",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{c0} + {stride}], tmm0",
                "tilestored [{c1} + {stride}], tmm1",
                "tilestored [{c2} + {stride}], tmm2",
                "tilestored [{c3} + {stride}], tmm3",;
                upper = inout(reg) a[0] => _,
                lower = inout(reg) a[1] => _,
                a_stride = in(reg) 4 * a_stride,
                left = inout(reg) b[0] => _,
                right = inout(reg) b[1] => _,
                stride = in(reg) 4 * stride,
                sixteen = in(reg) 4 * ROWS * stride,
                steps = inout(reg) steps => _,
                c0 = in(reg) c[0],
                c1 = in(reg) c[1],
                c2 = in(reg) c[2],
                c3 = in(reg) c[3],
            )
        };
    }
    // SAFETY: this function's contract.
    unsafe {
        if ADD {
            call!(
                "tileloadd tmm0, [{c0} + {stride}]",
                "tileloadd tmm1, [{c1} + {stride}]",
                "tileloadd tmm2, [{c2} + {stride}]",
                "tileloadd tmm3, [{c3} + {stride}]",
            );
        } else {
            call!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",);
        }
    }
}

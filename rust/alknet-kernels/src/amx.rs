//! AMX: products of whole tiles, 16 by 16 sums of 64 bytes each per instruction.
//!
//! Rust has no stable intrinsics for tiles, so that these files use inline assembly. Tile registers and
//! their configuration belong to the thread; Rust code never touches them. [`tiles::Tiles`] configures
//! them, and releases them when it is dropped: a thread that has released its tiles has no tile
//! state for the operating system to save.

mod attention;
mod products;
mod rotation;
mod tiles;

use std::{
    arch::{asm, x86_64::*},
    sync::OnceLock,
};

use self::tiles::{ROW_BYTES, ROWS};
use crate::{
    avx512,
    dispatch::{Kernels, TileKernels},
    isa::Isa,
    scalar,
};

pub(crate) static KERNELS: Kernels = Kernels {
    isa: Isa::Amx,
    matmul: products::matmul,
    tiles: Some(TileKernels {
        copy: products::linear::<false>,
        add: products::linear::<true>,
        gate_up: products::gate_up,
        qkv: products::qkv,
        store_values: attention::store_values,
        attention: attention::attention,
        columns: attention::COLUMNS,
        rotation: rotation::BLOCK,
        quantize: rotation::quantize,
        norm_quantize: rotation::norm_quantize,
    }),
    ..avx512::KERNELS
};

/// Whether the CPU has tiles of bytes and bf16 numbers, and the operating system lets this process
/// use them.
///
/// The system saves tiles only for processes that asked for it; the first call asks.
pub(crate) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        is_x86_feature_detected!("avx512dq")
            && cpu_has_tiles()
            && system_saves_tiles()
            && permission()
    })
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

/// Numbers 0 and 16, 1 and 17, …
const INTERLEAVE: [u16; 32] = {
    let mut order = [0; 32];
    let mut i = 0;
    while i < 32 {
        order[i] = (i / 2 + i % 2 * 16) as u16;
        i += 1;
    }
    order
};

/// [`scalar::exp2`].
#[inline]
#[target_feature(enable = "avx512f")]
fn exp2(x: __m512) -> __m512 {
    let [a, b, c] = scalar::EXP2.map(|c| _mm512_set1_ps(c));
    let rounding = _mm512_set1_ps(scalar::ROUNDING);
    let n = _mm512_sub_ps(_mm512_add_ps(x, rounding), rounding);
    let r = _mm512_sub_ps(x, n);
    _mm512_scalef_ps(_mm512_fmadd_ps(_mm512_fmadd_ps(a, r, b), r, c), n)
}

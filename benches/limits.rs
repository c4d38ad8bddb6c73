//! What this machine can do at most: bytes from memory, and multiply-adds of plain tile loops.
//!
//! `cargo run --release -p alknet-kernels --example limits [BYTES]` prints one JSON object. The
//! comparison with other engines (`peers.py`) turns it into the least time that a pass can take. Every
//! rate is that of all threads together, the best of several runs: a limit is what nothing can exceed.
//!
//! `BYTES`, by default those of 53 million 8-bit weights, are what is read again and again.

use std::{
    hint::black_box,
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use memmap2::{Advice, MmapMut};

/// Bytes that all threads read from memory: beyond any cache.
const STREAM_BYTES: usize = 1 << 30;
const WEIGHT_BYTES: usize = 53 << 20;
/// Steps along the inner dimension of one tile: its operands stay in the first-level cache.
const STEPS: usize = 128;
/// Rounds over everything that is measured, so that a slow moment of the machine meets each of them.
const ROUNDS: usize = 10;
const RUN_TIME: Duration = Duration::from_millis(100);

fn main() {
    let bytes = std::env::args().nth(1).and_then(|bytes| bytes.parse().ok());
    let weight_bytes = bytes.unwrap_or(WEIGHT_BYTES);
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let tiles = tiles();
    let mut best = vec![0.0_f64; tiles.len() + 2];
    for _ in 0..ROUNDS {
        let streams = [STREAM_BYTES, weight_bytes].map(|bytes| stream_rate(bytes, threads));
        let rates = streams.into_iter().chain(tiles.iter().map(|tile| tile_rate(tile, threads)));
        best.iter_mut().zip(rates).for_each(|(best, rate)| *best = best.max(rate));
    }
    let streams = ["stream_bytes_per_s", "again_bytes_per_s"];
    let names = streams.into_iter().chain(tiles.iter().map(|tile| tile.name));
    let fields: Vec<_> =
        names.zip(best).map(|(name, rate)| format!("\"{name}\": {rate:.0}")).collect();
    println!("{{\"threads\": {threads}, {}}}", fields.join(", "));
}

/// One product of two small matrices that never leaves registers and first-level cache.
struct Tile {
    /// Arithmetic and instruction set, as in the printed object.
    name: &'static str,
    /// Multiply-adds of one call of `run`.
    multiply_adds: usize,
    /// Multiplies 32-bit words of the left operand by those of the right one.
    run: fn(&[u32], &[u32]),
    /// 32 bits of the operands; ones of the tile's number format.
    ones: u32,
}

/// The widest operands of any tile: 16 rows, and 2 vectors of 16 words a step. A vector that lay across
/// two cache lines would be two loads.
#[repr(align(64))]
struct Operands {
    rows: [u32; STEPS * 16],
    weights: [u32; STEPS * 32],
}

/// Bytes per second when all threads read `bytes` over and over, each a part of its own.
fn stream_rate(bytes: usize, threads: usize) -> f64 {
    // Whole blocks for each of the places where a thread reads at a time.
    let part = bytes / threads / (PLACES * 128) * (PLACES * 128);
    let work = || {
        let mut memory = MmapMut::map_anon(part).expect("memory");
        // As for our weights. Without huge pages it is measured with small ones.
        _ = memory.advise(Advice::HugePage);
        memory.fill(1);
        move || read_all(&memory)
    };
    rate(threads, work) * part as f64
}

/// Places at which a thread reads at the same time: more of them keep more of memory busy.
const PLACES: usize = 4;

fn read_all(memory: &[u8]) {
    // Sums that do not wait for each other: memory is the bound, not the latency of adding.
    let mut sums = [0_u64; 16];
    let part = memory.len() / PLACES;
    for at in (0..part).step_by(128) {
        for place in 0..PLACES {
            let block = memory[place * part + at..][..128].as_chunks::<8>().0;
            sums.iter_mut()
                .zip(block)
                .for_each(|(sum, word)| *sum = sum.wrapping_add(u64::from_le_bytes(*word)));
        }
    }
    black_box(sums);
}

/// Multiply-adds per second of all threads.
fn tile_rate(tile: &Tile, threads: usize) -> f64 {
    const CALLS: usize = 100;
    let work = || {
        let operands =
            Box::new(Operands { rows: [tile.ones; STEPS * 16], weights: [tile.ones; STEPS * 32] });
        move || {
            for _ in 0..CALLS {
                let operands = black_box(&operands);
                (tile.run)(&operands.rows, &operands.weights);
            }
        }
    };
    rate(threads, work) * (CALLS * tile.multiply_adds) as f64
}

/// Calls per second, added up over threads that start together.
///
/// `prepare` runs in each thread, untimed, and gives the call.
fn rate<W: FnMut()>(threads: usize, prepare: impl Fn() -> W + Sync) -> f64 {
    let barrier = Barrier::new(threads);
    thread::scope(|scope| {
        let run = || {
            let mut work = prepare();
            work();
            barrier.wait();
            let start = Instant::now();
            let mut calls = 0;
            while start.elapsed() < RUN_TIME {
                work();
                calls += 1;
            }
            f64::from(calls) / start.elapsed().as_secs_f64()
        };
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        handles.into_iter().map(|handle| handle.join().expect("no panic")).sum()
    })
}

#[cfg(not(target_arch = "x86_64"))]
fn tiles() -> Vec<Tile> {
    Vec::new()
}

#[cfg(target_arch = "x86_64")]
use x86::tiles;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::{
        arch::{asm, x86_64::*},
        hint::black_box,
    };

    use alknet_kernels::Isa;

    use super::{STEPS, Tile};

    const BYTES: u32 = 0x0101_0101;
    const BF16: u32 = 0x3f80_3f80;
    const FP32: u32 = 0x3f80_0000;
    /// Times that a call with AMX takes all steps: setting tiles up takes as long as a few hundred of them.
    const AMX_REPEATS: usize = 32;

    /// The tile loops that this CPU can run.
    pub(super) fn tiles() -> Vec<Tile> {
        let tile = |name, run, vectors, lanes, ones| Tile {
            name,
            multiply_adds: STEPS * vectors * lanes,
            run,
            ones,
        };
        let mut tiles = Vec::new();
        if Isa::Avx2.is_available() {
            // SAFETY: the CPU has AVX2 and FMA.
            tiles.push(tile("int8_avx2", |a, b| unsafe { int8_avx2(a, b) }, 4 * 2, 32, BYTES));
            // SAFETY: as above.
            tiles.push(tile("fp32_avx2", |a, b| unsafe { fp32_avx2(a, b) }, 6 * 2, 8, FP32));
        }
        if Isa::AvxVnni.is_available() {
            // SAFETY: the CPU has AVX2 with VNNI.
            tiles.push(tile(
                "int8_avxvnni",
                |a, b| unsafe { int8_avxvnni(a, b) },
                6 * 2,
                32,
                BYTES,
            ));
        }
        if Isa::Avx512.is_available() {
            // SAFETY: the CPU has AVX-512 with VNNI.
            tiles.push(tile("int8_avx512", |a, b| unsafe { int8_avx512(a, b) }, 12 * 2, 64, BYTES));
            // SAFETY: as above.
            tiles.push(tile("fp32_avx512", |a, b| unsafe { fp32_avx512(a, b) }, 12 * 2, 16, FP32));
        }
        if Isa::Avx512Bf16.is_available() {
            tiles.push(tile(
                "bf16_avx512bf16",
                // SAFETY: the CPU has AVX-512 with BF16.
                |a, b| unsafe { bf16_avx512bf16(a, b) },
                12 * 2,
                32,
                BF16,
            ));
        }
        if Isa::Amx.is_available() {
            let vectors = AMX_REPEATS * 2 * 2 * 16;
            // SAFETY: the CPU has AMX, and this process may use it.
            tiles.push(tile("int8_amx", |a, b| unsafe { int8_amx(a, b) }, vectors, 1024, BYTES));
            // SAFETY: as above.
            tiles.push(tile("bf16_amx", |a, b| unsafe { bf16_amx(a, b) }, vectors, 512, BF16));
        }
        tiles
    }

    /// `tile_loop!(name, features, rows, words, vector, zero, |word pointer| load, |word| splat,
    /// |sum, row, weights| sum)`: `rows` × 2 vectors of sums, each of `words` 32-bit words.
    macro_rules! tile_loop {
        ($name:ident, $features:literal, $rows:literal, $words:literal, $zero:expr,
         $load:expr, $splat:expr, $mac:expr) => {
            #[target_feature(enable = $features)]
            fn $name(rows: &[u32], weights: &[u32]) {
                let mut sums = [[$zero; 2]; $rows];
                let rows = rows.as_chunks::<$rows>().0;
                let weights = weights.as_chunks::<$words>().0.as_chunks::<2>().0;
                for (rows, weights) in rows.iter().zip(weights).take(STEPS) {
                    let weights = [$load(&weights[0]), $load(&weights[1])];
                    for (sums, row) in sums.iter_mut().zip(rows) {
                        let row = $splat(*row);
                        sums[0] = $mac(sums[0], row, weights[0]);
                        sums[1] = $mac(sums[1], row, weights[1]);
                    }
                }
                black_box(sums);
            }
        };
    }

    tile_loop!(
        int8_avx2,
        "avx2",
        4,
        8,
        _mm256_setzero_si256(),
        load_256,
        |word: u32| _mm256_set1_epi32(word as i32),
        |sum, row, weights| {
            let pairs = _mm256_maddubs_epi16(row, weights);
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    );
    tile_loop!(
        int8_avxvnni,
        "avx2,avxvnni",
        6,
        8,
        _mm256_setzero_si256(),
        load_256,
        |word: u32| _mm256_set1_epi32(word as i32),
        |sum, row, weights| _mm256_dpbusd_avx_epi32(sum, row, weights)
    );
    tile_loop!(
        fp32_avx2,
        "avx2,fma",
        6,
        8,
        _mm256_setzero_ps(),
        |words| _mm256_castsi256_ps(load_256(words)),
        |word| _mm256_set1_ps(f32::from_bits(word)),
        |sum, row, weights| _mm256_fmadd_ps(row, weights, sum)
    );
    tile_loop!(
        int8_avx512,
        "avx512f,avx512vnni",
        12,
        16,
        _mm512_setzero_si512(),
        load_512,
        |word: u32| _mm512_set1_epi32(word as i32),
        |sum, row, weights| _mm512_dpbusd_epi32(sum, row, weights)
    );
    tile_loop!(
        fp32_avx512,
        "avx512f",
        12,
        16,
        _mm512_setzero_ps(),
        |words| _mm512_castsi512_ps(load_512(words)),
        |word| _mm512_set1_ps(f32::from_bits(word)),
        |sum, row, weights| _mm512_fmadd_ps(row, weights, sum)
    );

    tile_loop!(
        bf16_avx512bf16,
        "avx512f,avx512bf16",
        12,
        16,
        _mm512_setzero_ps(),
        |words| bf16(load_512(words)),
        |word: u32| bf16(_mm512_set1_epi32(word as i32)),
        |sum, row, weights| _mm512_dpbf16_ps(sum, row, weights)
    );

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn bf16(bits: __m512i) -> __m512bh {
        // SAFETY: both types are 512 bits of any pattern.
        unsafe { std::mem::transmute(bits) }
    }

    /// Two by two tiles of sums, and the instruction that adds to them. Operands are loaded once: with
    /// loads in between it is a fifth slower here, as long as they hold anything but zeros.
    macro_rules! amx_loop {
        ($name:ident, $multiply:literal) => {
            /// # Safety
            /// `Isa::Amx` must be available.
            unsafe fn $name(rows: &[u32], weights: &[u32]) {
                assert!(rows.len() >= 2 * 256 && weights.len() >= 2 * 256);
                // Palette 1, then the bytes and the number of the rows of eight tiles.
                let mut configuration = [0_u8; 64];
                configuration[0] = 1;
                for tile in 0..8 {
                    (configuration[16 + 2 * tile], configuration[48 + tile]) = (64, 16);
                }
                // SAFETY: AMX is available; the loads stay within the two tiles of each operand.
                unsafe {
                    asm!(
                        "ldtilecfg [{configuration}]",
                        "tileloadd tmm4, [{rows} + {line}]",
                        "tileloadd tmm6, [{weights} + {line}]",
                        "tileloadd tmm7, [{weights} + {line} + 1024]",
                        "tileloadd tmm5, [{rows} + {line} + 1024]",
                        "2:",
                        concat!($multiply, " tmm0, tmm4, tmm6"),
                        concat!($multiply, " tmm1, tmm4, tmm7"),
                        concat!($multiply, " tmm2, tmm5, tmm6"),
                        concat!($multiply, " tmm3, tmm5, tmm7"),
                        "dec {steps}",
                        "jnz 2b",
                        "tilerelease",
                        configuration = in(reg) configuration.as_ptr(),
                        rows = in(reg) rows.as_ptr(),
                        weights = in(reg) weights.as_ptr(),
                        line = in(reg) 64_usize,
                        steps = inout(reg) AMX_REPEATS * STEPS => _,
                        out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                        out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                        options(nostack, readonly),
                    );
                }
            }
        };
    }

    amx_loop!(int8_amx, "tdpbsud");
    amx_loop!(bf16_amx, "tdpbf16ps");

    #[target_feature(enable = "avx2")]
    fn load_256(words: &[u32; 8]) -> __m256i {
        // SAFETY: the load covers the eight words and needs no alignment.
        unsafe { _mm256_loadu_si256(words.as_ptr().cast()) }
    }

    #[target_feature(enable = "avx512f")]
    fn load_512(words: &[u32; 16]) -> __m512i {
        // SAFETY: the load covers the sixteen words and needs no alignment.
        unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
    }
}

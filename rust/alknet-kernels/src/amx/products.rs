//! Linear products: bytes on tiles, finished block by block while the sums are in the first-level cache.

use std::{
    arch::x86_64::*,
    cell::{Cell, RefCell},
    ops::Range,
};

use super::tiles::{ROW_BYTES, ROWS, Tiles, tile_asm};
use crate::{
    dispatch::Product,
    keys::Projection,
    ops::Heads,
    pack::PackedMatrix,
    pool::Shared,
    rows::{Intermediate, QuantizedRows},
    scalar::{self, K_ALIGN, LANES, Place, TileHeads},
};

/// Most tiles of rows of a group, which takes each panel from the second-level cache once.
const GROUP_TILES: usize = 4;

/// Panels of a block.
const PAIR: usize = 2;

/// Most tiles of rows that a group multiplies before it goes back: 36 KiB stay in the first-level cache
/// while panels pass by.
const PART_TILES: usize = 36;

/// Most bytes of a chunk of panels, which stays in the second-level cache over all groups while the next one
/// comes.
const CHUNK_BYTES: usize = 112 << 10;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Sums of a group by one panel.
#[repr(C, align(64))]
struct Sums([[i32; LANES]; GROUP_TILES * ROWS]);

impl Sums {
    const ZERO: Self = Self([[0; LANES]; GROUP_TILES * ROWS]);
}

thread_local! {
    /// Sums of a group by a pair of panels, or by a chunk of them where a group goes back: up to 40 KiB
    /// per thread.
    static SUMS: RefCell<Vec<[Sums; PAIR]>> = const { RefCell::new(Vec::new()) };
}

/// A group of rows by two panels.
struct Block<'a> {
    product: &'a Product<'a>,
    rows: Range<usize>,
    panels: [usize; PAIR],
    sums: &'a [Sums; PAIR],
    fetch: &'a Fetch,
}

impl Block<'_> {
    /// Calls `finish(row, numbers)` for the outputs of every row, 16 of each panel: `sum · row scale ·
    /// scale + bias`, as [`scalar::matmul`] makes them.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn for_rows(&self, mut finish: impl FnMut(usize, [__m512; PAIR])) {
        let (x, w) = (self.product.x, self.product.w);
        // SAFETY: panels have 16 scales and biases.
        let load = |numbers: &[f32; LANES]| unsafe { _mm512_loadu_ps(numbers.as_ptr()) };
        let (scales, biases) =
            (self.panels.map(|p| load(w.scales(p))), self.panels.map(|p| load(w.bias(p))));
        let row_scales = &x.scales[self.rows.clone()];
        let [first, second] = self.sums;
        let sums = first.0.iter().zip(&second.0);
        for (r, ((first, second), scale)) in sums.zip(row_scales).enumerate() {
            let sums = [first, second];
            self.fetch.line();
            let row_scale = _mm512_set1_ps(*scale);
            let numbers = std::array::from_fn(|p| {
                // SAFETY: there are 16 sums.
                let sum = unsafe { _mm512_loadu_si512(sums[p].as_ptr().cast()) };
                let sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), row_scale);
                _mm512_fmadd_ps(sum, scales[p], biases[p])
            });
            finish(self.rows.start + r, numbers);
        }
    }
}

/// Pair number `i` of neighbouring panels; a last one without a neighbour is paired with itself.
fn neighbours(panels: &Range<usize>, i: usize) -> [usize; PAIR] {
    let first = panels.start + PAIR * i;
    [first, (first + 1).min(panels.end - 1)]
}

/// [`crate::scalar::matmul`] by pairs of panels, of which every block is handed to `finish`.
#[inline]
#[target_feature(enable = "avx512f")]
fn for_blocks(
    product: &Product<'_>,
    pair: impl Fn(usize) -> [usize; PAIR],
    finish: impl FnMut(&Block<'_>),
) {
    SUMS.with_borrow_mut(|sums| for_blocks_in(sums, product, pair, finish));
}

/// [`for_blocks`] with a place for sums.
#[inline]
#[target_feature(enable = "avx512f")]
fn for_blocks_in(
    sums: &mut Vec<[Sums; PAIR]>,
    product: &Product<'_>,
    pair: impl Fn(usize) -> [usize; PAIR],
    mut finish: impl FnMut(&Block<'_>),
) {
    let Product { x, rows, w, .. } = product;
    if rows.is_empty() || product.panels.is_empty() {
        return;
    }
    assert!(rows.start.is_multiple_of(ROWS), "products begin with a tile");
    let cut = Cut::new(product);
    if sums.len() < cut.sums {
        sums.resize_with(cut.sums, || [Sums::ZERO; PAIR]);
    }
    // SAFETY: this file's kernels are handed out where AMX is available.
    let tiles = unsafe { Tiles::new() };
    for first in (0..cut.pairs).step_by(cut.chunk) {
        let chunk = first..cut.pairs.min(first + cut.chunk);
        let fetch = Fetch::new(product, &cut, chunk.end);
        for start in rows.clone().step_by(cut.group) {
            let rows = start..rows.end.min(start + cut.group);
            for step in (0..cut.steps).step_by(cut.part) {
                let steps = step..cut.steps.min(step + cut.part);
                for (i, slot) in chunk.clone().zip((0..cut.sums).cycle()) {
                    let (panels, sums) = (pair(i), &mut sums[slot]);
                    for (panel, sums) in panels.into_iter().zip(&mut *sums) {
                        let (tiles, panel) = (x.tiles(&rows), w.panel(panel));
                        // SAFETY: tiles are configured.
                        unsafe {
                            multiply(&Operands { tiles, panel, steps: &steps }, &fetch, sums)
                        };
                    }
                    if steps.end == cut.steps {
                        let rows = rows.clone();
                        finish(&Block { product, rows, panels, sums, fetch: &fetch });
                    }
                }
            }
        }
    }
    drop(tiles);
}

/// How a product is cut.
struct Cut {
    /// Pairs of panels, and how many of them are a chunk.
    pairs: usize,
    chunk: usize,
    /// Rows of a group.
    group: usize,
    /// Steps of 64 inputs, and how many of them a group takes before it goes back.
    steps: usize,
    part: usize,
    /// Pairs of panels whose sums are kept.
    sums: usize,
    /// Pairs of cache lines that are fetched per step of a panel.
    fetches: usize,
}

impl Cut {
    fn new(Product { x, rows, panels, .. }: &Product<'_>) -> Self {
        let pairs = panels.len().div_ceil(PAIR);
        let pair_bytes = PAIR * LANES * x.stride();
        let chunks = pairs.div_ceil((CHUNK_BYTES / pair_bytes).max(1));
        let chunk = pairs.div_ceil(chunks);
        let tiles = rows.len().div_ceil(ROWS);
        let groups = tiles.div_ceil(GROUP_TILES);
        let group_tiles = tiles.div_ceil(groups);
        let steps = x.stride() / K_ALIGN;
        let parts = steps.div_ceil(PART_TILES / group_tiles);
        // While a chunk is read, as much is fetched: a line for each row that is finished, the rest between.
        let lines = (pair_bytes / LINE / groups).saturating_sub(group_tiles * ROWS);
        Self {
            pairs,
            chunk,
            group: group_tiles * ROWS,
            steps,
            part: steps.div_ceil(parts),
            sums: if parts > 1 { chunk } else { 1 },
            fetches: (lines / (2 * PAIR * steps)).max(1),
        }
    }
}

/// What is fetched into the second-level cache while a product runs.
struct Fetch {
    next: Cell<*const u8>,
    /// Pairs of cache lines per step of a panel.
    fetches: usize,
}

impl Fetch {
    /// Of what follows the first `pairs` pairs of panels.
    fn new(product: &Product<'_>, cut: &Cut, pairs: usize) -> Self {
        let Product { w, panels, next, .. } = product;
        let next = if pairs < cut.pairs {
            w.panel_range(panels.start + PAIR * pairs..panels.end)
        } else {
            next
        };
        Self { next: Cell::new(next.as_ptr()), fetches: cut.fetches }
    }

    /// Fetches one more line.
    #[inline]
    fn line(&self) {
        let next = self.next.get();
        // SAFETY: a prefetch of any address is harmless.
        #[allow(unused_unsafe, reason = "prefetching is unsafe in older compilers")]
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(next.cast());
        }
        self.next.set(next.wrapping_add(LINE));
    }
}

/// What is multiplied.
struct Operands<'a> {
    /// Whole tiles of the rows of a group.
    tiles: &'a [i8],
    /// A panel as wide as the rows.
    panel: &'a [u8],
    /// The part of their width, in steps of 64 inputs.
    steps: &'a Range<usize>,
}

/// Sums of a group by a panel, or of their part that begins at the first step; later parts are added to them.
///
/// # Safety
/// Tiles must be configured.
unsafe fn multiply(operands: &Operands<'_>, fetch: &Fetch, sums: &mut Sums) {
    let Operands { tiles, panel, steps } = *operands;
    // A step is a tile of rows, and as much of a panel.
    let tile_bytes = panel.len();
    assert!(steps.start < steps.end && steps.end * ROWS * K_ALIGN <= tile_bytes);
    let start = steps.start * ROWS * K_ALIGN;
    let tile = |i: usize| tiles[i * tile_bytes..][..tile_bytes][start..].as_ptr();
    let later = usize::from(steps.start > 0);
    let mut next = fetch.next.get();
    // The loop over steps: what is done with each tile of rows, and where its sums are.
    macro_rules! call {
        ($($tile:ident: $number:literal, $rows:literal, $sums:literal, $place:literal;)*) => {
            tile_asm!(
                "test {later}, {later}",
                "jz 2f",
                $(concat!("tileloadd ", $sums, ", [{sums} + {line} + ", $place, "]"),)*
                "jmp 3f",
                "2:",
                $(concat!("tilezero ", $sums),)*
                "3:",
                "tileloaddt1 tmm7, [{panel} + {line}]",
                $(
                    concat!("tileloadd ", $rows, ", [{", stringify!($tile), "} + {line}]"),
                    concat!("tdpbssd ", $sums, ", ", $rows, ", tmm7"),
                    concat!("add {", stringify!($tile), "}, 1024"),
                )*
                "mov {count}, {fetches}",
                "4:",
                "prefetcht1 [{next}]",
                "prefetcht1 [{next} + 64]",
                "sub {next}, -128",
                "dec {count}",
                "jnz 4b",
                "add {panel}, 1024",
                "dec {steps}",
                "jnz 3b",
                $(concat!("tilestored [{sums} + {line} + ", $place, "], ", $sums),)*;
                later = in(reg) later,
                panel = inout(reg) panel[start..].as_ptr() => _,
                line = in(reg) ROW_BYTES,
                fetches = in(reg) fetch.fetches,
                count = out(reg) _,
                next = inout(reg) next,
                steps = inout(reg) steps.len() => _,
                sums = in(reg) sums.0.as_mut_ptr(),
                $($tile = inout(reg) tile($number) => _,)*
            )
        };
    }
    // SAFETY: steps of rows and panels are whole, and sums those of four tiles; this function's contract; a
    // prefetch of any address is harmless.
    unsafe {
        match tiles.len() / tile_bytes {
            1 => call!(a: 0, "tmm4", "tmm0", 0;),
            2 => call!(
                a: 0, "tmm4", "tmm0", 0;
                b: 1, "tmm5", "tmm1", 1024;
            ),
            3 => call!(
                a: 0, "tmm4", "tmm0", 0;
                b: 1, "tmm5", "tmm1", 1024;
                c: 2, "tmm6", "tmm2", 2048;
            ),
            _ => call!(
                a: 0, "tmm4", "tmm0", 0;
                b: 1, "tmm5", "tmm1", 1024;
                c: 2, "tmm6", "tmm2", 2048;
                d: 3, "tmm4", "tmm3", 3072;
            ),
        }
    }
    fetch.next.set(next);
}

/// [`crate::scalar::matmul`].
#[target_feature(enable = "avx512f")]
pub(super) fn matmul(
    x: &QuantizedRows,
    rows: Range<usize>,
    w: &PackedMatrix,
    panels: Range<usize>,
    out: &mut [f32],
) {
    let (first_row, first_panel, columns) = (rows.start, panels.start, panels.len() * LANES);
    let pair = |i| neighbours(&panels, i);
    for_blocks(&Product { x, rows, w, panels: panels.clone(), next: &[] }, pair, |block| {
        block.for_rows(|row, numbers| {
            for (panel, x) in block.panels.into_iter().zip(numbers) {
                let first = (row - first_row) * columns + (panel - first_panel) * LANES;
                // SAFETY: the slice has 16 numbers.
                unsafe { _mm512_storeu_ps(out[first..][..LANES].as_mut_ptr(), x) };
            }
        });
    });
}

/// `out = x · Wᵀ + bias`, or `out += …` when `ADD`; rows of `width` numbers.
///
/// # Safety
/// The rows and outputs of the product must belong to this task alone.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn linear<const ADD: bool>(
    product: &Product<'_>,
    width: usize,
    out: &Shared<f32>,
) {
    for_blocks(
        product,
        |i| neighbours(&product.panels, i),
        |block| {
            let [first, second] = block.panels.map(|panel| panel * LANES);
            let len = (second + LANES).min(width) - first;
            let masks = [lanes_mask(len), lanes_mask(len.saturating_sub(LANES))];
            block.for_rows(|row, numbers| {
                // SAFETY: this function's contract; the masks leave the `len` numbers of the range.
                unsafe {
                    let out = out.range(row * width + first, len).as_mut_ptr();
                    for (p, (mut x, mask)) in numbers.into_iter().zip(masks).enumerate() {
                        let out = out.wrapping_add(p * LANES);
                        if ADD {
                            x = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out), x);
                        }
                        _mm512_mask_storeu_ps(out, mask, x);
                    }
                }
            });
        },
    );
}

/// The first `len` lanes of a register.
fn lanes_mask(len: usize) -> __mmask16 {
    ((1_u32 << len.min(LANES)) - 1) as __mmask16
}

/// `SiLU(gate) · up` for panels of gates and ups in turn, into [tiles](Intermediate) of rows of `width` numbers.
///
/// # Safety
/// As [`linear`].
#[target_feature(enable = "avx512f,avx512dq,avx512bf16")]
pub(super) unsafe fn gate_up(product: &Product<'_>, width: usize, out: &Shared<u16>) {
    for_blocks(
        product,
        |i| neighbours(&product.panels, i),
        |block| {
            let first = block.panels[0] / 2 * LANES;
            block.for_rows(|row, [gate, up]| {
                // SAFETY: this function's contract; any pattern is a row of bf16 numbers.
                unsafe {
                    let out = out.range(Intermediate::place(width, row, first), LANES);
                    let words: __m256i =
                        std::mem::transmute(_mm512_cvtneps_pbh(silu_mul(gate, up)));
                    _mm256_storeu_si256(out.as_mut_ptr().cast(), words);
                }
            });
        },
    );
}

/// [`scalar::silu_mul`], before it is rounded.
#[inline]
#[target_feature(enable = "avx512f")]
fn silu_mul(gate: __m512, up: __m512) -> __m512 {
    let one = _mm512_set1_ps(1.0);
    let x = _mm512_mul_ps(gate, _mm512_set1_ps(-std::f32::consts::LOG2_E));
    // The second one where it is NaN.
    let x = _mm512_min_ps(_mm512_set1_ps(scalar::MOST), x);
    let x = _mm512_add_ps(one, super::exp2(x));
    let bits = _mm512_set1_epi32(scalar::RECIPROCAL as i32);
    let guess = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_castps_si512(x)));
    let step = _mm512_fnmadd_ps(x, guess, _mm512_set1_ps(scalar::STEP_TO));
    let inverse = _mm512_fmadd_ps(guess, step, guess);
    _mm512_mul_ps(_mm512_mul_ps(gate, up), inverse)
}

/// The joint projection for whole heads: queries and keys are rotated, queries also scaled, and all
/// rounded to bf16.
///
/// # Shapes
/// - `angles`: `[all rows, head_dim]`
/// - `out`: [`Projection::words`]
///
/// # Safety
/// The rows and heads of the product must belong to this task alone.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn qkv(product: &Product<'_>, heads: &Heads, angles: &[f32], out: &Shared<u16>) {
    let (dim, panels) = (heads.head_dim, heads.packed_head() / LANES);
    if !dim.is_multiple_of(2 * LANES) {
        // SAFETY: this function's contract.
        unsafe { qkv_of_odd_heads(product, heads, angles, out) };
        return;
    }
    // Numbers that are rotated together stand half a head apart.
    let half = panels / 2;
    let pair = |i: usize| {
        let panel = product.panels.start + i / half * panels + i % half;
        [panel, panel + half]
    };
    for_blocks(product, pair, |block| {
        let (head, place) = (block.panels[0] / panels, block.panels[0] % panels * LANES);
        let scale = heads.scale(head);
        let start = Projection::place(heads, 0, head) + place;
        block.for_rows(|row, [a, b]| {
            let (mut low, mut high) = (a, b);
            // SAFETY: this function's contract; half a head has 16 numbers and angles from `place` on.
            unsafe {
                if let Some(scale) = scale {
                    let angles = angles[row * dim..][..dim].as_ptr();
                    let scale = _mm512_set1_ps(scale);
                    let cos = _mm512_mul_ps(_mm512_loadu_ps(angles.add(place)), scale);
                    let sin = _mm512_mul_ps(_mm512_loadu_ps(angles.add(dim / 2 + place)), scale);
                    low = _mm512_fmsub_ps(a, cos, _mm512_mul_ps(b, sin));
                    high = _mm512_fmadd_ps(b, cos, _mm512_mul_ps(a, sin));
                }
                let out = out.range(start + row * Projection::width(heads), dim / 2 + LANES);
                for (x, place) in [(low, 0), (high, dim / 2)] {
                    let words = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x));
                    _mm256_storeu_si256(out[place..][..LANES].as_mut_ptr().cast(), words);
                }
            }
        });
    });
}

/// [`qkv`] for heads that are no whole number of pairs of panels: by way of fp32 numbers.
///
/// # Safety
/// As [`qkv`].
#[target_feature(enable = "avx512f")]
unsafe fn qkv_of_odd_heads(
    product: &Product<'_>,
    heads: &Heads,
    angles: &[f32],
    out: &Shared<u16>,
) {
    let Product { x, rows, w, panels, .. } = product;
    let (dim, padded) = (heads.head_dim, heads.packed_head());
    let task_heads = panels.start * LANES / padded..panels.end * LANES / padded;
    let mut tile = vec![0.0; rows.len() * panels.len() * LANES];
    matmul(x, rows.clone(), w, panels.clone(), &mut tile);
    let mut numbers = vec![0.0; rows.len() * task_heads.len() * dim];
    let scales: Vec<_> = task_heads.clone().map(|head| heads.scale(head)).collect();
    let tile_heads = TileHeads { head_dim: dim, padded, scales: &scales };
    let angles = &angles[rows.start * dim..];
    let place = Place { out: &Shared::new(&mut numbers), start: 0, stride: task_heads.len() * dim };
    // SAFETY: the place is this function's own.
    unsafe { scalar::finish_qkv(&tile, &tile_heads, angles, &place) };
    let places = rows.clone().flat_map(|row| task_heads.clone().map(move |head| (row, head)));
    for ((row, head), numbers) in places.zip(numbers.chunks_exact(dim)) {
        let place = Projection::place(heads, row, head);
        // SAFETY: this function's contract.
        let out = unsafe { out.range(place, Projection::place(heads, row, head + 1) - place) };
        let (out, filling) = out.split_at_mut(dim);
        out.iter_mut().zip(numbers).for_each(|(word, x)| *word = (x.to_bits() >> 16) as u16);
        filling.fill(0);
    }
}

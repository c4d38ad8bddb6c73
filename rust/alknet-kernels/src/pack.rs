//! 8-bit weights in the order in which the kernels read them.
//!
//! Outputs go in panels of 16. A panel holds, for every four inputs, 64 bytes: four weights of each
//! of its outputs. That is one register of AVX-512 VNNI, four half registers of AVX2, and one row of
//! an AMX tile. Weights are stored as `w + 128`, since VNNI multiplies unsigned by signed bytes; AMX also
//! multiplies signed ones, and has them as they are.

use std::{io, ops::Range, sync::Arc};

use memmap2::MmapMut;

use crate::{
    dispatch::Kernels,
    pool::{Shared, Turn},
    scalar::{K_ALIGN, LANES, hadamard_block},
};

/// Most inputs of a product whose sum of `127 · 255` per input stays within 32 bits.
pub const MAX_INPUTS: usize = 1 << 16;

/// Rounds a number of outputs up to whole panels.
pub fn padded_outputs(outputs: usize) -> usize {
    outputs.next_multiple_of(LANES)
}

/// Writes row `i` into a slice of zeros.
pub type Widen<'a, E> = dyn Fn(usize, &mut [f32]) -> Result<(), E> + Sync + 'a;

/// A matrix `[outputs, inputs]` to be packed.
pub struct MatrixSource<'a, E> {
    /// Rows of the packed matrix, a multiple of 16 (see [`padded_outputs`]).
    pub outputs: usize,
    /// Numbers in a row.
    pub inputs: usize,
    /// Writes a row of `inputs` numbers; rows that only fill a panel are left zero.
    pub widen: Box<Widen<'a, E>>,
    /// `[outputs]`, or empty for none.
    pub bias: Vec<f32>,
}

/// Why packing failed.
#[derive(Debug)]
pub enum PackError<E> {
    /// A source could not be widened.
    Source(E),
    /// The operating system gave no memory.
    Memory(io::Error),
}

/// A packed matrix `[outputs, inputs]`: `w ≈ scale · (byte − 128)`, or `scale · byte` for kernels that multiply
/// tiles, one scale per output.
#[derive(Debug, Clone)]
pub struct PackedMatrix {
    arena: Arc<MmapMut>,
    start: usize,
    /// Place in the arena of the matrix after this one.
    next: Range<usize>,
    inputs: usize,
    /// `inputs` rounded up; the filling stands for zero.
    stride: usize,
    /// `[outputs]`, the rotation's factor included.
    scales: Vec<f32>,
    /// `[outputs]`.
    bias: Vec<f32>,
}

impl PackedMatrix {
    /// Quantises and packs matrices into one allocation of huge pages, on all threads.
    ///
    /// # Errors
    /// [`PackError`], the last one of a source when several fail.
    pub(crate) fn pack<E: Send>(
        turn: &Turn,
        kernels: &Kernels,
        sources: Vec<MatrixSource<'_, E>>,
    ) -> Result<Vec<Self>, PackError<E>> {
        let mut starts = vec![0];
        for source in &sources {
            assert!(source.outputs.is_multiple_of(LANES), "outputs fill whole panels");
            assert!(source.inputs <= MAX_INPUTS, "more inputs than 32-bit sums can hold");
            let bytes = source.outputs * source.inputs.next_multiple_of(K_ALIGN);
            starts.push(starts[starts.len() - 1] + bytes);
        }
        let mut arena = allocate(starts[sources.len()].max(1)).map_err(PackError::Memory)?;
        let tasks: Vec<(usize, usize)> = sources
            .iter()
            .enumerate()
            .flat_map(|(m, source)| (0..source.outputs / LANES).map(move |panel| (m, panel)))
            .collect();
        let mut scales: Vec<f32> = vec![0.0; tasks.len() * LANES];
        let failure = std::sync::Mutex::new(None);
        {
            let (bytes, scales) = (Shared::new(&mut arena), Shared::new(&mut scales));
            turn.for_each(tasks.len(), |task| {
                let (m, panel) = tasks[task];
                let source = &sources[m];
                let len = LANES * source.inputs.next_multiple_of(K_ALIGN);
                // SAFETY: a task has one panel and one block of scales to itself.
                let (bytes, scales) = unsafe {
                    (bytes.range(starts[m] + panel * len, len), scales.range(task * LANES, LANES))
                };
                if let Err(error) = pack_panel(kernels, source, panel, bytes, scales) {
                    *failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner) =
                        Some(error);
                }
            });
        }
        if let Some(error) = failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
        {
            return Err(PackError::Source(error));
        }
        let arena = Arc::new(arena);
        let mut scales = scales.as_slice();
        // Nothing follows the last one.
        starts.push(starts[sources.len()]);
        let packed = sources.into_iter().zip(starts.windows(3)).map(|(source, starts)| {
            let (own, rest) = scales.split_at(source.outputs);
            scales = rest;
            let mut bias = source.bias;
            bias.resize(source.outputs, 0.0);
            let stride = source.inputs.next_multiple_of(K_ALIGN);
            let arena = Arc::clone(&arena);
            let (start, next) = (starts[0], starts[1]..starts[2]);
            Self { arena, start, next, inputs: source.inputs, stride, scales: own.to_vec(), bias }
        });
        Ok(packed.collect())
    }

    /// Numbers in a row.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Number of rows, those that only fill a panel included.
    pub fn outputs(&self) -> usize {
        self.scales.len()
    }

    /// Number of panels.
    pub(crate) fn panels(&self) -> usize {
        self.outputs() / LANES
    }

    /// Bytes of consecutive panels.
    pub(crate) fn panel_range(&self, panels: Range<usize>) -> &[u8] {
        let len = LANES * self.stride;
        &self.arena[self.start + panels.start * len..self.start + panels.end * len]
    }

    /// Bytes of the matrix that was packed after this one, or none: of share `share` of `shares`, about.
    pub(crate) fn next(&self, share: usize, shares: usize) -> &[u8] {
        let next = &self.arena[self.next.clone()];
        &next[next.len() / shares * share..next.len() / shares * (share + 1)]
    }

    /// Bytes of one panel, `[stride / 4, 16, 4]`.
    pub(crate) fn panel(&self, panel: usize) -> &[u8] {
        self.panel_range(panel..panel + 1)
    }

    /// Scales of a panel's outputs.
    pub(crate) fn scales(&self, panel: usize) -> &[f32; LANES] {
        panel_of(&self.scales, panel)
    }

    /// Biases of a panel's outputs.
    pub(crate) fn bias(&self, panel: usize) -> &[f32; LANES] {
        panel_of(&self.bias, panel)
    }
}

/// Zeroed memory in huge pages where the system has them: fewer misses of the address cache.
fn allocate(bytes: usize) -> io::Result<MmapMut> {
    let arena = MmapMut::map_anon(bytes)?;
    #[cfg(target_os = "linux")]
    if arena.advise(memmap2::Advice::HugePage).is_err() {
        // A kernel without them: ordinary pages do.
    }
    Ok(arena)
}

fn panel_of(numbers: &[f32], panel: usize) -> &[f32; LANES] {
    numbers.as_chunks().0.get(panel).expect("scales and biases fill whole panels")
}

/// Widens, rotates, rounds and interleaves the 16 rows of a panel.
fn pack_panel<E>(
    kernels: &Kernels,
    source: &MatrixSource<'_, E>,
    panel: usize,
    bytes: &mut [u8],
    scales: &mut [f32],
) -> Result<(), E> {
    let block = hadamard_block(source.inputs);
    let stride = source.inputs.next_multiple_of(K_ALIGN);
    let mut row = vec![0.0; source.inputs];
    let mut quantized = vec![0i8; stride];
    for (i, scale) in scales.iter_mut().enumerate() {
        row.fill(0.0);
        (source.widen)(panel * LANES + i, &mut row)?;
        // Both sides are multiplied by the unnormalised matrix, so that products grow by its size.
        *scale = kernels.rotate_quantize(&mut row, block, &mut quantized).0 / block as f32;
        let flip = if kernels.tiles.is_some() { 0 } else { 0x80 };
        for (group, q) in bytes.chunks_exact_mut(4 * LANES).zip(quantized.as_chunks::<4>().0) {
            let stored = q.map(|q| (q as u8) ^ flip);
            group[4 * i..4 * i + 4].copy_from_slice(&stored);
        }
    }
    Ok(())
}

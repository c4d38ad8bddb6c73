//! Packed weights: a memory-mapped safetensors file, widened to fp32 on demand.
//!
//! Matrices keep the format they came in. Plain ones are ordinary safetensors tensors (`F32`, `F16`,
//! `BF16`). Quantised ones are `U8` tensors of shape `[rows, row_bytes]` holding ggml blocks, each row
//! a whole number of blocks; the metadata entry `ggml` maps their names to the block type. Names are
//! those of the Hugging Face checkpoint, and the rotary halves are in its order.

use std::{
    collections::BTreeMap,
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
};

use candle_core::quantized::GgmlDType;
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};

use crate::error::{Error, Result};

/// How the numbers of a tensor are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a 32-bit float.
    Bf16,
    /// ggml blocks.
    Ggml(GgmlDType),
}

impl Format {
    /// Bytes of one row of `cols` numbers; `None` when `cols` is no whole number of blocks, or absurd.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        match self {
            Self::F32 => cols.checked_mul(4),
            Self::F16 | Self::Bf16 => cols.checked_mul(2),
            Self::Ggml(kind) => cols
                .is_multiple_of(kind.block_size())
                .then(|| (cols / kind.block_size()).checked_mul(kind.type_size()))
                .flatten(),
        }
    }
}

impl Format {
    /// Bytes of one element of the safetensors tensor that stores this format.
    pub(crate) fn stored_size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Ggml(_) => 1,
        }
    }

    /// Name in the metadata entry `ggml` of packed files; `None` for plain numbers.
    pub(crate) fn ggml_name(self) -> Option<&'static str> {
        let Self::Ggml(kind) = self else { return None };
        GGML_NAMES.iter().find(|(_, k)| *k == kind).map(|(name, _)| *name)
    }
}

/// The block types that packed files may hold, by the names used in their metadata.
const GGML_NAMES: [(&str, GgmlDType); 10] = [
    ("q4_0", GgmlDType::Q4_0),
    ("q4_1", GgmlDType::Q4_1),
    ("q5_0", GgmlDType::Q5_0),
    ("q5_1", GgmlDType::Q5_1),
    ("q8_0", GgmlDType::Q8_0),
    ("q2_k", GgmlDType::Q2K),
    ("q3_k", GgmlDType::Q3K),
    ("q4_k", GgmlDType::Q4K),
    ("q5_k", GgmlDType::Q5K),
    ("q6_k", GgmlDType::Q6K),
];

/// Block type of a name in packed files.
fn ggml_from_name(name: &str) -> Option<GgmlDType> {
    GGML_NAMES.iter().find(|(n, _)| *n == name).map(|(_, kind)| *kind)
}

/// A tensor of the file: a matrix, or a vector as one row.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// Storage.
    pub format: Format,
    /// Number of rows (1 for vectors).
    pub rows: usize,
    /// Numbers in one row.
    pub cols: usize,
    bytes: Range<usize>,
}

/// A mapped weights file.
#[derive(Debug)]
pub struct Weights {
    path: PathBuf,
    map: Mmap,
    tensors: BTreeMap<String, TensorInfo>,
}

impl Weights {
    /// Maps a safetensors file and checks its directory; no number is read yet.
    ///
    /// # Errors
    /// [`Error::ModelLoad`] for a file that is missing, not safetensors, or of an unknown format.
    pub fn open(path: &Path) -> Result<Self> {
        let map = map_file(path)?;
        let tensors = directory(&map).map_err(|problem| Error::model(path, problem))?;
        Ok(Self { path: path.to_owned(), map, tensors })
    }

    /// The file's bytes, for hashing.
    pub fn as_bytes(&self) -> &[u8] {
        &self.map
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Directory entry of `name`, if the file has it.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// Directory entry of `name`, which must be `[rows, cols]`.
    ///
    /// # Errors
    /// [`Error::ModelLoad`] when it is missing or has another shape.
    pub fn expect(&self, name: &str, rows: usize, cols: usize) -> Result<&TensorInfo> {
        let info = self
            .get(name)
            .ok_or_else(|| Error::model(&self.path, format!("has no tensor {name:?}")))?;
        if (info.rows, info.cols) != (rows, cols) {
            return Err(Error::model(
                &self.path,
                format!(
                    "tensor {name:?} is {} x {}, config.json says {rows} x {cols}",
                    info.rows, info.cols
                ),
            ));
        }
        Ok(info)
    }

    /// Stored bytes of `info`.
    pub fn bytes(&self, info: &TensorInfo) -> &[u8] {
        &self.map[info.bytes.clone()]
    }

    /// Tells the operating system that this process needs no page of the file at present; pages
    /// that are read again come back from the page cache.
    pub fn release_pages(&self) {
        #[cfg(target_os = "linux")]
        #[expect(unsafe_code, reason = "advice that could change a writable or anonymous mapping")]
        // SAFETY: the mapping is of a file and read-only, so that dropped pages come back unchanged.
        let _advice = unsafe { self.map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
    }

    /// Widens `rows` of a tensor to fp32.
    ///
    /// # Shapes
    /// - `out`: `[rows.len(), cols]`
    ///
    /// # Errors
    /// [`Error::ModelLoad`] when a number is not finite.
    pub fn widen_rows(&self, info: &TensorInfo, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let row_bytes = info.bytes.len() / info.rows;
        let bytes = &self.bytes(info)[rows.start * row_bytes..rows.end * row_bytes];
        widen(info.format, bytes, out)?;
        // The largest bit pattern without sign is at or above infinity's if a number is not finite;
        // unlike a search this needs no branch per number.
        let largest = out.iter().fold(0, |largest: u32, x| largest.max(x.abs().to_bits()));
        if largest >= f32::INFINITY.to_bits() {
            return Err(Error::model(&self.path, "holds a weight that is not finite"));
        }
        Ok(())
    }

    /// Widens a whole tensor to fp32, `[rows, cols]`.
    ///
    /// # Errors
    /// As [`Weights::expect`] and [`Weights::widen_rows`].
    pub fn widen(&self, name: &str, rows: usize, cols: usize) -> Result<Vec<f32>> {
        let info = self.expect(name, rows, cols)?;
        let mut out = vec![0.0; rows * cols];
        self.widen_rows(info, 0..rows, &mut out)?;
        Ok(out)
    }
}

/// Maps a file for reading.
pub(crate) fn map_file(path: &Path) -> Result<Mmap> {
    let file = File::open(path)
        .map_err(|error| Error::model(path, format!("cannot be opened: {error}")))?;
    // SAFETY: the mapping is read-only and private to its owner. Another process that truncates
    // the file meanwhile would make reads fault; detector files are written to a new name and
    // renamed into place, never changed.
    #[expect(unsafe_code, reason = "mapping the weights lets processes share them")]
    let map = unsafe { Mmap::map(&file) };
    map.map_err(|error| Error::model(path, format!("cannot be mapped: {error}")))
}

/// Reads the directory of a packed file.
fn directory(map: &[u8]) -> std::result::Result<BTreeMap<String, TensorInfo>, String> {
    let (header, metadata) = SafeTensors::read_metadata(map)
        .map_err(|error| format!("not a safetensors file: {error}"))?;
    let ggml: BTreeMap<String, String> =
        match metadata.metadata().as_ref().and_then(|m| m.get("ggml")) {
            None => BTreeMap::new(),
            Some(json) => serde_json::from_str(json).map_err(|error| {
                format!("metadata entry \"ggml\" is not a JSON object of strings: {error}")
            })?,
        };
    let data = header + size_of::<u64>();
    let mut tensors = BTreeMap::new();
    for (name, tensor) in metadata.tensors() {
        let (rows, cols) = match tensor.shape.as_slice() {
            [cols] => (1, *cols),
            [rows, cols] => (*rows, *cols),
            shape => {
                return Err(format!("tensor {name:?} has shape {shape:?}, not a vector or matrix"));
            }
        };
        let bytes = data + tensor.data_offsets.0..data + tensor.data_offsets.1;
        let (format, cols) = match (tensor.dtype, ggml.get(&name)) {
            (Dtype::F32, None) => (Format::F32, cols),
            (Dtype::F16, None) => (Format::F16, cols),
            (Dtype::BF16, None) => (Format::Bf16, cols),
            (Dtype::U8, Some(kind)) => {
                let kind = ggml_from_name(kind)
                    .ok_or_else(|| format!("tensor {name:?} has unknown block type {kind:?}"))?;
                if !cols.is_multiple_of(kind.type_size()) {
                    return Err(format!("tensor {name:?} is no whole number of blocks wide"));
                }
                // Blocks hold 16-bit scales, and candle insists on their alignment.
                if !bytes.start.is_multiple_of(align_of::<f16>()) {
                    return Err(format!("tensor {name:?} starts at the odd byte {}", bytes.start));
                }
                (Format::Ggml(kind), cols / kind.type_size() * kind.block_size())
            }
            (dtype, _) => return Err(format!("tensor {name:?} has unsupported type {dtype:?}")),
        };
        if rows == 0 || cols == 0 {
            return Err(format!("tensor {name:?} is empty"));
        }
        tensors.insert(name, TensorInfo { format, rows, cols, bytes });
    }
    Ok(tensors)
}

/// Widens stored numbers to fp32.
fn widen(format: Format, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    match format {
        Format::F32 => {
            for (x, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        Format::F16 => {
            for (x, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *x = f16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        Format::Bf16 => {
            for (x, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *x = bf16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        Format::Ggml(GgmlDType::Q4_1) => widen_q4_1(bytes, out),
        Format::Ggml(GgmlDType::Q8_0) => widen_q8_0(bytes, out),
        Format::Ggml(kind) => {
            let blocks = kind.from_data(bytes.into());
            let storage = blocks.dequantize(out.len())?;
            out.copy_from_slice(storage.as_slice::<f32>()?);
        }
    }
    Ok(())
}

/// Numbers in a block of the ggml formats below.
const BLOCK: usize = 32;

/// Blocks of a scale `d`, a minimum `m` (both fp16) and 32 numbers `x = d · q + m` of 4 bits, the
/// first 16 in the low halves of 16 bytes.
///
/// The shipped detector's two formats are widened here, straight from the mapped file: candle's
/// functions do the same, but allocate and copy for every call.
fn widen_q4_1(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.as_chunks::<20>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        let (d, m) = (half_at(block, 0), half_at(block, 2));
        let (low, high) = out.split_at_mut(BLOCK / 2);
        for ((low, high), q) in low.iter_mut().zip(high).zip(&block[4..]) {
            *low = f32::from(q & 0x0f) * d + m;
            *high = f32::from(q >> 4) * d + m;
        }
    }
}

/// Blocks of a scale `d` (fp16) and 32 numbers `x = d · q` of 8 bits.
fn widen_q8_0(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.as_chunks::<34>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        let d = half_at(block, 0);
        for (x, q) in out.iter_mut().zip(&block[2..]) {
            *x = f32::from(*q as i8) * d;
        }
    }
}

/// The fp16 number at an offset of a block.
fn half_at(block: &[u8], offset: usize) -> f32 {
    f16::from_le_bytes([block[offset], block[offset + 1]]).to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks of any bytes, but with scales that are finite.
    fn blocks(bytes: usize, halves: &[usize]) -> Vec<u8> {
        let mut blocks: Vec<u8> = (0..7 * bytes).map(|i| (i * 89 + i / 7) as u8).collect();
        for (i, block) in blocks.chunks_exact_mut(bytes).enumerate() {
            for at in halves {
                let half = f16::from_f32(0.37 * i as f32 - 1.0);
                block[*at..at + 2].copy_from_slice(&half.to_le_bytes());
            }
        }
        blocks
    }

    #[test]
    fn blocks_are_widened_as_candle_does() {
        for (kind, bytes) in
            [(GgmlDType::Q4_1, blocks(20, &[0, 2])), (GgmlDType::Q8_0, blocks(34, &[0]))]
        {
            let mut found = vec![0.0; 7 * BLOCK];
            widen(Format::Ggml(kind), &bytes, &mut found).unwrap();
            let storage = kind.from_data(bytes.as_slice().into()).dequantize(found.len()).unwrap();
            assert_eq!(found, storage.as_slice::<f32>().unwrap(), "{kind:?}");
        }
    }
}

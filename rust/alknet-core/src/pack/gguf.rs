//! Directory of a GGUF file, borrowed from its bytes.
//!
//! candle reads GGUF too, but copies every array element into a 32-byte enum, divides by the file's
//! own `general.alignment` and hands over no raw blocks. Here nothing is copied but a list of slices,
//! so that memory is bounded by the file's size whatever it claims.
//!
//! Source: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>

use std::{collections::BTreeMap, ops::Range};

use candle_core::quantized::GgmlDType;

use crate::model::weights::Format;

type Result<T> = std::result::Result<T, String>;

/// A metadata value; kinds that no Llama file needs are only skipped.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value<'a> {
    /// Any integer type that is not negative.
    Integer(u64),
    /// 32- or 64-bit float.
    Float(f64),
    /// One byte, 0 or 1.
    Bool(bool),
    /// UTF-8 text.
    String(&'a str),
    /// Array of strings.
    Strings(Vec<&'a str>),
    /// Array of 32-bit integers.
    Integers(Vec<u32>),
    /// A negative number or an array of another type.
    Other,
}

/// Where a matrix lies in the file.
#[derive(Debug, Clone)]
pub(super) struct Tensor {
    /// Storage of its numbers.
    pub(super) format: Format,
    /// Number of rows; 1 for vectors.
    pub(super) rows: usize,
    /// Numbers in one row.
    pub(super) cols: usize,
    /// Position in the file.
    pub(super) bytes: Range<usize>,
}

/// Metadata and tensor directory.
#[derive(Debug)]
pub(super) struct Gguf<'a> {
    /// Metadata by key.
    pub(super) metadata: BTreeMap<&'a str, Value<'a>>,
    /// Tensors by name.
    pub(super) tensors: BTreeMap<&'a str, Tensor>,
}

impl<'a> Gguf<'a> {
    /// Reads the directory and checks that every tensor lies inside `bytes`.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self> {
        let mut reader = Reader { bytes, at: 0 };
        if reader.take(4)? != b"GGUF" {
            return Err("is not a GGUF file".into());
        }
        let version = reader.u32()?;
        if !(2..=3).contains(&version) {
            return Err(format!(
                "has GGUF version {version}; versions 2 and 3, little-endian, can be read"
            ));
        }
        let (num_tensors, num_values) = (reader.u64()?, reader.u64()?);
        let mut metadata = BTreeMap::new();
        for _ in 0..num_values {
            let key = reader.string()?;
            let kind = reader.u32()?;
            if metadata.insert(key, reader.value(kind)?).is_some() {
                return Err(format!("has metadata key {key:?} twice"));
            }
        }
        let mut tensors = BTreeMap::new();
        for _ in 0..num_tensors {
            let (name, tensor) = reader.tensor()?;
            if tensors.insert(name, tensor).is_some() {
                return Err(format!("has tensor {name:?} twice"));
            }
        }
        place(&mut tensors, alignment(&metadata)?, reader.at, bytes.len())?;
        Ok(Self { metadata, tensors })
    }

    /// Integer under `key`, if there is one.
    pub(super) fn integer(&self, key: &str) -> Result<Option<usize>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(&Value::Integer(n)) => {
                usize::try_from(n).map(Some).map_err(|_| format!("{key} is {n}, too large"))
            }
            Some(_) => Err(format!("{key} is not an integer")),
        }
    }

    /// Float under `key`, if there is one.
    pub(super) fn float(&self, key: &str) -> Result<Option<f64>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(&Value::Float(x)) => Ok(Some(x)),
            Some(_) => Err(format!("{key} is not a float")),
        }
    }

    /// String under `key`, if there is one.
    pub(super) fn string(&self, key: &str) -> Result<Option<&'a str>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(&Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(format!("{key} is not a string")),
        }
    }

    /// Array of strings under `key`.
    pub(super) fn strings(&self, key: &str) -> Result<&[&'a str]> {
        match self.metadata.get(key) {
            Some(Value::Strings(strings)) => Ok(strings),
            _ => Err(format!("has no array of strings {key}")),
        }
    }
}

/// Where tensor data start and what they are aligned to, in bytes.
fn alignment(metadata: &BTreeMap<&str, Value<'_>>) -> Result<usize> {
    match metadata.get("general.alignment") {
        None => Ok(32),
        Some(&Value::Integer(n @ 1..=65_536)) if n.is_power_of_two() => Ok(n as usize),
        Some(other) => Err(format!("general.alignment is {other:?}, not a small power of two")),
    }
}

/// Turns offsets into the data section into positions in the file, and checks them.
fn place(
    tensors: &mut BTreeMap<&str, Tensor>,
    alignment: usize,
    header: usize,
    file: usize,
) -> Result<()> {
    let data = header.next_multiple_of(alignment);
    for (name, tensor) in &mut *tensors {
        let range = data
            .checked_add(tensor.bytes.start)
            .and_then(|start| Some(start..start.checked_add(tensor.bytes.len())?))
            .filter(|range| range.end <= file)
            .ok_or_else(|| {
                format!("ends before tensor {name:?} does; it is cut short or its offsets lie")
            })?;
        tensor.bytes = range;
    }
    refuse_overlaps(tensors)
}

/// Every byte belongs to one tensor at most.
fn refuse_overlaps(tensors: &BTreeMap<&str, Tensor>) -> Result<()> {
    let mut sorted: Vec<_> = tensors.iter().collect();
    sorted.sort_by_key(|(_, tensor)| tensor.bytes.start);
    let overlap = sorted.windows(2).find(|pair| pair[0].1.bytes.end > pair[1].1.bytes.start);
    overlap.map_or(Ok(()), |pair| Err(format!("has tensor {:?} inside {:?}", pair[1].0, pair[0].0)))
}

/// A cursor that never passes the end.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let taken = self
            .bytes
            .get(self.at..)
            .and_then(|rest| rest.get(..n))
            .ok_or_else(|| format!("ends inside its header, at byte {}", self.bytes.len()))?;
        self.at += n;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("take returns N bytes"))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A length or count, which may exceed what the file holds.
    fn size(&mut self) -> Result<usize> {
        Ok(usize::try_from(self.u64()?).unwrap_or(usize::MAX))
    }

    fn string(&mut self) -> Result<&'a str> {
        let len = self.size()?;
        let start = self.at;
        std::str::from_utf8(self.take(len)?)
            .map_err(|_| format!("has a string at byte {start} that is not UTF-8"))
    }

    /// A metadata value of type `kind`.
    fn value(&mut self, kind: u32) -> Result<Value<'a>> {
        let signed = |n: i64| u64::try_from(n).map_or(Value::Other, Value::Integer);
        Ok(match kind {
            0 => Value::Integer(u8::from_le_bytes(self.array()?).into()),
            1 => signed(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Integer(u16::from_le_bytes(self.array()?).into()),
            3 => signed(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Integer(self.u32()?.into()),
            5 => signed(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::String(self.string()?),
            9 => self.elements()?,
            10 => Value::Integer(self.u64()?),
            11 => signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            _ => return Err(format!("has a metadata value of unknown type {kind}")),
        })
    }

    /// The elements of an array. Nested arrays are refused: no model file has them.
    fn elements(&mut self) -> Result<Value<'a>> {
        let (kind, len) = (self.u32()?, self.size()?);
        let width = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            // No capacity in advance: each string takes eight bytes of the file at least.
            8 => {
                return Ok(Value::Strings((0..len).map(|_| self.string()).collect::<Result<_>>()?));
            }
            _ => return Err(format!("has an array of unsupported type {kind}")),
        };
        let bytes = self.take(len.saturating_mul(width))?;
        Ok(match kind {
            4 | 5 => Value::Integers(
                bytes
                    .chunks_exact(4)
                    .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                    .collect(),
            ),
            _ => Value::Other,
        })
    }

    /// A directory entry; its range still counts from the start of the data section.
    fn tensor(&mut self) -> Result<(&'a str, Tensor)> {
        let name = self.string()?;
        let (cols, rows) = match self.u32()? {
            1 => (self.size()?, 1),
            2 => (self.size()?, self.size()?),
            n => return Err(format!("has tensor {name:?} of {n} dimensions, not 1 or 2")),
        };
        let kind = self.u32()?;
        let format = format(kind).ok_or_else(|| {
            format!(
                "has tensor {name:?} of ggml type {kind}; F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, \
                 Q8_0 and Q2_K to Q6_K can be read"
            )
        })?;
        let start = self.size()?;
        let end = format
            .row_bytes(cols)
            .and_then(|row| row.checked_mul(rows))
            .filter(|&len| len > 0)
            .and_then(|len| start.checked_add(len))
            .ok_or_else(|| format!("has tensor {name:?} of impossible shape {rows} x {cols}"))?;
        Ok((name, Tensor { format, rows, cols, bytes: start..end }))
    }
}

/// Storage format of a ggml type number.
fn format(kind: u32) -> Option<Format> {
    Some(match kind {
        0 => Format::F32,
        1 => Format::F16,
        2 => Format::Ggml(GgmlDType::Q4_0),
        3 => Format::Ggml(GgmlDType::Q4_1),
        6 => Format::Ggml(GgmlDType::Q5_0),
        7 => Format::Ggml(GgmlDType::Q5_1),
        8 => Format::Ggml(GgmlDType::Q8_0),
        10 => Format::Ggml(GgmlDType::Q2K),
        11 => Format::Ggml(GgmlDType::Q3K),
        12 => Format::Ggml(GgmlDType::Q4K),
        13 => Format::Ggml(GgmlDType::Q5K),
        14 => Format::Ggml(GgmlDType::Q6K),
        30 => Format::Bf16,
        _ => return None,
    })
}

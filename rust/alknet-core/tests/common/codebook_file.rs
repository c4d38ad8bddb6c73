//! A small codebook file that a test can take apart: valid as it is made, written byte by byte.

use std::collections::BTreeMap;

use serde_json::json;

/// One tensor of the file.
#[derive(Debug, Clone)]
pub(crate) struct Tensor {
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<u8>,
}

impl Tensor {
    pub(crate) fn f32(shape: &[usize], numbers: &[f32]) -> Self {
        assert_eq!(shape.iter().product::<usize>(), numbers.len());
        let data = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        Self { dtype: "F32", shape: shape.to_vec(), data }
    }
}

/// The parts of a codebook file.
#[derive(Debug, Clone)]
pub(crate) struct CodebookFile {
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) tensors: BTreeMap<String, Tensor>,
}

pub(crate) const HIDDEN_SIZE: usize = 4;
/// Blocks up to the deepest site.
pub(crate) const N_BLOCKS: usize = 4;
pub(crate) const N_SITES: usize = 2;
pub(crate) const N_COMPONENTS: usize = 3;
pub(crate) const WINDOW: usize = 4;
/// What an activation at root mean square 1 is multiplied by.
pub(crate) const GAIN: f32 = 1000.0;
pub(crate) const SEGMENT_TOKENS: usize = 16;

/// A null that rises by 0.5 per unit of the statistic from 0 on: a statistic of 4 is p = 0.01.
const NULL_KNOTS: [f32; 3] = [0.0, 4.0, 8.0];
const NULL_VALUES: [f32; 3] = [0.0, 2.0, 4.0];

/// Only a mean tail depth of several hundred is novel.
const NOVELTY_KNOTS: [f32; 3] = [0.0, 100.0, 600.0];
const NOVELTY_VALUES: [f32; 3] = [0.0, 0.01, 4.0];

impl CodebookFile {
    /// Two sites of width 4. Component `k` is entry `k` of the first site, [`GAIN`] times, plus half of
    /// that of the second; the directions are component 0 (`attack`, user), 1 (`embedded_instruction`, document)
    /// and 2 (`jailbreak`, user, not scored).
    pub(crate) fn valid() -> Self {
        let columns = N_SITES * HIDDEN_SIZE;
        let mut components = vec![0.0; N_COMPONENTS * columns];
        for k in 0..N_COMPONENTS {
            components[k * columns + k] = GAIN;
            components[k * columns + HIDDEN_SIZE + k] = 0.5 * GAIN;
        }
        let identity = |k: usize| (0..N_COMPONENTS).map(move |j| f32::from(u8::from(j == k)));
        let weights: Vec<f32> = (0..3).flat_map(identity).collect();
        let classes = 2;
        let nulls = |n: usize, row: &[f32]| row.repeat(n);
        let tensors = [
            ("mean", Tensor::f32(&[columns], &vec![0.0; columns])),
            ("components", Tensor::f32(&[N_COMPONENTS, columns], &components)),
            ("cdf_knots", Tensor::f32(&[N_COMPONENTS, 3], &[-1.0, 0.0, 1.0].repeat(N_COMPONENTS))),
            ("cdf_values", Tensor::f32(&[N_COMPONENTS, 3], &[0.1, 0.5, 0.9].repeat(N_COMPONENTS))),
            ("direction_weights", Tensor::f32(&[1, 3, N_COMPONENTS], &weights)),
            ("direction_bias", Tensor::f32(&[3], &[0.0; 3])),
            ("null_knots", Tensor::f32(&[3, classes, 3], &nulls(3 * classes, &NULL_KNOTS))),
            ("null_values", Tensor::f32(&[3, classes, 3], &nulls(3 * classes, &NULL_VALUES))),
            ("novelty_knots", Tensor::f32(&[classes, 3], &nulls(classes, &NOVELTY_KNOTS))),
            ("novelty_values", Tensor::f32(&[classes, 3], &nulls(classes, &NOVELTY_VALUES))),
        ];
        let directions = json!([
            {"name": "attack", "origin": "user", "scored": true},
            {"name": "embedded_instruction", "origin": "document", "scored": true},
            {"name": "jailbreak", "origin": "user", "scored": false},
        ]);
        let metadata = [
            ("format_version", "4".to_owned()),
            ("detector", "synthetic".to_owned()),
            ("weights_sha256", "a".repeat(64)),
            ("tokenizer_sha256", "b".repeat(64)),
            ("config_sha256", "c".repeat(64)),
            ("sites", "1.resid_post,3.mlp_out".to_owned()),
            ("hidden_size", HIDDEN_SIZE.to_string()),
            ("window", WINDOW.to_string()),
            ("stride", "2".to_owned()),
            ("scales", "[1]".to_owned()),
            ("segment_tokens", SEGMENT_TOKENS.to_string()),
            ("segment_overlap", "4".to_owned()),
            ("length_classes", "[8, 16]".to_owned()),
            ("origins", r#"["user", "document", null]"#.to_owned()),
            ("directions", directions.to_string()),
        ];
        Self {
            metadata: metadata.map(|(key, value)| (key.to_owned(), value)).into(),
            tensors: tensors.map(|(name, tensor)| (name.to_owned(), tensor)).into(),
        }
    }

    /// The file with a token that closes every so many others; a tenth of component 0 counts for direction 0.
    pub(crate) fn closed(self, token: u32, every: usize) -> Self {
        self.closed_by(&json!({"token": token, "every": every}))
    }

    /// The same with vectors that were learned, of ones.
    pub(crate) fn closed_by_learned(mut self, n_blocks: usize, every: usize) -> Self {
        let shape = [n_blocks, HIDDEN_SIZE];
        let ones = vec![1.0; n_blocks * HIDDEN_SIZE];
        self.tensors.insert("closing".to_owned(), Tensor::f32(&shape, &ones));
        self.closed_by(&json!({"every": every}))
    }

    /// The same with a first stage, on the first site, that ends the reading above this p-value.
    pub(crate) fn staged(mut self, above: f64) -> Self {
        let early = |(name, tensor): (&String, &Tensor)| {
            let columns =
                |numbers: &[u8]| numbers.chunks(16).step_by(2).flatten().copied().collect();
            let (shape, data) = match name.as_str() {
                "mean" => (vec![HIDDEN_SIZE], columns(&tensor.data)),
                "components" => (vec![N_COMPONENTS, HIDDEN_SIZE], columns(&tensor.data)),
                _ => (tensor.shape.clone(), tensor.data.clone()),
            };
            (format!("early.{name}"), Tensor { dtype: "F32", shape, data })
        };
        let own: Vec<_> =
            self.tensors.iter().filter(|(name, _)| *name != "closing").map(early).collect();
        self.tensors.extend(own);
        self.metadata.insert("early".to_owned(), json!({"sites": 1, "above": above}).to_string());
        self
    }

    fn closed_by(mut self, closing: &serde_json::Value) -> Self {
        self.metadata.insert("closing".to_owned(), closing.to_string());
        if let Some(weights) = self.tensors.get_mut("direction_weights") {
            weights.shape[0] += 1;
            let mut row = [0.0; 3 * N_COMPONENTS];
            row[0] = 0.1;
            weights.data.extend(row.iter().flat_map(|x: &f32| x.to_le_bytes()));
        }
        self
    }

    /// The safetensors header: every tensor after the other, in order of name.
    pub(crate) fn header(&self) -> serde_json::Map<String, serde_json::Value> {
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".to_owned(), json!(self.metadata));
        let mut end = 0;
        for (name, Tensor { dtype, shape, data }) in &self.tensors {
            let start = end;
            end += data.len();
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
            header.insert(name.clone(), entry);
        }
        header
    }

    /// The bytes of the file.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.with_header(&serde_json::Value::Object(self.header()).to_string())
    }

    /// The file with another header before the same data.
    pub(crate) fn with_header(&self, header: &str) -> Vec<u8> {
        let padding = header.len().wrapping_neg() % 8;
        let mut bytes = ((header.len() + padding) as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(std::iter::repeat_n(b' ', padding));
        bytes.extend(self.tensors.values().flat_map(|tensor| &tensor.data));
        bytes
    }
}

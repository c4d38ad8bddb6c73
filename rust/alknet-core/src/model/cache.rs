//! Key/value cache of one sequence.

use super::TokenId;

/// Keys (rotated) and values of one layer, `[len, num_key_value_heads · head_dim]`, row-major.
#[derive(Debug, Clone, Default)]
pub struct LayerCache {
    /// Keys after RoPE.
    pub keys: Vec<f32>,
    /// Values.
    pub values: Vec<f32>,
}

/// What a sequence has read so far. A clone is an independent continuation, so that a constant
/// prefix is computed once and cloned.
#[derive(Debug, Clone, Default)]
pub struct KvCache {
    /// Tokens read so far; engines without a key/value cache read them again.
    pub input_ids: Vec<TokenId>,
    /// One entry per layer up to the deepest site; empty for engines without a key/value cache.
    pub layers: Vec<LayerCache>,
}

impl KvCache {
    /// An empty cache of `num_layers` layers.
    pub fn new(num_layers: usize) -> Self {
        Self { input_ids: Vec::new(), layers: vec![LayerCache::default(); num_layers] }
    }

    /// Number of tokens read so far.
    pub fn len(&self) -> usize {
        self.input_ids.len()
    }

    /// Whether nothing has been read yet.
    pub fn is_empty(&self) -> bool {
        self.input_ids.is_empty()
    }
}

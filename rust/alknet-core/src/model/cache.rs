//! Key/value cache of one sequence.

use std::sync::{Arc, Mutex};

use alknet_kernels::KeyValues;

use super::TokenId;

/// Keys (rotated) and values of one layer.
pub type LayerCache = KeyValues;

/// Memory of dropped caches, for the next ones: memory that is new to the process has to be
/// zeroed by the operating system, page by page, which takes a tenth of a short pass.
#[derive(Debug)]
pub(super) struct SpareLayers {
    /// Most bytes that are kept.
    most: usize,
    spares: Mutex<Spares>,
}

#[derive(Debug, Default)]
struct Spares {
    caches: Vec<Vec<LayerCache>>,
    bytes: usize,
}

impl SpareLayers {
    /// Bytes per thread: those of a segment of 1,024 tokens of the shipped detector's model.
    const BYTES_PER_THREAD: usize = 12 << 20;

    /// Memory for an engine of `threads` threads.
    pub(super) fn new(threads: usize) -> Self {
        Self { most: threads * Self::BYTES_PER_THREAD, spares: Mutex::default() }
    }

    fn take(&self) -> Option<Vec<LayerCache>> {
        // In a forked process the lock may be held for ever: then there is new memory.
        let mut spares = self.spares.try_lock().ok()?;
        let layers = spares.caches.pop()?;
        spares.bytes -= bytes(&layers);
        Some(layers)
    }

    fn put(&self, mut layers: Vec<LayerCache>) {
        layers.iter_mut().for_each(LayerCache::clear);
        let bytes = bytes(&layers);
        if let Ok(mut spares) = self.spares.try_lock()
            && spares.bytes + bytes <= self.most
        {
            spares.bytes += bytes;
            spares.caches.push(layers);
        }
    }
}

fn bytes(layers: &[LayerCache]) -> usize {
    layers.iter().map(LayerCache::bytes).sum()
}

/// What a sequence has read so far. A clone is an independent continuation, so that a constant
/// prefix is computed once and cloned.
#[derive(Debug, Default)]
pub struct KvCache {
    /// Tokens read so far; engines without a key/value cache read them again.
    pub input_ids: Vec<TokenId>,
    /// One entry per layer up to the deepest site; empty for engines without a key/value cache.
    pub layers: Vec<LayerCache>,
    spares: Option<Arc<SpareLayers>>,
}

impl KvCache {
    /// An empty cache of `num_layers` layers.
    pub fn new(num_layers: usize) -> Self {
        let layers = vec![LayerCache::default(); num_layers];
        Self { input_ids: Vec::new(), layers, spares: None }
    }

    /// An empty cache of `num_layers` layers whose memory comes from `spares` and goes back there.
    pub(super) fn recycled(num_layers: usize, spares: &Arc<SpareLayers>) -> Self {
        let layers = spares.take().unwrap_or_else(|| vec![LayerCache::default(); num_layers]);
        Self { input_ids: Vec::new(), layers, spares: Some(Arc::clone(spares)) }
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

impl Clone for KvCache {
    fn clone(&self) -> Self {
        let Some(spares) = &self.spares else {
            let (input_ids, layers) = (self.input_ids.clone(), self.layers.clone());
            return Self { input_ids, layers, spares: None };
        };
        let mut copy = Self::recycled(self.layers.len(), spares);
        copy.input_ids.extend_from_slice(&self.input_ids);
        for (copy, layer) in copy.layers.iter_mut().zip(&self.layers) {
            copy.copy_from(layer);
        }
        copy
    }
}

impl Drop for KvCache {
    fn drop(&mut self) {
        if let Some(spares) = &self.spares {
            spares.put(std::mem::take(&mut self.layers));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_a_dropped_cache_is_used_again_and_its_numbers_are_not() {
        let spares = Arc::new(SpareLayers::new(1));
        let mut first = KvCache::recycled(2, &spares);
        first.layers[1].keys.extend([1.0; 100]);
        let place = first.layers[1].keys.as_ptr();
        let copy = first.clone();
        assert_eq!(copy.layers[1].keys, [1.0; 100]);
        drop(first);
        let second = KvCache::recycled(2, &spares);
        assert_eq!(second.layers[1].keys.as_ptr(), place);
        assert!(second.is_empty() && second.layers.iter().all(|layer| layer.keys.is_empty()));
        let third = KvCache::recycled(2, &spares);
        assert_eq!((third.layers.len(), third.layers[1].keys.capacity()), (2, 0));
    }

    #[test]
    fn memory_of_a_long_text_is_given_back() {
        let spares = Arc::new(SpareLayers::new(1));
        let mut long = KvCache::recycled(1, &spares);
        long.layers[0].keys.reserve(SpareLayers::BYTES_PER_THREAD / size_of::<f32>() + 1);
        drop(long);
        assert!(spares.take().is_none());
    }

    #[test]
    fn memory_of_several_texts_is_kept_up_to_a_sum() {
        let spares = Arc::new(SpareLayers::new(1));
        let mut caches = [(); 3].map(|()| KvCache::recycled(1, &spares));
        for cache in &mut caches {
            cache.layers[0].keys.reserve(SpareLayers::BYTES_PER_THREAD / size_of::<f32>() / 2);
        }
        drop(caches);
        assert!(spares.take().is_some() && spares.take().is_some() && spares.take().is_none());
    }
}

//! The engines and the tokenizer against numbers written by `tests/golden/make_golden.py` with
//! Transformers.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use alknet_core::{
    capture::{Activations, Capture},
    model::{
        Backend, KvCache, LlamaConfig, Sequence, Site, SiteKind, TokenId, candle::CandleBackend,
        weights::Weights,
    },
    tokenize::Tokenizer,
};
use safetensors::SafeTensors;
use serde::Deserialize;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

/// A detector packed from the file that the golden numbers were made with: the folder that
/// `ALKNET_TEST_DETECTOR` names, or the packaged one. Without it, says so and returns `None`.
#[expect(clippy::disallowed_methods, reason = "how a test is told where its weights are")]
fn detector() -> Option<PathBuf> {
    let packaged = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../python/alknet_firewall/detectors/smollm2-135m-instruct");
    let folder = std::env::var_os("ALKNET_TEST_DETECTOR").map_or(packaged, PathBuf::from);
    if folder.join("model.safetensors").is_file() {
        return Some(folder);
    }
    #[expect(clippy::print_stderr, reason = "a skipped test must be seen")]
    {
        eprintln!("SKIPPED: no packed weights in {}; set ALKNET_TEST_DETECTOR", folder.display());
    }
    None
}

/// Largest relative error of a row (in the Euclidean norm) after `layer` that rounding explains.
///
/// The rounding errors of a product over `width` numbers add up like a random walk, to `ε √width`. An
/// input's error goes through ten of them per block: norm, projection, scores (where both factors err,
/// so two), mixing, `o_proj`, norm, gate and up (both err), and down. Norms keep errors relative, and
/// those of all blocks add up in the residual stream. Besides, Transformers computes rotary angles in
/// fp32, which errs by `ε · position` at most.
fn tolerance(layer: usize, width: usize, seq_len: usize) -> f64 {
    let epsilon = f64::from(f32::EPSILON);
    (layer + 1) as f64 * 10.0 * epsilon * (width as f64).sqrt() + epsilon * seq_len as f64
}

fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let difference = &mut found.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b));
    norm(difference) / norm(&mut expected.iter().map(|&x| f64::from(x)))
}

/// Numbers of a tensor of `file`.
fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let bytes = file.tensor(name).unwrap().data().chunks_exact(4);
    bytes.map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// Numbers of an `I64` tensor of `file`.
fn integers(file: &SafeTensors<'_>, name: &str) -> Vec<usize> {
    let bytes = file.tensor(name).unwrap().data().chunks_exact(8);
    bytes.map(|b| i64::from_le_bytes(b.try_into().unwrap()) as usize).collect()
}

/// Row `t` of site `s`.
fn row(activations: &Activations, t: usize, s: usize) -> &[f32] {
    let hidden = activations.hidden_size;
    &activations.data[(t * activations.n_sites + s) * hidden..][..hidden]
}

/// Activations of a whole batch, each sequence read from its beginning.
fn read(backend: &dyn Backend, batch: &[&[TokenId]]) -> Vec<Activations> {
    let mut caches: Vec<KvCache> = batch.iter().map(|_| backend.new_cache()).collect();
    extend(backend, batch, &mut caches)
}

/// Activations of further tokens of every sequence.
fn extend(backend: &dyn Backend, batch: &[&[TokenId]], caches: &mut [KvCache]) -> Vec<Activations> {
    let (n_sites, hidden_size) = (backend.sites().len(), backend.hidden_size());
    let zeros = |input_ids: &&[TokenId]| Activations::zeros(input_ids.len(), n_sites, hidden_size);
    let mut activations: Vec<_> = batch.iter().map(zeros).collect();
    let mut sequences: Vec<_> = batch
        .iter()
        .zip(caches)
        .map(|(input_ids, cache)| Sequence::new(input_ids, cache))
        .collect();
    backend.forward(&mut sequences, &Capture::new(&mut activations)).unwrap();
    activations
}

/// A tiny model with all its sites, its golden activations and the ids they belong to.
struct Tiny {
    backend: CandleBackend,
    config: LlamaConfig,
    expected: Vec<u8>,
    input_ids: Vec<TokenId>,
}

impl Tiny {
    fn load(folder: &str) -> Self {
        let folder = golden(folder);
        let config = LlamaConfig::from_file(&folder.join("config.json")).unwrap();
        let weights = Arc::new(Weights::open(&folder.join("model.safetensors")).unwrap());
        let kinds = [SiteKind::AttnOut, SiteKind::MlpOut, SiteKind::ResidPost];
        let sites: Vec<Site> = (0..config.num_hidden_layers)
            .flat_map(|layer| kinds.map(|kind| Site { layer, kind }))
            .collect();
        let backend = CandleBackend::load(weights, &config, &sites, Some(2)).unwrap();
        let expected = fs::read(folder.join("activations.safetensors")).unwrap();
        let ids = integers(&SafeTensors::deserialize(&expected).unwrap(), "input_ids");
        let input_ids = ids.into_iter().map(|id| id as TokenId).collect();
        Self { backend, config, expected, input_ids }
    }

    fn tolerance(&self, site: Site) -> f64 {
        tolerance(site.layer, self.config.intermediate_size, self.input_ids.len())
    }

    fn assert_golden(&self, found: &Activations, what: &str) {
        let file = SafeTensors::deserialize(&self.expected).unwrap();
        for (s, site) in self.backend.sites().iter().enumerate() {
            let expected = floats(&file, &site.to_string());
            for (t, expected) in expected.chunks_exact(self.config.hidden_size).enumerate() {
                let error = relative_error(row(found, t, s), expected);
                let tolerance = self.tolerance(*site);
                assert!(
                    error <= tolerance,
                    "{what}: {site}, token {t}: {error:.1e} > {tolerance:.1e}"
                );
            }
        }
    }
}

#[test]
fn tiny_models_have_the_activations_of_transformers() {
    for folder in ["tiny", "tiny-biased"] {
        let tiny = Tiny::load(folder);
        let found = read(&tiny.backend, &[&tiny.input_ids]);
        tiny.assert_golden(&found[0], folder);
    }
}

#[test]
fn a_ragged_batch_changes_nothing() {
    let tiny = Tiny::load("tiny");
    let batch = [&tiny.input_ids[..3], &tiny.input_ids, &[], &tiny.input_ids[5..23]];
    let found = read(&tiny.backend, &batch);
    tiny.assert_golden(&found[1], "in a batch");
    assert!(found[2].data.is_empty());
}

#[test]
fn a_sequence_continues_from_its_cache() {
    let tiny = Tiny::load("tiny-biased");
    let (mut whole, mut caches) = (Vec::new(), vec![tiny.backend.new_cache()]);
    for part in [0..1, 1..14, 14..15, 15..tiny.input_ids.len()] {
        let found = extend(&tiny.backend, &[&tiny.input_ids[part]], &mut caches);
        whole.extend(&found[0].data);
    }
    let (n_sites, hidden_size) = (tiny.backend.sites().len(), tiny.backend.hidden_size());
    let seq_len = tiny.input_ids.len();
    assert_eq!(caches[0].len(), seq_len);
    tiny.assert_golden(&Activations { seq_len, n_sites, hidden_size, data: whole }, "in parts");
}

#[test]
fn a_clone_of_a_cache_is_independent() {
    let tiny = Tiny::load("tiny");
    let mut first = vec![tiny.backend.new_cache()];
    extend(&tiny.backend, &[&tiny.input_ids[..10]], &mut first);
    let mut second = first.clone();
    extend(&tiny.backend, &[&[7, 8, 9]], &mut second);
    let found = extend(&tiny.backend, &[&tiny.input_ids[10..]], &mut first);
    let whole = read(&tiny.backend, &[&tiny.input_ids]);
    for (s, site) in tiny.backend.sites().iter().enumerate() {
        for t in 10..tiny.input_ids.len() {
            let error = relative_error(row(&found[0], t - 10, s), row(&whole[0], t, s));
            assert!(error <= tiny.tolerance(*site), "{site}, token {t}: {error:.1e}");
        }
    }
}

/// Longer than a block of queries; the tiny model reads 128 positions, so it is given more.
#[test]
fn blocks_of_queries_see_what_one_block_sees() {
    let folder = golden("tiny");
    let mut config = LlamaConfig::from_file(&folder.join("config.json")).unwrap();
    config.max_position_embeddings = 512;
    let weights = Arc::new(Weights::open(&folder.join("model.safetensors")).unwrap());
    let site = Site { layer: 3, kind: SiteKind::ResidPost };
    let backend = CandleBackend::load(weights, &config, &[site], None).unwrap();
    let input_ids: Vec<TokenId> = (0..400).map(|i| (i * i + 3) % 264).collect();
    let whole = read(&backend, &[&input_ids]);
    let (mut parts, mut caches) = (Vec::new(), vec![backend.new_cache()]);
    for part in input_ids.chunks(50) {
        parts.extend(extend(&backend, &[part], &mut caches).remove(0).data);
    }
    for (t, row) in parts.chunks_exact(config.hidden_size).enumerate() {
        let error = relative_error(row, &whole[0].data[t * config.hidden_size..][..row.len()]);
        assert!(error <= tolerance(3, 64, 400), "token {t}: {error:.1e}");
    }
}

#[test]
fn rotary_frequencies_are_those_of_transformers() {
    #[derive(Deserialize)]
    struct Table {
        config: serde_json::Value,
        inv_freq: Vec<f64>,
        attention_factor: f64,
    }
    let path = golden("rope.json");
    let tables: Vec<Table> = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert!(tables.len() >= 12);
    for table in tables {
        let json = serde_json::to_vec(&table.config).unwrap();
        let found = LlamaConfig::from_json(&path, &json).unwrap().rotary_frequencies();
        let kind = &table.config["rope_parameters"];
        // Transformers computes them in fp32, in a handful of operations.
        let close = |a: f64, b: f64| (a - b).abs() <= 8.0 * f64::from(f32::EPSILON) * b.abs();
        assert!(close(found.attention_factor, table.attention_factor), "{kind}");
        assert_eq!(found.inv_freq.len(), table.inv_freq.len());
        for (found, expected) in found.inv_freq.iter().zip(&table.inv_freq) {
            assert!(close(*found, *expected), "{kind}: {found} is not {expected}");
        }
    }
}

#[test]
fn smollm2_has_the_ids_of_its_published_tokenizer() {
    let Some(detector) = detector() else { return };
    let tokenizer = Tokenizer::from_file(&detector.join("tokenizer.json")).unwrap();
    let (texts, ids) = smollm2_texts();
    for (name, text) in &texts {
        assert_eq!(tokenizer.encode(text).unwrap().input_ids, ids[name], "{name}");
    }
}

#[test]
fn smollm2_has_the_activations_of_transformers() {
    let Some(detector) = detector() else { return };
    let config = LlamaConfig::from_file(&detector.join("config.json")).unwrap();
    let weights = Arc::new(Weights::open(&detector.join("model.safetensors")).unwrap());
    let sites = [0, 3, 6, 10, 14].map(|layer| Site { layer, kind: SiteKind::ResidPost });
    let backend = CandleBackend::load(weights, &config, &sites, None).unwrap();
    let bytes = fs::read(golden("smollm2.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    for (name, ids) in smollm2_texts().1 {
        let input_ids: Vec<TokenId> = config.bos_token_id.into_iter().chain(ids).collect();
        let found = read(&backend, &[&input_ids]).remove(0);
        let chosen = integers(&file, &format!("{name}/rows"));
        for (s, site) in sites.iter().enumerate() {
            let tolerance = tolerance(site.layer, config.intermediate_size, input_ids.len());
            let norms = floats(&file, &format!("{name}/{site}/norms"));
            assert_eq!(norms.len(), input_ids.len(), "{name}");
            for (t, norm) in norms.iter().enumerate() {
                let found = row(&found, t, s).iter().map(|x| x * x).sum::<f32>().sqrt();
                let error = relative_error(&[found], &[*norm]);
                assert!(error <= tolerance, "{name}, {site}, norm {t}: {error:.1e}");
            }
            let rows = floats(&file, &format!("{name}/{site}/rows"));
            for (t, expected) in chosen.iter().zip(rows.chunks_exact(config.hidden_size)) {
                let error = relative_error(row(&found, *t, s), expected);
                assert!(
                    error <= tolerance,
                    "{name}, {site}, token {t}: {error:.1e} > {tolerance:.1e}"
                );
            }
        }
    }
}

type ByName<T> = BTreeMap<String, T>;

/// Texts and their ids by name.
fn smollm2_texts() -> (ByName<String>, ByName<Vec<TokenId>>) {
    let read = |name: &str| fs::read(golden(name)).unwrap();
    (
        serde_json::from_slice(&read("texts.json")).unwrap(),
        serde_json::from_slice(&read("smollm2.json")).unwrap(),
    )
}

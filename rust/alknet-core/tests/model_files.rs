//! Model files that are damaged, hostile or of another kind: a typed error, never a panic, and no
//! allocation by what a file claims. And the good ones: every source of a model packs to the same.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use alknet_core::{
    Error, Result,
    model::{
        Backend, KvCache, LlamaConfig, Sequence, Sink, Site, SiteKind, TokenId,
        candle::CandleBackend, weights::Weights,
    },
    pack::pack,
    tokenize::Tokenizer,
};
use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file, gguf_file::Value},
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value as Json, json};
use tempfile::TempDir;

const LAYERS: usize = 4;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

/// The tiny golden model as a Hugging Face folder with a tokenizer.
fn tiny_folder() -> TempDir {
    let folder = TempDir::new().unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(golden("tiny").join(name), folder.path().join(name)).unwrap();
    }
    fs::copy(golden("tiny-tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    folder
}

/// What a GGUF file of the tiny golden model holds, to be changed by tests.
struct TinyGguf {
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, QTensor>,
}

impl TinyGguf {
    /// Matrices quantised to `format`, written as llama.cpp's converter does.
    fn new(format: GgmlDType) -> Self {
        let bytes = fs::read(golden("tiny/model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.iter().map(|(name, view)| gguf_tensor(name, &view, format));
        Self { metadata: metadata(), tensors: tensors.collect() }
    }

    fn set(mut self, key: &str, value: Value) -> Self {
        self.metadata.insert(key.into(), value);
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let metadata: Vec<_> = self.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let tensors: Vec<_> = self.tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let mut file = std::io::Cursor::new(Vec::new());
        gguf_file::write(&mut file, &metadata, &tensors).unwrap();
        file.into_inner()
    }
}

fn gguf_tensor(name: &str, view: &TensorView<'_>, format: GgmlDType) -> (String, QTensor) {
    let numbers: Vec<f32> =
        view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let mut tensor = Tensor::from_vec(numbers, view.shape(), &Device::Cpu).unwrap();
    if name.contains("q_proj") || name.contains("k_proj") {
        // Output `half · 4 + j` of a head of width 8 becomes `2·j + half`.
        let heads = view.shape()[0] / 8;
        let split = tensor.reshape((heads, 2, 4, view.shape()[1])).unwrap();
        tensor = split.transpose(1, 2).unwrap().contiguous().unwrap();
        tensor = tensor.reshape(view.shape()).unwrap();
    }
    let format = if view.shape().len() == 1 { GgmlDType::F32 } else { format };
    let name = name
        .replace("model.layers.", "blk.")
        .replace("model.embed_tokens", "token_embd")
        .replace("model.norm", "output_norm")
        .replace("input_layernorm", "attn_norm")
        .replace("post_attention_layernorm", "ffn_norm")
        .replace("self_attn.o_proj", "attn_output")
        .replace("self_attn.", "attn_")
        .replace("mlp.", "ffn_")
        .replace("_proj", "");
    (name, QTensor::quantize(&tensor, format).unwrap())
}

fn metadata() -> BTreeMap<String, Value> {
    let json: Json =
        serde_json::from_slice(&fs::read(golden("tiny-tokenizer.json")).unwrap()).unwrap();
    let vocab: BTreeMap<u64, &String> = json["model"]["vocab"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(token, id)| (id.as_u64().unwrap(), token))
        .collect();
    let tokens = vocab.values().map(|token| Value::String(token.to_string())).collect();
    let kinds = vocab.keys().map(|&id| Value::I32(if id < 3 { 3 } else { 1 })).collect();
    let merges = json["model"]["merges"].as_array().unwrap().iter();
    let merges = merges
        .map(|m| Value::String(format!("{} {}", m[0].as_str().unwrap(), m[1].as_str().unwrap())));
    let text = |text: &str| Value::String(text.into());
    let entries = [
        ("general.architecture", text("llama")),
        ("llama.block_count", Value::U32(LAYERS as u32)),
        ("llama.context_length", Value::U32(128)),
        ("llama.embedding_length", Value::U32(32)),
        ("llama.feed_forward_length", Value::U32(64)),
        ("llama.attention.head_count", Value::U32(4)),
        ("llama.attention.head_count_kv", Value::U32(2)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("llama.rope.freq_base", Value::F32(10_000.0)),
        ("llama.rope.dimension_count", Value::U32(8)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("smollm")),
        ("tokenizer.ggml.tokens", Value::Array(tokens)),
        ("tokenizer.ggml.token_type", Value::Array(kinds)),
        ("tokenizer.ggml.merges", Value::Array(merges.collect())),
        ("tokenizer.ggml.bos_token_id", Value::U32(1)),
    ];
    entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// Packs the bytes of a file called `name`.
fn pack_bytes(name: &str, bytes: &[u8]) -> Result<TempDir> {
    let (source, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let path = source.path().join(name);
    fs::write(&path, bytes).unwrap();
    pack(&path, out.path(), LAYERS).map(|()| out)
}

fn pack_folder(source: &Path) -> Result<TempDir> {
    let out = TempDir::new().unwrap();
    pack(source, out.path(), LAYERS).map(|()| out)
}

/// The problem that a [`Error::ModelLoad`] names.
fn problem<T>(result: Result<T>) -> String {
    match result {
        Err(Error::ModelLoad { problem, .. }) => problem,
        Err(other) => panic!("an error of another kind: {other}"),
        Ok(_) => panic!("no error"),
    }
}

fn assert_problem<T>(result: Result<T>, expected: &str) {
    let problem = problem(result);
    assert!(problem.contains(expected), "{problem:?} does not say {expected:?}");
}

/// All tensors of a folder, widened.
fn widened(folder: &Path) -> BTreeMap<String, Vec<f32>> {
    let weights = Weights::open(&folder.join("model.safetensors")).unwrap();
    let widen = |name: &str| {
        let info = weights.get(name).unwrap();
        weights.widen(name, info.rows, info.cols).unwrap()
    };
    weights.names().map(|name| (name.to_owned(), widen(name))).collect()
}

/// A generator of small random numbers (Knuth's MMIX constants).
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

/// Calls `read` with copies of `bytes` in which a few bits among the first `header` bytes are wrong,
/// and with cut ones. What it returns does not matter: it must return.
fn damage(bytes: &[u8], header: usize, mut read: impl FnMut(&[u8])) {
    let mut random = Random(1);
    for _ in 0..600 {
        let mut damaged = bytes.to_vec();
        for _ in 0..=random.below(3) {
            damaged[random.below(header)] ^= 1 << random.below(8);
        }
        read(&damaged);
    }
    for _ in 0..100 {
        read(&bytes[..random.below(bytes.len())]);
    }
}

#[test]
fn gguf_and_folder_pack_to_the_same_files() {
    let folder = pack_folder(tiny_folder().path()).unwrap();
    let gguf = pack_bytes("tiny.gguf", &TinyGguf::new(GgmlDType::F32).bytes()).unwrap();
    assert_eq!(widened(gguf.path()), widened(folder.path()));
    let config = |out: &TempDir| LlamaConfig::from_file(&out.path().join("config.json")).unwrap();
    let (from_gguf, from_folder) = (config(&gguf), config(&folder));
    assert_eq!(from_gguf.rotary_frequencies(), from_folder.rotary_frequencies());
    assert_eq!(from_gguf.rms_norm_eps, 1e-5);
    // Not the token that announces a chat turn, which the GGUF file names.
    assert_eq!((from_gguf.bos_token_id, from_folder.bos_token_id), (Some(0), Some(0)));
    let encode = |out: &TempDir| {
        let tokenizer = Tokenizer::from_file(&out.path().join("tokenizer.json")).unwrap();
        tokenizer.encode("the  café<|im_end|> 2025\u{4}\n👋").unwrap()
    };
    assert_eq!(encode(&gguf), encode(&folder));
}

#[test]
fn the_same_source_gives_the_same_bytes() {
    let bytes = TinyGguf::new(GgmlDType::Q4_1).bytes();
    let (first, second) = (pack_bytes("a", &bytes).unwrap(), pack_bytes("b", &bytes).unwrap());
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        let read = |out: &TempDir| fs::read(out.path().join(name)).unwrap();
        assert_eq!(read(&first), read(&second), "{name}");
    }
}

#[test]
fn quantised_blocks_are_kept_and_widened_as_candle_does() {
    for format in [GgmlDType::Q8_0, GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q5_1] {
        let gguf = TinyGguf::new(format);
        let out = pack_bytes("tiny.gguf", &gguf.bytes()).unwrap();
        let found = widened(out.path());
        let down = gguf.tensors["blk.2.ffn_down.weight"].dequantize(&Device::Cpu).unwrap();
        let down = down.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(found["model.layers.2.mlp.down_proj.weight"], down);
        // Row 1 of a head is its second even output.
        let q = gguf.tensors["blk.3.attn_q.weight"].dequantize(&Device::Cpu).unwrap();
        let q = q.to_vec2::<f32>().unwrap();
        assert_eq!(found["model.layers.3.self_attn.q_proj.weight"][32..64], q[2]);
    }
}

#[test]
fn only_the_first_layers_are_packed() {
    let (source, out) = (tiny_folder(), TempDir::new().unwrap());
    pack(source.path(), out.path(), 2).unwrap();
    let names: Vec<String> = widened(out.path()).into_keys().collect();
    assert_eq!(names.len(), 1 + 2 * 9);
    assert!(names.iter().all(|name| !name.contains("layers.2") && name != "model.norm.weight"));
    assert_problem(pack(source.path(), out.path(), 0), "has 4 layers; 0 cannot be packed");
    assert_problem(pack(source.path(), out.path(), 5), "has 4 layers; 5 cannot be packed");
}

#[test]
fn shards_pack_to_what_one_file_packs_to() {
    let folder = tiny_folder();
    let single = pack_folder(folder.path()).unwrap();
    let path = folder.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut weight_map = BTreeMap::new();
    for (shard, odd) in [("a.safetensors", false), ("b.safetensors", true)] {
        let mine = |name: &str| name.contains(".1.") == odd;
        let tensors: Vec<_> = file.iter().filter(|(name, _)| mine(name)).collect();
        weight_map.extend(tensors.iter().map(|(name, _)| (name.to_string(), shard)));
        safetensors::serialize_to_file(tensors, None, &folder.path().join(shard)).unwrap();
    }
    fs::remove_file(path).unwrap();
    let index = folder.path().join("model.safetensors.index.json");
    fs::write(&index, json!({ "weight_map": weight_map }).to_string()).unwrap();
    assert_eq!(widened(pack_folder(folder.path()).unwrap().path()), widened(single.path()));
    for outside in ["../a.safetensors", "/a.safetensors", ".."] {
        fs::write(&index, json!({ "weight_map": { "x": outside } }).to_string()).unwrap();
        assert_problem(pack_folder(folder.path()), "no file of its own folder");
    }
}

#[test]
fn pickles_are_refused_by_name_and_content() {
    let pickle = b"\x80\x02}q\x00.";
    for name in ["model.bin", "model.PT", "model.pth", "model.ckpt", "model.pkl"] {
        assert_problem(pack_bytes(name, b"GGUF"), "is a Python pickle");
    }
    assert_problem(pack_bytes("model.gguf", pickle), "is a Python pickle");
    assert_problem(pack_bytes("model.gguf", b"PK\x03\x04rest"), "is a Python pickle");
    let folder = tiny_folder();
    fs::write(folder.path().join("model.safetensors"), pickle).unwrap();
    assert_problem(pack_folder(folder.path()), "is a Python pickle");
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    assert_problem(pack_folder(folder.path()), "has neither model.safetensors nor");
    fs::write(folder.path().join("pytorch_model.bin"), pickle).unwrap();
    assert_problem(pack_folder(folder.path()), "is a Python pickle");
}

#[test]
fn other_models_are_refused() {
    let text = |text: &str| Value::String(text.into());
    for (key, value, expected) in [
        ("general.architecture", text("qwen2"), "architecture \"qwen2\""),
        ("llama.expert_count", Value::U32(8), "mixture of experts"),
        ("llama.rope.dimension_count", Value::U32(4), "rotates 4 of 8"),
        ("llama.rope.scaling.type", text("yarn"), "by \"yarn\""),
        ("tokenizer.ggml.model", text("llama"), "tokenizer of kind \"llama\""),
        ("tokenizer.ggml.pre", text("new-way"), "unknown way, \"new-way\""),
        ("tokenizer.ggml.tokens", Value::Array(vec![text("a"), text("a")]), "the same token twice"),
        ("tokenizer.ggml.token_type", Value::Array(vec![Value::I32(1)]), "264 tokens but 1"),
        ("tokenizer.ggml.merges", Value::Array(vec![text("t q")]), "merge 0"),
        ("llama.attention.head_count", Value::U32(0), "num_attention_heads is 0"),
        ("llama.attention.head_count", Value::U32(u32::MAX), "num_attention_heads is 4294967295"),
        ("llama.embedding_length", text("wide"), "llama.embedding_length is not an integer"),
        ("llama.feed_forward_length", Value::U32(65), "its metadata say 65 x 32"),
        ("llama.block_count", Value::U32(5), "has 5 layers"),
        ("general.alignment", Value::U32(0), "not a small power of two"),
    ] {
        let layers = if key == "llama.block_count" { 6 } else { LAYERS };
        let (source, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let path = source.path().join("tiny.gguf");
        fs::write(&path, TinyGguf::new(GgmlDType::F32).set(key, value).bytes()).unwrap();
        assert_problem(pack(&path, out.path(), layers), expected);
    }
    for (name, expected) in [
        ("blk.0.attn_q_norm.weight", "which no Llama-type decoder has"),
        ("rope_freqs.weight", "by a table"),
        ("blk.0.attn_q.bias", "has no tensor \"blk.0.attn_k.bias\""),
    ] {
        let mut gguf = TinyGguf::new(GgmlDType::F32);
        let vector = Tensor::ones(32, candle_core::DType::F32, &Device::Cpu).unwrap();
        gguf.tensors.insert(name.into(), QTensor::quantize(&vector, GgmlDType::F32).unwrap());
        assert_problem(pack_bytes("tiny.gguf", &gguf.bytes()), expected);
    }
    let other = json!({ "model_type": "mistral", "hidden_size": 32 });
    let folder = tiny_folder();
    fs::write(folder.path().join("config.json"), other.to_string()).unwrap();
    problem(pack_folder(folder.path()));
}

#[test]
fn damaged_gguf_files_are_errors() {
    let gguf = TinyGguf::new(GgmlDType::Q8_0);
    let bytes = gguf.bytes();
    let data: usize = gguf.tensors.values().map(QTensor::storage_size_in_bytes).sum();
    damage(&bytes, bytes.len() - data, |bytes| {
        if let Err(error) = pack_bytes("tiny.gguf", bytes) {
            assert!(matches!(error, Error::ModelLoad { .. }), "{error}");
        }
    });
}

#[test]
fn gguf_files_that_lie_allocate_nothing() {
    let number = |n: u64| n.to_le_bytes().to_vec();
    let file = |num_tensors: u64, num_values: u64, rest: &[u8]| {
        let counts = [number(num_tensors), number(num_values)].concat();
        [b"GGUF\x03\0\0\0".as_slice(), &counts, rest].concat()
    };
    let huge = u64::MAX / 3;
    let key = |kind: u32| [number(1), b"a".to_vec(), kind.to_le_bytes().to_vec()].concat();
    let strings = [key(9), 8_u32.to_le_bytes().to_vec(), number(huge)].concat();
    let numbers = [key(9), 4_u32.to_le_bytes().to_vec(), number(huge)].concat();
    let nested = [key(9), 9_u32.to_le_bytes().to_vec(), number(huge)].concat();
    let matrix = |cols: u64, rows: u64, kind: u32, offset: u64| {
        let shape = [2_u32.to_le_bytes().to_vec(), number(cols), number(rows)].concat();
        let place = [kind.to_le_bytes().to_vec(), number(offset)].concat();
        [number(1), b"a".to_vec(), shape, place].concat()
    };
    for (bytes, expected) in [
        (file(0, huge, b""), "ends inside its header"),
        (file(huge, 0, b""), "ends inside its header"),
        (file(0, 1, &number(huge)), "ends inside its header"),
        (file(0, 1, &strings), "ends inside its header"),
        (file(0, 1, &numbers), "ends inside its header"),
        (file(0, 1, &nested), "unsupported type 9"),
        (file(0, 1, &key(77)), "unknown type 77"),
        (file(1, 0, &matrix(huge, huge, 0, 0)), "impossible shape"),
        (file(1, 0, &matrix(1 << 62, 4, 0, 0)), "impossible shape"),
        (file(1, 0, &matrix(0, 4, 0, 0)), "impossible shape"),
        (file(1, 0, &matrix(33, 4, 8, 0)), "impossible shape"),
        (file(1, 0, &matrix(1 << 40, 4, 0, 0)), "ends before tensor"),
        (file(1, 0, &matrix(1, 1, 0, huge)), "ends before tensor"),
        (file(1, 0, &matrix(1, 1, 0, u64::MAX)), "impossible shape"),
        (file(1, 0, &matrix(32, 4, 21, 0)), "ggml type 21"),
        (b"GGUF\x01\0\0\0".to_vec(), "GGUF version 1"),
        (b"GGUF\0\0\0\x03".to_vec(), "GGUF version 50331648"),
        (b"GGML".to_vec(), "not a GGUF file"),
        (Vec::new(), "ends inside its header"),
    ] {
        assert_problem(pack_bytes("a.gguf", &bytes), expected);
    }
    let two = [matrix(32, 4, 0, 0), matrix(32, 4, 0, 64)].concat();
    let mut bytes = file(2, 0, &two);
    let second = bytes.len() - matrix(32, 4, 0, 64).len() + 8;
    bytes[second] = b'b';
    bytes.resize(4096, 0);
    assert_problem(pack_bytes("a.gguf", &bytes), "has tensor \"b\" inside \"a\"");
}

/// A backend over a weights file with these bytes.
fn load(bytes: &[u8], sites: &[Site]) -> Result<CandleBackend> {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("model.safetensors");
    fs::write(&path, bytes).unwrap();
    let config = LlamaConfig::from_file(&golden("tiny/config.json")).unwrap();
    CandleBackend::load(Arc::new(Weights::open(&path)?), &config, sites, Some(1))
}

const LAST: Site = Site { layer: LAYERS - 1, kind: SiteKind::ResidPost };

#[test]
fn damaged_weights_are_errors() {
    let packed = pack_bytes("tiny.gguf", &TinyGguf::new(GgmlDType::Q4_1).bytes()).unwrap();
    let bytes = fs::read(packed.path().join("model.safetensors")).unwrap();
    assert!(load(&bytes, &[LAST]).is_ok());
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    damage(&bytes, header, |bytes| {
        if let Err(error) = load(bytes, &[LAST]) {
            assert!(matches!(error, Error::ModelLoad { .. }), "{error}");
        }
    });
}

#[test]
fn weights_that_lie_are_errors() {
    let with_header = |header: &str, data: usize| {
        let size = (header.len() as u64).to_le_bytes();
        [size.as_slice(), header.as_bytes(), &vec![0; data]].concat()
    };
    let tensor = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
    };
    let huge = tensor("F32", "[4611686018427387904,4]", "[0,16]");
    let long = tensor("F32", "[1099511627776]", "[0,4398046511104]");
    let (first, second) = (tensor("F32", "[4]", "[0,16]"), tensor("F32", "[4]", "[8,24]"));
    let blocks = tensor("U8", "[2,34]", "[0,68]");
    let ggml =
        |kind: &str| format!(r#"{{"__metadata__":{{"ggml":"{{\"a\":\"{kind}\"}}"}},"a":{blocks}"#);
    for (bytes, expected) in [
        (u64::MAX.to_le_bytes().to_vec(), "not a safetensors file"),
        (vec![0; 3], "not a safetensors file"),
        (with_header(&format!(r#"{{"a":{huge}}}"#), 16), "not a safetensors file"),
        (with_header(&format!(r#"{{"a":{long}}}"#), 16), "not a safetensors file"),
        (with_header(&format!(r#"{{"a":{first},"b":{second}}}"#), 24), "not a safetensors file"),
        (with_header(&format!(r#"{{"a":{blocks}}}"#), 68), "unsupported type U8"),
        (with_header(&format!("{}}}", ggml("q9_9")), 68), "unknown block type \"q9_9\""),
        (with_header(&format!("{}}}", ggml("q4_1")), 68), "no whole number of blocks"),
        (with_header(&format!("{}}}{}", ggml("q8_0"), pad_to_odd(&ggml("q8_0"))), 68), "odd byte"),
        (with_header(r#"{"a":{"dtype":"F32","shape":[0,4],"data_offsets":[0,0]}}"#, 0), "empty"),
        (with_header(r#"{"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}"#, 8), "type F64"),
        (with_header(r#"{"__metadata__":{"ggml":"[]"}}"#, 0), "is not a JSON object of strings"),
        (with_header("{}", 0), "has no tensor \"model.embed_tokens.weight\""),
    ] {
        assert_problem(load(&bytes, &[LAST]), expected);
    }
}

/// Spaces that bring the data of a file with this header (and a closing brace) to an odd byte.
fn pad_to_odd(header: &str) -> &'static str {
    if header.len().is_multiple_of(2) { "" } else { " " }
}

/// The tiny model with one tensor replaced.
fn with_tensor(name: &str, shape: &[usize], numbers: &[f32]) -> Vec<u8> {
    let bytes = fs::read(golden("tiny/model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let data: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut tensors: HashMap<String, TensorView<'_>> =
        file.iter().map(|(name, view)| (name.to_owned(), view)).collect();
    let view = TensorView::new(Dtype::F32, shape.to_vec(), &data).unwrap();
    assert!(tensors.insert(name.to_owned(), view).is_some());
    safetensors::serialize(tensors, None).unwrap()
}

#[test]
fn weights_of_another_shape_or_not_finite_are_errors() {
    let name = "model.layers.1.mlp.up_proj.weight";
    let bytes = with_tensor(name, &[32, 64], &[0.5; 2048]);
    assert_problem(load(&bytes, &[LAST]), "is 32 x 64, config.json says 64 x 32");
    for bad in [f32::NAN, f32::INFINITY] {
        let mut numbers = [0.5; 2048];
        numbers[77] = bad;
        let bytes = with_tensor(name, &[64, 32], &numbers);
        assert_problem(load(&bytes, &[LAST]), "not finite");
        // What lies behind the last site is not read.
        assert!(load(&bytes, &[Site { layer: 0, kind: SiteKind::ResidPost }]).is_ok());
    }
    // Embeddings are widened as they are read.
    let mut numbers = vec![0.5; 264 * 32];
    numbers[32] = f32::NAN;
    let bytes = with_tensor("model.embed_tokens.weight", &[264, 32], &numbers);
    let backend = load(&bytes, &[LAST]).unwrap();
    assert!(forward(&backend, &[0, 2], &mut backend.new_cache()).is_ok());
    assert_problem(forward(&backend, &[0, 1], &mut backend.new_cache()), "not finite");
}

struct Ignore;

impl Sink for Ignore {
    fn rows(&self, _: usize, _: usize, _: usize, _: &[f32]) -> Result<()> {
        Ok(())
    }
}

fn forward(backend: &CandleBackend, input_ids: &[TokenId], cache: &mut KvCache) -> Result<()> {
    backend.forward(&mut [Sequence::new(input_ids, cache)], &Ignore)
}

#[test]
fn impossible_input_is_an_error() {
    let bytes = fs::read(golden("tiny/model.safetensors")).unwrap();
    let backend = load(&bytes, &[LAST]).unwrap();
    let run = |input_ids: &[TokenId], mut cache: KvCache| forward(&backend, input_ids, &mut cache);
    assert!(matches!(run(&[264], backend.new_cache()), Err(Error::Input(_))));
    assert!(matches!(run(&[1; 129], backend.new_cache()), Err(Error::Input(_))));
    assert!(matches!(run(&[1], KvCache::new(1)), Err(Error::Inference(_))));
    let mut used = backend.new_cache();
    forward(&backend, &[1; 100], &mut used).unwrap();
    assert!(matches!(run(&[1; 29], used.clone()), Err(Error::Input(_))));
    used.layers[0].keys.pop();
    assert!(matches!(run(&[1], used), Err(Error::Inference(_))));
    assert!(run(&[1; 128], backend.new_cache()).is_ok());
    assert!(run(&[], backend.new_cache()).is_ok());
    assert!(backend.forward(&mut [], &Ignore).is_ok());
    for sites in [&[][..], &[LAST, LAST], &[Site { layer: 4, ..LAST }]] {
        assert!(matches!(load(&bytes, sites), Err(Error::Config(_))));
    }
    let (source, out) = (tiny_folder(), TempDir::new().unwrap());
    pack(source.path(), out.path(), 2).unwrap();
    let bytes = fs::read(out.path().join("model.safetensors")).unwrap();
    assert_problem(load(&bytes, &[LAST]), "has no tensor \"model.layers.2.");
}

/// The tiny configuration with some fields changed (`null` removes one).
fn config(changes: Json) -> Result<LlamaConfig> {
    let mut json: Json =
        serde_json::from_slice(&fs::read(golden("tiny/config.json")).unwrap()).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        json[key] = value.clone();
    }
    LlamaConfig::from_json(Path::new("config.json"), json.to_string().as_bytes())
}

#[test]
fn hostile_configurations_are_errors() {
    for (changes, expected) in [
        (json!({ "hidden_size": 0 }), "hidden_size is 0"),
        (json!({ "hidden_size": -1 }), "not a Llama configuration"),
        (json!({ "hidden_size": 1e30 }), "not a Llama configuration"),
        (json!({ "vocab_size": 4_000_000_000_u64 }), "vocab_size is 4000000000"),
        (json!({ "num_hidden_layers": 1_000_000 }), "num_hidden_layers is 1000000"),
        (json!({ "num_attention_heads": 0 }), "num_attention_heads is 0"),
        (json!({ "num_attention_heads": 64, "head_dim": null }), "head_dim is 0"),
        (json!({ "num_key_value_heads": 0 }), "num_key_value_heads is 0"),
        (json!({ "num_key_value_heads": 3 }), "not a multiple of num_key_value_heads 3"),
        (json!({ "head_dim": 7 }), "head_dim is 7"),
        (json!({ "model_type": "qwen2" }), "model_type \"qwen2\""),
        (json!({ "hidden_act": "gelu" }), "hidden_act \"gelu\""),
        (json!({ "rms_norm_eps": 0.0 }), "must be positive"),
        (
            json!({ "rope_parameters": { "rope_type": "default", "rope_theta": -1.0 } }),
            "must be positive",
        ),
        (
            json!({ "rope_parameters": { "rope_type": "linear", "factor": 0.0 } }),
            "factor 0; it must be positive",
        ),
        (
            json!({ "rope_parameters": { "rope_type": "yarn", "factor": -2.0 } }),
            "factor -2; it must be positive",
        ),
        (json!({ "rope_parameters": { "rope_type": "spiral" } }), "spiral"),
        (
            json!({ "rope_parameters": { "rope_type": "linear", "factor": 2.0, "mscale": 1.0 } }),
            "mscale",
        ),
        (
            json!({ "rope_parameters": { "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16 } }),
            "must be below the second",
        ),
    ] {
        assert_problem(config(changes), expected);
    }
    for bytes in [&b""[..], b"[]", b"nul", b"{\"a\"", &[0xff; 40], "[".repeat(1 << 20).as_bytes()] {
        problem(LlamaConfig::from_json(Path::new("config.json"), bytes));
    }
}

#[test]
fn older_spellings_of_rope_scaling_are_read() {
    let linear = json!({ "rope_parameters": { "rope_type": "linear", "factor": 4.0 } });
    let older =
        json!({ "rope_parameters": null, "rope_scaling": { "type": "linear", "factor": 4.0 } });
    assert_eq!(config(linear).unwrap(), config(older).unwrap());
}

/// The problem of a `tokenizer.json` with these bytes.
fn tokenizer(bytes: &[u8]) -> Result<Tokenizer> {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("tokenizer.json");
    fs::write(&path, bytes).unwrap();
    Tokenizer::from_file(&path)
}

#[test]
fn hostile_tokenizers_are_errors() {
    let bytes = fs::read(golden("tiny-tokenizer.json")).unwrap();
    let changed = |change: fn(&mut Json)| {
        let mut json: Json = serde_json::from_slice(&bytes).unwrap();
        change(&mut json);
        tokenizer(json.to_string().as_bytes())
    };
    assert!(changed(|_| ()).is_ok());
    for (result, expected) in [
        (
            changed(|json| json["model"]["merges"] = json!([["a".repeat(50), "b"]])),
            "longer than every token",
        ),
        (changed(|json| json["model"]["merges"] = json!([["a", "b"]])), "out of vocabulary"),
        (changed(|json| json["model"]["merges"] = json!(["ab"])), "a merge without a space"),
        (changed(|json| json["model"]["merges"] = json!([["a"]])), "two tokens"),
        (changed(|json| json["model"]["type"] = json!("WordPiece")), "only BPE is supported"),
        (changed(|json| json["model"]["dropout"] = json!(0.5)), "dropout"),
        (changed(|json| json["model"]["vocab"]["a"] = json!(-1)), "is no BPE tokenizer"),
        (changed(|json| json["added_tokens"][1]["id"] = json!(7)), "the id 7"),
        (changed(|json| json["pre_tokenizer"] = json!({ "type": "Magic" })), "is no BPE tokenizer"),
        (tokenizer(b""), "is no BPE tokenizer"),
        (tokenizer("[".repeat(1 << 20).as_bytes()), "is no BPE tokenizer"),
    ] {
        assert_problem(result, expected);
    }
    damage(&bytes, bytes.len(), |bytes| {
        if let Ok(tokenizer) = tokenizer(bytes) {
            let text = "the café<|im_end|> 2025";
            let encoding = tokenizer.encode(text).unwrap();
            assert!(encoding.offsets.iter().all(|&(a, b)| text.get(a..b).is_some()));
        }
    });
}

#[test]
fn json_files_are_limited_before_they_are_read() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("config.json");
    fs::File::create(&path).unwrap().set_len((64 << 20) + 1).unwrap();
    assert_problem(LlamaConfig::from_file(&path), "at most 67108864 bytes");
    assert_problem(Tokenizer::from_file(&path), "at most 67108864 bytes");
    assert_problem(pack_folder(folder.path()), "at most 67108864 bytes");
}

#[cfg(unix)]
#[test]
fn a_device_without_end_is_not_read_to_its_end() {
    problem(LlamaConfig::from_file(Path::new("/dev/zero")));
    problem(Tokenizer::from_file(Path::new("/dev/zero")));
}

#[test]
fn merges_may_be_pairs_or_strings() {
    let bytes = fs::read(golden("tiny-tokenizer.json")).unwrap();
    let mut json: Json = serde_json::from_slice(&bytes).unwrap();
    let merges = json["model"]["merges"].as_array().unwrap().iter();
    let strings = merges.map(|m| format!("{} {}", m[0].as_str().unwrap(), m[1].as_str().unwrap()));
    json["model"]["merges"] = strings.collect();
    let encode = |bytes: &[u8]| tokenizer(bytes).unwrap().encode("the    thé").unwrap();
    assert_eq!(encode(json.to_string().as_bytes()), encode(&bytes));
}

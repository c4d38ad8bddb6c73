//! Codebook files that are damaged, hostile, or meant for something else: each is a typed error.

#[path = "common/codebook_file.rs"]
mod codebook_file;

use std::fs::File;

use alknet_core::{
    Codebook, Error, Origin,
    codebook::{Fingerprint, MAX_BYTES},
    model::Probe,
    score,
    window::Closing,
};
use codebook_file::{
    CodebookFile, GAIN, HIDDEN_SIZE, N_BLOCKS, N_COMPONENTS, SEGMENT_TOKENS, Tensor, WINDOW,
};
use proptest::prelude::*;

/// Why a file is refused, which must be as a codebook.
fn refusal(bytes: &[u8]) -> String {
    match Codebook::from_bytes(bytes) {
        Err(Error::Codebook(problem)) => problem,
        Err(other) => panic!("refused as something else: {other}"),
        Ok(_) => panic!("accepted"),
    }
}

/// Why the valid file is refused after `change`.
fn refusal_after(change: impl FnOnce(&mut CodebookFile)) -> String {
    let mut file = CodebookFile::valid();
    change(&mut file);
    refusal(&file.to_bytes())
}

fn set_metadata(key: &str, value: &str) -> String {
    refusal_after(|file| {
        file.metadata.insert(key.to_owned(), value.to_owned());
    })
}

/// Replaces number `index` of a tensor.
fn set_number(tensor: &mut Tensor, index: usize, x: f32) {
    tensor.data[4 * index..4 * index + 4].copy_from_slice(&x.to_le_bytes());
}

fn set_tensor(name: &str, tensor: Tensor) -> String {
    refusal_after(|file| {
        file.tensors.insert(name.to_owned(), tensor);
    })
}

/// What is accepted must not bring the scoring down: a finite verdict or an error.
fn assert_usable(codebook: &Codebook) {
    for level in [0.0, 1.0, -1e3, 1e30] {
        let projections = vec![level; 40 * codebook.n_components()];
        let n_closings = codebook.closing.as_ref().map_or(0, |closing| closing.count(40));
        let closings = vec![level; n_closings * codebook.n_components()];
        let Ok(frames) = score::frames(codebook, &projections, &closings) else { continue };
        for frame in frames {
            assert!(frame.attack.iter().all(|x| (0.0..=12.0).contains(x)), "{frame:?}");
            assert!((0.0..=12.0).contains(&frame.novelty), "{frame:?}");
        }
    }
}

#[test]
fn a_valid_file_is_read_as_it_was_written() {
    let codebook = Codebook::from_bytes(&CodebookFile::valid().to_bytes()).unwrap();
    assert_eq!(codebook.detector, "synthetic");
    assert_eq!(codebook.n_components(), N_COMPONENTS);
    assert_eq!((codebook.window, codebook.segment_tokens), (WINDOW, SEGMENT_TOKENS));
    assert_eq!(codebook.origins, [Some(Origin::User), Some(Origin::Document), None]);
    assert_eq!(codebook.site(0).1[..4], [GAIN, 0.0, 0.0, 0.0]);
    assert_eq!(codebook.site(1).1[..4], [0.5 * GAIN, 0.0, 0.0, 0.0]);
    assert_eq!(codebook.terms(&[7.0, 2.0, 5.0]), [7.0, 2.0, 5.0]);
    assert_eq!(codebook.cdf(0, 0.0), 0.5);
    assert_eq!([1, 8, 9, 17, 1000].map(|n| codebook.length_class(n)), [0, 0, 1, 1, 1]);
    assert_usable(&codebook);
}

#[test]
fn a_frame_counts_by_its_largest_run_of_every_scale() {
    let mut file = CodebookFile::valid();
    file.metadata.insert("scales".into(), "[1, 3]".into());
    // Direction 0 reads component 0: once in a window, three times in a run of three.
    let mut weights = [0.0; 2 * 3 * N_COMPONENTS];
    (weights[0], weights[3 * N_COMPONENTS]) = (1.0, 3.0);
    let weights = Tensor::f32(&[2, 3, N_COMPONENTS], &weights);
    file.tensors.insert("direction_weights".into(), weights);
    let codebook = Codebook::from_bytes(&file.to_bytes()).unwrap();
    // Windows of 4 tokens, every 2, on component 0: their means are 0, 2, 4 and so on.
    let projections = |n: usize| -> Vec<f32> {
        let first = |t: usize| if t < 4 { 0.0 } else { 4.0 };
        (0..n).flat_map(|t| [first(t), 0.0, 0.0]).collect()
    };
    let logits = |n: usize| -> Vec<_> {
        let frames = score::frames(&codebook, &projections(n), &[]).unwrap();
        frames.into_iter().map(|frame| frame.logits[0]).collect()
    };
    assert_eq!(logits(8), [4.0 + 3.0 * 2.0]);
    assert_eq!(logits(10), [10.0, 4.0 + 3.0 * (2.0 + 4.0 + 4.0) / 3.0]);
    assert_eq!(logits(6), [2.0 + 3.0 * 1.0]);
    assert_eq!(logits(4), [0.0]);
    assert!(logits(0).is_empty());
    let mut broken = projections(10);
    broken[27] = f32::NAN;
    assert!(matches!(score::frames(&codebook, &broken, &[]), Err(Error::Inference(_))));
}

#[test]
fn a_frame_counts_with_the_first_closing_token_after_it() {
    let file = CodebookFile::valid().closed(5, 5);
    let codebook = Codebook::from_bytes(&file.to_bytes()).unwrap();
    assert_eq!(codebook.closing, Some(Closing { probes: vec![Probe::Token(5)], every: 5 }));
    // Of seven tokens the windows end after four, six and seven.
    let tokens = [1.0, 0.0, 0.0].repeat(7);
    let mut closings = [30.0, 0.0, 0.0, -10.0, 0.0, 0.0];
    let frames = score::frames(&codebook, &tokens, &closings).unwrap();
    let expected = [4.0, 0.0, 0.0];
    assert_eq!(frames.len(), expected.len());
    for (frame, expected) in frames.iter().zip(expected) {
        assert!((frame.logits[0] - expected).abs() < 1e-6, "{:?}", frame.logits);
        assert!(frame.logits[1..].iter().all(|logit| *logit == 0.0));
    }
    let missing = score::frames(&codebook, &tokens, &closings[..3]).unwrap_err().to_string();
    assert!(missing.contains("1 readouts of 2"), "{missing}");
    closings[3] = f32::NAN;
    assert!(matches!(score::frames(&codebook, &tokens, &closings), Err(Error::Inference(_))));
}

#[test]
fn a_first_stage_reads_the_first_sites() {
    let file = CodebookFile::valid().closed_by_learned(N_BLOCKS, 8).staged(0.25);
    let codebook = Codebook::from_bytes(&file.to_bytes()).unwrap();
    let early = codebook.early.as_ref().unwrap();
    assert_eq!(early.above, 0.25);
    assert_eq!(early.codebook.sites, codebook.sites[..1]);
    assert_eq!(early.codebook.site(0), codebook.site(0));
    assert_eq!(early.codebook.closing, codebook.closing);
    assert_usable(&early.codebook);
    assert_usable(&codebook);
}

#[test]
fn a_first_stage_that_cannot_be_first_is_refused() {
    let refused = |change: &dyn Fn(&mut CodebookFile)| {
        let mut file = CodebookFile::valid().staged(0.5);
        change(&mut file);
        refusal(&file.to_bytes())
    };
    let early = |entry: &str| {
        refused(&|file| _ = file.metadata.insert("early".to_owned(), entry.to_owned()))
    };
    assert!(early(r#"{"sites": 0, "above": 0.5}"#).contains("0 of 2 sites"));
    assert!(early(r#"{"sites": 2, "above": 0.5}"#).contains("2 of 2 sites"));
    assert!(early(r#"{"sites": 1, "above": 1.0}"#).contains("p = 1"));
    assert!(early(r#"{"sites": 1, "above": -0.5}"#).contains("p = -0.5"));
    assert!(early(r#"{"sites": 1}"#).contains("above"));
    assert!(early("null").contains("early"));
    let without = refused(&|file| _ = file.tensors.remove("early.null_knots"));
    assert!(without.contains("early.null_knots"), "{without}");
    let reversed = |file: &mut CodebookFile| {
        file.metadata.insert("sites".to_owned(), "3.mlp_out,1.resid_post".to_owned());
    };
    assert!(refused(&reversed).contains("not before the others"));
    let same_block = |file: &mut CodebookFile| {
        file.metadata.insert("sites".to_owned(), "3.attn_out,3.mlp_out".to_owned());
    };
    assert!(refused(&same_block).contains("not before the others"));
}

#[test]
fn what_closes_a_text_is_a_token_or_a_vector_for_every_block() {
    let file = CodebookFile::valid().closed_by_learned(N_BLOCKS, 8);
    let codebook = Codebook::from_bytes(&file.to_bytes()).unwrap();
    let probes = vec![Probe::Learned(vec![1.0; N_BLOCKS * HIDDEN_SIZE])];
    assert_eq!(codebook.closing, Some(Closing { probes, every: 8 }));
    let file = CodebookFile::valid().closed_by_learned(N_BLOCKS + 1, 8);
    let expected = format!("expected F32 [{N_BLOCKS}, {HIDDEN_SIZE}]");
    assert!(refusal(&file.to_bytes()).contains(&expected));
    let mut file = CodebookFile::valid().closed_by_learned(N_BLOCKS, 8);
    file.tensors.remove("closing");
    assert!(refusal(&file.to_bytes()).contains("no tensor \"closing\""));
}

#[test]
fn a_closing_token_needs_weights_and_a_distance() {
    let mut file = CodebookFile::valid();
    let open = Codebook::from_bytes(&file.to_bytes()).unwrap();
    file.metadata.insert("closing".into(), "null".into());
    assert_eq!(Codebook::from_bytes(&file.to_bytes()).unwrap().closing, open.closing);
    file.metadata.insert("closing".into(), r#"{"token": 5, "every": 64}"#.into());
    assert!(refusal(&file.to_bytes()).contains("direction_weights"));
    let dense = CodebookFile::valid().closed(5, 3);
    assert!(refusal(&dense.to_bytes()).contains("every 3 tokens; a window of 4"));
    for damaged in ["[5]", r#"{"token": -1, "every": 64}"#, r#"{"token": 5}"#] {
        let mut file = CodebookFile::valid().closed(5, 64);
        file.metadata.insert("closing".into(), damaged.into());
        assert!(refusal(&file.to_bytes()).contains("closing"));
    }
}

#[test]
fn metadata_that_is_not_known_is_kept() {
    let mut file = CodebookFile::valid();
    file.metadata.insert("quality".into(), "{}".into());
    assert_eq!(Codebook::from_bytes(&file.to_bytes()).unwrap().metadata["quality"], "{}");
}

#[test]
fn every_truncation_is_refused() {
    let bytes = CodebookFile::valid().to_bytes();
    for len in 0..bytes.len() {
        refusal(&bytes[..len]);
    }
}

#[test]
fn bytes_after_the_end_are_refused() {
    let mut bytes = CodebookFile::valid().to_bytes();
    bytes.extend([0; 8]);
    refusal(&bytes);
}

#[test]
fn no_flipped_bit_panics() {
    let mut bytes = CodebookFile::valid().to_bytes();
    let mut refused = 0;
    for bit in 0..8 * bytes.len() {
        bytes[bit / 8] ^= 1 << (bit % 8);
        match Codebook::from_bytes(&bytes) {
            Ok(codebook) => assert_usable(&codebook),
            Err(Error::Codebook(_)) => refused += 1,
            Err(other) => panic!("bit {bit}: refused as something else: {other}"),
        }
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
    assert!(refused > 4 * bytes.len(), "only {refused} of {} flips are noticed", 8 * bytes.len());
}

#[test]
fn a_header_that_lies_about_its_length_is_refused() {
    let bytes = CodebookFile::valid().to_bytes();
    for claim in [0, 1, bytes.len() as u64, 1 << 32, 1 << 44, u64::MAX / 2, u64::MAX] {
        let mut lying = bytes.clone();
        lying[..8].copy_from_slice(&claim.to_le_bytes());
        refusal(&lying);
    }
}

/// An allocation of what these files claim would end the process.
#[test]
fn nothing_is_allocated_because_a_header_says_so() {
    let file = CodebookFile::valid();
    for shape in [vec![1 << 44], vec![1 << 22, 1 << 22], vec![1 << 63, 4], vec![usize::MAX; 9]] {
        for name in file.tensors.keys() {
            for end in [None, Some(1_u64 << 46), Some(u64::MAX)] {
                let mut header = file.header();
                header[name]["shape"] = shape.clone().into();
                if let Some(end) = end {
                    header[name]["data_offsets"][1] = end.into();
                }
                refusal(&file.with_header(&serde_json::Value::Object(header).to_string()));
            }
        }
    }
    for key in ["hidden_size", "window", "stride", "segment_tokens", "segment_overlap"] {
        for claim in ["17592186044416", "18446744073709551615", "99999999999999999999999"] {
            assert!(set_metadata(key, claim).contains(key));
        }
    }
    set_metadata("length_classes", "[8, 18446744073709551616]");
}

#[test]
fn tensors_that_overlap_or_leave_holes_are_refused() {
    let file = CodebookFile::valid();
    for (name, change) in [("components", -4_i64), ("components", 4), ("mean", 4)] {
        let mut header = file.header();
        for end in 0..2 {
            let offset = header[name]["data_offsets"][end].as_i64().unwrap();
            header[name]["data_offsets"][end] = (offset + change).into();
        }
        refusal(&file.with_header(&serde_json::Value::Object(header).to_string()));
    }
    let mut header = file.header();
    header["null_values"] = header["null_knots"].clone();
    refusal(&file.with_header(&serde_json::Value::Object(header).to_string()));
}

#[test]
fn headers_that_are_not_json_objects_are_refused() {
    let file = CodebookFile::valid();
    for header in ["", "[]", "null", "{\"mean\": 1}", "{", &"[".repeat(100_000)] {
        refusal(&file.with_header(header));
    }
}

#[test]
fn numbers_that_are_not_finite_are_refused_in_every_tensor() {
    for (name, tensor) in CodebookFile::valid().tensors {
        for x in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for index in [0, tensor.data.len() / 4 - 1] {
                let mut bad = tensor.clone();
                set_number(&mut bad, index, x);
                let problem = set_tensor(&name, bad);
                assert!(problem.contains(&name) && problem.contains(&index.to_string()));
            }
        }
    }
}

#[test]
fn every_tensor_is_needed_with_its_type_and_shape() {
    for (name, tensor) in CodebookFile::valid().tensors {
        let missing = refusal_after(|file| drop(file.tensors.remove(&name)));
        assert!(missing.contains("no tensor"), "{missing}");
        for dtype in ["I32", "U32"] {
            let problem = set_tensor(&name, Tensor { dtype, ..tensor.clone() });
            assert!(problem.contains(&name) && problem.contains(dtype), "{problem}");
        }
        let mut shape = tensor.shape.clone();
        shape.push(1);
        set_tensor(&name, Tensor { shape, ..tensor.clone() });
        let wider = [tensor.shape.clone(), vec![1]].concat();
        set_tensor(&name, Tensor { shape: wider.into_iter().rev().collect(), ..tensor.clone() });
        set_tensor(&name, Tensor { shape: vec![0], data: Vec::new(), ..tensor });
    }
}

#[test]
fn splines_must_rise() {
    for (name, tensor) in CodebookFile::valid().tensors {
        let mut bad = tensor.clone();
        if name.ends_with("_knots") {
            let first: [u8; 4] = tensor.data[..4].try_into().unwrap();
            set_number(&mut bad, 1, f32::from_le_bytes(first));
            assert!(set_tensor(&name, bad).contains("do not increase"));
        } else if name.ends_with("_values") {
            let last: [u8; 4] = tensor.data[8..12].try_into().unwrap();
            set_number(&mut bad, 1, f32::from_le_bytes(last) * 1.01);
            assert!(set_tensor(&name, bad).contains("not monotone"));
        }
    }
}

#[test]
fn distribution_functions_stay_within_zero_and_one() {
    let ends = [(0, 0.0), (0, -0.1), (2, 1.0), (2, 1.5), (0, 0.5), (2, 0.5)];
    for (index, x) in ends {
        let mut tensor = CodebookFile::valid().tensors["cdf_values"].clone();
        set_number(&mut tensor, index, x);
        assert!(set_tensor("cdf_values", tensor).contains("cdf 0"));
    }
}

#[test]
fn nulls_start_at_zero_or_above_and_reach_the_contract() {
    for name in ["null_values", "novelty_values"] {
        for (index, x) in [(0, -0.1), (2, 2.9), (1, 4.0)] {
            let mut tensor = CodebookFile::valid().tensors[name].clone();
            set_number(&mut tensor, index, x);
            assert!(set_tensor(name, tensor).contains("−log10 p"));
        }
    }
}

#[test]
fn every_metadata_entry_is_needed() {
    for key in CodebookFile::valid().metadata.keys() {
        let problem = refusal_after(|file| drop(file.metadata.remove(key)));
        assert!(problem.contains(key), "{problem}");
    }
    refusal_after(|file| file.metadata.clear());
}

#[test]
fn metadata_out_of_range_are_refused() {
    let cases = [
        ("format_version", vec!["1", "2", "3", "", "4 "]),
        ("hidden_size", vec!["0", "-4", "4.0", "", "5"]),
        ("window", vec!["0", "4097", "four"]),
        ("stride", vec!["0", "5"]),
        ("scales", vec!["[]", "[0]", "[2, 2]", "[-1]", "1"]),
        ("segment_tokens", vec!["3", "1048577"]),
        ("segment_overlap", vec!["16", "-1"]),
        (
            "sites",
            vec![
                "",
                "1.resid_post",
                "1.resid_post,1.resid_post",
                "1.resid_post,3",
                "1.resid_post,x.mlp_out",
                "1.a,2.b",
            ],
        ),
        ("length_classes", vec!["[]", "[16, 8]", "[8, 8]", "8", "[-8, 16]", "[8]"]),
        (
            "origins",
            vec![
                "[]",
                r#"["user"]"#,
                "[null, null]",
                r#"["user", "user", null]"#,
                r#"["tool", null]"#,
            ],
        ),
        ("directions", vec!["[]", "{}", r#"[{"name": "a", "origin": "user", "scored": true}]"#]),
    ];
    for (key, values) in cases {
        for value in values {
            set_metadata(key, value);
        }
    }
}

#[test]
fn every_origin_needs_a_scored_direction() {
    let unscored = CodebookFile::valid().metadata["directions"].replacen("true", "false", 1);
    assert!(set_metadata("directions", &unscored).contains("no scored direction"));
}

#[test]
fn a_codebook_for_other_files_is_refused_with_both_hashes() {
    let codebook = Codebook::from_bytes(&CodebookFile::valid().to_bytes()).unwrap();
    codebook.check(&codebook.fingerprint).unwrap();
    let other = "0".repeat(64);
    let mut loaded = [(); 3].map(|()| codebook.fingerprint.clone());
    let fields: [fn(&mut Fingerprint) -> &mut String; 3] =
        [|f| &mut f.weights_sha256, |f| &mut f.tokenizer_sha256, |f| &mut f.config_sha256];
    for (loaded, field) in loaded.iter_mut().zip(fields) {
        let made_for = std::mem::replace(field(loaded), other.clone());
        let Err(Error::Codebook(problem)) = codebook.check(loaded) else { panic!("accepted") };
        assert!(problem.contains(&other) && problem.contains(&made_for), "{problem}");
    }
}

#[test]
fn files_are_limited_before_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("codebook.safetensors");
    let refusal = || match Codebook::from_file(&path) {
        Err(Error::Codebook(problem)) => problem,
        other => panic!("{other:?}"),
    };
    assert!(refusal().contains("cannot be read"));
    File::create(&path).unwrap().set_len(MAX_BYTES + 1).unwrap();
    assert!(refusal().contains("at most"));
    std::fs::write(&path, CodebookFile::valid().to_bytes()).unwrap();
    Codebook::from_file(&path).unwrap();
}

#[cfg(unix)]
#[test]
fn a_device_without_end_is_not_read_to_its_end() {
    let path = std::path::Path::new("/dev/zero");
    assert!(matches!(Codebook::from_file(path), Err(Error::Codebook(_))));
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        refusal(&bytes);
    }

    #[test]
    fn no_overwritten_bytes_panic(at in any::<proptest::sample::Index>(), with: [u8; 8]) {
        let mut bytes = CodebookFile::valid().to_bytes();
        let at = at.index(bytes.len() - with.len());
        bytes[at..at + with.len()].copy_from_slice(&with);
        if let Ok(codebook) = Codebook::from_bytes(&bytes) {
            assert_usable(&codebook);
        }
    }
}

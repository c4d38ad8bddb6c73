//! Every kernel of every instruction set against the scalar one, and the scalar ones against formulas.

use proptest::prelude::*;

use crate::{
    Engine, Extension, Heads, Intermediate, Isa, KeyValues, MatrixSource, PackedMatrix, Pass,
    Projection, QuantizedRows, Segment,
    attention::AttentionTask,
    dispatch::Kernels,
    lines::Lines,
    padded_outputs,
    pool::Shared,
    rows::Excess,
    scalar::{
        LANES, MOST, Place, TileHeads, bf16, exp2, hadamard, hadamard_block, reciprocal, transpose,
    },
};

fn kernels(isa: Isa) -> &'static Kernels {
    Kernels::of(Some(isa)).unwrap()
}

/// Instruction sets of this CPU other than the specification.
fn vector_isas() -> impl Iterator<Item = Isa> {
    Isa::available().filter(|isa| *isa != Isa::Scalar)
}

/// Uniform numbers in [−1, 1) of a generator of Knuth's (MMIX).
fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn pack(engine: &Engine, outputs: usize, inputs: usize, weights: &[f32]) -> PackedMatrix {
    let widen = Box::new(move |row: usize, out: &mut [f32]| {
        if row < outputs {
            out.copy_from_slice(&weights[row * inputs..][..inputs]);
        }
        Ok::<(), std::convert::Infallible>(())
    });
    let bias = noise(9, outputs);
    let outputs = padded_outputs(outputs);
    engine.pass().pack(vec![MatrixSource { outputs, inputs, widen, bias }]).unwrap().remove(0)
}

/// Noise in bf16.
fn short_noise(seed: u64, len: usize) -> Vec<f32> {
    noise(seed, len).into_iter().map(bf16).collect()
}

/// Rows of queries, keys and values, bf16 numbers, in both forms.
fn projection(heads: &Heads, numbers: Vec<f32>) -> Projection {
    let mut projection = Projection { numbers: lines(&numbers), ..Projection::default() };
    let width = Projection::width(heads);
    projection.words.grow(numbers.len() / heads.qkv_width() * width);
    let words = projection.words.chunks_exact_mut(Projection::place(heads, 0, 1));
    for (words, numbers) in words.zip(numbers.chunks_exact(heads.head_dim)) {
        words.iter_mut().zip(numbers).for_each(|(word, x)| *word = (x.to_bits() >> 16) as u16);
    }
    projection
}

fn lines(numbers: &[f32]) -> Lines<f32> {
    let mut lines = Lines::default();
    lines.grow(numbers.len());
    lines[..numbers.len()].copy_from_slice(numbers);
    lines
}

/// The bits of rows of numbers, in whichever form the kernels have left them.
fn projected_bits(heads: &Heads, rows: usize, x: &Projection) -> Vec<u32> {
    if x.words.is_empty() {
        return bits(&x.numbers[..rows * heads.qkv_width()]);
    }
    let words = &x.words[..rows * Projection::width(heads)];
    let heads_of_rows = words.chunks_exact(Projection::place(heads, 0, 1));
    heads_of_rows
        .flat_map(|row| row[..heads.head_dim].iter().map(|word| u32::from(*word) << 16))
        .collect()
}

/// The rows in fp32.
fn numbers(mut x: Intermediate) -> Vec<f32> {
    if x.numbers.is_empty() {
        x.widen();
    }
    x.numbers[..x.rows * x.width].to_vec()
}

/// An intermediate result of rows of `width` bf16 numbers, in both forms.
fn intermediate(width: usize, numbers: Vec<f32>) -> Intermediate {
    let mut x = Intermediate::default();
    x.reshape(numbers.len() / width, width, true);
    for (i, number) in numbers.iter().enumerate() {
        x.words[Intermediate::place(width, i / width, i % width)] = (number.to_bits() >> 16) as u16;
    }
    Intermediate { numbers: lines(&numbers), ..x }
}

/// The rows of 8-bit numbers, filling included, wherever the kernels of `isa` have them.
fn quantized(q: &QuantizedRows, isa: Isa) -> Vec<i8> {
    let (rows, stride) = (q.rows(), q.stride());
    if kernels(isa).tiles.is_some() {
        let place = |row, i| row / 16 * 16 * stride + i / 64 * 16 * 64 + row % 16 * 64 + i % 64;
        return (0..rows * stride).map(|i| q.data[place(i / stride, i % stride)]).collect();
    }
    let mut data = q.data[..rows * stride].to_vec();
    for (row, data) in data.chunks_exact_mut(stride).enumerate() {
        for Excess { first, four } in q.excess(row) {
            data[*first as usize..][..4].iter_mut().zip(four).for_each(|(x, part)| *x += part);
        }
    }
    data
}

/// Adds rows to `cache`, in as many chunks as there are `ends`.
fn extend(pass: &Pass, heads: Heads, x: &Projection, ends: &[usize], cache: &mut KeyValues) {
    let mut start = 0;
    for &end in ends {
        let places = pass.grow(heads, cache, end - start, end - start);
        pass.extend(heads, x, &mut [Extension { rows: start..end, places }]);
        start = end;
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn powers_of_two_are_within_a_part_in_579() {
    for i in -1_260_000..1_275_000i32 {
        let x = i as f32 * 1e-4;
        let (found, expected) = (f64::from(exp2(x)), f64::from(x).exp2());
        assert!((found - expected).abs() <= expected / 579.0, "2^{x} is not {found}");
    }
    assert_eq!([-127.0, -1e30, f32::NEG_INFINITY].map(exp2), [0.0; 3]);
    assert_eq!([128.0, 1e30, f32::INFINITY].map(exp2), [f32::INFINITY; 3]);
    assert!(exp2(f32::NAN).is_nan());
}

#[test]
fn reciprocals_are_within_a_part_in_750() {
    for i in 0..1_300_000 {
        let x = (i as f32 * 5e-5).exp2();
        let found = f64::from(reciprocal(x)) * f64::from(x);
        assert!((found - 1.0).abs() <= 1.0 / 750.0, "1/{x} is not {found}");
    }
    assert!(reciprocal(1.0 + MOST.exp2()) > 0.0);
    assert!(reciprocal(f32::NAN).is_nan());
}

#[test]
fn bf16_numbers_are_the_nearest() {
    let next = f32::from_bits(1.0f32.to_bits() + (1 << 16));
    let between = |eighths: u32| f32::from_bits(1.0f32.to_bits() + (eighths << 13));
    assert_eq!([3, 4, 5].map(|eighths| bf16(between(eighths))), [1.0, 1.0, next]);
    // Of two the even one.
    assert_eq!(bf16(between(12)), f32::from_bits(next.to_bits() + (1 << 16)));
    assert_eq!(bf16(f32::MAX), f32::INFINITY);
    assert_eq!(bf16(f32::NEG_INFINITY), f32::NEG_INFINITY);
    assert!(bf16(f32::NAN).is_nan() && bf16(f32::from_bits(0x7fff_ffff)).is_nan());
}

#[test]
fn rotating_twice_multiplies_by_the_block_size() {
    for block in [1, 2, 8, 64] {
        let x = noise(1, 3 * block);
        let mut twice = x.clone();
        hadamard(&mut twice, block);
        hadamard(&mut twice, block);
        for (twice, x) in twice.iter().zip(x) {
            assert!((twice / block as f32 - x).abs() < 1e-6);
        }
    }
}

#[test]
fn inner_products_add_sixteen_lanes() {
    for len in [0, 5, 16, 100, 576] {
        let (x, rows) = (noise(1, len), noise(2, 3 * len));
        let mut found = [0.0; 3];
        crate::dots(&x, &rows, &mut found);
        for (i, found) in found.into_iter().enumerate() {
            let row = &rows[i * len..][..len];
            let whole = len / 16 * 16;
            let product = |k: usize| x[k] * row[k];
            let lane = |lane: usize| (lane..whole).step_by(16).map(product).sum::<f32>();
            let tail = (whole..len).map(product).sum::<f32>();
            assert_eq!(found, (0..16).map(lane).sum::<f32>() + tail);
            assert_eq!(found, crate::dot(&x, row));
        }
    }
}

#[test]
fn a_number_that_is_not_finite_makes_the_whole_row_nan() {
    let engine = Engine::new(Some(Isa::Scalar), Some(1)).unwrap();
    let w = pack(&engine, 5, 70, &noise(3, 5 * 70));
    for isa in Isa::available() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = noise(2, 3 * 70);
            x[70 + 33] = bad;
            let engine = Engine::new(Some(isa), Some(1)).unwrap();
            let (pass, mut q, mut out) = (engine.pass(), QuantizedRows::default(), [0.0; 15]);
            pass.quantize(&mut x, 70, &mut q);
            pass.linear::<false>(&q, &w, 5, &mut out);
            let nan: Vec<bool> = out.iter().map(|x| x.is_nan()).collect();
            assert_eq!(nan, [[false; 5], [true; 5], [false; 5]].concat(), "{isa}, {bad}");
        }
    }
}

#[test]
fn matrices_know_what_follows_them() {
    let engine = Engine::new(Some(Isa::Scalar), Some(1)).unwrap();
    let source = |outputs| {
        let widen = |i: usize, row: &mut [f32]| {
            row.copy_from_slice(&noise(i as u64, 64));
            Ok::<(), std::convert::Infallible>(())
        };
        MatrixSource { outputs, inputs: 64, widen: Box::new(widen), bias: Vec::new() }
    };
    let packed = engine.pass().pack(vec![source(16), source(48)]).unwrap();
    let [first, second] = packed.as_slice() else { panic!("two matrices were packed") };
    assert_eq!(first.next(0, 1), second.panel_range(0..3));
    assert_eq!(first.next(1, 3), second.panel(1));
    assert!(second.next(0, 1).is_empty());
}

/// Tile state in use is what a change of threads has to save.
#[cfg(target_arch = "x86_64")]
#[test]
fn tiles_are_released_when_a_step_ends() {
    #[target_feature(enable = "xsave")]
    fn states_in_use() -> u64 {
        // SAFETY: register 1 exists on every CPU with AMX.
        unsafe { std::arch::x86_64::_xgetbv(1) }
    }
    if !Isa::Amx.is_available() {
        return;
    }
    let engine = Engine::new(Some(Isa::Amx), Some(1)).unwrap();
    let w = pack(&engine, 40, 70, &noise(3, 40 * 70));
    let heads = Heads { num_attention_heads: 2, num_key_value_heads: 1, head_dim: 8 };
    let (pass, mut q, mut out) = (engine.pass(), QuantizedRows::default(), vec![0.0; 20 * 40]);
    pass.rms_norm_quantize(&noise(2, 20 * 64), &noise(1, 64), 1e-5, &mut q);
    pass.quantize(&mut noise(2, 20 * 70), 70, &mut q);
    pass.linear::<false>(&q, &w, 40, &mut out);
    let mut cache = KeyValues::default();
    let x = projection(&heads, short_noise(4, 20 * heads.qkv_width()));
    extend(&pass, heads, &x, &[20], &mut cache);
    let segment = Segment { rows: 0..20, first: 0, step: 1, cache: &cache };
    pass.attention(heads, &[segment], &x, &mut Intermediate::default());
    // SAFETY: the CPU has AMX, so that the system uses XSAVE.
    assert_eq!(unsafe { states_in_use() } >> 17 & 3, 0);
}

#[test]
#[should_panic(expected = "rows.len() >= last")]
fn attention_is_refused_where_keys_are_missing_that_a_step_leads_to() {
    let task = AttentionTask {
        heads: 1,
        first: 0,
        step: 3,
        tokens: 2,
        head_dim: 2,
        queries: &[0.0; 4],
        query_stride: 2,
        keys: &[0.0; 6],
        values: &[0.0; 6],
        stride: 2,
    };
    kernels(Isa::Scalar).attention(&task, &mut [0.0; 4]);
}

/// Of numbers below one: their weights are off by up to a part in 579, then rounded towards zero by up to one
/// in 128, and the result is rounded to bf16.
const ATTENTION_ERROR: f64 = 1.0 / 579.0 + 1.0 / 128.0 + 1.0 / 512.0;

/// Attention in fp64, `[heads, tokens, head_dim]`.
fn plain_attention(task: &AttentionTask<'_>) -> Vec<f64> {
    let dim = task.head_dim;
    let mut out = Vec::new();
    for (head, token) in (0..task.heads).flat_map(|h| (0..task.tokens).map(move |t| (h, t))) {
        let query = &task.queries[token * task.query_stride + head * dim..][..dim];
        let score = |s: usize| -> f64 {
            let key = &task.keys[s * task.stride..][..dim];
            query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>()
        };
        let seen = task.first + token * task.step + 1;
        let weights: Vec<f64> = (0..seen).map(|s| score(s).exp2()).collect();
        let total: f64 = weights.iter().sum();
        out.extend((0..dim).map(|i| {
            let value = |s: usize| f64::from(task.values[s * task.stride + i]);
            weights.iter().enumerate().map(|(s, w)| w / total * value(s)).sum::<f64>()
        }));
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn rows_are_quantised_to_the_same_bits(width in 1usize..300, seed: u64, filling in 0usize..70) {
        let x = noise(seed, width);
        let block = hadamard_block(width);
        let run = |isa| {
            let (mut x, mut out) = (x.clone(), vec![1; width + filling]);
            let (scale, sum) = kernels(isa).rotate_quantize(&mut x, block, &mut out);
            (bits(&x), out, scale.to_bits(), sum)
        };
        let expected = run(Isa::Scalar);
        prop_assert_eq!(expected.1.iter().map(|q| i32::from(*q)).sum::<i32>(), expected.3);
        for isa in vector_isas() {
            prop_assert_eq!(run(isa), expected.clone(), "{}", isa);
        }
    }

    #[test]
    fn intermediate_results_are_quantised_to_the_same_bits(
        rows in 1usize..40,
        width in prop_oneof![(1usize..6).prop_map(|blocks| 64 * blocks), 1usize..200],
        threads in 1usize..3,
        seed: u64,
    ) {
        let x = short_noise(seed, rows * width);
        let weight = noise(!seed, width);
        let run = |isa, x: Vec<f32>| {
            let engine = Engine::new(Some(isa), Some(threads)).unwrap();
            let (pass, mut q, mut normed) =
                (engine.pass(), QuantizedRows::default(), QuantizedRows::default());
            pass.rms_norm_quantize(&x, &weight, 1e-5, &mut normed);
            pass.quantize_intermediate(&mut intermediate(width, x), &mut q);
            [q, normed]
        };
        let expected = run(Isa::Scalar, x.clone());
        for isa in vector_isas() {
            let found = run(isa, x.clone());
            // Rows are on their own.
            let last = run(isa, x[(rows - 1) * width..].to_vec());
            for ((found, expected), last) in found.iter().zip(&expected).zip(&last) {
                prop_assert_eq!(bits(&found.scales), bits(&expected.scales), "{}", isa);
                prop_assert_eq!(found.scales[rows - 1].to_bits(), last.scales[0].to_bits());
                let all = quantized(found, isa);
                prop_assert_eq!(&all, &quantized(expected, Isa::Scalar), "{}", isa);
                let stride = found.stride();
                prop_assert_eq!(&all[(rows - 1) * stride..], &quantized(last, isa)[..stride]);
                for (row, q) in all.chunks(stride).enumerate().filter(|_| isa != Isa::Amx) {
                    let sum: i32 = q.iter().map(|q| i32::from(*q)).sum();
                    prop_assert_eq!(found.offsets[row], -128 * sum, "{}", isa);
                }
            }
        }
    }

    #[test]
    fn split_rows_add_up_to_the_whole(words in 1usize..6, seed: u64, sixteenths in 1i16..=16) {
        let scale = |x: &f32| (x * 8.0 * f32::from(sixteenths)).clamp(-127.0, 127.0) as i8;
        let row: Vec<i8> = noise(seed, 64 * words).iter().map(scale).collect();
        for isa in vector_isas() {
            let (mut rest, mut excess) = (row.clone(), vec![Excess::default(); 16 * words]);
            let len = kernels(isa).split(&mut rest, &mut excess);
            for Excess { first, four } in &excess[..len] {
                rest[*first as usize..][..4].iter_mut().zip(four).for_each(|(x, part)| *x += part);
            }
            prop_assert_eq!(&rest, &row, "{}", isa);
        }
    }

    #[test]
    fn norms_have_the_same_bits(width in 1usize..300, seed: u64) {
        let (x, weight) = (noise(seed, width), noise(!seed, width));
        let run = |isa| {
            let mut normed = vec![0.0; width];
            kernels(isa).rms_norm(&x, &weight, 1e-5, &mut normed);
            bits(&normed)
        };
        let expected = run(Isa::Scalar);
        let mean = x.iter().map(|x| f64::from(x * x)).sum::<f64>() / width as f64;
        for ((found, x), weight) in expected.iter().zip(&x).zip(&weight) {
            let exact = f64::from(*x) / (mean + 1e-5).sqrt() * f64::from(*weight);
            prop_assert!((f64::from(f32::from_bits(*found)) - exact).abs() <= exact.abs() / 255.0);
        }
        for isa in vector_isas() {
            prop_assert_eq!(run(isa), run(Isa::Scalar), "{}", isa);
        }
    }

    #[test]
    fn tiles_are_finished_alike(
        rows in 1usize..5,
        units in 1usize..4,
        missing in 0usize..LANES,
        gap in 0usize..3,
        seed: u64,
    ) {
        let columns = units * 2 * LANES;
        let tile = noise(seed, rows * columns).iter().map(|x| x * 20.0).collect::<Vec<_>>();
        let (width, half) = (columns - missing, columns / 2 - missing.min(columns / 2 - 1));
        // Every head is a unit of columns of which some only fill it.
        let head_dim = 2 * LANES - missing / 2 * 2;
        let scales = [Some(0.5), Some(1.0), None];
        let heads = TileHeads { head_dim, padded: 2 * LANES, scales: &scales[3 - units..] };
        let angles = noise(!seed, rows * head_dim);
        let run = |isa| {
            let kernels = kernels(isa);
            let finished = |run: &dyn Fn(&Place<'_>)| {
                let stride = columns + gap;
                let mut out = vec![1.0; rows * stride + 1];
                run(&Place { out: &Shared::new(&mut out), start: 1, stride });
                bits(&out)
            };
            // SAFETY: nobody else knows of the places.
            [
                finished(&|place| unsafe {
                    kernels.finish_linear::<false>(&tile, columns, width, place);
                }),
                finished(&|place| unsafe {
                    kernels.finish_linear::<true>(&tile, columns, width, place);
                }),
                finished(&|place| unsafe {
                    kernels.finish_gate_up(&tile, columns, half, place);
                }),
                finished(&|place| unsafe {
                    kernels.finish_qkv(&tile, &heads, &angles, place);
                }),
            ]
        };
        for isa in vector_isas() {
            prop_assert_eq!(run(isa), run(Isa::Scalar), "{}", isa);
        }
    }

    #[test]
    fn products_have_the_same_bits_and_are_near_exact(
        rows in 1usize..150,
        outputs in 1usize..90,
        inputs in prop_oneof![1usize..200, 577usize..1300],
        threads in 1usize..4,
        seed: u64,
    ) {
        let (x, weights) = (noise(seed, rows * inputs), noise(!seed, outputs * inputs));
        let run = |isa| {
            let engine = Engine::new(Some(isa), Some(threads)).unwrap();
            let w = pack(&engine, outputs, inputs, &weights);
            let (pass, mut q) = (engine.pass(), QuantizedRows::default());
            pass.quantize(&mut x.clone(), inputs, &mut q);
            let mut out = vec![1.0; rows * outputs];
            pass.linear::<true>(&q, &w, outputs, &mut out);
            (out, q, w)
        };
        let (expected, q, w) = run(Isa::Scalar);
        let (block, bias) = (hadamard_block(inputs), noise(9, outputs));
        for (i, found) in expected.iter().enumerate() {
            let (row, output) = (i / outputs, i % outputs);
            let (x, w_row) = (&x[row * inputs..][..inputs], &weights[output * inputs..][..inputs]);
            let exact: f64 = x.iter().zip(w_row).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
            // Each rotated number is off by at most half a step, of `scale` and `w_scale · block`.
            let (mut x, mut w_row) = (x.to_vec(), w_row.to_vec());
            hadamard(&mut x, block);
            hadamard(&mut w_row, block);
            let step = f64::from(q.scales[row]);
            let w_step = f64::from(w.scales(output / LANES)[output % LANES]) * block as f64;
            let bound: f64 = x
                .iter()
                .zip(&w_row)
                .map(|(x, w)| f64::from(x.abs()) * w_step + f64::from(w.abs()) * step + step * w_step)
                .sum::<f64>() / 2.0 / block as f64;
            let error = f64::from(*found) - 1.0 - f64::from(bias[output]) - exact;
            prop_assert!(error.abs() <= bound * 1.01 + 1e-5, "{error} > {bound}");
        }
        for isa in vector_isas() {
            prop_assert_eq!(bits(&run(isa).0), bits(&expected), "{}", isa);
        }
    }

    #[test]
    fn attention_is_near_exact(
        heads in 1usize..4,
        tokens in 1usize..40,
        first in 0usize..150,
        step in prop_oneof![Just(1usize), 0usize..70],
        pairs in 1usize..40,
        seed: u64,
    ) {
        let (dim, end) = (2 * pairs, first + (tokens - 1) * step + 1);
        let (query_stride, stride) = (heads * dim + 3, dim + 5);
        let queries = short_noise(seed, tokens * query_stride);
        let (keys, values) = (short_noise(!seed, end * stride), short_noise(seed ^ 7, end * stride));
        let task = AttentionTask {
            heads, first, step, tokens, head_dim: dim, queries: &queries, query_stride,
            keys: &keys, values: &values, stride,
        };
        let expected = plain_attention(&task);
        let mut spec = vec![0.0; heads * tokens * dim];
        kernels(Isa::Scalar).attention(&task, &mut spec);
        for (found, expected) in spec.iter().zip(&expected) {
            prop_assert!((f64::from(*found) - expected).abs() <= ATTENTION_ERROR);
        }
        for isa in vector_isas() {
            let mut out = vec![0.0; heads * tokens * dim];
            kernels(isa).attention(&task, &mut out);
            prop_assert_eq!(bits(&out), bits(&spec), "{}", isa);
        }
    }

    #[test]
    fn attention_of_a_chunk_is_near_exact(
        group in 1usize..4,
        pairs_of_heads in 1usize..3,
        tokens in 1usize..40,
        first in 0usize..150,
        step in prop_oneof![Just(1usize), 1usize..70],
        half in 1usize..40,
        threads in 1usize..3,
        seed: u64,
    ) {
        let (dim, end) = (2 * half, first + (tokens - 1) * step + 1);
        let heads = Heads {
            num_attention_heads: group * pairs_of_heads,
            num_key_value_heads: pairs_of_heads,
            head_dim: dim,
        };
        let rows = short_noise(seed, end * heads.qkv_width());
        let x = projection(&heads, rows.clone());
        let keys = heads.query_width();
        let mut spec = None;
        let expected: Vec<_> = (0..pairs_of_heads).map(|head| plain_attention(&AttentionTask {
            heads: group,
            first,
            step,
            tokens,
            head_dim: dim,
            queries: &rows[first * heads.qkv_width() + head * group * dim..],
            query_stride: heads.qkv_width(),
            keys: &rows[keys + head * dim..],
            values: &rows[keys + heads.kv_width() + head * dim..],
            stride: heads.qkv_width(),
        })).collect();
        for isa in Isa::available() {
            let engine = Engine::new(Some(isa), Some(threads)).unwrap();
            let (pass, mut cache) = (engine.pass(), KeyValues::default());
            extend(&pass, heads, &x, &[first / 2, first, end], &mut cache);
            prop_assert!(cache.holds(end, heads.kv_width()));
            let mut out = Intermediate::default();
            let segment = Segment { rows: first..first + tokens, first, step, cache: &cache };
            pass.attention(heads, &[segment], &x, &mut out);
            let out = numbers(out);
            let spec = spec.get_or_insert_with(|| bits(&out));
            prop_assert_eq!(&bits(&out), &*spec, "{}", isa);
            for (row, out) in out.chunks_exact(heads.query_width()).enumerate().skip(first) {
                for (head, found) in out.chunks_exact(dim).enumerate() {
                    let place = (head % group * tokens + row - first) * dim;
                    for (found, exact) in found.iter().zip(&expected[head / group][place..]) {
                        prop_assert!((f64::from(*found) - exact).abs() <= ATTENTION_ERROR);
                    }
                }
            }
        }
    }

    #[test]
    fn joint_projections_have_the_same_bits(
        rows in 1usize..70,
        half in 1usize..40,
        group in 1usize..3,
        threads in 1usize..3,
        seed: u64,
    ) {
        let (dim, inputs) = (2 * half, 64);
        let heads = Heads { num_attention_heads: 2 * group, num_key_value_heads: 2, head_dim: dim };
        let all = heads.qkv_width() / dim;
        let weights = noise(seed, all * dim * inputs);
        let (x, angles) = (noise(!seed, rows * inputs), noise(seed ^ 5, rows * dim));
        let run = |isa| {
            let engine = Engine::new(Some(isa), Some(threads)).unwrap();
            let widen = |i: usize, out: &mut [f32]| {
                let (head, place) = (i / heads.packed_head(), i % heads.packed_head());
                if place < dim {
                    out.copy_from_slice(&weights[(head * dim + place) * inputs..][..inputs]);
                }
                Ok::<(), std::convert::Infallible>(())
            };
            let outputs = all * heads.packed_head();
            let source = MatrixSource { outputs, inputs, widen: Box::new(widen), bias: vec![] };
            let pass = engine.pass();
            let w = pass.pack(vec![source]).unwrap().remove(0);
            let (mut q, mut out) = (QuantizedRows::default(), Projection::default());
            pass.quantize(&mut x.clone(), inputs, &mut q);
            pass.qkv(&q, &w, heads, &angles, &mut out);
            out
        };
        let expected = projected_bits(&heads, rows, &run(Isa::Scalar));
        for isa in vector_isas() {
            let found = projected_bits(&heads, rows, &run(isa));
            prop_assert_eq!(&found, &expected, "{}", isa);
        }
    }

    #[test]
    fn gates_have_the_same_bits(rows in 1usize..70, width in 1usize..70, threads in 1usize..3, seed: u64) {
        let inputs = 64;
        let (x, weights) = (noise(seed, rows * inputs), noise(!seed, 2 * width * inputs));
        let run = |isa| {
            let engine = Engine::new(Some(isa), Some(threads)).unwrap();
            let pass = engine.pass();
            let w = pack_gate_up(&pass, width, inputs, &weights);
            let (mut q, mut out) = (QuantizedRows::default(), Intermediate::default());
            pass.quantize(&mut x.clone(), inputs, &mut q);
            pass.gate_up(&q, &w, width, &mut out);
            numbers(out)
        };
        let expected = run(Isa::Scalar);
        for isa in vector_isas() {
            prop_assert_eq!(bits(&run(isa)), bits(&expected), "{}", isa);
        }
    }

    #[test]
    fn transposing_moves_every_number(rows in 1usize..40, columns in 1usize..40, gap in 0usize..3) {
        let (stride, out_stride) = (columns + gap, rows + gap);
        let x = noise(1, rows * stride);
        let mut expected = vec![0.0; columns * out_stride];
        transpose(&x, stride, (rows, columns), &mut expected, out_stride);
        for (i, j) in (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j))) {
            prop_assert_eq!(expected[j * out_stride + i], x[i * stride + j]);
        }
        #[cfg(target_arch = "x86_64")]
        if Isa::Avx2.is_available() {
            let mut out = vec![0.0; columns * out_stride];
            // SAFETY: AVX2 is available.
            unsafe { crate::avx2::transpose(&x, stride, (rows, columns), &mut out, out_stride) };
            prop_assert_eq!(out, expected);
        }
    }
}

/// Inputs and weights as large as they get, in all combinations of signs: no sum may saturate.
#[test]
fn products_of_the_largest_numbers_are_exact() {
    // An odd width is not rotated.
    let (rows, outputs, inputs) = (16, 16, 255);
    let sign = |i: usize, k: usize| if i >> (k % 4) & 1 == 0 { 1.0 } else { -1.0 };
    let signs: Vec<f32> = (0..rows).flat_map(|i| (0..inputs).map(move |k| sign(i, k))).collect();
    for isa in Isa::available() {
        let engine = Engine::new(Some(isa), Some(1)).unwrap();
        let w = pack(&engine, outputs, inputs, &signs);
        let (pass, mut q, mut out) =
            (engine.pass(), QuantizedRows::default(), vec![0.0; rows * outputs]);
        pass.quantize(&mut signs.clone(), inputs, &mut q);
        pass.linear::<false>(&q, &w, outputs, &mut out);
        for (i, (found, bias)) in out.iter().zip(noise(9, outputs).iter().cycle()).enumerate() {
            let same = |k: &usize| sign(i / outputs, *k) == sign(i % outputs, *k);
            let exact = 2.0 * (0..inputs).filter(same).count() as f32 - inputs as f32;
            assert!((found - bias - exact).abs() < 1e-3, "{isa}: {found}, exactly {exact}");
        }
    }
}

/// Panels of 16 gates and of the 16 matching ups in turn, of `[2, width, inputs]` weights.
fn pack_gate_up(pass: &Pass, width: usize, inputs: usize, weights: &[f32]) -> PackedMatrix {
    let widen = |i: usize, out: &mut [f32]| {
        let (row, up) = (i / (2 * LANES) * LANES + i % LANES, i / LANES % 2);
        if row < width {
            out.copy_from_slice(&weights[(up * width + row) * inputs..][..inputs]);
        }
        Ok::<(), std::convert::Infallible>(())
    };
    let outputs = 2 * padded_outputs(width);
    let source = MatrixSource { outputs, inputs, widen: Box::new(widen), bias: Vec::new() };
    pass.pack(vec![source]).unwrap().remove(0)
}

#[test]
fn gate_and_up_alternate_in_panels() {
    let (inputs, width, rows) = (64, 40, 3);
    let weights = noise(4, 2 * width * inputs);
    let engine = Engine::new(None, Some(2)).unwrap();
    let pass = engine.pass();
    let w = pack_gate_up(&pass, width, inputs, &weights);
    let (mut q, mut out) = (QuantizedRows::default(), Intermediate::default());
    let x = noise(6, rows * inputs);
    pass.quantize(&mut x.clone(), inputs, &mut q);
    pass.gate_up(&q, &w, width, &mut out);
    let out = numbers(out);
    for (i, found) in out.iter().enumerate() {
        let dot = |up: usize| -> f32 {
            let w = &weights[(up * width + i % width) * inputs..][..inputs];
            x[i / width * inputs..].iter().zip(w).map(|(x, w)| x * w).sum()
        };
        let (gate, up) = (dot(0), dot(1));
        let exact = gate / (1.0 + (-gate).exp()) * up;
        // Both dots are off by some 0.02 (64 products of numbers below 1, each side 0.5 % off).
        let bound = 0.05 * (1.0 + gate.abs() + up.abs());
        assert!((found - exact).abs() < bound, "{found}, exactly {exact}");
    }
}

/// A group of positions may have several writers, in any order.
#[test]
fn positions_are_filled_in_runs() {
    let heads = Heads { num_attention_heads: 4, num_key_value_heads: 2, head_dim: 24 };
    let rows = 150;
    let x = projection(&heads, short_noise(1, rows * heads.qkv_width()));
    for isa in Isa::available() {
        let engine = Engine::new(Some(isa), Some(2)).unwrap();
        let pass = engine.pass();
        let held = |cache: &KeyValues| {
            (cache.keys.clone(), cache.values.clone(), cache.blocks.words().to_vec())
        };
        let (mut whole, mut runs) = (KeyValues::default(), KeyValues::default());
        extend(&pass, heads, &x, &[5, rows], &mut whole);
        extend(&pass, heads, &x, &[5], &mut runs);
        let mut places = pass.grow(heads, &mut runs, rows - 5, rows - 5);
        let mut extensions: Vec<_> = [5..41, 41..72, 72..rows]
            .map(|rows| Extension { places: places.take(rows.len()), rows })
            .into();
        extensions.reverse();
        pass.extend(heads, &x, &mut extensions);
        assert!(held(&runs) == held(&whole), "{isa}");
    }
}

/// Scores beyond what their exponentials can hold, of both signs and beside small ones.
#[test]
fn scores_may_be_of_any_size() {
    let heads = Heads { num_attention_heads: 2, num_key_value_heads: 1, head_dim: 16 };
    let (rows, dim, width) = (100, heads.head_dim, heads.qkv_width());
    let queries_of = |sizes: [f32; 3]| {
        let mut x = short_noise(3, rows * width);
        for (row, x) in x.chunks_exact_mut(width).enumerate() {
            // The largest score has the last of 37 keys, or the first.
            x[..2 * dim].fill(bf16(sizes[row % 3]));
            x[2 * dim..3 * dim].fill((row % 37 + 5) as f32);
        }
        x
    };
    let mixed = queries_of([1e-3, 1.0, -1.0]);
    let expected = plain_attention(&AttentionTask {
        heads: 2,
        first: 0,
        step: 1,
        tokens: rows,
        head_dim: dim,
        queries: &mixed,
        query_stride: width,
        keys: &mixed[2 * dim..],
        values: &mixed[3 * dim..],
        stride: width,
    });
    for isa in Isa::available() {
        let engine = Engine::new(Some(isa), Some(1)).unwrap();
        let run = |x: Vec<f32>| {
            let (pass, x, mut cache) = (engine.pass(), projection(&heads, x), KeyValues::default());
            extend(&pass, heads, &x, &[rows], &mut cache);
            let mut out = Intermediate::default();
            let segment = Segment { rows: 0..rows, first: 0, step: 1, cache: &cache };
            pass.attention(heads, &[segment], &x, &mut out);
            numbers(out)
        };
        let (found, small) = (run(mixed.clone()), run(queries_of([1e-3; 3])));
        for (i, found) in found.iter().enumerate() {
            let (row, head) = (i / (2 * dim), i / dim % 2);
            let exact = expected[(head * rows + row) * dim + i % dim];
            assert!((f64::from(*found) - exact).abs() < 0.01, "{isa}: {found}, exactly {exact}");
            // A column's result does not depend on those beside it.
            assert!(row % 3 != 0 || *found == small[i], "{isa}");
        }
    }
}

/// Segments of one chunk read their own keys only, and a token's result does not depend on its chunk.
#[test]
fn segments_do_not_see_each_other() {
    let heads = Heads { num_attention_heads: 4, num_key_value_heads: 2, head_dim: 16 };
    let (rows, first) = (70, 30);
    let x = projection(&heads, short_noise(1, (rows + 5) * heads.qkv_width()));
    let past = projection(&heads, short_noise(2, first * heads.qkv_width()));
    for isa in Isa::available() {
        let engine = Engine::new(Some(isa), Some(2)).unwrap();
        let pass = engine.pass();
        let run = |segments: &[Segment<'_>]| {
            let mut out = Intermediate::default();
            pass.attention(heads, segments, &x, &mut out);
            let mut out = numbers(out);
            out.resize((rows + 5) * heads.query_width(), 0.0);
            out
        };
        let (mut long, mut short) = (KeyValues::default(), KeyValues::default());
        extend(&pass, heads, &past, &[first], &mut long);
        let add = |rows: std::ops::Range<usize>, cache: &mut KeyValues| {
            let places = pass.grow(heads, cache, rows.len(), rows.len());
            pass.extend(heads, &x, &mut [Extension { rows, places }]);
        };
        fn segment(rows: std::ops::Range<usize>, cache: &KeyValues) -> Segment<'_> {
            Segment { first: 30 + rows.start, step: 1, rows, cache }
        }
        add(0..33, &mut long);
        let start = run(&[segment(0..33, &long)]);
        add(33..rows, &mut long);
        add(rows..rows + 5, &mut short);
        let short = Segment { rows: rows..rows + 5, first: 0, step: 1, cache: &short };
        let together = run(&[segment(0..rows, &long), short.clone()]);
        let apart = [run(&[segment(33..rows, &long)]), run(&[short])]
            .iter()
            .fold(start, |sum, x| sum.iter().zip(x).map(|(a, b)| a + b).collect());
        assert_eq!(together, apart, "{isa}");
    }
}

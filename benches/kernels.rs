//! The steps of a decoder block in the shape of SmolLM2-135M, on one thread, per instruction set.
//!
//! `cargo bench -p alknet-kernels`; throughput is in multiply-adds.

use std::convert::Infallible;

use alknet_kernels::{
    Engine, Extension, Heads, Intermediate, Isa, KeyValues, MatrixSource, PackedMatrix, Projection,
    QuantizedRows, Segment,
};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const HIDDEN: usize = 576;
const INNER: usize = 1536;
const HEADS: Heads = Heads { num_attention_heads: 9, num_key_value_heads: 3, head_dim: 64 };

fn engines() -> impl Iterator<Item = Engine> {
    Isa::available().map(|isa| Engine::new(Some(isa), Some(1)).expect("available"))
}

/// Numbers without a pattern that the kernels could profit from.
fn numbers(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * 0.37).sin()).collect()
}

fn matrix(engine: &Engine, outputs: usize, inputs: usize) -> PackedMatrix {
    let widen = Box::new(move |row: usize, out: &mut [f32]| {
        out.iter_mut().enumerate().for_each(|(i, x)| *x = ((row * inputs + i) as f32).sin());
        Ok::<(), Infallible>(())
    });
    let source = MatrixSource { outputs, inputs, widen, bias: Vec::new() };
    engine.pass().pack(vec![source]).expect("memory").remove(0)
}

fn products(c: &mut Criterion) {
    for (name, outputs, inputs) in [
        ("qkv", HEADS.qkv_width(), HIDDEN),
        ("gate_up", 2 * INNER, HIDDEN),
        ("down", HIDDEN, INNER),
    ] {
        let mut group = c.benchmark_group(name);
        for engine in engines() {
            let w = matrix(&engine, outputs, inputs);
            for rows in [1, 16, 128] {
                let pass = engine.pass();
                let mut q = QuantizedRows::default();
                pass.quantize(&mut numbers(rows * inputs), inputs, &mut q);
                let mut out = vec![0.0; rows * outputs];
                group.throughput(Throughput::Elements((rows * outputs * inputs) as u64));
                group.bench_function(BenchmarkId::new(engine.isa().name(), rows), |b| {
                    b.iter(|| pass.linear::<false>(&q, &w, outputs, &mut out));
                });
            }
        }
        group.finish();
    }
}

fn row_steps(c: &mut Criterion) {
    let mut group = c.benchmark_group("rows of 128");
    for engine in engines() {
        let (pass, isa) = (engine.pass(), engine.isa().name());
        let (mut x, norm) = (numbers(128 * INNER), numbers(HIDDEN));
        let mut q = QuantizedRows::default();
        group.bench_function(BenchmarkId::new("rms_norm_quantize", isa), |b| {
            b.iter(|| pass.rms_norm_quantize(&x[..128 * HIDDEN], &norm, 1e-5, &mut q));
        });
        group.bench_function(BenchmarkId::new("quantize", isa), |b| {
            // Rotating twice only scales by 64; the numbers are set back before they overflow.
            b.iter(|| {
                pass.quantize(&mut x, INNER, &mut q);
                x.iter_mut().for_each(|x| *x *= 0.125);
            });
        });
    }
    group.finish();
}

fn attention(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention");
    for engine in engines() {
        let w = matrix(&engine, HEADS.qkv_width(), HIDDEN);
        for len in [16, 128, 1024] {
            let pass = engine.pass();
            let rows = len.min(256);
            let (mut q, mut x) = (QuantizedRows::default(), Projection::default());
            pass.quantize(&mut numbers(len * HIDDEN), HIDDEN, &mut q);
            pass.qkv(&q, &w, HEADS, &numbers(len * HEADS.head_dim), &mut x);
            let mut cache = KeyValues::default();
            let places = pass.grow(HEADS, &mut cache, len, len);
            pass.extend(HEADS, &x, &mut [Extension { rows: 0..len, places }]);
            let segment = Segment { rows: 0..rows, first: len - rows, step: 1, cache: &cache };
            let mut out = Intermediate::default();
            group.bench_function(BenchmarkId::new(engine.isa().name(), len), |b| {
                b.iter(|| pass.attention(HEADS, std::slice::from_ref(&segment), &x, &mut out));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, products, row_steps, attention);
criterion_main!(benches);

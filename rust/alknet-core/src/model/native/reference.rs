//! A decoder as plain as the formulas, in fp64 on weights widened to fp32: what the engine is held to.

use crate::model::{Input, LlamaConfig, Readout, Site, SiteKind, TokenId, weights::Weights};

/// Activations at every site for a sequence read from its start, `[sites][tokens, readouts][hidden_size]`.
pub(super) fn forward(
    weights: &Weights,
    config: &LlamaConfig,
    sites: &[Site],
    input_ids: &[TokenId],
    readouts: &[Readout<'_>],
) -> Vec<Vec<Vec<f64>>> {
    let tokens = (0..input_ids.len()).map(|t| Place { position: t, seen: t + 1 });
    let beside = readouts.iter().map(|r| Place { position: r.after, seen: r.after });
    let reference = Reference { weights, config, places: tokens.chain(beside).collect() };
    let hidden = config.hidden_size;
    let tokens = input_ids.iter().map(|id| Input::Token(*id));
    let inputs = tokens.chain(readouts.iter().map(|readout| readout.probe.input(hidden)));
    let embedding = Matrix::read(weights, "model.embed_tokens", config.vocab_size, hidden);
    let begin = |input: Input<'_>| match input {
        Input::Token(id) => embedding.rows[id as usize].clone(),
        Input::Vector(vector) => vector.iter().copied().map(f64::from).collect(),
    };
    let mut x: Vec<Vec<f64>> = inputs.map(begin).collect();
    let mut captured = vec![Vec::new(); sites.len()];
    let last = sites.iter().map(|site| site.layer).max().unwrap();
    for layer in 0..=last {
        for (x, readout) in x[input_ids.len()..].iter_mut().zip(readouts) {
            let steering = readout.probe.steering(layer, hidden).into_iter().flatten();
            x.iter_mut().zip(steering).for_each(|(x, v)| *x += f64::from(*v));
        }
        let attention = reference.attention(layer, &x);
        add(&mut x, &attention);
        let mlp = reference.mlp(layer, &x);
        add(&mut x, &mlp);
        for (site, captured) in sites.iter().zip(&mut captured) {
            if site.layer == layer {
                *captured = match site.kind {
                    SiteKind::AttnOut => attention.clone(),
                    SiteKind::MlpOut => mlp.clone(),
                    SiteKind::ResidPost => x.clone(),
                };
            }
        }
    }
    captured
}

fn add(x: &mut [Vec<f64>], y: &[Vec<f64>]) {
    x.iter_mut().flatten().zip(y.iter().flatten()).for_each(|(x, y)| *x += y);
}

struct Matrix {
    rows: Vec<Vec<f64>>,
    bias: Vec<f64>,
}

impl Matrix {
    fn read(weights: &Weights, name: &str, rows: usize, cols: usize) -> Self {
        let widen = |name: String, rows, cols| -> Vec<f64> {
            weights.widen(&name, rows, cols).unwrap().into_iter().map(f64::from).collect()
        };
        let numbers = widen(format!("{name}.weight"), rows, cols);
        let bias = format!("{name}.bias");
        let bias =
            if weights.get(&bias).is_some() { widen(bias, 1, rows) } else { vec![0.0; rows] };
        Self { rows: numbers.chunks(cols).map(<[f64]>::to_vec).collect(), bias }
    }

    fn apply(&self, x: &[f64]) -> Vec<f64> {
        self.rows.iter().zip(&self.bias).map(|(row, bias)| dot(row, x) + bias).collect()
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Where a row stands, and how many tokens it sees.
struct Place {
    position: usize,
    seen: usize,
}

struct Reference<'a> {
    weights: &'a Weights,
    config: &'a LlamaConfig,
    places: Vec<Place>,
}

impl Reference<'_> {
    fn matrix(&self, layer: usize, name: &str, rows: usize, cols: usize) -> Matrix {
        Matrix::read(self.weights, &format!("model.layers.{layer}.{name}"), rows, cols)
    }

    fn norm(&self, layer: usize, name: &str, x: &[f64]) -> Vec<f64> {
        let weight = self.matrix(layer, name, 1, self.config.hidden_size);
        let factor = 1.0 / (dot(x, x) / x.len() as f64 + self.config.rms_norm_eps).sqrt();
        x.iter().zip(&weight.rows[0]).map(|(x, weight)| x * factor * weight).collect()
    }

    fn rope(&self, x: &mut [f64], position: usize) {
        let frequencies = self.config.rotary_frequencies();
        let half = x.len() / 2;
        for (i, f) in frequencies.inv_freq.iter().enumerate() {
            let (sin, cos) = (position as f64 * f).sin_cos();
            let (sin, cos) =
                (sin * frequencies.attention_factor, cos * frequencies.attention_factor);
            (x[i], x[i + half]) = (x[i] * cos - x[i + half] * sin, x[i + half] * cos + x[i] * sin);
        }
    }

    fn attention(&self, layer: usize, x: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let (hidden, dim) = (self.config.hidden_size, self.config.head_dim());
        let (heads, pairs) = (self.config.num_attention_heads, self.config.num_key_value_heads());
        let projection = |name: &str, heads: usize| -> Vec<Vec<f64>> {
            let matrix = self.matrix(layer, &format!("self_attn.{name}"), heads * dim, hidden);
            x.iter().map(|x| matrix.apply(&self.norm(layer, "input_layernorm", x))).collect()
        };
        let rotated = |name: &str, heads: usize| -> Vec<Vec<f64>> {
            let mut rows = projection(name, heads);
            for (place, row) in self.places.iter().zip(&mut rows) {
                row.chunks_mut(dim).for_each(|head| self.rope(head, place.position));
            }
            rows
        };
        let (queries, keys) = (rotated("q_proj", heads), rotated("k_proj", pairs));
        let values = projection("v_proj", pairs);
        let output = self.matrix(layer, "self_attn.o_proj", hidden, heads * dim);
        let token = |t: usize| {
            let mut mixed = vec![0.0; heads * dim];
            for head in 0..heads {
                let pair = head / (heads / pairs) * dim;
                let query = &queries[t][head * dim..][..dim];
                let scores: Vec<f64> = (0..self.places[t].seen)
                    .map(|s| dot(query, &keys[s][pair..][..dim]) / (dim as f64).sqrt())
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
                for (s, score) in scores.iter().enumerate() {
                    for (i, value) in values[s][pair..][..dim].iter().enumerate() {
                        mixed[head * dim + i] += (score - max).exp() / sum * value;
                    }
                }
            }
            output.apply(&mixed)
        };
        (0..x.len()).map(token).collect()
    }

    fn mlp(&self, layer: usize, x: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let (hidden, width) = (self.config.hidden_size, self.config.intermediate_size);
        let gate = self.matrix(layer, "mlp.gate_proj", width, hidden);
        let up = self.matrix(layer, "mlp.up_proj", width, hidden);
        let down = self.matrix(layer, "mlp.down_proj", hidden, width);
        let token = |x: &Vec<f64>| {
            let normed = self.norm(layer, "post_attention_layernorm", x);
            let inner: Vec<f64> = gate
                .apply(&normed)
                .into_iter()
                .zip(up.apply(&normed))
                .map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
                .collect();
            down.apply(&inner)
        };
        x.iter().map(token).collect()
    }
}

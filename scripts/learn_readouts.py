"""Learns what closes texts for the shipped detector's model, and writes it for calibration.

In an environment with PyTorch (``benches/requirements.txt``) and the package, after ``make demo``::

    python scripts/learn_readouts.py --gguf model.Q4_1.gguf --detector FOLDER DIR [DIR ...]

A readout stands after every 64 tokens of a text and at its end, sees what is before it, and nothing
sees it. Keys and values of the texts are therefore constants, and what is learned are the vectors
that are added to one residual stream before each block: a deep prompt of one position (Li & Liang
2021, Liu et al. 2022) with a logistic model on its activations at the detector's sites. Of the
places of a text the one with the largest log-odds counts. The logistic model is thrown away:
`calibrate` fits its own, as for windows.

Each fold has a readout that was learned without its rows, so that left-out scores stay left out.
Some four minutes a readout on two cores, and 12 GB for keys and values.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from alknet_firewall import _core
from alknet_firewall.calibration.activations import Layout
from alknet_firewall.calibration.corpus import Row, for_other_languages
from alknet_firewall.calibration.crossfit import numbered_folds
from alknet_firewall.calibration.readouts import FILE
from alknet_firewall.calibration.run import CLOSING, read_rows
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

# At most so many rows of a kind, and tokens of a text.
LIMIT, MAX_TOKENS = 100, 256
# Texts of about so many tokens are a batch, and so many batches a step.
BATCH_TOKENS, BATCHES_PER_STEP = 2500, 8
EPOCHS, RATE, MODEL_RATE = 8, 0.006, 0.003
# Penalty of the logistic model's weights, and the noise on activations, in standard deviations.
PENALTY, NOISE = 2e-4, 0.3
# Principal components that the logistic model sees.
COMPONENTS = 96

Bools = npt.NDArray[np.bool_]
Weights = npt.NDArray[np.float64]


class Decoder:
    """The blocks of a Llama up to the deepest site; matrices in bf16, all else in fp32."""

    def __init__(self, gguf: Path, sites: Sequence[int]) -> None:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name).model
        self.config: LlamaConfig = model.config
        self.sites = sites
        self.embedding = model.embed_tokens.weight.detach()
        self.blocks = model.layers[: 1 + max(sites)].requires_grad_(False)
        self.head_dim = self.config.hidden_size // self.config.num_attention_heads
        theta = self.config.rope_parameters["rope_theta"]
        self.frequencies = theta ** (-torch.arange(0, self.head_dim, 2) / self.head_dim)
        for block in self.blocks:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(block.self_attn, name).bfloat16()
            block.mlp.bfloat16()

    def heads(self, x: torch.Tensor, n: int, positions: torch.Tensor | None) -> torch.Tensor:
        """``(..., n_heads, head_dim)`` of a projection, rotated where it has positions."""
        x = x.float().unflatten(-1, (n, self.head_dim))
        if positions is None:
            return x
        angles = positions[..., None, None] * self.frequencies
        (a, b), cos, sin = x.chunk(2, -1), angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    @torch.no_grad()
    def keys_and_values(self, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of every block, in bf16: ``(n_texts, n_heads, n_tokens, head_dim)`` each."""
        queries, pairs = self.config.num_attention_heads, self.config.num_key_value_heads
        x, positions = self.embedding[ids], torch.arange(ids.shape[1])
        kept = []
        for block in self.blocks:
            attention = block.self_attn
            h = block.input_layernorm(x).bfloat16()
            q = self.heads(attention.q_proj(h), queries, positions)
            k = self.heads(attention.k_proj(h), pairs, positions)
            v = self.heads(attention.v_proj(h), pairs, None)
            q, k, v = (t.transpose(-2, -3).bfloat16().contiguous() for t in (q, k, v))
            kept.append((k, v))
            context = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + attention.o_proj(context.transpose(1, 2).flatten(2)).float()
            x = x + block.mlp(block.post_attention_layernorm(x).bfloat16()).float()
        return kept

    @torch.no_grad()
    def scale(self, vectors: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Root mean square of the stream of readouts before each block, ``(n_blocks,)``."""
        streams = list(self.streams(vectors, batch))
        return torch.stack([x[batch.real].square().mean().sqrt() for x in streams[:-1]])

    def read(self, vectors: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Activations at root mean square 1, ``(n_texts, n_places, n_sites * hidden_size)``."""
        streams = list(self.streams(vectors, batch))
        rows = [streams[site + 1] for site in self.sites]
        return torch.cat([F.rms_norm(x, x.shape[-1:], eps=1e-6) for x in rows], -1)

    def streams(self, vectors: torch.Tensor, batch: Batch) -> Iterator[torch.Tensor]:
        """The residual stream of readouts before each block, and after the last one."""
        pairs = self.config.num_key_value_heads
        x = torch.zeros(*batch.places.shape, self.config.hidden_size)
        n_tokens = batch.caches[0][0].shape[2]
        hidden = torch.arange(n_tokens) >= batch.places[..., None]
        mask = hidden.float()[:, None, None] * -1e9
        for vector, block, (k, v) in zip(vectors, self.blocks, batch.caches, strict=True):
            attention = block.self_attn
            x = x + vector
            yield x
            h = block.input_layernorm(x).bfloat16()
            q = self.heads(attention.q_proj(h), self.config.num_attention_heads, batch.places)
            q = q.unflatten(2, (pairs, -1))
            scores = torch.einsum("bpkgd,bktd->bkgpt", q, k.float()) / math.sqrt(self.head_dim)
            context = torch.einsum("bkgpt,bktd->bpkgd", (scores + mask).softmax(-1), v.float())
            x = x + attention.o_proj(context.flatten(2).bfloat16()).float()
            x = x + block.mlp(block.post_attention_layernorm(x).bfloat16()).float()
        yield x


@dataclass(frozen=True)
class Batch:
    """Texts of like length.

    Attributes
    ----------
    texts : list of int
    caches : list
        Keys and values, see `Decoder.keys_and_values`.
    places : Tensor
        ``(n_texts, n_places)``: how many tokens each readout sees.
    real : Tensor
        Bool ``(n_texts, n_places)``; the others fill up.
    """

    texts: list[int]
    caches: list[tuple[torch.Tensor, torch.Tensor]]
    places: torch.Tensor
    real: torch.Tensor

    def largest(self, logits: torch.Tensor) -> torch.Tensor:
        """Of the places of every text, ``(n_texts,)``."""
        return logits.masked_fill(~self.real, -1e9).max(1).values


def batches(decoder: Decoder, texts: Sequence[Sequence[int]], every: int) -> Iterator[Batch]:
    """All texts, the shortest first."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    while order:
        size = 1
        while size < len(order) and (size + 1) * len(texts[order[size]]) <= BATCH_TOKENS:
            size += 1
        taken, order = order[:size], order[size:]
        lengths = torch.tensor([len(texts[i]) for i in taken])
        ids = torch.zeros(size, int(lengths.max()), dtype=torch.long)
        for row, i in zip(ids, taken, strict=True):
            row[: len(texts[i])] = torch.tensor(texts[i])
        # Before the first token is what every text begins with.
        count, ends = -(-(ids.shape[1] - 1) // every), lengths[:, None] - 1
        places = every * torch.arange(1, count + 1).expand(size, count)
        real = places < ends + every
        places = 1 + torch.minimum(places, ends)
        yield Batch(taken, decoder.keys_and_values(ids), places, real)


class Learner:
    """One readout and its logistic model, which begins as that of a token."""

    def __init__(
        self, decoder: Decoder, token: int, data: list[Batch], attack: Bools, weight: Weights
    ) -> None:
        self.decoder, self.data = decoder, data
        self.attack, self.weight = torch.tensor(attack).float(), torch.tensor(weight).float()
        vectors = torch.zeros(len(decoder.blocks), decoder.config.hidden_size)
        vectors[0] = decoder.embedding[token]
        self.start, self.scale = vectors, decoder.scale(vectors, data[len(data) // 2])
        self.change = torch.zeros_like(vectors, requires_grad=True)
        self._fit_model()

    def vectors(self) -> torch.Tensor:
        """``(n_blocks, hidden_size)``."""
        return self.start + self.change * self.scale[:, None]

    @torch.no_grad()
    def _fit_model(self) -> None:
        """Whitens what closes the texts, and fits a logistic model to begin with."""
        last = []
        for batch in self.data:
            rows = self.decoder.read(self.vectors(), batch)
            last.append(rows[torch.arange(len(rows)), batch.real.sum(1) - 1])
        texts = [text for batch in self.data for text in batch.texts]
        weight, attack, x = self.weight[texts], self.attack[texts], torch.cat(last)
        seen = weight > 0
        self.mean = x[seen].mean(0)
        scaled = (x[seen] - self.mean) * weight[seen].sqrt()[:, None]
        _, values, components = torch.linalg.svd(scaled, full_matrices=False)
        self.components = components[:COMPONENTS].T / values[:COMPONENTS]
        self.components *= weight[seen].sum().sqrt()
        model = LogisticRegression(C=0.01, max_iter=300)
        z = ((x[seen] - self.mean) @ self.components).numpy()
        model.fit(z, attack[seen].numpy(), sample_weight=weight[seen].numpy())
        self.weights = torch.tensor(model.coef_[0], dtype=torch.float32)
        self.bias = torch.tensor(model.intercept_, dtype=torch.float32)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Weighted cross-entropy of a batch, a share of all texts'."""
        rows = self.decoder.read(self.vectors(), batch)
        rows = rows + torch.randn_like(rows) * NOISE * rows.detach().std((0, 1))
        logits = ((rows - self.mean) @ self.components) @ self.weights + self.bias
        losses = F.binary_cross_entropy_with_logits(
            batch.largest(logits), self.attack[batch.texts], reduction="none"
        )
        share = len(self.data) / len(self.attack) / BATCHES_PER_STEP
        return (losses * self.weight[batch.texts]).sum() * share

    def learn(self) -> npt.NDArray[np.float32]:
        """Takes all steps; returns the vectors."""
        model = [self.weights.requires_grad_(), self.bias.requires_grad_()]
        groups = [{"params": [self.change], "rate": RATE}, {"params": model, "rate": MODEL_RATE}]
        adam = torch.optim.Adam(groups, betas=(0.9, 0.98))
        generator, steps = np.random.default_rng(0), EPOCHS * len(self.data) // BATCHES_PER_STEP
        order = np.concatenate([generator.permutation(len(self.data)) for _ in range(EPOCHS)])
        for step in range(steps):
            for i in order[step * BATCHES_PER_STEP : (step + 1) * BATCHES_PER_STEP]:
                if self.weight[self.data[i].texts].any():
                    self.loss(self.data[i]).backward()
            (PENALTY * self.weights.square().sum()).backward()
            for group in adam.param_groups:
                group["lr"] = group["rate"] * min(1, (step + 1) / 10) * max(0.02, 1 - step / steps)
            adam.step()
            adam.zero_grad()
        return self.vectors().detach().numpy()


def weights(rows: Sequence[Row], attack: Bools, held: Bools) -> Weights:
    """Of every text: groups by the root of their size, attacks as much as the others."""
    groups = [(row.source, row.kind, row.attack) for row in rows]
    sizes = Counter(groups)
    weight = np.array([sizes[group] ** -0.5 for group in groups])
    weight[held] = 0
    for own in (attack, ~attack):
        weight[own] *= len(rows) / weight[own].sum()
    return weight


def main() -> None:
    """Learns the readouts that the file lacks, if it was begun."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--detector", type=Path, required=True)
    parser.add_argument("--token", default=CLOSING)
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("paths", type=Path, nargs="+")
    arguments = parser.parse_args()
    layout = Layout()
    # What serves the direction of other languages alone takes no part.
    rows = read_rows(arguments.paths, limit=LIMIT)
    rows = [row for row in rows if not for_other_languages(row.source)]
    tokenizer = Tokenizer.from_file(str(arguments.detector / "tokenizer.json"))
    config = json.loads((arguments.detector / "config.json").read_text())
    encodings = tokenizer.encode_batch([row.text for row in rows], add_special_tokens=False)
    texts = [[config["bos_token_id"], *encoding.ids[:MAX_TOKENS]] for encoding in encodings]
    decoder = Decoder(arguments.gguf, [int(site.split(".")[0]) for site in layout.sites])
    data = list(batches(decoder, texts, layout.closing_every))
    attack = np.array([row.attack for row in rows])
    [token] = _core.token_ids(str(arguments.detector), arguments.token)
    learned = list(load_file(arguments.out)["readouts"]) if arguments.out.exists() else []
    weights_sha256 = _core.fingerprint(str(arguments.detector))["weights_sha256"]
    held_out = [*numbered_folds(rows).values(), np.zeros(len(rows), dtype=bool)]
    for number, held in enumerate(held_out[len(learned) :], len(learned)):
        torch.manual_seed(number)
        weight = weights(rows, attack, held)
        learned.append(Learner(decoder, token, data, attack, weight).learn())
        save_file(
            {"readouts": np.stack(learned)},
            arguments.out,
            metadata={"weights_sha256": weights_sha256},
        )
        sys.stderr.write(f"readout {number + 1} of {len(held_out)}\n")


if __name__ == "__main__":
    main()

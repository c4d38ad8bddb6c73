"""A complete detector around the tiny random model of ``tests/golden``.

Its codebook is made so that `ATTACK` alarms whatever the origin, `ORDER` in documents only, and
ordinary sentences never. So everything around the model can be tested where no weights are.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
from alknet_firewall import _core, detector
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent / "golden"

# Letters that the random weights happen to tell best from ordinary sentences; none is the ROT13 of
# the other, which would be read as it.
ATTACK = "L" * 24
ORDER = "A" * 24
BENIGN = (
    "The committee meets on the second Tuesday of the month.",
    "could you send me the minutes of our last meeting?",
    "Boil the rice for twelve minutes, then let it rest.",
    "def add(a, b):\n    return a + b\n",
    "Die Brücke ist bis Freitag gesperrt.",
    "3.14159 is a little less than 22/7",
    "我们明天下午三点开会。",
    "Привет! До встречи 👍 في المساء",
    "My sister moved to Lyon last spring and likes it there",
)

SITES = ("0.attn_out", "1.resid_post")
# Up to the deepest site.
N_BLOCKS = 1 + max(int(site.split(".")[0]) for site in SITES)
HIDDEN_SIZE = 32
LAYOUT = {"window": 8, "stride": 4, "segment_tokens": 64, "segment_overlap": 16}

# A logit of 4 is p = 0.01, one of 8 is p = 0.0001.
_NULL = ([0.0, 4.0, 8.0, 12.0], [0.0, 2.0, 4.0, 6.0])
# So far from everything does no text lie: what alarms here is a direction.
_NOVELTY = ([0.0, 5e4, 1e5], [0.0, 0.001, 4.0])
_WORDS = """
a about after all and animals are at back bread by can city day down each every first for found from
garden green had have her here house in into is it just kind know later light little long made many
me more near new night no not now of on one or other our people place quickly rain red river road
school sea she ship simple small so some summer table that the their then there they this time to
train tree two under up very walk was water we well went were what when where which white who will
window winter with year you 12 40 7
"""
_DIRECTIONS = [
    {"name": "attack", "scored": True},
    {"name": "embedded_instruction", "origin": "document", "scored": True},
]


def make(folder: Path) -> Path:
    """Write the detector into a folder that does not exist yet."""
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / "tiny" / name, folder / name)
    shutil.copyfile(GOLDEN / "tiny-tokenizer.json", folder / "tokenizer.json")
    reader = _core.Reader(str(folder), list(SITES), engine="candle", threads=1)

    texts = [*BENIGN, *ordinary_sentences(200)]
    options = {"window": 8, "stride": 4, "max_tokens": 1024, "closing": None}
    benign = np.concatenate(reader.window_means(texts, **options))

    def last_windows(end: str) -> np.ndarray:
        """Mean activations of the last window of texts that end so, after the like of `BENIGN`."""
        texts = [end, *(f"{text[:n]} {end}" for text in BENIGN for n in (8, 40))]
        last = [reader.activations(text)[-LAYOUT["window"] :] for text in texts]
        return np.stack([_unit_rms(rows).mean(axis=0).ravel() for rows in last])

    write_codebook(
        folder / detector.CODEBOOK,
        benign,
        last_windows(ATTACK),
        last_windows(ORDER),
        _core.fingerprint(str(folder)),
    )
    manifest = detector.describe(folder, name="tiny", license="MIT", source={"kind": "path"})
    detector.write_manifest(folder, manifest)
    return folder


def write_codebook(
    path: Path,
    benign: np.ndarray,
    attack: np.ndarray,
    order: np.ndarray,
    fingerprint: dict[str, str],
    sites: tuple[str, ...] = SITES,
) -> None:
    """Write a codebook that tells attacks and orders from benign text.

    All three are window means, ``(n, width)``.
    """
    mean = benign.mean(axis=0)
    components = np.stack(
        [
            _separating(benign - mean, one - mean, other - mean)
            for one, other in ((attack, order), (order, attack))
        ]
    )
    z = (benign - mean) @ components.T
    spread = z.std(axis=0)
    # Benign windows measure 0.4 at most, attacks and orders 1: a logit of -6 and of 18.
    weights = 40.0 * np.eye(2)
    tensors = {
        "mean": mean,
        "components": components,
        "cdf_knots": spread[:, None] * np.array([-3.0, 0.0, 3.0]),
        "cdf_values": np.tile([0.01, 0.5, 0.99], (2, 1)),
        "direction_weights": weights[None],
        "direction_bias": np.full(2, -22.0),
        "null_knots": np.tile(_NULL[0], (3, 2, 1)),
        "null_values": np.tile(_NULL[1], (3, 2, 1)),
        "novelty_knots": np.tile(_NOVELTY[0], (2, 1)),
        "novelty_values": np.tile(_NOVELTY[1], (2, 1)),
    }
    metadata = fingerprint | {
        "format_version": "4",
        "detector": "tiny",
        "sites": ",".join(sites),
        "hidden_size": str(benign.shape[1] // len(sites)),
        "length_classes": "[16, 64]",
        "origins": '["user", "document", null]',
        "directions": json.dumps(_DIRECTIONS),
        "scales": "[1]",
        **{name: str(value) for name, value in LAYOUT.items()},
    }
    arrays = {name: np.ascontiguousarray(x, dtype=np.float32) for name, x in tensors.items()}
    save_file(arrays, path, metadata=metadata)


def ordinary_sentences(n: int) -> list[str]:
    """Sentences of common words, the same every time."""
    rng, words = random.Random(7), _WORDS.split()
    sentences = [" ".join(rng.choices(words, k=rng.randint(4, 16))) for _ in range(n)]
    return [sentence.capitalize() + rng.choice(".!?,") for sentence in sentences]


def _unit_rms(rows: np.ndarray) -> np.ndarray:
    return rows / np.sqrt((rows**2).mean(axis=-1, keepdims=True))


def _separating(benign: np.ndarray, positive: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The direction along which ``positive`` measures 1, ``other`` about 0, and all vary least."""
    difference, other_mean = positive.mean(axis=0), other.mean(axis=0)
    covariance = np.cov(benign.T) + np.cov(positive.T) + np.outer(other_mean, other_mean)
    ridge = 0.02 * np.trace(covariance) / len(covariance)
    direction = np.linalg.solve(covariance + ridge * np.eye(len(covariance)), difference)
    return direction / (direction @ difference)

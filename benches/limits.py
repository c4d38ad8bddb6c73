"""The least time of the detector's pass on this machine, from what `limits.rs` measures."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Work", "least_ms", "measure", "work_of"]

_COMMAND = "cargo run --release --quiet -p alknet-kernels --example limits"


@dataclass(frozen=True)
class Work:
    """What one pass must do at least.

    Attributes
    ----------
    weights : int
        Weights of the matrix products: each is read once, as one byte, and multiplied once a token.
    attention : int
        Multiply-adds of attention for each pair of a token and one that it attends to.
    """

    weights: int
    attention: int


def measure(root: Path, work: Work) -> dict[str, float]:
    """Rates of this machine, by the names that `limits.rs` gives them.

    Raises
    ------
    OSError, subprocess.CalledProcessError
        If the measuring program cannot be built or run.
    """
    command = [*_COMMAND.split(), "--", str(work.weights)]
    run = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    rates: dict[str, float] = json.loads(run.stdout)
    return rates


def work_of(config: dict[str, Any], num_layers: int) -> Work:
    """The work of the first `num_layers` blocks of a Llama-type decoder's ``config.json``."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, config["num_key_value_heads"] * head_dim
    attention = hidden * (queries + 2 * keys) + queries * hidden
    block = attention + 3 * hidden * config["intermediate_size"]
    # One multiply-add for the score and one for the value, for each number of a query.
    return Work(num_layers * block, num_layers * 2 * queries)


def least_ms(rates: dict[str, float], work: Work, tokens: int, isa: str) -> float | None:
    """Milliseconds below which no pass over `tokens` can be; None without a rate for `isa`.

    Weights are read while the arithmetic of the products, in int8, and of attention, in the fastest
    floating point there is, run one after the other: they use the same units. Passes follow each
    other here, so that weights may come from a cache: they are read at the rate of as many bytes
    that are read again and again.
    """
    int8 = _fastest(rates, isa, "int8")
    floating = _fastest(rates, isa, "bf16", "fp32")
    if int8 is None or floating is None:
        return None
    pairs = tokens * (tokens + 1) / 2
    arithmetic = work.weights * tokens / int8 + work.attention * pairs / floating
    return 1e3 * max(arithmetic, work.weights / rates["again_bytes_per_s"])


def _fastest(rates: dict[str, float], isa: str, *formats: str) -> float | None:
    """The highest rate of some number formats: of one instruction set, or of all for "best"."""
    names = (name.split("_") for name in rates if name.startswith(formats))
    found = [rates[f"{form}_{has}"] for form, has in names if isa in ("best", has)]
    return max(found, default=None)

"""Readouts that were learned for a model: what closes its texts in place of a token.

Readout ``i`` was learned without the rows of fold ``i`` (see `crossfit.numbered_folds`), so that
left-out scores are of texts that nothing has seen; the last one was learned from all rows. A script
writes the file, ``scripts/learn_readouts.py``: gradients of the model need PyTorch.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from .activations import Learned

__all__ = ["FILE", "learned_readouts"]

# Beside this module, in the package.
FILE = Path(__file__).with_name("readouts.safetensors")


def learned_readouts(weights_sha256: str) -> Learned | None:
    """What was learned for the model with these weights, if anything was."""
    with safe_open(FILE, "numpy") as file:
        if file.metadata()["weights_sha256"] != weights_sha256:
            return None
        return Learned(file.get_tensor("readouts"))

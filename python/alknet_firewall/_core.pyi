"""Native part of `alknet_firewall`; use the package, not this module."""

from typing import Any, final

import numpy as np
import numpy.typing as npt

__all__ = [
    "Firewall",
    "Reader",
    "Stream",
    "__version__",
    "build_info",
    "fingerprint",
    "inspect_codebook",
    "pack_model",
    "score",
    "token_ids",
]

__version__: str

@final
class Firewall:
    def __new__(
        cls,
        detector: str,
        *,
        codebook: str | None = None,
        suspicious: float = 0.3,
        dangerous: float = 0.7,
        max_tokens: int | None = None,
        engine: str = "native",
        threads: int | None = None,
        isa: str | None = None,
        early_exit: bool = False,
        model: Any = None,
    ) -> Firewall: ...
    @property
    def detector(self) -> str: ...
    @property
    def engine(self) -> str: ...
    @property
    def sites(self) -> list[str]: ...
    def screen(self, text: str, origin: str | None = None) -> tuple[Any, ...]: ...
    def screen_batch(
        self, texts: list[str], origins: list[str | None]
    ) -> list[tuple[Any, ...]]: ...
    def stream(self, origin: str | None = None) -> Stream: ...
    def activations(self, text: str) -> npt.NDArray[np.float32]: ...

@final
class Stream:
    def feed(self, chunk: str) -> tuple[Any, ...]: ...
    def finish(self) -> tuple[Any, ...]: ...

@final
class Reader:
    def __new__(
        cls,
        detector: str,
        sites: list[str],
        *,
        engine: str = "native",
        threads: int | None = None,
        isa: str | None = None,
    ) -> Reader: ...
    @property
    def engine(self) -> str: ...
    def activations(self, text: str) -> npt.NDArray[np.float32]: ...
    def window_means(
        self,
        texts: list[str],
        *,
        window: int,
        stride: int,
        max_tokens: int,
        closing: tuple[list[int | npt.NDArray[np.float32]], int] | None,
    ) -> list[npt.NDArray[np.float32]]: ...
    def count_tokens(self, text: str) -> int: ...

def pack_model(source: str, out_dir: str, num_layers: int) -> None: ...
def fingerprint(detector: str) -> dict[str, str]: ...
def token_ids(detector: str, text: str) -> list[int]: ...
def inspect_codebook(path: str) -> dict[str, str]: ...
def score(p_value: float) -> float: ...
def build_info() -> dict[str, str]: ...

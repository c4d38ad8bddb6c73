"""The engines that are compared, and the process in which each of them runs.

``python engines.py KEY FOLDER ISA`` loads one engine and then answers requests, one JSON object a
line on standard input and output. One process each keeps thread pools and instruction-set switches
apart; between its turns an engine sleeps.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import formats

__all__ = ["ENGINES", "ISAS", "NATIVE", "Engine", "Input", "Isa", "Setup"]

Isa = Literal["best", "avx512", "avx2"]
ISAS: tuple[Isa, ...] = ("best", "avx512", "avx2")

NATIVE = "alknet-firewall"
"""Key of our own engine."""


@dataclass(frozen=True)
class Input:
    """One text: as it is, and as the token ids that a peer reads.

    Our reader keeps the state after its first token (``<|endoftext|>``) from load time and computes
    a row for each token of the text. Peers read that token and all but the last of the text's:
    as many rows.
    """

    text: str
    input_ids: list[int]


@dataclass(frozen=True)
class Setup:
    """What an engine is loaded from.

    Attributes
    ----------
    folder : Path
        Where `formats` wrote the models.
    detector : str
        The detector's folder.
    sites : list of str
        Where activations are read.
    threads : int
        Threads to use.
    isa : str
        The newest instructions that may be used: the CPU's, AVX-512's with VNNI, or AVX2's.
    """

    folder: Path
    detector: str
    sites: list[str]
    threads: int
    isa: Isa


# Reads a text and returns (n_sites, seq_len, hidden_size), or None where it cannot show them.
Run = Callable[[Input], Any]


@dataclass(frozen=True)
class Engine:
    """One row of the comparison.

    Attributes
    ----------
    load : callable
        Makes the engine's `Run`.
    needs : str or None
        The format it reads.
    held : Mapping
        By level, the environment that holds it to that; or why nothing does.
    reads_text : bool
        It takes the text and not the ids: see `Input` for how its rows then differ.
    """

    load: Callable[[Setup], Run]
    needs: str | None = None
    held: Mapping[Isa, Mapping[str, str] | str] = field(default_factory=dict)
    reads_text: bool = False


def _load_ours(engine: str) -> Callable[[Setup], Run]:
    def load(setup: Setup) -> Run:
        from alknet_firewall import _core

        isa = None if setup.isa == "best" else setup.isa
        threads = setup.threads
        reader = _core.Reader(setup.detector, setup.sites, engine=engine, threads=threads, isa=isa)
        return lambda item: reader.activations(item.text).swapaxes(0, 1)

    return load


def _load_torch(dtype: str) -> Callable[[Setup], Run]:
    def load(setup: Setup) -> Run:
        import torch

        torch.set_num_threads(setup.threads)
        module = formats.load_truncated(setup.folder, setup.sites, dtype)

        def run(item: Input) -> Any:
            with torch.inference_mode():
                return module(torch.tensor([item.input_ids])).float().numpy()

        return run

    return load


def _load_openvino(file: str, precision: str) -> Callable[[Setup], Run]:
    def load(setup: Setup) -> Run:
        import numpy as np
        import openvino as ov

        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": setup.threads,
            # Held down it refuses models for which bf16 was asked.
            "INFERENCE_PRECISION_HINT": precision if setup.isa == "best" else "f32",
        }
        compiled = ov.Core().compile_model(setup.folder / file, "CPU", options)
        return lambda item: compiled(np.array([item.input_ids]))[0]

    return load


def _load_onnx(file: str) -> Callable[[Setup], Run]:
    def load(setup: Setup) -> Run:
        import numpy as np
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = setup.threads
        session = onnxruntime.InferenceSession(
            setup.folder / file, options, providers=["CPUExecutionProvider"]
        )
        return lambda item: session.run(None, {"input_ids": np.array([item.input_ids])})[0]

    return load


def _load_llama_cpp(setup: Setup) -> Run:
    import llama_cpp

    longest = 4096
    model = llama_cpp.Llama(
        str(setup.folder / formats.GGUF),
        n_ctx=longest,
        n_batch=longest,
        n_ubatch=longest,
        n_threads=setup.threads,
        n_threads_batch=setup.threads,
        verbose=False,
    )

    def run(item: Input) -> None:
        model.reset()
        model.eval(item.input_ids)

    return run


# PyTorch's fp32 products are MKL's, its bf16 ones oneDNN's, the rest is its own: each has a switch.
_TORCH: Mapping[Isa, Mapping[str, str]] = {
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}
_ONEDNN: dict[Isa, Mapping[str, str] | str] = {
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
}
_MLAS_AVX2 = "half of OpenVINO's products in fp32 are MLAS's, which has no switch: it keeps AVX-512"
_OPENVINO_BF16 = "OpenVINO computes in bf16 with AVX-512 BF16 or AMX only"
_ONNX = "ONNX Runtime chooses its kernels by the CPU and has no switch"
_CANDLE = "candle chooses its kernels by the CPU and has no switch"
_LLAMA_CPP = "llama.cpp chooses its instructions when it is built"


def _never(reason: str) -> dict[Isa, Mapping[str, str] | str]:
    """`Engine.held` of an engine that no level below the CPU's can be asked of."""
    return {isa: reason for isa in ISAS if isa != "best"}


ENGINES: dict[str, Engine] = {
    NATIVE: Engine(_load_ours("native"), reads_text=True),
    "openvino bf16": Engine(
        _load_openvino(formats.OPENVINO, "bf16"), formats.OPENVINO, _never(_OPENVINO_BF16)
    ),
    "openvino int8": Engine(
        _load_openvino(formats.OPENVINO_INT8, "f32"), formats.OPENVINO_INT8, _ONEDNN
    ),
    "openvino int8 bf16": Engine(
        _load_openvino(formats.OPENVINO_INT8, "bf16"), formats.OPENVINO_INT8, _never(_OPENVINO_BF16)
    ),
    "openvino int8 weights": Engine(
        _load_openvino(formats.OPENVINO_WEIGHTS, "bf16"), formats.OPENVINO_WEIGHTS, _ONEDNN
    ),
    "openvino fp32": Engine(
        _load_openvino(formats.OPENVINO, "f32"),
        formats.OPENVINO,
        _ONEDNN | {"avx2": _MLAS_AVX2},
    ),
    "torch bf16": Engine(_load_torch("bfloat16"), formats.MODEL, _TORCH),
    "torch fp32": Engine(_load_torch("float32"), formats.MODEL, _TORCH),
    # In int8 it may take AMX.
    "onnxruntime int8": Engine(_load_onnx(formats.ONNX_INT8), formats.ONNX_INT8, _never(_ONNX)),
    "onnxruntime fp32": Engine(_load_onnx(formats.ONNX), formats.ONNX, {"avx2": _ONNX}),
    "candle fp32": Engine(_load_ours("candle"), held={"avx2": _CANDLE}, reads_text=True),
    "llama.cpp": Engine(_load_llama_cpp, formats.GGUF, _never(_LLAMA_CPP)),
}


def _time(run: Run, item: Input, warm_up: int, seconds: float) -> list[float]:
    """Milliseconds of single passes: as many as fit into `seconds`, at least one."""
    for _ in range(warm_up):
        run(item)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        run(item)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _save(key: str, run: Run, item: Input, path: str) -> None:
    """Saves the activations of the tokens that every engine reads, to compare the engines."""
    import numpy as np

    activations = run(item)
    if activations is not None:
        rows = slice(-1) if ENGINES[key].reads_text else slice(1, None)
        np.save(path, np.asarray(activations, dtype=np.float32)[:, rows])


def _answer(key: str, run: Run, request: dict[str, Any]) -> dict[str, Any]:
    item = Input(request["text"], request["input_ids"])
    if path := request.get("save_to"):
        _save(key, run, item, path)
        return {}
    return {"ms": _time(run, item, request["warm_up"], request["seconds"])}


def main(key: str, folder: Path, isa: Isa) -> None:
    # Libraries print to standard output; the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    options = json.loads((folder / "engines.json").read_text())
    try:
        run = ENGINES[key].load(Setup(folder=folder, isa=isa, **options))
        print(json.dumps({}), file=answers)
        for line in sys.stdin:
            print(json.dumps(_answer(key, run, json.loads(line))), file=answers)
    except Exception as error:  # noqa: BLE001 - a peer that fails is reported as missing.
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])  # type: ignore[arg-type]

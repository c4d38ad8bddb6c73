"""What a user of the package feels: start-up, memory, throughput, where a screening's time goes.

Everything is measured in fresh processes, on the installed package. ``python product.py PROBE
OPTIONS`` is such a process: it prints one JSON value.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import texts

__all__ = ["measure"]

WORDS = 30
CALLERS = 64
CALLER_TOKENS = 128
SHORT_CALLER_TOKENS = 16
SCREENS = 1000

_BARE = "pass"
_IMPORT = "import alknet_firewall"
# Nothing but the clock is imported before the clock starts.
_COLD_START = """
import time
start = time.perf_counter()
from alknet_firewall import Firewall
Firewall({detector!r}).screen({text!r})
print(1e3 * (time.perf_counter() - start))
"""


def measure(detector: str, tokens: list[int], *, quick: bool) -> dict[str, Any]:
    """Runs every probe.

    Parameters
    ----------
    detector : str
        Name or folder.
    tokens : list of int
        Lengths at which the stages are timed.
    quick : bool
        Fewer repeats.

    Returns
    -------
    dict
        The entries that go into ``peers.json``.

    Raises
    ------
    RuntimeError
        If a probe fails, with what it wrote to standard error.
    """
    result: dict[str, Any] = _start_up(detector, repeats=5 if quick else 15)
    options = {"detector": detector, "tokens": tokens, "seconds": 0.3 if quick else 1.0}
    for probe in ("memory", "throughput", "stages"):
        result |= json.loads(_python(__file__, probe, json.dumps(options)))
    return result


def _start_up(detector: str, repeats: int) -> dict[str, float]:
    """Medians over interleaved new processes; the first of each only warms the page cache."""
    cold = _COLD_START.format(detector=detector, text=texts.words(WORDS))
    times: dict[str, list[float]] = {"bare": [], "import": [], "process": [], "cold": []}
    for repeat in range(repeats + 1):
        runs = {"bare": _BARE, "import": _IMPORT, "process": cold}
        for name, code in runs.items():
            start = time.perf_counter()
            output = _python("-c", code)
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - start))
                if output:
                    times["cold"].append(float(output))
    return {
        "import_ms": median(times["import"]) - median(times["bare"]),
        "cold_start_ms": median(times["cold"]),
        "cold_start_process_ms": median(times["process"]),
    }


def _python(*arguments: str) -> str:
    """Standard output of a new interpreter that sees none of the user's settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ALKNET_")}
    environment = kept | {"XDG_CONFIG_HOME": "/nonexistent"}
    run = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise RuntimeError(run.stderr.strip() or f"exit status {run.returncode}")
    return run.stdout


def _memory(detector: str, **_: Any) -> dict[str, Any]:
    """Resident memory after many screenings of texts of all lengths, in units of 10⁶ bytes."""
    from alknet_firewall import Firewall

    firewall = Firewall(detector)
    for i in range(SCREENS):
        firewall.screen(texts.words(1 + i % 300))
    status = Path("/proc/self/status").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in status if line.endswith(" kB")}
    mb = {name: kib[name] * 1024 / 1e6 for name in ("VmRSS", "VmHWM", "RssAnon", "RssFile")}
    return {
        "rss_mb": mb["VmRSS"],
        "rss_peak_mb": mb["VmHWM"],
        "rss_anonymous_mb": mb["RssAnon"],
        "rss_mapped_files_mb": mb["RssFile"],
    }


def _throughput(detector: str, seconds: float, **_: Any) -> dict[str, Any]:
    """Texts per second with many callers, over those of a single one that waits for each."""
    from alknet_firewall import Firewall

    firewall = Firewall(detector)
    count_tokens = _token_counter(detector, firewall.sites)
    result: dict[str, Any] = {"throughput_callers": CALLERS}
    for name, tokens in (("throughput", CALLER_TOKENS), ("throughput_short", SHORT_CALLER_TOKENS)):
        text = texts.text_of(tokens, count_tokens)
        screen = partial(firewall.screen, text)
        screen()
        alone, together = [], []
        for _round in range(5):
            alone.append(_rate(screen, 1, seconds))
            together.append(_rate(screen, CALLERS, seconds))
        result[name] = median(together) / median(alone)
        result[f"{name}_texts_per_s"] = {"alone": median(alone), "together": median(together)}
    return result


def _rate(call: Callable[[], object], callers: int, seconds: float) -> float:
    """Calls per second of `callers` threads that call for `seconds`; late finishers count."""
    counts = [0] * callers
    deadline = time.perf_counter() + seconds

    def run(caller: int) -> None:
        while time.perf_counter() < deadline:
            call()
            counts[caller] += 1

    threads = [threading.Thread(target=run, args=(caller,)) for caller in range(callers)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - start)


def _stages(detector: str, tokens: list[int], seconds: float) -> dict[str, Any]:
    """Medians of a screening and of its parts, in milliseconds."""
    from alknet_firewall import Firewall

    firewall, early = Firewall(detector), Firewall(detector, early_exit=True)
    count = _token_counter(detector, firewall.sites)

    def split(text: str) -> dict[str, float]:
        calls: dict[str, Callable[[str], object]]
        calls = {"tokenize": count, "activations": firewall.activations, "screen": firewall.screen}
        calls["early_exit"] = early.screen
        times: dict[str, list[float]] = {name: [] for name in calls}
        end = time.perf_counter() + 2 * seconds
        while len(times["screen"]) < 4 or time.perf_counter() < end:
            for name, call in calls.items():
                # Each follows one of its own kind: none profits from another's waking the threads.
                call(text)
                start = time.perf_counter()
                call(text)
                times[name].append(1e3 * (time.perf_counter() - start))
        ms = {name: median(values) for name, values in times.items()}
        forward = ms["activations"] - ms["tokenize"]
        other = ms["screen"] - ms["activations"]
        parts = {"tokenize": ms["tokenize"], "forward": forward, "other": other}
        return parts | {name: ms[name] for name in ("screen", "early_exit")}

    short = split(texts.words(WORDS))
    return {
        "stages_ms": {str(n): split(texts.text_of(n, count)) for n in tokens},
        "screen_30_words": short | {"ratio": short["screen"] / short["forward"]},
    }


def _token_counter(detector: str, sites: list[str]) -> Callable[[str], int]:
    from alknet_firewall import _core
    from alknet_firewall.detector import find_detector

    reader = _core.Reader(str(find_detector(detector)), sites, threads=1)
    return lambda text: reader.count_tokens(text)


_PROBES: dict[str, Callable[..., dict[str, Any]]]
_PROBES = {"memory": _memory, "throughput": _throughput, "stages": _stages}

if __name__ == "__main__":
    print(json.dumps(_PROBES[sys.argv[1]](**json.loads(sys.argv[2]))))

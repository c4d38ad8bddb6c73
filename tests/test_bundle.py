"""Bundles: deterministic to write, and nothing in them trusted when read."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from alknet_firewall import detector
from alknet_firewall.bundle import bundle, read_bundle_manifest, unpack, verify
from alknet_firewall.detector import FILES
from alknet_firewall.errors import ModelLoadError


@pytest.fixture
def folder(tmp_path) -> Path:
    """A detector of small files, one of them exactly one tar block long."""
    folder = tmp_path / "made" / "mine"
    folder.mkdir(parents=True)
    for file in FILES:
        (folder / file).write_bytes(file.encode() * 100)
    (folder / "config.json").write_bytes(b"x" * 512)
    source = {"kind": "path"}
    manifest = detector.describe(folder, name="mine", license="MIT", source=source)
    detector.write_manifest(folder, manifest)
    return folder


@pytest.fixture
def tar(folder, tmp_path) -> Path:
    return bundle(folder, tmp_path / "mine.tar")


def unpacked(tar: Path, tmp_path: Path) -> Path:
    target = tmp_path / "unpacked"
    target.mkdir()
    unpack(tar, target)
    return target


def test_round_trip(tar, folder, tmp_path):
    target = unpacked(tar, tmp_path)
    for file in (*FILES, "manifest.json"):
        assert (target / file).read_bytes() == (folder / file).read_bytes()
    assert detector.verify_folder(target).ok
    assert read_bundle_manifest(tar) == detector.read_manifest(folder)


def test_unpacked_again_and_bundled_gives_the_same_bytes(tar, tmp_path):
    again = bundle(unpacked(tar, tmp_path), tmp_path / "again.tar")
    assert again.read_bytes() == tar.read_bytes()


def test_headers_carry_nothing_of_this_machine(tar):
    with tarfile.open(tar) as archive:
        members = archive.getmembers()
    assert [member.name for member in members] == [
        "mine/manifest.json",
        "mine/README.txt",
        "mine/codebook.safetensors",
        "mine/config.json",
        "mine/model.safetensors",
        "mine/tokenizer.json",
    ]
    for member in members:
        assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
        assert member.mode == 0o644


def test_other_tools_read_it(tar, folder, tmp_path):
    if not shutil.which("tar"):
        pytest.skip("no tar")
    subprocess.run(["tar", "xf", tar, "-C", tmp_path], check=True)
    assert detector.verify_folder(tmp_path / "mine").ok


def test_readme_says_how_to_verify_and_install(tar):
    with tarfile.open(tar) as archive:
        readme = archive.extractfile("mine/README.txt").read().decode()
    assert "alknet-firewall verify mine.tar" in readme
    assert "alknet-firewall setup --source mine.tar" in readme


def test_changed_detector_is_not_bundled(folder, tmp_path):
    (folder / "config.json").write_bytes(b"y" * 512)
    old = tmp_path / "mine.tar"
    old.write_bytes(b"what was there")
    with pytest.raises(ModelLoadError, match="not as its manifest says"):
        bundle(folder, old)
    assert old.read_bytes() == b"what was there"
    assert {path.name for path in tmp_path.iterdir()} == {"made", "mine.tar"}


@pytest.mark.parametrize("content", [b"y" * 511, b"x" * 513])
def test_detector_of_another_size_is_not_bundled(folder, tmp_path, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ModelLoadError):
        bundle(folder, tmp_path / "mine.tar")


class TestVerify:
    def test_intact(self, tar, folder):
        assert verify(tar).ok
        assert verify(folder).ok

    def test_changed_content_is_named(self, tar):
        data = tar.read_bytes().replace(b"tokenizer.jsontokenizer", b"tokenizer.jsonTokenizer", 1)
        tar.write_bytes(data)
        assert verify(tar).changed == ("tokenizer.json",)

    def test_missing_file(self, tmp_path):
        with pytest.raises(ModelLoadError, match="cannot be read"):
            verify(tmp_path / "none.tar")


def rebuilt(tar: Path, change, tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    """Write a bundle's members anew after `change` altered the list of (header, data)."""
    with tarfile.open(tar) as archive:
        members = [(header, archive.extractfile(header).read()) for header in archive]
    change(members)
    with tarfile.open(tar, "w", format=tar_format) as archive:
        for header, data in members:
            header.size = header.size if header.isreg() else 0
            archive.addfile(header, io.BytesIO(data.ljust(header.size, b"\0")))
    return tar


def added(name: str, **fields):
    def change(members) -> None:
        header = tarfile.TarInfo(name)
        for field, value in fields.items():
            setattr(header, field, value)
        members.append((header, b""))

    return change


def renamed(index: int, name: str):
    def change(members) -> None:
        members[index][0].name = name

    return change


def retyped(index: int, kind: bytes, link: str = ""):
    def change(members) -> None:
        members[index][0].type = kind
        members[index][0].linkname = link

    return change


def resized(index: int, size: int):
    def change(members) -> None:
        members[index][0].size = size

    return change


HOSTILE = {
    "unknown member": added("mine/extra.py"),
    "second copy": added("mine/config.json"),
    "absolute path": renamed(3, "/etc/cron.d/x"),
    "climbing path": renamed(3, "mine/../../config.json"),
    "other folder": renamed(3, "other/config.json"),
    "renamed folder": renamed(0, "other/manifest.json"),
    "symbolic link": retyped(3, tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": retyped(3, tarfile.LNKTYPE, "mine/manifest.json"),
    "device": retyped(3, tarfile.CHRTYPE),
    "fifo": retyped(3, tarfile.FIFOTYPE),
    "folder": retyped(3, tarfile.DIRTYPE),
    "manifest is a link": retyped(0, tarfile.SYMTYPE, "/etc/passwd"),
    "larger than the manifest says": resized(3, 1024),
    "smaller than the manifest says": resized(3, 100),
    "huge manifest": resized(0, 2 << 20),
    "huge read-me": resized(1, 1 << 20),
    "member left out": lambda members: members.pop(3),
    "other order": lambda members: members.reverse(),
    "nothing at all": lambda members: members.clear(),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_archive_is_refused(tar, tmp_path, change):
    rebuilt(tar, change)
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(ModelLoadError):
        unpack(tar, target)
    assert {path.name for path in target.iterdir()} <= {*FILES, "manifest.json", "README.txt"}
    with pytest.raises(ModelLoadError):
        verify(tar)


def test_extended_headers_are_refused(tar):
    def with_pax(members) -> None:
        members[3][0].pax_headers = {"path": "../../x", "size": "1"}

    rebuilt(tar, with_pax, tarfile.PAX_FORMAT)
    with pytest.raises(ModelLoadError, match="plain files"):
        verify(tar)


def test_claimed_size_is_not_allocated(tar):
    header = tarfile.TarInfo("mine/manifest.json")
    header.size = (8 << 30) - 1
    tar.write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + b"{}")
    with pytest.raises(ModelLoadError, match="cannot have"):
        verify(tar)


@pytest.mark.parametrize("keep", [0, 100, 512, 700, 2000, 3000, 5000])
def test_cut_off(tar, keep):
    tar.write_bytes(tar.read_bytes()[:keep])
    with pytest.raises(ModelLoadError):
        verify(tar)


def test_data_after_the_end(tar):
    tar.write_bytes(tar.read_bytes() + b"more")
    with pytest.raises(ModelLoadError, match="more than the detector"):
        verify(tar)


@pytest.mark.parametrize("head", [b"\x1f\x8b" + bytes(600), b"PK\x03\x04" * 300, b"\xff" * 1024])
def test_other_files(tmp_path, head):
    path = tmp_path / "x.tar"
    path.write_bytes(head)
    with pytest.raises(ModelLoadError, match="not a detector bundle"):
        verify(path)

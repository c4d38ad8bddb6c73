"""Setting up detectors: verified before and after, in one step, whatever goes wrong."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import multiprocessing
import pickle
import shutil
import threading
import zipfile
from pathlib import Path

import pytest
from alknet_firewall import detector, hub, install, pypi
from alknet_firewall.bundle import bundle
from alknet_firewall.detector import EMBEDDED, FILES
from alknet_firewall.errors import CodebookError, ConfigError, HubError, ModelLoadError
from alknet_firewall.install import fetch, setup
from alknet_firewall.locking import locked

SAFETENSORS = (2).to_bytes(8, "little") + b"{}" + b"weights"


def fake_pack(source: str, out_dir: str, num_layers: int) -> None:
    """Write what the packer would: three files that depend on what went in."""
    path = Path(source)
    data = path.read_bytes() if path.is_file() else (path / "model.safetensors").read_bytes()
    (Path(out_dir) / "model.safetensors").write_bytes(data + bytes([num_layers]))
    (Path(out_dir) / "config.json").write_text("{}")
    (Path(out_dir) / "tokenizer.json").write_text("{}")


def fake_compile(folder: Path) -> None:
    name = folder.name.encode()
    (folder / "codebook.safetensors").write_bytes(
        name + (folder / "model.safetensors").read_bytes()
    )


def never(*_: object) -> None:
    raise AssertionError("there was no need for this")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty user folder, and a package without detectors."""
    monkeypatch.setenv("ALKNET_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(detector, "_PACKAGED", tmp_path / "packaged")
    return tmp_path / "home"


@pytest.fixture
def gguf(tmp_path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF weights")
    return path


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(SAFETENSORS)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def make(source: object, **options) -> Path:
    """Run `setup` with the fake packer and codebook compiler."""
    defaults = {"name": "mine", "pack": fake_pack, "compile_codebook": fake_compile}
    return setup(str(source), **{**defaults, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class TestFromPath:
    def test_gguf(self, gguf, home):
        folder = make(gguf, num_layers=7)
        assert folder == home / "detectors" / "mine"
        assert detector.verify_folder(folder).ok
        assert contents(folder)["model.safetensors"] == b"GGUF weights\x07"
        assert contents(folder)["codebook.safetensors"].startswith(b"mine")

    def test_manifest_says_where_the_weights_came_from(self, gguf):
        manifest = detector.read_manifest(make(gguf, num_layers=7))
        sha256 = hashlib.sha256(gguf.read_bytes()).hexdigest()
        assert manifest.name == "mine"
        assert manifest.license == "unknown"
        assert manifest.source == {
            "kind": "path",
            "sha256": {"model.gguf": sha256},
            "num_layers": 7,
        }

    def test_checkpoint(self, checkpoint):
        manifest = detector.read_manifest(make(checkpoint))
        assert set(manifest.source["sha256"]) == {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
        }

    def test_sharded_checkpoint(self, checkpoint):
        (checkpoint / "model.safetensors").rename(checkpoint / "a.safetensors")
        shutil.copy(checkpoint / "a.safetensors", checkpoint / "b.safetensors")
        weights = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps(weights))
        hashes = fetch(str(checkpoint)).source["sha256"]
        assert {"a.safetensors", "b.safetensors", "model.safetensors.index.json"} <= set(hashes)

    def test_needs_a_name(self, gguf):
        with pytest.raises(ConfigError, match="--name"):
            make(gguf, name=None)

    def test_needs_a_codebook(self, gguf):
        with pytest.raises(ConfigError, match="needs a codebook"):
            make(gguf, compile_codebook=None, pack=never)

    def test_codebook_must_have_been_written(self, gguf):
        with pytest.raises(CodebookError):
            make(gguf, compile_codebook=lambda folder: None)

    @pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
    def test_missing_file_is_named(self, checkpoint, file):
        (checkpoint / file).unlink()
        with pytest.raises(ModelLoadError, match=file):
            make(checkpoint)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(ModelLoadError, match="nothing at"):
            make(tmp_path / "none")

    def test_files_are_readable_for_those_whom_the_umask_allows(self, gguf):
        def private(*arguments) -> None:
            fake_pack(*arguments)
            (Path(arguments[1]) / "model.safetensors").chmod(0o600)

        modes = {path.stat().st_mode for path in make(gguf, pack=private).iterdir()}
        assert len(modes) == 1
        assert modes != {0o100600}


class TestPickle:
    """None of these may reach the packer, and none is ever unpickled."""

    @pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".BIN"])
    def test_refused_by_name(self, tmp_path, suffix):
        path = tmp_path / f"model{suffix}"
        path.write_bytes(SAFETENSORS)
        with pytest.raises(ModelLoadError, match="pickle files run code"):
            make(path, pack=never)

    def test_folder_with_nothing_else_is_refused(self, checkpoint):
        (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
        with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin is refused"):
            make(checkpoint, pack=never)

    def test_beside_safetensors_it_is_left_alone(self, checkpoint):
        (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps({}))
        assert "pytorch_model.bin" not in fetch(str(checkpoint)).source["sha256"]

    @pytest.mark.parametrize("protocol", range(6))
    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
    def test_refused_by_content(self, checkpoint, name, protocol):
        (checkpoint / name).write_bytes(pickle.dumps({"weights": [1.0]}, protocol))
        with pytest.raises(ModelLoadError):
            make(checkpoint, pack=never)

    def test_zip_of_torch_is_refused_by_content(self, checkpoint):
        with zipfile.ZipFile(checkpoint / "model.safetensors", "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({}))
        with pytest.raises(ModelLoadError, match="zip archive"):
            make(checkpoint, pack=never)

    def test_old_torch_file_is_refused_by_content(self, gguf):
        gguf.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"rest")
        with pytest.raises(ModelLoadError, match=r"torch\.save"):
            make(gguf, pack=never)

    @pytest.mark.parametrize("shard", ["pytorch_model.bin", "../x.safetensors", "a.txt", 3])
    def test_index_may_name_nothing_else(self, checkpoint, shard):
        index = checkpoint / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"x": shard}}))
        with pytest.raises(ModelLoadError):
            make(checkpoint, pack=never)

    @pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"weight_map": {}}', b"[" * 100_000])
    def test_index_that_is_none(self, checkpoint, data):
        (checkpoint / "model.safetensors.index.json").write_bytes(data)
        with pytest.raises(ModelLoadError, match="not a safetensors index"):
            make(checkpoint, pack=never)

    def test_header_that_resembles_a_pickle_is_accepted(self, checkpoint):
        header = b"{" + b" " * (0x0280 - 2) + b"}"  # its length starts with the bytes 80 02
        data = len(header).to_bytes(8, "little") + header
        (checkpoint / "model.safetensors").write_bytes(data)
        make(checkpoint)


class TestRepeated:
    def test_intact_detector_is_left_as_it_is(self, gguf):
        first = make(gguf)
        before = (first / "model.safetensors").stat()
        assert make(gguf, pack=never) == first
        assert (first / "model.safetensors").stat() == before

    def test_force_makes_it_anew(self, gguf):
        first = (make(gguf) / "model.safetensors").stat().st_ino
        assert (make(gguf, force=True) / "model.safetensors").stat().st_ino != first

    @pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")])
    def test_damaged_detector_is_made_anew(self, gguf, damage):
        folder = make(gguf)
        damage(folder / "tokenizer.json")
        assert detector.verify_folder(make(gguf)).ok

    def test_other_weights_need_force(self, gguf):
        folder = make(gguf)
        gguf.write_bytes(b"GGUF other weights")
        with pytest.raises(ConfigError, match="--force"):
            make(gguf)
        make(gguf, force=True)
        assert contents(folder)["model.safetensors"].startswith(b"GGUF other")

    def test_other_depth_needs_force(self, gguf):
        make(gguf, num_layers=7)
        with pytest.raises(ConfigError, match="--force"):
            make(gguf, num_layers=8)


class TestFailure:
    def broken(self, *_: object) -> None:
        raise ModelLoadError("broken")

    @pytest.mark.parametrize("step", ["pack", "compile_codebook"])
    def test_old_detector_stays(self, gguf, step):
        folder = make(gguf)
        before = contents(folder)
        with pytest.raises(ModelLoadError, match="broken"):
            make(gguf, force=True, **{step: self.broken})
        assert contents(folder) == before
        assert [path.name for path in folder.parent.iterdir()] == ["mine"]

    def test_nothing_is_left_when_there_was_no_old_one(self, gguf, home):
        with pytest.raises(ModelLoadError, match="broken"):
            make(gguf, pack=self.broken)
        assert list((home / "detectors").iterdir()) == []

    def test_old_detector_comes_back_if_the_last_rename_fails(self, gguf, monkeypatch):
        folder = make(gguf)
        before = contents(folder)
        rename = Path.rename

        def fail_into_place(self: Path, target: Path) -> Path:
            if self.parent.name == ".mine.new":
                raise OSError("disk full")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail_into_place)
        with pytest.raises(OSError, match="disk full"):
            make(gguf, force=True)
        assert contents(folder) == before

    def test_what_a_killed_run_left_is_put_in_order(self, gguf):
        folder = make(gguf)
        before = contents(folder)
        folder.rename(folder.with_name(".mine.old"))  # killed between the two renames
        folder.with_name(".mine.new").mkdir()
        assert make(gguf, pack=never) == folder
        assert contents(folder) == before
        assert [path.name for path in folder.parent.iterdir()] == ["mine"]

    @pytest.mark.parametrize("force", [False, True])
    def test_folder_with_anything_else_is_left_alone(self, gguf, tmp_path, force):
        precious = tmp_path / "precious"
        precious.mkdir()
        (precious / "thesis.tex").touch()
        with pytest.raises(ConfigError, match="left alone"):
            make(gguf, out=precious, force=force)
        assert (precious / "thesis.tex").exists()

    def test_made_detector_must_match_its_manifest(self, gguf, monkeypatch):
        def changed_after(folder: Path, manifest: detector.Manifest) -> None:
            detector.write_manifest(folder, manifest)
            (folder / "config.json").write_text("changed")

        monkeypatch.setattr(install, "write_manifest", changed_after)
        with pytest.raises(ModelLoadError, match=r"changed: config\.json"):
            make(gguf)


def _make_in_process(source: str, log: str) -> None:
    def counted(*arguments) -> None:
        with Path(log).open("a") as stream:
            stream.write("packed\n")
        fake_pack(*arguments)

    make(source, pack=counted)


class TestAtOnce:
    def test_two_processes_make_it_once(self, gguf, home, tmp_path):
        log = tmp_path / "log"
        context = multiprocessing.get_context("spawn")
        runs = [context.Process(target=_make_in_process, args=(gguf, log)) for _ in range(4)]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
        assert [run.exitcode for run in runs] == [0] * 4
        assert log.read_text() == "packed\n"
        assert detector.verify_folder(home / "detectors" / "mine").ok

    def test_waiting_is_told(self, tmp_path):
        told = threading.Event()
        got = []

        def second() -> None:
            with locked(tmp_path / "thing", lambda *step: told.set()):
                got.append("second")

        thread = threading.Thread(target=second)
        with locked(tmp_path / "thing"):
            thread.start()
            assert told.wait(10)
            got.append("first")
        thread.join(10)
        assert got == ["first", "second"]
        assert list(tmp_path.glob(".thing*")) == []


class TestReadyMade:
    @pytest.fixture
    def ready(self, gguf, tmp_path) -> Path:
        return make(gguf, out=tmp_path / "elsewhere")

    @pytest.mark.parametrize("form", ["folder", "bundle"])
    def test_is_verified_and_copied(self, ready, home, form, tmp_path):
        source = ready if form == "folder" else bundle(ready, tmp_path / "mine.tar")
        folder = setup(str(source))
        assert folder == home / "detectors" / "mine"
        assert detector.verify_folder(folder).ok
        assert detector.read_manifest(folder) == detector.read_manifest(ready)
        before = (folder / "model.safetensors").stat()
        setup(str(source))
        assert (folder / "model.safetensors").stat() == before

    def test_changed_folder_is_refused(self, ready, home):
        (ready / "tokenizer.json").write_text("changed")
        (ready / "config.json").unlink()
        with pytest.raises(ModelLoadError, match=r"config\.json.*tokenizer\.json"):
            setup(str(ready))
        assert list((home / "detectors").iterdir()) == []

    def test_changed_bundle_is_refused(self, ready, home, tmp_path):
        tar = bundle(ready, tmp_path / "mine.tar")
        tar.write_bytes(tar.read_bytes().replace(b"GGUF weights", b"GGUF wEights", 1))
        with pytest.raises(ModelLoadError, match="has changed"):
            setup(str(tar))
        assert list((home / "detectors").iterdir()) == []

    def test_keeps_its_name(self, ready):
        with pytest.raises(ConfigError, match="keeps that name"):
            setup(str(ready), name="other")


class TestEmbedded:
    """The embedded detector: its manifest and codebook come with the package."""

    @pytest.fixture(autouse=True)
    def fetched(self, gguf, monkeypatch):
        monkeypatch.setattr(pypi, "download", lambda pin, **_: gguf)

    @pytest.fixture
    def released(self, gguf, tmp_path) -> Path:
        """What the repository holds: manifest and codebook, the rest to be derived."""
        folder = make("pypi", name=None, out=detector.packaged_dir(EMBEDDED))
        for file in set(FILES) - {"codebook.safetensors"}:
            (folder / file).unlink()
        return folder

    def test_first_of_all_needs_a_codebook(self):
        with pytest.raises(ConfigError, match="needs a codebook"):
            setup("pypi", pack=fake_pack)

    def test_is_derived_to_the_bytes_of_the_manifest(self, released, home):
        folder = setup("pypi", pack=fake_pack)
        assert folder == home / "detectors" / EMBEDDED
        assert detector.find_detector(EMBEDDED) == folder
        for file in ("manifest.json", "codebook.safetensors"):
            assert (folder / file).read_bytes() == (released / file).read_bytes()

    def test_can_be_derived_in_place(self, released):
        before = contents(released)
        assert setup("pypi", out=released, pack=fake_pack) == released
        assert detector.verify_folder(released).ok
        assert before.items() <= contents(released).items()

    def test_complete_package_needs_no_setup(self, released, home):
        setup("pypi", out=released, pack=fake_pack)
        assert setup("pypi", pack=never) == released
        assert not home.exists()

    def test_other_result_is_refused(self, released, home):
        def other(*arguments) -> None:
            fake_pack(*arguments)
            (Path(arguments[1]) / "tokenizer.json").write_text("other")

        with pytest.raises(ModelLoadError, match=r"released.*changed: tokenizer\.json"):
            setup("pypi", pack=other)
        assert list((home / "detectors").iterdir()) == []

    def test_older_release_is_replaced_without_asking(self, gguf, home, monkeypatch, tmp_path):
        make("pypi", name=None)
        gguf.write_bytes(b"GGUF of the new release")
        make("pypi", name=None, out=detector.packaged_dir(EMBEDDED))
        (detector.packaged_dir(EMBEDDED) / "model.safetensors").unlink()
        folder = setup("pypi", pack=fake_pack)
        assert contents(folder)["model.safetensors"].startswith(b"GGUF of the new release")

    def test_its_codebook_is_never_compiled_anew(self, released):
        setup("pypi", pack=fake_pack, compile_codebook=never)

    def test_same_weights_with_a_codebook_of_ones_own(self, released):
        folder = make("pypi", name="ours")
        assert contents(folder)["codebook.safetensors"].startswith(b"ours")

    def test_other_detector_may_not_take_its_name(self, released, tmp_path, monkeypatch):
        monkeypatch.setattr(detector, "_PACKAGED", tmp_path / "none")
        foreign = make("pypi", name=EMBEDDED, num_layers=3, out=tmp_path / "foreign")
        monkeypatch.setattr(detector, "_PACKAGED", released.parent)
        with pytest.raises(ModelLoadError, match="released with this version"):
            setup(str(foreign))


class TestHub:
    @pytest.fixture(autouse=True)
    def fetched(self, checkpoint, monkeypatch):
        calls = []

        def download(source, *, revision, **_):
            calls.append((source.repo, revision))
            return hub.Snapshot(checkpoint, "c" * 40)

        monkeypatch.setattr(hub, "download", download)
        return calls

    def test_resolved_revision_is_recorded(self):
        folder = make("hub", name="smollm2-135m-instruct-hub")
        manifest = detector.read_manifest(folder)
        assert manifest.source["repo"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
        assert manifest.source["revision"] == "c" * 40
        assert manifest.license == "Apache-2.0"

    def test_default_name(self, fetched, home):
        assert make("hub", name=None) == home / "detectors" / "smollm2-135m"
        assert fetched == [("HuggingFaceTB/SmolLM2-135M", None)]

    def test_second_run_asks_nobody(self, fetched):
        for _ in range(2):
            make("hub", name="smollm2-135m-instruct-hub")
        assert len(fetched) == 1

    def test_other_revision_needs_force(self, fetched):
        make("hub", name="smollm2-135m-instruct-hub")
        with pytest.raises(ConfigError, match="--force"):
            make("hub", name="smollm2-135m-instruct-hub", revision="d" * 40)

    def test_unknown_name(self):
        with pytest.raises(ConfigError, match="smollm2-135m"):
            make("hub", name="gpt-7")

    def test_failure_is_passed_on(self, monkeypatch):
        def gone(*_, **__):
            raise HubError("gone")

        monkeypatch.setattr(hub, "download", gone)
        with pytest.raises(HubError, match="gone"):
            make("hub", name=None)


def test_progress_names_every_stage(gguf):
    steps = []
    make(gguf, progress=lambda *step: steps.append(step))
    assert [stage for stage, *_ in steps if stage != "verify"] == ["pack", "codebook"]


needs_core = pytest.mark.skipif(
    importlib.util.find_spec("alknet_firewall._core") is None, reason="extension not built"
)
GOLDEN = Path(__file__).parent / "golden"


@needs_core
def test_real_packer_keeps_the_first_layers(tmp_path):
    source = tmp_path / "tiny"
    source.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "tiny" / file, source)
    shutil.copy(GOLDEN / "tiny-tokenizer.json", source / "tokenizer.json")
    folder = make(source, pack=None, num_layers=2)
    assert detector.verify_folder(folder).ok
    header = (folder / "model.safetensors").read_bytes()
    assert b"model.layers.1." in header
    assert b"model.layers.2." not in header


@needs_core
def test_real_packer_refuses_what_is_no_model(gguf):
    with pytest.raises(ModelLoadError):
        make(gguf, pack=None)

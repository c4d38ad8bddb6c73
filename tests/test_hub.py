"""Fetching from the Hub: the real client against a local server, each call in its own process.

The client reads its ``HF_*`` variables once, at import; a process of its own also shows that the
user's variables reach it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, HubServer

pytest.importorskip("huggingface_hub")

WEIGHTS = (10).to_bytes(8, "little") + b'{"a": 1}  ' + bytes(range(256)) * 4096
FILES = {
    "model.safetensors": WEIGHTS,
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b'{"version": "1.0"}',
    "pytorch_model.bin": b"\x80\x02 never fetched",
    "onnx/config.json": b"{}",
}
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()

SCRIPT = """
import json, sys, time
from alknet_firewall import hub
from alknet_firewall.errors import HubError
source, options = json.loads(sys.argv[1])
time.sleep = lambda seconds: None  # the client's pauses between its attempts
steps = []
try:
    snapshot = hub.download(
        hub.HubSource(license="MIT", **source), progress=lambda *step: steps.append(step), **options
    )
    result = {"folder": str(snapshot.folder), "revision": snapshot.revision}
except HubError as error:
    result = {"error": str(error)}
print(json.dumps({**result, "steps": steps}))
"""


@dataclass
class Client:
    """Runs `hub.download` in a new process with its own cache."""

    home: Path
    endpoint: str

    def download(
        self, source: dict[str, Any], env: dict[str, str] | None = None, **options: Any
    ) -> dict[str, Any]:
        source = {"repo": "owner/model", **source}
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment = {
            **kept,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.home),
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "HF_HUB_ETAG_TIMEOUT": "1",
            **(env or {}),
        }
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps([source, options])],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)  # also: nothing else is printed
        return result


@pytest.fixture
def server():
    with HubServer(dict(FILES)) as running:
        yield running


@pytest.fixture
def client(server, tmp_path):
    return Client(tmp_path / "hf", server.endpoint)


def test_fetches_only_safetensors_and_json(client, server):
    result = client.download({"revision": COMMIT, "sha256": {"model.safetensors": SHA256}})
    folder = Path(result["folder"])
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
    }
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert result["revision"] == COMMIT
    assert not server.downloads("pytorch_model.bin")


def test_progress_counts_bytes_upwards(client):
    result = client.download({"revision": COMMIT, "sha256": {"model.safetensors": SHA256}})
    done = [step[1] for step in result["steps"] if step[0] == "download"]
    assert done == sorted(done)
    assert done[-1] == sum(len(FILES[name]) for name in list(FILES)[:3])


def test_branch_is_resolved_and_reported(client):
    assert client.download({"revision": "main"})["revision"] == COMMIT


def test_second_run_downloads_nothing(client, server):
    client.download({"revision": COMMIT})
    before = len(server.downloads("model.safetensors"))
    client.download({"revision": COMMIT})
    assert len(server.downloads("model.safetensors")) == before == 1


def test_given_revision_is_not_held_to_the_pins_of_another(client):
    source = {"revision": "f" * 40, "sha256": {"model.safetensors": "0" * 64}}
    assert client.download(source, revision=COMMIT)["revision"] == COMMIT


def test_broken_connection_is_resumed(client, server):
    # The client keeps what it received in pieces of 10 MB.
    large = WEIGHTS * 12
    server.files["model.safetensors"] = large
    server.cut_after["model.safetensors"] = [11 << 20]
    sha256 = {"model.safetensors": hashlib.sha256(large).hexdigest()}
    assert "error" not in client.download({"revision": COMMIT, "sha256": sha256})
    assert server.downloads("model.safetensors") == [None, f"bytes={10 << 20}-"]


def test_truncated_body_is_an_error_and_the_next_run_repairs_it(client, server):
    server.cut_after["model.safetensors"] = [1000, *[0] * 20]
    result = client.download({"revision": COMMIT, "sha256": {"model.safetensors": SHA256}})
    assert "run the same command again" in result["error"]
    server.cut_after.clear()
    assert "error" not in client.download({"revision": COMMIT})


def test_wrong_content_is_refused(client, server):
    server.served["model.safetensors"] = WEIGHTS[:-1] + b"x"
    result = client.download({"revision": COMMIT, "sha256": {"model.safetensors": SHA256}})
    found = hashlib.sha256(WEIGHTS[:-1] + b"x").hexdigest()
    assert SHA256 in result["error"]
    assert found in result["error"]


def test_wrong_content_in_the_cache_is_fetched_again(client, server):
    server.served["model.safetensors"] = WEIGHTS[:-1] + b"x"
    client.download({"revision": COMMIT})
    server.served.clear()
    result = client.download({"revision": COMMIT, "sha256": {"model.safetensors": SHA256}})
    assert (Path(result["folder"]) / "model.safetensors").read_bytes() == WEIGHTS


def test_pinned_file_that_is_not_in_the_repository(client, server):
    del server.files["model.safetensors"]
    result = client.download({"revision": COMMIT, "sha256": {"model.safetensors": SHA256}})
    assert "has no model.safetensors" in result["error"]


def test_listed_file_that_is_not_delivered(client, server):
    server.lost.add("model.safetensors")
    assert "does not deliver" in client.download({"revision": COMMIT})["error"]


def test_gated_without_token(client, server):
    server.token = "hf_right"
    error = client.download({"revision": "main"})["error"]
    assert "gated" in error
    assert "https://huggingface.co/owner/model" in error


def test_gated_with_a_token_that_has_no_access(client, server):
    server.token = "hf_right"
    error = client.download({"revision": "main"}, token="hf_wrong")["error"]
    assert "gated" in error
    assert "hf_wrong" not in error


@pytest.mark.parametrize("way", ["argument", "environment"])
def test_gated_with_the_right_token(client, server, way):
    server.token = "hf_right"
    if way == "argument":
        result = client.download({"revision": COMMIT}, token="hf_right")
    else:
        result = client.download({"revision": COMMIT}, env={"HF_TOKEN": "hf_right"})
    assert result["revision"] == COMMIT


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_unknown_repository(client, revision):
    error = client.download({"repo": "owner/other", "revision": revision})["error"]
    assert "no such repository" in error


@pytest.mark.parametrize("revision", ["v9", "e" * 40])
def test_unknown_revision(client, revision):
    assert "no such revision" in client.download({"revision": revision})["error"]


def test_repository_name_that_is_none(client):
    error = client.download({"repo": "not/a/name"})["error"]
    assert "owner/name" in error


@pytest.mark.parametrize(
    ("status", "advice"),
    [(403, "access was refused"), (500, "try again later"), (503, "try again later")],
)
def test_status_codes(client, server, status, advice):
    server.status = status
    assert advice in client.download({"revision": COMMIT})["error"]


def test_slow_server_times_out(client, server):
    server.delay = 3.0
    error = client.download({"revision": COMMIT})["error"]
    assert "check the network and proxy settings" in error


def test_nobody_listens(client, server):
    client.endpoint = "http://127.0.0.1:9"
    error = client.download({"revision": COMMIT})["error"]
    assert "check the network and proxy settings" in error


@pytest.mark.parametrize("way", ["argument", "environment"])
class TestOffline:
    def offline(self, client, way, **source):
        if way == "argument":
            return client.download(source, offline=True)
        return client.download(source, env={"HF_HUB_OFFLINE": "1"})

    def test_uses_the_cache(self, client, server, way):
        client.download({"revision": "main"})
        asked = len(server.log)
        assert self.offline(client, way, revision="main")["revision"] == COMMIT
        assert len(server.log) == asked

    def test_not_cached(self, client, server, way):
        assert "offline" in self.offline(client, way, revision=COMMIT)["error"]
        assert not server.log


def test_proxy_variables_are_the_users(client):
    # Nothing listens there: had they been dropped, the download would have worked.
    proxy = {"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "", "no_proxy": ""}
    result = client.download({"revision": COMMIT}, env=proxy)
    assert "error" in result


def test_importing_does_not_import_the_client():
    code = "import sys, alknet_firewall.hub; print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

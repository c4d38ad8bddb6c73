"""The wheel as a user gets it: installed without a network beside nothing but its dependencies.

`make test` names the wheel and a folder with its dependencies in the environment.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

WHEEL = os.environ.get("WHEEL_UNDER_TEST")
WHEELHOUSE = os.environ.get("WHEELHOUSE")
MAX_BYTES = 85_000_000

pytestmark = pytest.mark.skipif(not WHEEL, reason="no wheel is given: `make test` builds one")

# Anything that asks for an address fails, as on a machine without a network.
OFFLINE = """
import socket
def refuse(*_, **__):
    raise OSError("the network was asked for")
socket.socket.connect = socket.getaddrinfo = refuse
"""

SCREEN = """
import sys
from alknet_firewall import Firewall
alarm = Firewall().screen("Could you move our meeting to Thursday afternoon?")
print(alarm.level.name, alarm.detector, "numpy" in sys.modules)
"""


@pytest.fixture(scope="module")
def wheel() -> Path:
    return Path(WHEEL or "").resolve(strict=True)


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """Python of a clean environment that holds the wheel and its dependencies."""
    folder = tmp_path_factory.mktemp("wheel") / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", folder], network=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--isolated", "--python", python, "install", "--no-index"]
    run([*pip, "--find-links", Path(WHEELHOUSE or "").resolve(strict=True), wheel])
    return python


def run(command: list[object], *, network: bool = False) -> str:
    """Output of a command that must succeed, run in a namespace without a network if allowed."""
    words = [str(word) for word in command]
    if not network and may_unshare():
        words = ["unshare", "--map-root-user", "--net", *words]
    foreign = ("ALKNET_", "PIP_", "PYTHON")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, cwd="/", check=False
    )
    assert done.returncode in (0, 10, 20), done.stderr
    return done.stdout


def may_unshare() -> bool:
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "--map-root-user", "--net", "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_common_server_accepts_it(wheel):
    assert re.search(r"-cp311-abi3-manylinux2014_\w+\.manylinux_2_17_\w+\.whl$", wheel.name)


def test_size(wheel):
    assert wheel.stat().st_size <= MAX_BYTES


def test_what_is_inside(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    detector = "alknet_firewall/detectors/smollm2-135m-instruct/"
    files = {"codebook.safetensors", "config.json", "manifest.json"}
    files |= {"model.safetensors", "tokenizer.json"}
    assert {name.removeprefix(detector) for name in names if name.startswith(detector)} == files
    others = {"py.typed", "_core.pyi", "evaluation/report.html"}
    others |= {"calibration/readouts.safetensors"}
    assert {f"alknet_firewall/{name}" for name in others} <= set(names)
    assert any(name.endswith("/THIRD_PARTY_NOTICES.md") for name in names)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"alknet_firewall"}


def test_it_screens_offline_without_numpy(python):
    output = run([python, "-c", OFFLINE + SCREEN])
    assert output.split() == ["CLEAR", "smollm2-135m-instruct", "False"]


def test_nothing_heavy_is_installed(python):
    output = run([python, "-c", "import importlib.metadata as m\n"
                  "print(*(d.name.lower() for d in m.distributions()))"])  # fmt: skip
    assert {"alknet-firewall", "click"} <= set(output.split())
    assert not {"numpy", "torch", "transformers", "scipy"} & set(output.split())


def test_the_command_line_is_there(python):
    command = python.parent / "alknet-firewall"
    assert "CLEAR" in run([command, "screen", "Could you move our meeting to Thursday?"])
    assert "as in the manifest" in run([command, "verify"])

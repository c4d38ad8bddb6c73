"""Detectors that several tests share, and an environment without this machine's own settings."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from alknet_firewall import Firewall
from alknet_firewall.detector import EMBEDDED, find_detector
from alknet_firewall.errors import ModelLoadError


@pytest.fixture(autouse=True)
def _clean_settings(monkeypatch, tmp_path):
    """No ``ALKNET_*`` variables and no configuration file of the person who runs the tests.

    ``ALKNET_ISA`` stays: every test can be run on another instruction set.
    """
    for variable in [name for name in os.environ if name.startswith("ALKNET_")]:
        if variable != "ALKNET_ISA":
            monkeypatch.delenv(variable)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-configuration"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """The tiny detector's folder; not to be changed."""
    # Needs numpy and safetensors, which the tests of downloads do without.
    import tiny_detector

    return tiny_detector.make(tmp_path_factory.mktemp("detectors") / "tiny")


@pytest.fixture
def tiny_copy(tiny_folder, tmp_path) -> Path:
    """A copy of the tiny detector's folder, for tests that change it."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy" / "tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_folder) -> Firewall:
    """The tiny detector: alarms on `tiny_detector.ATTACK`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tiny_folder))
        return Firewall(tiny_folder)


@pytest.fixture(scope="session")
def real_folder() -> Path:
    """The embedded detector's folder. Without weights its tests are skipped, but never in CI."""
    try:
        return find_detector(EMBEDDED)
    except ModelLoadError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"NO EMBEDDED DETECTOR: {error}")


@pytest.fixture(scope="session")
def fw(real_folder) -> Firewall:
    """The embedded detector."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(real_folder / "none"))
        return Firewall(real_folder)

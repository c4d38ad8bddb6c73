"""What the documentation says can be run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import alknet_firewall
import pytest
from alknet_firewall.cli import main

README = Path(__file__).parent.parent / "README.md"
MODULES = [
    "alknet_firewall",
    *(
        f"alknet_firewall.{module.name}"
        for module in pkgutil.iter_modules(alknet_firewall.__path__)
    ),
]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_docstring_examples_run(name, request):
    module = importlib.import_module(name)
    tests = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    if not tests:
        return
    request.getfixturevalue("fw")  # Skips where the embedded detector is missing.
    runner = doctest.DocTestRunner(verbose=False)
    for test in tests:
        assert runner.run(test).failed == 0, test.name


def test_there_are_docstring_examples():
    finder = doctest.DocTestFinder()
    found = [
        test
        for name in ("alknet_firewall", "alknet_firewall.firewall")
        for test in finder.find(importlib.import_module(name))
        if test.examples
    ]
    assert len(found) >= 2


def test_every_public_name_is_there_and_documented():
    for name in alknet_firewall.__all__:
        value = getattr(alknet_firewall, name)
        if name != "__version__":
            assert value.__doc__, name
            assert not value.__doc__.startswith(f"{name}("), f"{name} has no docstring of its own"


def blocks(language: str) -> list[str]:
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", range(len(blocks("python"))))
def test_the_python_blocks_of_the_readme_run(block, fw, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("python")[block], f"README.md, block {block}", "exec"), {})


def test_the_commands_of_the_readme_exist():
    text = "\n".join([*blocks("sh"), *blocks("bash"), *blocks("console")])
    for command in re.findall(r"^\W*alknet-firewall (\w+)", text, re.MULTILINE):
        assert command in main.commands, command

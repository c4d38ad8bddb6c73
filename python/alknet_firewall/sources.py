"""Model files that a setup may read: what counts as one, and what is refused unread.

Only GGUF and safetensors are read. Pickle files run code when they are loaded, so they are refused
by their name and, whatever they are called, by their first bytes; nothing here ever unpickles.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import ModelLoadError

__all__ = ["check_model_files", "model_files"]

INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"})
MAX_JSON_BYTES = 64 << 20

# The legacy torch.save format starts with this number, itself pickled.
_TORCH_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")


def model_files(source: Path) -> list[Path]:
    """List the files that packing `source` would read, sorted by name.

    Parameters
    ----------
    source : Path
        A ``.gguf`` file, or a folder with ``config.json``, ``tokenizer.json`` and safetensors:
        one ``model.safetensors``, or the shards that ``model.safetensors.index.json`` names.

    Raises
    ------
    ModelLoadError
        It is neither, or a file is missing.
    """
    if source.suffix.lower() in PICKLE_SUFFIXES:
        raise _pickle(source, f"its name ends in {source.suffix}")
    if source.is_file():
        if source.suffix.lower() != ".gguf":
            raise ModelLoadError(f"{source} is not a .gguf file, a .tar bundle or a folder")
        return [source]
    if not source.is_dir():
        raise ModelLoadError(f"there is nothing at {source}")
    names = {"config.json", "tokenizer.json", *_weight_names(source)}
    files = [source / name for name in sorted(names)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelLoadError(f"{source} lacks {', '.join(missing)}")
    return files


def check_model_files(files: Iterable[Path]) -> None:
    """Refuse files whose content is not what their name says.

    Raises
    ------
    ModelLoadError
        A file is a pickle, or any other thing than its name says.
    """
    for file in files:
        with file.open("rb") as stream:
            head = stream.read(1024)
        if not _looks_right(file, head):
            if reason := _pickle_reason(head):
                raise _pickle(file, reason)
            raise ModelLoadError(f"{file} does not start like a {file.suffix} file")


def _weight_names(folder: Path) -> set[str]:
    if not (folder / INDEX).is_file():
        if not (folder / "model.safetensors").is_file():
            _refuse_pickle_folder(folder)
        return {"model.safetensors"}
    shards = _shards(folder / INDEX)
    for name in shards:
        if Path(name).suffix.lower() in PICKLE_SUFFIXES:
            raise _pickle(folder / Path(name).name, f"{INDEX} names it")
        if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
            raise ModelLoadError(f"{folder / INDEX} names something other than .safetensors files")
    return {INDEX, *shards}


def _shards(index: Path) -> set[str]:
    if index.stat().st_size > MAX_JSON_BYTES:
        raise ModelLoadError(f"{index} is larger than the {MAX_JSON_BYTES} bytes allowed")
    try:
        document: Any = json.loads(index.read_bytes())
        shards = set(document["weight_map"].values())
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{index} is not a safetensors index") from error
    if not shards or not all(isinstance(name, str) for name in shards):
        raise ModelLoadError(f"{index} is not a safetensors index")
    return shards


def _refuse_pickle_folder(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise _pickle(path, f"its name ends in {path.suffix}")


def _looks_right(file: Path, head: bytes) -> bool:
    match file.suffix.lower():
        case ".gguf":
            return head.startswith(b"GGUF")
        case ".safetensors":
            # An 8-byte length, and that many bytes of JSON.
            length = int.from_bytes(head[:8], "little")
            return head[8:9] == b"{" and length <= file.stat().st_size - 8
        case _:
            return head.lstrip()[:1] == b"{"


def _pickle_reason(head: bytes) -> str | None:
    if _TORCH_MAGIC in head[:32]:
        return "it starts like an old torch.save file"
    if head.startswith(b"PK"):
        return "it is a zip archive, as torch.save writes"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "it starts like a pickle"
    return None


def _pickle(file: Path, reason: str) -> ModelLoadError:
    return ModelLoadError(
        f"{file} is refused: {reason}, and pickle files run code when loaded; "
        "use a .safetensors or .gguf version of the model"
    )

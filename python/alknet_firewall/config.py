"""Configuration: arguments, then environment (``ALKNET_*``), then a TOML file, then defaults."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from .alarm import Thresholds
from .detector import EMBEDDED
from .errors import ConfigError

__all__ = ["FirewallConfig"]

# ALKNET_* variables that are not options of a firewall: where things are kept, which file to read.
_OTHER_VARIABLES = {"ALKNET_CONFIG", "ALKNET_HOME"}

# The engine keeps a place for every thread: far more than machines have cores take all memory.
_MOST = {"max_tokens": 2**31 - 1, "threads": 1024}


@dataclass(frozen=True, slots=True)
class FirewallConfig:
    """Everything that can be chosen about a firewall; checked when made.

    Parameters
    ----------
    detector : str
        Name of a detector, or the path of a detector folder.
    codebook_path : str or None
        Another codebook for the same model; by default the detector's own.
    thresholds : Thresholds
        Scores at which the level rises.
    max_tokens : int or None
        Most tokens of a text that are read, 1 to 2**31 - 1; a longer text is at least SUSPICIOUS.
        None reads everything.
    engine : "native" or "candle"
        The CPU kernels of this library, or the portable fp32 reference.
    threads : int or None
        Threads of the engine, 1 to 1024; None takes what affinity and the container's quota allow.
    isa : str or None
        Holds the native engine to an instruction set (``scalar``, ``avx2``, ``avxvnni``,
        ``avx512``, ``avx512bf16``, ``amx``); None takes the best one of this CPU.
    early_exit : bool
        Leaves what a first look finds ordinary at that: with the native engine most ordinary texts
        then take half the time. p-values above .5 tell less, and a few oddities pass that were
        SUSPICIOUS.
    on_error : "raise" or "block"
        Whether a failed screening raises, or gives a DANGEROUS alarm that says so.

    Raises
    ------
    ConfigError
        If a value is of the wrong type or out of its range.
    """

    detector: str = EMBEDDED
    codebook_path: str | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    max_tokens: int | None = None
    engine: Literal["native", "candle"] = "native"
    threads: int | None = None
    isa: str | None = None
    early_exit: bool = False
    on_error: Literal["raise", "block"] = "raise"

    def __post_init__(self) -> None:
        for name, kinds in _TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or isinstance(value, bool) != (kinds == (bool,)):
                raise ConfigError(f"{name} is {value!r}, which is not of the right type")
        low, high = self.thresholds.suspicious, self.thresholds.dangerous
        numbers = all(type(threshold) in (int, float) for threshold in (low, high))
        if not numbers or not 0 < low <= high <= 1:
            raise ConfigError(
                f"thresholds suspicious={low!r}, dangerous={high!r}: "
                "0 < suspicious <= dangerous <= 1 is needed"
            )
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ConfigError(f"{name} is {value!r}: 1 to {most} is needed, or None")
        for name, allowed in (("engine", ("native", "candle")), ("on_error", ("raise", "block"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: one of {allowed} is needed")

    @classmethod
    def load(cls, **arguments: Any) -> FirewallConfig:
        """Collects the configuration from arguments, environment, file and defaults.

        The file is ``$ALKNET_CONFIG``, or else ``alknet-firewall/config.toml`` in the user's
        configuration folder if it exists. It holds the names above at the top level, and
        ``[thresholds]`` with ``suspicious`` and ``dangerous``. In the environment the same names
        are upper case: ``ALKNET_DETECTOR``, ``ALKNET_SUSPICIOUS``, ...

        Raises
        ------
        ConfigError
            If a key is unknown anywhere, or a value is not usable.
        """
        given = {name: value for name, value in arguments.items() if value is not None}
        _check_names(given, "argument")
        values = _from_file() | _from_environment(os.environ)
        thresholds = values.pop("thresholds", Thresholds())
        low = values.pop("suspicious", thresholds.suspicious)
        high = values.pop("dangerous", thresholds.dangerous)
        return cls(**{**values, "thresholds": Thresholds(low, high), **given})


_TYPES: dict[str, tuple[type, ...]] = {
    "detector": (str,),
    "codebook_path": (str, type(None)),
    "thresholds": (Thresholds,),
    "max_tokens": (int, type(None)),
    "threads": (int, type(None)),
    "isa": (str, type(None)),
    "early_exit": (bool,),
}
_NAMES = {f.name for f in fields(FirewallConfig)}
_SCALARS = (_NAMES - {"thresholds"}) | {"suspicious", "dangerous"}


def _boolean(text: str) -> bool:
    values = {"1": True, "true": True, "0": False, "false": False}
    if text.lower() not in values:
        raise ValueError
    return values[text.lower()]


# How values in the environment are read, and what they are.
_PARSERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "max_tokens": (int, "a number"),
    "threads": (int, "a number"),
    "suspicious": (float, "a number"),
    "dangerous": (float, "a number"),
    "early_exit": (_boolean, "true or false"),
}


def _check_names(values: Mapping[str, Any], where: str) -> None:
    unknown = sorted(set(values) - _NAMES)
    if unknown:
        raise ConfigError(f"unknown {where} {unknown[0]!r}: known are {', '.join(sorted(_NAMES))}")


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith("ALKNET_") or variable in _OTHER_VARIABLES or not text:
            continue
        name = variable.removeprefix("ALKNET_").lower()
        if name not in _SCALARS:
            known = ", ".join(sorted(f"ALKNET_{n.upper()}" for n in _SCALARS))
            raise ConfigError(f"unknown environment variable {variable}: known are {known}")
        parse, kind = _PARSERS.get(name, (str, ""))
        try:
            values[name] = parse(text)
        except ValueError:
            raise ConfigError(f"{variable} is {text!r}, which is not {kind}") from None
    return values


def _from_file() -> dict[str, Any]:
    named = os.environ.get("ALKNET_CONFIG")
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    try:
        path = Path(named) if named else Path(home).expanduser() / "alknet-firewall" / "config.toml"
    except RuntimeError:  # Without a home there is no file in it.
        return {}
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):  # Some services have /dev/null as home.
        if named:
            raise ConfigError(f"ALKNET_CONFIG names {path}, which does not exist") from None
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    _check_names(values, f"key in {path}:")
    if "thresholds" in values:
        table = values["thresholds"]
        if not isinstance(table, dict) or set(table) - {"suspicious", "dangerous"}:
            raise ConfigError(f"{path}: [thresholds] holds suspicious and dangerous, nothing else")
        values["thresholds"] = Thresholds(**table)
    return values

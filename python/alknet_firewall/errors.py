"""Exceptions of the package. None of their messages ever holds screened text."""

from __future__ import annotations

__all__ = [
    "AlknetFirewallError",
    "CodebookError",
    "ConfigError",
    "HubError",
    "InferenceError",
    "InputError",
    "ModelLoadError",
]


class AlknetFirewallError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(AlknetFirewallError):
    """An option is unknown, out of its range, or contradicts another."""


class InputError(AlknetFirewallError):
    """The text cannot be screened as given: wrong type, or larger than the stated limit."""


class ModelLoadError(AlknetFirewallError):
    """A detector's model, tokenizer or manifest is missing, damaged, unsafe or not supported."""


class CodebookError(AlknetFirewallError):
    """A codebook is damaged, inconsistent, or was compiled for another detector."""


class HubError(AlknetFirewallError):
    """A file could not be fetched from the Hugging Face Hub or a package index."""


class InferenceError(AlknetFirewallError):
    """The forward pass or the scoring failed; there is no verdict, and none may be assumed."""

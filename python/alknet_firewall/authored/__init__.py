"""Calibration text written for this project: attacks, ordinary text, and what lies between.

Everything is composed of phrases written by hand (``data/``), the same for the same seed. A small
fixed part, ``calibration.jsonl.gz``, is shipped with the package; any number of further rows comes
from :func:`generate`::

    python -m alknet_firewall.authored --out DIR --rows 40000 --seed 0

After a change of the phrases the fixed part is written anew::

    python -m alknet_firewall.authored --shipped
"""

from .generator import generate
from .rows import Row
from .shipped import calibration_rows

__all__ = ["Row", "calibration_rows", "generate"]

"""From labelled text to a codebook, and how good a codebook is.

Needs the ``[calibrate]`` extra. The stages are `corpus` (rows of text), `activations` (`windows`
of them, cached on disk), `fit` (components and directions, a `scorer`), `null` (p-values),
`codebook` (the file), and `evaluate`, which does all of it with whole sources left out
(`crossfit`).
"""

from __future__ import annotations

try:
    import numpy  # noqa: F401
    import scipy  # noqa: F401
    import sklearn  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"calibration needs {error.name}: pip install 'alknet-firewall[calibrate]'"
    ) from None

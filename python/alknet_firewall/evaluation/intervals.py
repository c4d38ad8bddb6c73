"""How sure one can be of a share."""

from __future__ import annotations

import math

__all__ = ["wilson"]

# Standard errors of a two-sided 95 % interval.
_Z = 1.96


def wilson(hits: float, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a probability of which ``hits`` of ``n`` trials are known.

    A hit may count in part, as a tie does. The interval stays inside [0, 1] and is honest for few
    trials and for shares near 0 and 1; without a trial it is all of [0, 1].
    """
    if n == 0:
        return 0.0, 1.0
    share, weight = hits / n, _Z * _Z / n
    centre = (share + weight / 2) / (1 + weight)
    half = _Z / (1 + weight) * math.sqrt(share * (1 - share) / n + weight / (4 * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)

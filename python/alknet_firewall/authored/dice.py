"""Reproducible random choices.

Only :meth:`random.Random.random` is promised to give the same sequence in every Python version, so
every other choice is made from it here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

__all__ = ["Dice"]

T = TypeVar("T")


class Dice:
    """A source of choices that depends on nothing but its seed.

    Parameters
    ----------
    seed : str
        Any text; equal seeds give equal choices.
    """

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random

    def between(self, low: int, high: int) -> int:
        """An integer from `low` to `high`, both included."""
        return low + int(self._random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        """True with the given probability, 0 to 1."""
        return self._random() < probability

    def pick(self, items: Sequence[T]) -> T:
        """One of `items`, each equally likely."""
        return items[self.between(0, len(items) - 1)]

    def weighted(self, weights: dict[T, float]) -> T:
        """One of the keys, as likely as its weight says."""
        point = self._random() * sum(weights.values())
        for item, weight in weights.items():
            point -= weight
            if point < 0:
                return item
        return next(reversed(weights))

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` of `items` in random order; repeats only when there are fewer than `count`."""
        if not items and count:
            raise ValueError(f"cannot draw {count} of no items")
        drawn: list[T] = []
        while len(drawn) < count:
            rest = list(items)
            while rest and len(drawn) < count:
                drawn.append(rest.pop(self.between(0, len(rest) - 1)))
        return drawn

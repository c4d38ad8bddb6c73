"""From groups of phrases to numbered rows."""

from __future__ import annotations

from collections.abc import Iterator

from .dice import Dice
from .grammar import Grammar
from .groups import GROUPS, Group
from .phrases import phrases
from .rows import Draft, Row

__all__ = ["generate"]

# A group that repeats itself this often in a row has nothing new left to say.
_PATIENCE = 200


def generate(seed: int, rows: int, parts: list[str] | None = None) -> Iterator[Row]:
    """Writes calibration rows, no text twice.

    Parameters
    ----------
    seed : int
        Equal seeds give equal rows, in every Python version.
    rows : int
        About how many; the groups share them out by weight, and a group of few phrases may stay
        below its share.
    parts : list of str, optional
        Names of the groups to write, all by default.

    Yields
    ------
    Row
        Group after group; the two rows of a pair follow each other.

    Raises
    ------
    ValueError
        `parts` names an unknown group.
    """
    groups = _chosen(parts)
    total = sum(group.share for group in groups)
    for group in groups:
        yield from _group_rows(group, seed, round(rows * group.share / total))


def _chosen(parts: list[str] | None) -> list[Group]:
    known = {group.name: group for group in GROUPS}
    unknown = sorted(set(parts or ()) - set(known))
    if unknown:
        raise ValueError(f"no such group: {', '.join(unknown)}; known are {', '.join(known)}")
    return [known[name] for name in parts] if parts else list(GROUPS)


def _group_rows(group: Group, seed: int, count: int) -> Iterator[Row]:
    dice = Dice(f"{seed}/{group.name}")
    written = 0
    for drafts in _fresh(group, phrases(), dice):
        if written >= count:
            return
        pair = f"authored-{group.name}-{seed}-p{written}" if len(drafts) == 2 else ""
        for draft in drafts:
            yield _row(draft, group, f"authored-{group.name}-{seed}-{written}", pair)
            written += 1


def _fresh(group: Group, grammar: Grammar, dice: Dice) -> Iterator[list[Draft]]:
    """Drafts whose texts the group has not written before, until it runs dry."""
    seen: set[str] = set()
    repeats = 0
    while repeats < _PATIENCE:
        drafts = group.write(grammar, dice)
        texts = {draft.text for draft in drafts}
        if len(texts) < len(drafts) or not texts.isdisjoint(seen) or "" in texts:
            repeats += 1
            continue
        repeats = 0
        seen |= texts
        yield drafts


def _row(draft: Draft, group: Group, identifier: str, pair: str) -> Row:
    return Row(
        id=identifier,
        text=draft.text,
        label=draft.label,
        kind=draft.kind,
        source=f"authored/{group.name}",
        family=draft.family,
        carrier=draft.carrier,
        origin=draft.origin,
        lang=draft.lang,
        pair=pair,
        split="calibration",
    )

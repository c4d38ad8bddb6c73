"""Texts to time: ordinary prose of an exact number of tokens, and of an exact number of words."""

from collections.abc import Callable
from itertools import cycle

__all__ = ["text_of", "words"]

_PROSE = """
The library moved to the old mill in spring, and since then the reading room has looked out over
the water. On the ground floor you will find newspapers, maps and the children's corner; upstairs,
local history has a room of its own, with four long tables and a lamp at each seat. Borrowing is
free for everyone who lives in the district. A card costs nothing either, but please bring a
letter or a bill with your address on it. Books may be kept for four weeks and renewed twice, by
telephone or at the desk, unless somebody else is waiting for them. We open at nine on weekdays,
at ten on Saturdays, and close for the whole of August while the roof is being repaired.
"""


def words(count: int) -> str:
    """The first `count` words of the prose, over and over if need be."""
    return " ".join(word for word, _ in zip(cycle(_PROSE.split()), range(count), strict=False))


def text_of(n_tokens: int, count_tokens: Callable[[str], int]) -> str:
    """Prose of exactly `n_tokens` tokens.

    Parameters
    ----------
    n_tokens : int
        At least 1.
    count_tokens : callable
        The tokenizer's count for a text. A word with the space before it must give the same tokens
        wherever it stands, and `" and"` must be one token.

    Raises
    ------
    ValueError
        If the tokenizer is not of that kind.
    """
    text, total = "The", count_tokens("The")
    for word in cycle(_PROSE.split()[1:]):
        size = count_tokens(" " + word)
        if total + size > n_tokens:
            break
        text, total = f"{text} {word}", total + size
    text += " and" * (n_tokens - total)
    if (found := count_tokens(text)) != n_tokens:
        raise ValueError(f"the tokenizer makes {found} tokens of a text meant to have {n_tokens}")
    return text

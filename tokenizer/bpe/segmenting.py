"""Apply merges to a short string; of equal ranks the leftmost pair merges first, as in every BPE library."""

from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

Part = TypeVar("Part", str, bytes)


def merge_parts(parts: list[Part], rank: Callable[[Part, Part], float | None],
                min_parts: int = 1) -> list[Part]:
    """Merge the neighbours with the lowest rank until no pair has a rank or `min_parts` remain."""
    parts = list(parts)
    ranks = [rank(a, b) for a, b in pairwise(parts)]
    while len(parts) > min_parts:
        best = min((r for r in ranks if r is not None), default=None)
        if best is None:
            break
        i = ranks.index(best)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
        del ranks[i]
        if i > 0:
            ranks[i - 1] = rank(parts[i - 1], parts[i])
        if i < len(ranks):
            ranks[i] = rank(parts[i], parts[i + 1])
    return parts


def find_last_merge(symbols: list[Part], rank_of: dict[Part, float]) -> tuple[Part, Part] | None:
    """Return the last two tokens that merge into a token of `symbols`; None if merging cannot make the token.

    tiktoken and sentencepiece merge the neighbours whose product has the best rank.  Merges inside a token's
    text do not depend on the text around it, so a token always comes from the same pair.  A list of merges
    therefore needs only this pair.
    """
    parts = merge_parts(symbols, lambda a, b: rank_of.get(a + b), min_parts=2)
    return (parts[0], parts[1]) if len(parts) == 2 else None

"""Byte-pair merging of one short string, as every BPE library does it: the best pair first,
the leftmost of equal ones."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

Part = TypeVar("Part", str, bytes)


def merge_parts(parts: list[Part], rank: Callable[[Part, Part], float | None],
                at_least: int = 1) -> list[Part]:
    """Return what is left of `parts` when no two neighbours have a rank, or `at_least` are left; the lowest
    rank merges first."""
    parts = list(parts)
    ranks = [rank(a, b) for a, b in pairwise(parts)]
    while len(parts) > at_least:
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
    """Return the two tokens of which merging by products' ranks makes a token of `symbols`;
    None where it cannot make it.

    tiktoken and sentencepiece join the neighbours whose product ranks best, whatever the neighbours are.  As
    long as nothing inside a token's text has joined with anything outside, they do there exactly what they do
    to this text alone; so the token is always made of the same two, and listing this pair alone says the same
    as listing every way to cut it in two.
    """
    parts = merge_parts(symbols, lambda a, b: rank_of.get(a + b), at_least=2)
    return (parts[0], parts[1]) if len(parts) == 2 else None

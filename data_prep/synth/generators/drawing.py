"""Chance that follows from names alone: what is drawn for an item is the same in every run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def share_of(*names: object) -> float:
    """Return a number from 0 up to 1, evenly spread over names."""
    digest = hashlib.sha256(json.dumps(names).encode()).digest()
    # 53 bits, which a float holds exactly: always below 1
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)


def choose(choices: Sequence[T], *names: object) -> T:
    """Return one of some choices, each as often as the others over many names."""
    return choices[int(share_of(*names) * len(choices))]


def shuffled(choices: Sequence[T], *names: object) -> list[T]:
    """Return choices in an order that follows from names."""
    order = sorted(range(len(choices)), key=lambda place: share_of(*names, place))
    return [choices[place] for place in order]


class Draws:
    """One choice after the other, for what cannot name each of them."""

    def __init__(self, *names: object) -> None:
        """`names`: what the stream is drawn for, such as an item's id and an attempt's number."""
        self._names, self._count = names, 0

    def share(self) -> float:
        """Return the next number from 0 up to 1."""
        self._count += 1
        return share_of(*self._names, self._count)

    def below(self, number: int) -> int:
        """Return the next whole number from 0 to `number` - 1; `number` must be positive."""
        return int(self.share() * number)

    def one(self, of: Sequence[T]) -> T:
        return of[self.below(len(of))]

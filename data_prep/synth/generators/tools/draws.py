"""Choices that follow from a name alone: the same in every process and with every version of Python."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draws:
    """A stream of choices."""

    def __init__(self, *names: object) -> None:
        """`names`: what the stream is drawn for, such as an item's id and an attempt's number."""
        self._name = "\x1f".join(map(str, names))
        self._count = 0

    def below(self, number: int) -> int:
        """Return a whole number from 0 to `number` - 1; `number` must be positive."""
        self._count += 1
        digest = hashlib.sha256(f"{self._name}\x1e{self._count}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % number

    def share(self) -> float:
        """Return a number from 0 to 1, without 1."""
        return self.below(1 << 53) / (1 << 53)

    def one(self, of: Sequence[T]) -> T:
        """Return one of several."""
        return of[self.below(len(of))]

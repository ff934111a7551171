"""A stream of choices that follows from a name alone."""

from __future__ import annotations

from collections.abc import Sequence

from data_prep.synth.generators.drawing import T, share_of


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
        """Return one of several."""
        return of[self.below(len(of))]

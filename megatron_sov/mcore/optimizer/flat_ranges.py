"""Ranges of the elements of a flattened tensor, as rectangles of the tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

Rectangle = tuple[tuple[int, ...], tuple[int, ...]]
"""(first index, extent)."""


def flat_ranges(shape: Sequence[int], start: int, stop: int) -> Iterator[Rectangle]:
    """Cut the elements [start, stop) of a row-major tensor into at most 2 * axes - 1 rectangles.

    They come in the order of the elements: the end of a row, whole rows, the beginning of a row,
    and so on inwards.
    """
    if stop <= start:
        return
    row = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if head and first == last:
        yield from _in_row(shape, first, head, tail)
        return
    if head:
        yield from _in_row(shape, first, head, row)
        first += 1
    if first < last:
        yield (first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:])
    if tail:
        yield from _in_row(shape, last, 0, tail)


def _in_row(shape: Sequence[int], index: int, start: int, stop: int) -> Iterator[Rectangle]:
    for place, extent in flat_ranges(shape[1:], start, stop):
        yield (index, *place), (1, *extent)

"""Any block of a global tensor, put together from the pieces that overlap it, wherever these stand."""

from __future__ import annotations

import bisect
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megatron_sov.base.errors import UserError

MAX_CELLS_PER_PIECE = 64
"""Of the grid that pieces cut a tensor into: real ones form it themselves, and made-up ones shall not fill
the memory."""
MAX_OWNERS = 4
"""Of a cell, on average: each has one, and what is more is only counted to be told."""


@dataclasses.dataclass(frozen=True)
class StoredBlock:
    """One block of a global tensor, as it stands in a file."""

    file: str
    """File relative to the checkpoint folder."""
    name: str
    """Name inside the file."""
    offset: tuple[int, ...]
    """First index of the block in the global tensor."""
    shape: tuple[int, ...]
    """Extent of the block."""


def owners(shape: Sequence[int], pieces: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return how many pieces own each cell of the grid that is cut wherever a piece begins or ends.

    Raises:
        ValueError: a piece reaches beyond the tensor, they are cut in a way that no layout cuts, or they
            stand one upon another so often that counting would take the square of their number.
    """
    spans = [[(o, o + n) for o, n in zip(p["offset"], p["shape"], strict=True)] for p in pieces]
    if any(a < 0 or b > n for span in spans for (a, b), n in zip(span, shape, strict=True)):
        raise ValueError(f"a block reaches beyond its tensor of shape {list(shape)}")
    # along each axis the cuts of all pieces: inside one cell of this grid every element has the same owners
    cuts = [sorted({0, n, *(c for span in spans for c in span[axis])}) for axis, n in enumerate(shape)]
    if math.prod(len(c) - 1 for c in cuts) > MAX_CELLS_PER_PIECE * (len(pieces) + MAX_CELLS_PER_PIECE):
        raise ValueError(f"its {len(pieces)} blocks are cut in a way that no layout cuts")
    cell_of = [{c: i for i, c in enumerate(axis)} for axis in cuts]
    found = np.zeros([len(c) - 1 for c in cuts], np.int32)
    num_counted = 0
    for span in spans:
        places = [slice(cells[a], cells[b]) for (a, b), cells in zip(span, cell_of, strict=True)]
        # an index is foreign: pieces that all cover everything would make this loop quadratic in their number
        num_counted += math.prod(place.stop - place.start for place in places)
        if num_counted > MAX_OWNERS * found.size:
            raise ValueError(f"its {len(pieces)} blocks stand one upon another")
        found[tuple(places)] += 1
    return found


class Assembled(ABC):
    """Tensors that stand in pieces."""

    def __init__(self, where: object, shapes: Mapping[str, tuple[int, ...]],
                 dtypes: Mapping[str, torch.dtype], pieces: Mapping[str, Sequence[StoredBlock]],
                 remedy: str) -> None:
        """Take what an index says.

        Args:
            where: folder, for messages.
            shapes: key -> global shape.
            dtypes: key -> dtype.
            pieces: key -> its pieces.
            remedy: how a message about damage ends.
        """
        self._where, self._remedy = where, remedy
        self._shapes, self._dtypes = dict(shapes), dict(dtypes)
        self._pieces = {key: sorted(found, key=lambda p: p.offset) for key, found in pieces.items()}
        self._first = {key: [p.offset[0] if p.offset else 0 for p in found]
                       for key, found in self._pieces.items()}
        self._longest = {key: max((p.shape[0] for p in found if p.shape), default=0)
                         for key, found in self._pieces.items()}

    @abstractmethod
    def slice_of(self, key: str, piece: StoredBlock, block: tuple[slice, ...]) -> torch.Tensor:
        """Return the part of a piece that the slices cut out of it.

        Raises:
            UserError: its file is missing or damaged.
        """

    def check_complete(self) -> None:
        """Check, from the index alone, that every element of every tensor stands in exactly one piece.

        Raises:
            UserError: a part of a tensor is missing, or stands there twice; the message names it.
        """
        for key, pieces in self._pieces.items():
            try:
                found = owners(self._shapes[key], [dataclasses.asdict(p) for p in pieces])
            except ValueError as e:
                raise UserError(f"{self._where}: {key}: {e}; {self._remedy}") from None
            if (found != 1).any():
                what = "is missing" if (found < 1).any() else "stands in several pieces"
                raise UserError(
                    f"{self._where}: a part of {key} {list(self._shapes[key])} {what} (the pieces begin at "
                    f"{', '.join(str(p.offset) for p in pieces[:8])}{' ...' if len(pieces) > 8 else ''}); "
                    f"{self._remedy}")

    def keys(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._shapes)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's global shape."""
        return self._shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        """Return a tensor's dtype."""
        return self._dtypes[key]

    def held_in(self, file: str) -> list[str]:
        """Return the tensors of which a file (its path below the checkpoint's folder) holds a piece."""
        return [key for key, pieces in self._pieces.items() if any(piece.file == file for piece in pieces)]

    def files_of(self, key: str) -> set[str]:
        """Return the files (their paths below the checkpoint's folder) that hold a piece of a tensor."""
        return {piece.file for piece in self._pieces[key]}

    def read(self, key: str, offset: Sequence[int] | None = None,
             shape: Sequence[int] | None = None) -> torch.Tensor:
        """Return the block of `shape` at `offset` (default: the whole tensor),
        assembled from the pieces that overlap it.

        Raises:
            UserError: a file is missing or damaged, or no piece holds a part of the block.
        """
        extent = tuple(shape) if shape is not None else self._shapes[key]
        start = tuple(offset) if offset is not None else (0,) * len(extent)
        near = self._near(key, start, extent)
        for piece in near:
            if (piece.offset, piece.shape) == (start, extent):
                # as it stands in its file, with no copy
                return self.slice_of(key, piece, tuple(slice(0, n) for n in extent))
        out = torch.empty(extent, dtype=self._dtypes[key])
        found = 0
        for piece in near:
            low = [max(a, b) for a, b in zip(start, piece.offset, strict=True)]
            high = [min(a + n, b + m)
                    for a, n, b, m in zip(start, extent, piece.offset, piece.shape, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                here = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, start, strict=True))
                there = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, piece.offset, strict=True))
                out[here] = self.slice_of(key, piece, there)
                # pieces do not overlap (`check_complete`), so counting elements is enough to see a hole
                found += math.prod(b - a for a, b in zip(low, high, strict=True))
        if found != out.numel():
            raise UserError(f"{self._where}: {key} is damaged (its index holds {found} of the {out.numel()} "
                            f"elements at {start}); {self._remedy}")
        return out

    def _near(self, key: str, start: tuple[int, ...], extent: tuple[int, ...]) -> Sequence[StoredBlock]:
        """Return the pieces that can overlap a block along its first axis: of a tensor that holds all layers,
        or all experts, they are few."""
        if not start:
            return self._pieces[key]
        first = self._first[key]
        # a piece that begins before the block can reach into it only if it is long enough; `_longest` bounds
        # that
        low = bisect.bisect_right(first, start[0] - self._longest[key])
        return self._pieces[key][low:bisect.bisect_left(first, start[0] + extent[0])]

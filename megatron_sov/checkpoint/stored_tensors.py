"""Read any block of a global tensor by copying from overlapping stored pieces, the shards of the layout that
saved the checkpoint."""

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
"""Maximum grid cells per stored piece: a crafted index must not exhaust memory. This project's layouts cut
tensors into regular grids with a cell per piece."""
MAX_OWNERS = 4
"""Maximum mean number of pieces that cover a cell; a valid index has exactly 1."""


@dataclasses.dataclass(frozen=True)
class StoredBlock:
    """A block of a global tensor, stored as a named tensor in a file."""

    file: str
    """File relative to the checkpoint folder."""
    name: str
    """Name inside the file."""
    offset: tuple[int, ...]
    """First index in the global tensor, per axis."""
    shape: tuple[int, ...]
    """Extent per axis."""


def count_owners(shape: Sequence[int], pieces: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Count the pieces that cover each cell of a grid, whose lines are the boundaries of all pieces.

    Returns int32 counts, with the axes of `shape`. Raises `ValueError`: a piece exceeds `shape`, the grid has
    more than `MAX_CELLS_PER_PIECE` cells per piece, or pieces overlap more than `MAX_OWNERS` times in the
    mean.
    """
    ranges = []  # [pieces][axes] of (start, stop)
    boundaries = [{0, size} for size in shape]
    for piece in pieces:
        ranges.append([(start, start + size)
                       for start, size in zip(piece["offset"], piece["shape"], strict=True)])
        for (start, stop), size, axis_boundaries in zip(ranges[-1], shape, boundaries, strict=True):
            if start < 0 or stop > size:
                raise ValueError(f"a block reaches beyond its tensor of shape {list(shape)}")
            axis_boundaries |= {start, stop}
    grid_shape = [len(axis_boundaries) - 1 for axis_boundaries in boundaries]
    if math.prod(grid_shape) > MAX_CELLS_PER_PIECE * (len(pieces) + MAX_CELLS_PER_PIECE):
        raise ValueError(f"its {len(pieces)} blocks are cut in a way that no layout cuts")
    # The same pieces cover every element of a cell, so a count per cell is enough.
    cell_indices = [{boundary: i for i, boundary in enumerate(sorted(axis))} for axis in boundaries]
    num_owners = np.zeros(grid_shape, np.int32)
    num_counted = 0
    for piece_ranges in ranges:
        cells = [slice(indices[start], indices[stop])
                 for (start, stop), indices in zip(piece_ranges, cell_indices, strict=True)]
        # The index is untrusted: fully overlapping pieces would make this loop quadratic.
        num_counted += math.prod(cell.stop - cell.start for cell in cells)
        if num_counted > MAX_OWNERS * num_owners.size:
            raise ValueError(f"its {len(pieces)} blocks overlap")
        num_owners[tuple(cells)] += 1
    return num_owners


def _get_slices(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(first - zero, end - zero) for first, end, zero in zip(low, high, origin, strict=True))


class StoredTensors(ABC):
    """Tensors stored in pieces, indexed by key. Subclasses read a piece.

    Args:
        where: checkpoint folder, for error messages.
        shapes: key -> global shape.
        dtypes: key -> dtype.
        pieces: key -> stored pieces.
        remedy: advice that ends every error message about damage.
    """

    def __init__(self, where: object, shapes: Mapping[str, tuple[int, ...]],
                 dtypes: Mapping[str, torch.dtype], pieces: Mapping[str, Sequence[StoredBlock]],
                 remedy: str) -> None:
        self._where, self._remedy = where, remedy
        self._shapes, self._dtypes = dict(shapes), dict(dtypes)
        self._pieces = {key: sorted(blocks, key=lambda p: p.offset) for key, blocks in pieces.items()}
        self._first_indices = {key: [p.offset[0] if p.offset else 0 for p in blocks]
                               for key, blocks in self._pieces.items()}
        self._longest_extents = {key: max((p.shape[0] for p in blocks if p.shape), default=0)
                                 for key, blocks in self._pieces.items()}

    @abstractmethod
    def read_slice(self, key: str, piece: StoredBlock, block: tuple[slice, ...]) -> torch.Tensor:
        """Read `block` (slices) of a stored piece. Raises `UserError`: the file is missing or damaged."""

    def check_complete(self) -> None:
        """Check, from the index alone, that a tensor's pieces cover every element exactly once. Raises
        `UserError`: an element has no piece or several pieces; the message names the tensor."""
        for key, pieces in self._pieces.items():
            try:
                num_owners = count_owners(self._shapes[key], [dataclasses.asdict(p) for p in pieces])
            except ValueError as e:
                raise UserError(f"{self._where}: {key}: {e}; {self._remedy}") from None
            if (num_owners != 1).any():
                problem = "is missing" if (num_owners < 1).any() else "is stored in several pieces"
                raise UserError(
                    f"{self._where}: a part of {key} {list(self._shapes[key])} {problem} (the pieces begin "
                    f"at {', '.join(str(p.offset) for p in pieces[:8])}{' ...' if len(pieces) > 8 else ''}); "
                    f"{self._remedy}")

    def keys(self) -> list[str]:
        return list(self._shapes)

    def get_shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key]

    def get_dtype(self, key: str) -> torch.dtype:
        return self._dtypes[key]

    def list_keys_in(self, file: str) -> list[str]:
        """Return the keys with a piece in `file` (path relative to the checkpoint folder)."""
        return [key for key, pieces in self._pieces.items() if any(piece.file == file for piece in pieces)]

    def list_files(self, key: str, offset: Sequence[int] | None = None,
                   shape: Sequence[int] | None = None) -> set[str]:
        """Return the files (paths relative to the checkpoint folder) that `read` may open for a block."""
        return {piece.file for piece in self._find_candidates(key, *self._locate(key, offset, shape))}

    def read(self, key: str, offset: Sequence[int] | None = None,
             shape: Sequence[int] | None = None) -> torch.Tensor:
        """Return the block of `shape` at `offset` (default: the whole tensor), copied from overlapping
        pieces. Raises `UserError`: a file is missing or damaged, or the pieces do not cover the block."""
        start, extent = self._locate(key, offset, shape)
        candidates = self._find_candidates(key, start, extent)
        for piece in candidates:
            if (piece.offset, piece.shape) == (start, extent):
                # the piece equals the block: return the tensor without a copy
                return self.read_slice(key, piece, tuple(slice(0, n) for n in extent))
        out = torch.empty(extent, dtype=self._dtypes[key])
        num_read = 0
        for piece in candidates:
            # Intersection of block and piece, in indices of the global tensor.
            low = [max(first, piece_first) for first, piece_first in zip(start, piece.offset, strict=True)]
            high = [min(first + size, piece_first + piece_size) for first, size, piece_first, piece_size
                    in zip(start, extent, piece.offset, piece.shape, strict=True)]
            if all(first < end for first, end in zip(low, high, strict=True)):
                values = self.read_slice(key, piece, _get_slices(low, high, piece.offset))
                out[_get_slices(low, high, start)] = values
                # Pieces do not overlap (`check_complete`), so the element count is enough to detect a hole.
                num_read += math.prod(end - first for first, end in zip(low, high, strict=True))
        if num_read != out.numel():
            raise UserError(f"{self._where}: {key} is damaged (the index covers {num_read} of the "
                            f"{out.numel()} elements at {start}); {self._remedy}")
        return out

    def _locate(self, key: str, offset: Sequence[int] | None, shape: Sequence[int] | None
                ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return offset and shape of a block; the whole tensor by default."""
        extent = tuple(shape) if shape is not None else self._shapes[key]
        return tuple(offset) if offset is not None else (0,) * len(extent), extent

    def _find_candidates(self, key: str, start: tuple[int, ...],
                         extent: tuple[int, ...]) -> Sequence[StoredBlock]:
        """Return pieces that can overlap a block along the first axis (layers or experts)."""
        if not start:
            return self._pieces[key]
        first = self._first_indices[key]
        # a piece that starts before the block overlaps the block only if long enough
        low = bisect.bisect_right(first, start[0] - self._longest_extents[key])
        return self._pieces[key][low:bisect.bisect_left(first, start[0] + extent[0])]

"""Tensors on disk that belong to no layout: blocks of global tensors in safetensors files, with a JSON index.

Every process writes the blocks that it owns, each with its place in the global tensor; a reader asks for any block of any
tensor and gets it assembled from the pieces that overlap it.  Nothing is pickled, so foreign files can do no harm.

A part ("model", "optimizer") of a checkpoint folder is `PART/RANGE/rank-R-FILE.safetensors` plus `PART.index.json`:
``{key: {"dtype", "shape", "pieces": [{"file", "name", "offset", "shape"}]}}``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_sov.artifacts import atomic_write, fsync_path
from megatron_sov.errors import UserError

MAX_FILE_BYTES = 4 << 30
RANKS_PER_FOLDER = 256
MAX_OPEN_FILES = 64
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64,
                                                     torch.int32, torch.uint8, torch.bool)}
Index = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Piece:
    """One block of a global tensor, as it stands in a file."""

    file: str
    """File relative to the checkpoint folder."""
    name: str
    """Name inside the file."""
    offset: tuple[int, ...]
    """First index of the block in the global tensor."""
    shape: tuple[int, ...]
    """Extent of the block."""


class TensorWriter:
    """Collects one process's blocks and writes them to files of at most `MAX_FILE_BYTES`."""

    def __init__(self, folder: Path, part: str, rank: int = 0) -> None:
        self.folder, self.part, self.rank = folder, part, rank
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._files = 0
        self._index: Index = {}

    def add(self, key: str, block: torch.Tensor, global_shape: Sequence[int] | None = None,
            offset: Sequence[int] | None = None) -> None:
        """Add the block of tensor `key` that starts at `offset`; without shape and offset it is the whole tensor."""
        shape = tuple(global_shape) if global_shape is not None else tuple(block.shape)
        start = tuple(offset) if offset is not None else (0,) * len(shape)
        extent = (1,) * (len(shape) - block.dim()) + tuple(block.shape)
        size_bytes = block.numel() * block.element_size()
        if self._pending and self._pending_bytes + size_bytes > MAX_FILE_BYTES:
            self.flush()
        name = f"{key}@{','.join(map(str, start))}"
        if name in self._pending:
            raise ValueError(f"{name}: the same block was added twice")
        self._pending[name] = block.detach().cpu().contiguous()
        self._pending_bytes += size_bytes
        dtype = str(block.dtype).removeprefix("torch.")
        entry = self._index.setdefault(key, {"dtype": dtype, "shape": list(shape), "pieces": []})
        entry["pieces"].append({"file": self._next_file(), "name": name, "offset": list(start), "shape": list(extent)})

    def _next_file(self) -> str:
        group = self.rank // RANKS_PER_FOLDER
        return f"{self.part}/{group:05d}/rank-{self.rank:05d}-{self._files:05d}.safetensors"

    def flush(self) -> None:
        """Write the collected blocks to their file and sync it.

        Raises:
            OSError: the disk is full or refuses.
        """
        if self._pending:
            path = self.folder / self._next_file()
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                save_file(self._pending, path)
            except SafetensorError as e:  # how safetensors reports a full disk
                raise OSError(f"{path}: {e}") from e
            fsync_path(path)
            self._pending, self._pending_bytes = {}, 0
            self._files += 1

    def finish(self) -> Index:
        """Write what is left and return this process's index."""
        self.flush()
        return self._index


def write_index(folder: Path, part: str, indices: Sequence[Index]) -> None:
    """Merge the processes' indices and write `PART.index.json`; every element must be owned by exactly one block.

    Raises:
        ValueError: two processes disagree on a tensor, or its blocks do not cover it exactly.
    """
    merged: Index = {}
    for index in indices:
        for key, entry in index.items():
            known = merged.setdefault(key, {**entry, "pieces": []})
            if known["shape"] != entry["shape"] or known["dtype"] != entry["dtype"]:
                raise ValueError(f"{key}: written as {known['dtype']} {known['shape']} and as {entry['dtype']} {entry['shape']}")
            known["pieces"] += entry["pieces"]
    for key, entry in merged.items():
        owners = _owners(entry["shape"], entry["pieces"])
        if (owners != 1).any():
            raise ValueError(f"{key}: parts of the tensor {entry['shape']} are owned by {owners.min()} blocks and parts by "
                             f"{owners.max()}, each must be owned by 1")
    atomic_write(folder / f"{part}.index.json", json.dumps(merged))


def _owners(shape: Sequence[int], pieces: Sequence[dict[str, Any]]) -> np.ndarray:
    """Return how many pieces own each cell of the grid that is cut wherever a piece begins or ends.

    Raises:
        ValueError: a piece reaches beyond the tensor.
    """
    spans = [[(o, o + n) for o, n in zip(p["offset"], p["shape"], strict=True)] for p in pieces]
    if any(a < 0 or b > n for span in spans for (a, b), n in zip(span, shape, strict=True)):
        raise ValueError(f"a block reaches beyond its tensor of shape {list(shape)}")
    cuts = [sorted({0, n, *(c for span in spans for c in span[axis])}) for axis, n in enumerate(shape)]
    cell_of = [{c: i for i, c in enumerate(axis)} for axis in cuts]
    owners = np.zeros([len(c) - 1 for c in cuts], np.int32)
    for span in spans:
        owners[tuple(slice(cells[a], cells[b]) for (a, b), cells in zip(span, cell_of, strict=True))] += 1
    return owners


class TensorReader:
    """Reads any block of any tensor of one part of a checkpoint."""

    def __init__(self, folder: str | Path, part: str = "model") -> None:
        self.folder = Path(folder)
        self._files: dict[str, Any] = {}
        file = self.folder / f"{part}.index.json"
        try:
            raw = json.loads(file.read_text())
            self._shapes = {k: tuple(e["shape"]) for k, e in raw.items()}
            self._dtypes = {k: _DTYPES[e["dtype"]] for k, e in raw.items()}
            self._pieces = {k: [Piece(p["file"], p["name"], tuple(p["offset"]), tuple(p["shape"])) for p in e["pieces"]]
                            for k, e in raw.items()}
        except FileNotFoundError:
            raise UserError(f"{self.folder}: has no {part}.index.json, so it holds no '{part}' tensors") from None
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{file}: is damaged ({e}); use an earlier checkpoint") from None

    def keys(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._shapes)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's global shape."""
        return self._shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        """Return a tensor's dtype."""
        return self._dtypes[key]

    def read(self, key: str, offset: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> torch.Tensor:
        """Return the block of `shape` at `offset` (default: the whole tensor), assembled from the pieces that overlap it.

        Raises:
            UserError: a file is missing or damaged, or no piece holds a part of the block.
        """
        extent = tuple(shape) if shape is not None else self._shapes[key]
        start = tuple(offset) if offset is not None else (0,) * len(extent)
        out = torch.empty(extent, dtype=self._dtypes[key])
        found = 0
        for piece in self._pieces[key]:
            low = [max(a, b) for a, b in zip(start, piece.offset, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(start, extent, piece.offset, piece.shape, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                here = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, start, strict=True))
                there = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, piece.offset, strict=True))
                out[here] = self._slice(piece, there)
                found += math.prod(b - a for a, b in zip(low, high, strict=True))
        if found != out.numel():
            raise UserError(f"{self.folder}: {key} is damaged (its index holds {found} of the {out.numel()} elements "
                            f"at {start}); use an earlier checkpoint")
        return out

    def _open(self, file: str) -> Any:
        if file not in self._files:
            if len(self._files) >= MAX_OPEN_FILES:
                self._files.pop(next(iter(self._files)))
            self._files[file] = safe_open(self.folder / file, framework="pt")
        return self._files[file]

    def _slice(self, piece: Piece, block: tuple[slice, ...]) -> torch.Tensor:
        path = self.folder / piece.file
        try:
            view = self._open(piece.file).get_slice(piece.name)
            missing_axes = len(piece.shape) - len(view.get_shape())
            inner = view[block[missing_axes:]] if block[missing_axes:] else view[...]
            return inner.reshape(tuple(s.stop - s.start for s in block))
        except (OSError, SafetensorError) as e:
            raise UserError(f"{path}: cannot be read ({e}); use an earlier checkpoint") from None

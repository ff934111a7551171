"""Tensors on disk that belong to no layout: blocks of global tensors in safetensors files, with a JSON index.

Every process writes the blocks that it owns, each with its place in the global tensor; a reader asks for any
block of any tensor and gets it assembled from the pieces that overlap it.  Nothing is pickled, so foreign
files can do no harm.

A part ("model", "optimizer") of a checkpoint folder is `PART/RANGE/rank-R-FILE.safetensors` plus
`PART.index.json`: ``{key: {"dtype", "shape", "pieces": [{"file", "name", "offset", "shape"}]}}``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from megatron_sov.base.artifacts import FileRecord, atomic_write
from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint.assembling import Assembled, StoredBlock, owners
from megatron_sov.checkpoint.writer import TensorFile, TensorSpec, write_file

MAX_FILE_BYTES = 4 << 30
RANKS_PER_FOLDER = 256
REMEDY = "use an earlier checkpoint"
_DTYPES = {str(d).removeprefix("torch."): d
           for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32,
                     torch.uint8, torch.bool)}
Index = dict[str, dict[str, Any]]


def file_name(part: str, rank: int, number: int) -> str:
    """Return the place, in a checkpoint's folder, of the file `number` that a process writes of a part."""
    return f"{part}/{rank // RANKS_PER_FOLDER:05d}/rank-{rank:05d}-{number:05d}.safetensors"


def block_name(key: str, offset: Sequence[int]) -> str:
    """Return the name inside a file of the block of tensor `key` that begins at `offset`."""
    return f"{key}@{','.join(map(str, offset))}"


def add_block(index: Index, key: str, dtype: torch.dtype, shape: Sequence[int], piece: StoredBlock) -> None:
    """Enter a block of the tensor `key` (of global `shape`) into an index."""
    entry = index.setdefault(key, {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape),
                                   "pieces": []})
    entry["pieces"].append({"file": piece.file, "name": piece.name, "offset": list(piece.offset),
                            "shape": list(piece.shape)})


class TensorWriter:
    """Collects one process's blocks and writes them to files of at most `MAX_FILE_BYTES`."""

    def __init__(self, folder: Path, part: str, rank: int = 0, first_file: int = 0) -> None:
        self.folder, self.part, self.rank = folder, part, rank
        self.files: dict[str, FileRecord] = {}
        """What has been written: file relative to the folder -> its record."""
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._number = first_file
        self._index: Index = {}

    def add(self, key: str, block: torch.Tensor, global_shape: Sequence[int] | None = None,
            offset: Sequence[int] | None = None) -> None:
        """Add the block of tensor `key` that starts at `offset`; without shape and offset it
        is the whole tensor.

        A contiguous CPU tensor is not copied: it must stay as it is until the next `flush`.
        """
        shape = tuple(global_shape) if global_shape is not None else tuple(block.shape)
        start = tuple(offset) if offset is not None else (0,) * len(shape)
        # a layer or an expert of a stack has fewer axes than the stack: it is a block of extent 1 along these
        extent = (1,) * (len(shape) - block.dim()) + tuple(block.shape)
        size_bytes = block.numel() * block.element_size()
        if self._pending and self._pending_bytes + size_bytes > MAX_FILE_BYTES:
            self.flush()
        name = block_name(key, start)
        if name in self._pending:
            raise ValueError(f"{name}: the same block was added twice")
        self._pending[name] = block.detach().cpu().contiguous()
        self._pending_bytes += size_bytes
        add_block(self._index, key, block.dtype, shape, StoredBlock(self._next_file(), name, start, extent))

    def _next_file(self) -> str:
        return file_name(self.part, self.rank, self._number)

    def flush(self) -> None:
        """Write the collected blocks to their file and sync it.

        Raises:
            OSError: the disk is full or refuses.
        """
        if self._pending:
            path = self.folder / self._next_file()
            path.parent.mkdir(parents=True, exist_ok=True)
            specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in self._pending.items()]
            pending = self._pending
            self.files[self._next_file()] = write_file(path, specs, lambda spec: pending[spec.name])
            self._pending, self._pending_bytes = {}, 0
            self._number += 1

    def finish(self) -> Index:
        """Write what is left and return this process's index."""
        self.flush()
        return self._index


def write_index(folder: Path, part: str, indices: Sequence[Index]) -> None:
    """Merge the processes' indices and write `PART.index.json`; every element must be owned by
    exactly one block.

    Raises:
        ValueError: two processes disagree on a tensor, or its blocks do not cover it exactly.
    """
    merged: Index = {}
    for index in indices:
        for key, entry in index.items():
            known = merged.setdefault(key, {**entry, "pieces": []})
            if known["shape"] != entry["shape"] or known["dtype"] != entry["dtype"]:
                raise ValueError(f"{key}: written as {known['dtype']} {known['shape']} and as "
                                 f"{entry['dtype']} {entry['shape']}")
            known["pieces"] += entry["pieces"]
    for key, entry in merged.items():
        # before the index is written: a checkpoint with a hole must not get its name
        found = owners(entry["shape"], entry["pieces"])
        if (found != 1).any():
            raise ValueError(f"{key}: parts of the tensor {entry['shape']} are owned by {found.min()} "
                             f"blocks and parts by {found.max()}, each must be owned by 1")
    atomic_write(folder / f"{part}.index.json", json.dumps(merged))


def _sizes(value: Any) -> tuple[int, ...]:
    """Return a shape or an offset of an index; ValueError where it is none."""
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        raise ValueError(f"{str(value)[:80]} is no list of sizes")
    return tuple(value)


def _read_piece(raw: Any, axes: int) -> StoredBlock:
    """Return a piece of an index; ValueError where it is none of a tensor with so many axes."""
    block = StoredBlock(raw["file"], raw["name"], _sizes(raw["offset"]), _sizes(raw["shape"]))
    if not (isinstance(block.file, str) and isinstance(block.name, str)
            and len(block.offset) == len(block.shape) == axes):
        raise ValueError(f"{str(raw)[:200]} is no piece of a tensor with {axes} axes")
    return block


class TensorReader(Assembled):
    """Reads any block of any tensor of one part of a checkpoint."""

    def __init__(self, folder: str | Path, part: str = "model") -> None:
        self.folder = Path(folder)
        self._files: dict[str, TensorFile] = {}
        file = self.folder / f"{part}.index.json"
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            shapes = {k: _sizes(e["shape"]) for k, e in raw.items()}
            dtypes = {k: _DTYPES[e["dtype"]] for k, e in raw.items()}
            pieces = {k: [_read_piece(p, len(shapes[k])) for p in e["pieces"]] for k, e in raw.items()}
            _refuse_foreign_paths(file, pieces)
        except FileNotFoundError:
            raise UserError(f"{self.folder}: has no {part}.index.json, "
                            f"so it holds no '{part}' tensors") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise UserError(f"{file}: is damaged ({e}); {REMEDY}") from None
        super().__init__(self.folder, shapes, dtypes, pieces, REMEDY)

    def slice_of(self, key: str, piece: StoredBlock, block: tuple[slice, ...]) -> torch.Tensor:
        """Return the part of a piece that the slices cut out of it."""
        if piece.file not in self._files:
            self._files[piece.file] = TensorFile(self.folder / piece.file, REMEDY)
        file = self._files[piece.file]
        found = file.entries.get(piece.name)
        if (found is None or math.prod(found.shape) != math.prod(piece.shape)
                or file.dtype(piece.name) != self.dtype(key)):
            holds = f"holds it as {found.dtype} {list(found.shape)}" if found else "lacks it"
            raise UserError(f"{file.path}: {key} at {piece.offset} is {self.dtype(key)} "
                            f"{list(piece.shape)} in the index, but the file {holds}; {REMEDY}")
        # the file has the block without its axes of extent 1
        missing_axes = len(piece.shape) - len(found.shape)
        return file.read(piece.name, block[missing_axes:]).reshape(tuple(s.stop - s.start for s in block))


def _refuse_foreign_paths(index: Path, pieces: Mapping[str, Sequence[StoredBlock]]) -> None:
    """Raise `UserError` where an index (the file, for the message) sends to a file that does not lie below
    it."""
    for key, found in pieces.items():
        for piece in found:
            parts = PurePosixPath(piece.file).parts
            if not parts or parts[0] == "/" or ".." in parts:
                raise UserError(f"{index}: {key} would stand in {piece.file}, which is not a file below "
                                f"the checkpoint's folder; {REMEDY}")

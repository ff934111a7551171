"""Write and read layout-independent tensors: blocks of global tensors in safetensors files, with a JSON
index.

Each process writes the blocks that it owns, together with their offsets in the global tensors. A reader asks
for any block of a tensor and copies it from the stored blocks that overlap it. Nothing is pickled, so an
untrusted checkpoint cannot run code.

A part (`model`, `optimizer`) of a checkpoint folder consists of `PART/RANGE/rank-R-FILE.safetensors` and
`PART.index.json`: ``{key: {"dtype", "shape", "pieces": [{"file", "name", "offset", "shape"}]}}``.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from megatron_sov.base.artifacts import FileRecord, write_atomically
from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint.safetensors_files import TensorFile, TensorSpec, write_tensors
from megatron_sov.checkpoint.stored_tensors import StoredBlock, StoredTensors, count_owners

MAX_FILE_BYTES = 4 << 30
"""Maximum size of a file, except for a file with a single larger block."""
RANKS_PER_FOLDER = 256
REMEDY = "use an earlier checkpoint"
"""Advice that ends every error message about damage."""
_DTYPES = {str(d).removeprefix("torch."): d
           for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32,
                     torch.uint8, torch.bool)}
Index = dict[str, dict[str, Any]]


class TensorWriter:
    """Buffers a process's blocks and writes files with at most `MAX_FILE_BYTES`."""

    def __init__(self, folder: Path, part: str, rank: int = 0, first_file: int = 0) -> None:
        self.folder, self.part, self.rank = folder, part, rank
        self.files: dict[str, FileRecord] = {}
        """Written files: path relative to `folder` -> record."""
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._number = first_file
        self._index: Index = {}

    def add(self, key: str, block: torch.Tensor, global_shape: Sequence[int] | None = None,
            offset: Sequence[int] | None = None) -> None:
        """Buffer the block of tensor `key` that starts at `offset`; by default `block` is the whole tensor.

        A contiguous CPU tensor is not copied, so it must not change before the next `flush`.
        """
        shape = tuple(global_shape) if global_shape is not None else tuple(block.shape)
        start = tuple(offset) if offset is not None else (0,) * len(shape)
        # a layer or expert has fewer axes than the stack: the extent along a missing axis is 1
        extent = (1,) * (len(shape) - block.dim()) + tuple(block.shape)
        size_bytes = block.numel() * block.element_size()
        if self._pending and self._pending_bytes + size_bytes > MAX_FILE_BYTES:
            self.flush()
        name = format_block_name(key, start)
        if name in self._pending:
            raise ValueError(f"{name}: the same block was added twice")
        self._pending[name] = block.detach().cpu().contiguous()
        self._pending_bytes += size_bytes
        add_index_entry(self._index, key, block.dtype, shape,
                        StoredBlock(self._next_file(), name, start, extent))

    def _next_file(self) -> str:
        return format_file_name(self.part, self.rank, self._number)

    def flush(self) -> None:
        """Write the buffered blocks to a file and sync it. Raises `OSError`: full or read-only disk."""
        if self._pending:
            path = self.folder / self._next_file()
            path.parent.mkdir(parents=True, exist_ok=True)
            specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in self._pending.items()]
            pending = self._pending
            self.files[self._next_file()] = write_tensors(path, specs, lambda spec: pending[spec.name])
            self._pending, self._pending_bytes = {}, 0
            self._number += 1

    def finish(self) -> Index:
        """Write the remaining blocks and return this process's index."""
        self.flush()
        return self._index


class TensorReader(StoredTensors):
    """Reads tensor blocks from a checkpoint part."""

    def __init__(self, folder: str | Path, part: str = "model") -> None:
        self.folder = Path(folder)
        self._files: dict[str, TensorFile] = {}
        file = self.folder / f"{part}.index.json"
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            shapes = {key: _parse_sizes(entry["shape"]) for key, entry in raw.items()}
            dtypes = {key: _DTYPES[entry["dtype"]] for key, entry in raw.items()}
            pieces = {key: [_parse_piece(piece, len(shapes[key])) for piece in entry["pieces"]]
                      for key, entry in raw.items()}
            _check_paths(file, pieces)
        except FileNotFoundError:
            raise UserError(f"{self.folder}: has no {part}.index.json, "
                            f"so it holds no '{part}' tensors") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise UserError(f"{file}: is damaged ({e}); {REMEDY}") from None
        super().__init__(self.folder, shapes, dtypes, pieces, REMEDY)

    def read_slice(self, key: str, piece: StoredBlock, block: tuple[slice, ...]) -> torch.Tensor:
        if piece.file not in self._files:
            self._files[piece.file] = TensorFile(self.folder / piece.file, REMEDY)
        file = self._files[piece.file]
        stored = file.entries.get(piece.name)
        if (stored is None or math.prod(stored.shape) != math.prod(piece.shape)
                or file.get_dtype(piece.name) != self.get_dtype(key)):
            problem = f"stores {stored.dtype} {list(stored.shape)}" if stored else "lacks it"
            raise UserError(f"{file.path}: {key} at {piece.offset} is {self.get_dtype(key)} "
                            f"{list(piece.shape)} in the index, but the file {problem}; {REMEDY}")
        # the file stores the block without leading axes of extent 1
        missing_axes = len(piece.shape) - len(stored.shape)
        return file.read(piece.name, block[missing_axes:]).reshape(tuple(s.stop - s.start for s in block))


def format_file_name(part: str, rank: int, number: int) -> str:
    """Return the path in the checkpoint folder for file `number` that `rank` writes for `part`."""
    return f"{part}/{rank // RANKS_PER_FOLDER:05d}/rank-{rank:05d}-{number:05d}.safetensors"


def format_block_name(key: str, offset: Sequence[int]) -> str:
    """Return the name, inside a safetensors file, for the block of tensor `key` at `offset`."""
    return f"{key}@{','.join(map(str, offset))}"


def add_index_entry(index: Index, key: str, dtype: torch.dtype, shape: Sequence[int],
                    piece: StoredBlock) -> None:
    """Append block `piece` to the `index` entry for tensor `key` (`shape`: global)."""
    entry = index.setdefault(key, {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape),
                                   "pieces": []})
    entry["pieces"].append({"file": piece.file, "name": piece.name, "offset": list(piece.offset),
                            "shape": list(piece.shape)})


def write_index(folder: Path, part: str, indices: Sequence[Index]) -> None:
    """Merge the processes' indices and write `PART.index.json`. Raises `ValueError`: two processes disagree
    on a tensor's dtype or shape, or the blocks of a tensor do not cover every element exactly once."""
    merged: Index = {}
    for index in indices:
        for key, entry in index.items():
            total = merged.setdefault(key, {**entry, "pieces": []})
            if total["shape"] != entry["shape"] or total["dtype"] != entry["dtype"]:
                raise ValueError(f"{key}: written as {total['dtype']} {total['shape']} and as "
                                 f"{entry['dtype']} {entry['shape']}")
            total["pieces"] += entry["pieces"]
    for key, entry in merged.items():
        # Check before writing: an incomplete checkpoint must not get an index.
        num_owners = count_owners(entry["shape"], entry["pieces"])
        if (num_owners != 1).any():
            raise ValueError(f"{key}: elements of the tensor {entry['shape']} are covered by "
                             f"{num_owners.min()} to {num_owners.max()} blocks, each must be covered by 1")
    write_atomically(folder / f"{part}.index.json", json.dumps(merged))


def _parse_sizes(value: Any) -> tuple[int, ...]:
    """Convert a JSON list to a tuple of sizes; raises ValueError for invalid sizes."""
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        raise ValueError(f"{str(value)[:80]} is not a list of sizes")
    return tuple(value)


def _parse_piece(raw: Any, axes: int) -> StoredBlock:
    """Convert a JSON object to a block with `axes` axes; raises ValueError, KeyError or TypeError."""
    block = StoredBlock(raw["file"], raw["name"], _parse_sizes(raw["offset"]), _parse_sizes(raw["shape"]))
    if not (isinstance(block.file, str) and isinstance(block.name, str)
            and len(block.offset) == len(block.shape) == axes):
        raise ValueError(f"{str(raw)[:200]} is not a piece of a tensor with {axes} axes")
    return block


def _check_paths(index: Path, pieces: Mapping[str, Sequence[StoredBlock]]) -> None:
    """Raise `UserError` if a piece points to a file outside the checkpoint folder."""
    for key, blocks in pieces.items():
        for piece in blocks:
            parts = PurePosixPath(piece.file).parts
            if not parts or parts[0] == "/" or ".." in parts:
                raise UserError(f"{index}: {key} points to {piece.file}, which is outside the checkpoint "
                                f"folder; {REMEDY}")

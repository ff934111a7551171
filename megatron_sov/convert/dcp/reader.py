"""Read tensor blocks of torch.distributed checkpoints (DCP), without unpickling their files."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import refuse_outside_link
from megatron_sov.checkpoint.safetensors_files import read_block
from megatron_sov.checkpoint.stored_tensors import StoredBlock, StoredTensors
from megatron_sov.convert.megatron.inert_pickle import REMEDY, TorchArchive
from megatron_sov.convert.sources import BlockWeights
from megatron_sov.model.families.weights import Link
from megatron_sov.model.pretrained import format_names

_CACHED_HEADERS = 4096
"""Cache size for parsed archive headers."""
MAX_READ_BYTES = 1 << 20
"""Maximum bytes per read from an archive's member list or header."""


@dataclass(frozen=True)
class DistTensor:
    """Where a tensor's bytes are stored."""

    path: Path
    start: int
    """File offset of the first byte."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, block: Sequence[slice]) -> torch.Tensor:
        """Read a block (slices with start and stop, one per axis); raises OSError."""
        return read_block(self.path, self.start, self.shape, block, self.dtype)


def find_tensor(path: Path, start: int, length_bytes: int) -> DistTensor:
    """Locate the tensor of a `torch.save` archive inside a file; raises OSError or ValueError."""
    with open(path, "rb") as file:
        if start + length_bytes > os.fstat(file.fileno()).st_size:
            raise ValueError("the file ends before it does")
        archive = TorchArchive(_TensorWindow(file, start, length_bytes))
        dtype, shape, first, _ = archive.locate_tensor(archive.header)
    return DistTensor(path, start + first, shape, getattr(torch, dtype))


class _TensorWindow(io.RawIOBase):
    """A byte range as a read-only file object."""

    def __init__(self, file: Any, start: int, length_bytes: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence])
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Read bytes; raises ValueError above `MAX_READ_BYTES`, more than a single-tensor archive needs."""
        if min(size if size >= 0 else self._length, self._length - self._at) > MAX_READ_BYTES:
            raise ValueError(f"its archive has a member list of more than {MAX_READ_BYTES:,} bytes")
        return super().read(min(size, MAX_READ_BYTES)) or b""

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._start + self._at)
        raw = self._file.read(count)
        buffer[:len(raw)] = raw
        self._at += len(raw)
        return len(raw)


class DistTensors(StoredTensors):
    """Tensors in a torch.distributed checkpoint."""

    def __init__(self, folder: Path, entries: Mapping[str, Sequence[Any]]) -> None:
        """Check that the files exist; `entries`: key -> [dtype, shape, pieces] (see `inert_pickle.Index`).
        Raises `UserError`: a file is missing, or a link out of the folder."""
        self.folder = folder
        super().__init__(
            folder, {key: tuple(shape) for key, (_, shape, _) in entries.items()},
            {key: getattr(torch, dtype) for key, (dtype, _, _) in entries.items()},
            {key: [StoredBlock(file, f"{start}:{length}", tuple(offset), tuple(extent))
                   for file, start, length, offset, extent in pieces]
             for key, (_, _, pieces) in entries.items()}, REMEDY)
        for file in {piece[0] for _, _, pieces in entries.values() for piece in pieces}:
            if not (folder / file).is_file():
                raise UserError(f"{folder / file}: is missing; according to the index it contains "
                                f"{format_names(self.list_keys_in(file))}; {REMEDY}")
            refuse_outside_link(folder, folder / file)
        self._find = functools.lru_cache(_CACHED_HEADERS)(self._find_uncached)

    def read_slice(self, key: str, piece: StoredBlock, block: tuple[slice, ...]) -> torch.Tensor:
        try:
            tensor = self._find(piece)
            missing_axes = len(piece.shape) - len(tensor.shape)
            if ((1,) * missing_axes + tensor.shape) != piece.shape or tensor.dtype != self.get_dtype(key):
                raise ValueError(f"it is {tensor.dtype} {list(tensor.shape)} there")
            return tensor.read(block[missing_axes:]).reshape(tuple(s.stop - s.start for s in block))
        except (OSError, ValueError) as e:
            raise UserError(f"{self.folder / piece.file}: the block of {key} {list(piece.shape)} at "
                            f"{list(piece.offset)} cannot be read ({e}); {REMEDY}") from None

    def _find_uncached(self, piece: StoredBlock) -> DistTensor:
        start, length = map(int, piece.name.split(":"))
        return find_tensor(self.folder / piece.file, start, length)


class DistWeights(BlockWeights):
    """Tensors in a torch.distributed checkpoint, split into Hugging Face tensors."""

    tensors: DistTensors

    def list_keys(self, link: Link) -> list[str]:
        """Return the stored tensors that hold a block."""
        raise NotImplementedError

    def get_dtype(self, name: str) -> torch.dtype:
        return self.tensors.get_dtype(self.list_keys(self._links_by_name[name])[0])

    def list_keys_in(self, file: str) -> list[str]:
        """Return the stored tensors with a block in `file`."""
        return self.tensors.list_keys_in(file)

    def list_files(self, name: str) -> set[str]:
        return {file for key in self.list_keys(self._links_by_name[name])
                for file in self.tensors.list_files(key)}

"""Media as training meets them: decoded once, side by side in one file that is mapped into memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.artifacts import atomic_write, disk_errors
from megatron_sov.errors import UserError
from megatron_sov.obs.work_bar import work_bar

Pictures = np.ndarray[Any, np.dtype[np.uint8]]
Read = Callable[[str], np.ndarray[Any, Any]]


def picture_bank(file: Path, names: Sequence[str], side_pixels: int, read: Read) -> Pictures:
    """Return pictures [n, 3, side, side], uint8; they are decoded where `file` does not hold them yet.

    Args:
        file: where they are kept.
        names: the pictures.
        side_pixels: height and width of all.
        read: returns one, uint8 [3, side, side], or raises `UserError` with its name.
    """
    shape = (len(names), 3, side_pixels, side_pixels)
    if not names:
        return np.zeros(shape, dtype=np.uint8)
    if not file.exists():
        _write(file, names, read, np.dtype(np.uint8))
    bank = np.memmap(file, dtype=np.uint8, mode="r")
    if bank.size != np.prod(shape):
        raise UserError(f"{file}: has {bank.size:,} bytes where {len(names):,} pictures have "
                        f"{int(np.prod(shape)):,}; delete {file.parent} to begin again")
    return bank.reshape(shape)


class SoundBank:
    """Sounds of one rate, one behind the other, as 16-bit samples.

    Args:
        file: where they are kept; they are decoded where it does not hold them yet.
        names: the sounds.
        read: returns one, float32 in -1..1, or raises `UserError` with its name.
    """

    def __init__(self, file: Path, names: Sequence[str], read: Read) -> None:
        lengths = file.with_suffix(".json")
        if names and not (file.exists() and lengths.exists()):
            counts = _write(file, names, lambda name: _as_int16(read(name)), np.dtype(np.int16))
            atomic_write(lengths, json.dumps(counts))
        counts = json.loads(lengths.read_text(encoding="utf-8")) if names else []
        self._ends = np.cumsum(np.asarray(counts, dtype=np.int64))
        self._samples = np.memmap(file, dtype=np.int16, mode="r") if names else np.zeros(0, np.int16)
        if len(self._ends) != len(names) or (names and self._ends[-1] != self._samples.size):
            raise UserError(f"{file}: does not hold the {len(names):,} sounds of this training; delete "
                            f"{file.parent} to begin again")

    def __len__(self) -> int:
        """Return the number of sounds."""
        return len(self._ends)

    def __getitem__(self, row: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return one sound, float32 in -1..1."""
        begin = int(self._ends[row - 1]) if row else 0
        return np.asarray(self._samples[begin:int(self._ends[row])], dtype=np.float32) / 32767


Sounds = SoundBank | Sequence[np.ndarray[Any, np.dtype[np.float32]]]
"""Sounds by row."""


def _as_int16(sound: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.round(np.clip(sound, -1, 1) * 32767).astype(np.int16)


def _write(file: Path, names: Sequence[str], read: Read, dtype: np.dtype[Any]) -> list[int]:
    """Write what `read` returns of each path to one file, which appears when it is whole; return how many
    items each had."""
    temporary, counts = file.with_name(f"{file.name}.tmp"), []
    with disk_errors(file), open(temporary, "wb") as out, work_bar("reading", len(names), "file") as bar:
        for name in names:
            items = np.ascontiguousarray(read(name), dtype=dtype)
            out.write(items.tobytes())
            counts.append(items.size)
            bar.update(1)
    temporary.rename(file)
    return counts

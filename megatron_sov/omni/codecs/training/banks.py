"""Media as training meets them: decoded once, side by side in one file that is mapped into memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from megatron_sov.base.artifacts import atomic_write, new_file
from megatron_sov.base.errors import UserError
from megatron_sov.work.progress.progress_bar import work_bar

# The media files that a codec is trained from, and which of them are held out.

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".opus")
"""Endings of files of a folder that are taken; a list may name any file."""
MAX_LIST_BYTES = 1 << 30
MAX_NAME_CHARACTERS = 4096


@dataclass(frozen=True)
class MediaFiles:
    """Files in a fixed order."""

    root: Path
    """Folder that names begin at."""
    train: tuple[str, ...]
    """Names of those that are learned from."""
    heldout: tuple[str, ...]
    """Of those that are looked at, and never learned from."""
    digest: str
    """Of names and sizes: media that were exchanged are another training."""


def media_files(given: Path, endings: tuple[str, ...], heldout_share: float) -> MediaFiles:
    """Return the files of a folder, below it too, or of a list with one path in each line.

    Paths of a list begin at the list's folder.  Which are held out is a function of their names; two files
    are enough for one on either side.

    Raises:
        UserError: there are none, or one does not exist.
    """
    root = given if given.is_dir() else given.parent
    if given.is_dir():
        names = sorted(p.relative_to(given).as_posix() for p in given.rglob("*")
                       if p.suffix.lower() in endings and p.is_file())
        if not names:
            raise UserError(f"--input {given}: has no file that ends with {', '.join(endings)}; pass the "
                            "folder that has the media, or a list of files")
    else:
        names = _listed(given)
    sizes = "".join(f"{name}\0{os.stat(root / name).st_size}\n" for name in names)
    num_heldout = min(len(names) - 1, max(1, round(heldout_share * len(names)))) if heldout_share else 0
    # by a hash: neighbours in a folder are alike, and should fall on both sides
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    out = set(ranked[:num_heldout])
    return MediaFiles(root, tuple(n for n in names if n not in out), tuple(n for n in names if n in out),
                      hashlib.sha256(sizes.encode()).hexdigest())


def _is_below(name: str) -> bool:
    """Return whether a name can be that of a file below a folder."""
    path = PurePosixPath(name)
    return ("\0" not in name and len(name) <= MAX_NAME_CHARACTERS and not path.is_absolute()
            and ".." not in path.parts)


def _listed(given: Path) -> list[str]:
    """Return the files that a list names, each once, by name."""
    try:
        if given.stat().st_size > MAX_LIST_BYTES:
            raise UserError(f"--input {given}: is larger than a list can be ({MAX_LIST_BYTES:,} bytes); pass "
                            "a folder of media or a list of their paths")
        lines = given.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--input {given}: is neither a folder nor a list of files "
                        f"({getattr(e, 'strerror', None) or 'it is no text'}); pass a folder of media, or a "
                        "text file with one path in each line") from None
    found: set[str] = set()
    for number, line in enumerate(lines, 1):
        if name := line.strip():
            found.add(name)
            if not _is_below(name) or not (given.parent / name).is_file():
                raise UserError(f"{given}:{number}: {name[:200]!r} is no file; write paths as they are seen "
                                f"from {given.parent}, one in each line")
    if not found:
        raise UserError(f"--input {given}: names no file; write one path in each line")
    return sorted(found)


Pictures = np.ndarray[Any, np.dtype[np.uint8]]
Ids = np.ndarray[Any, np.dtype[np.int32]]
Read = Callable[[str], np.ndarray[Any, Any]]


def picture_bank(file: Path, names: Sequence[str], side_pixels: int, read: Read) -> Pictures:
    """Return pictures [n, 3, side, side], uint8; they are decoded where `file` does not hold them yet.

    Args:
        file: where they are kept.
        names: the pictures.
        side_pixels: height and width of all.
        read: returns one, uint8 [3, side, side], or raises `UserError` with its name.
    """
    return _even(file, names, (3, side_pixels, side_pixels), np.dtype(np.uint8), read)


def id_bank(file: Path, names: Sequence[str], num_tokens: int, read: Read) -> Ids:
    """Return the tokens [n, num_tokens], int32, of pictures; `read` returns those of one (see
    `picture_bank`)."""
    return _even(file, names, (num_tokens,), np.dtype(np.int32), read)


def _even(file: Path, names: Sequence[str], shape: tuple[int, ...], dtype: np.dtype[Any],
          read: Read) -> np.ndarray[Any, Any]:
    """Return items of one shape; they are written where `file` does not hold them yet."""
    if not names:
        return np.zeros((0, *shape), dtype=dtype)
    if not file.exists():
        _write(file, names, read, dtype)
    bank, expected = np.memmap(file, dtype=dtype, mode="r"), len(names) * int(np.prod(shape))
    if bank.size != expected:
        raise UserError(f"{file}: has {bank.size:,} numbers where {len(names):,} pictures have {expected:,}; "
                        f"delete {file.parent} to begin again")
    return bank.reshape(len(names), *shape)


class Ragged:
    """Rows of any length, one behind the other.

    Args:
        file: where they are kept; they are written where it does not hold them yet.
        names: the media.
        read: returns one's row, or raises `UserError` with its name.
        dtype: of the numbers.
    """

    def __init__(self, file: Path, names: Sequence[str], read: Read, dtype: np.dtype[Any]) -> None:
        lengths = file.with_suffix(".json")
        if names and not (file.exists() and lengths.exists()):
            counts = _write(file, names, read, dtype)
            # behind the numbers: a kill in between leaves no lengths, and both are written again
            atomic_write(lengths, json.dumps(counts))
        counts = json.loads(lengths.read_text(encoding="utf-8")) if names else []
        self._ends = np.cumsum(np.asarray(counts, dtype=np.int64))
        self._numbers = np.memmap(file, dtype=dtype, mode="r") if names else np.zeros(0, dtype)
        if len(self._ends) != len(names) or (names and self._ends[-1] != self._numbers.size):
            raise UserError(f"{file}: does not hold the {len(names):,} sounds of this training; delete "
                            f"{file.parent} to begin again")

    def __len__(self) -> int:
        return len(self._ends)

    def row(self, row: int) -> np.ndarray[Any, Any]:
        """Return one of them, as it is kept."""
        begin = int(self._ends[row - 1]) if row else 0
        return np.asarray(self._numbers[begin:int(self._ends[row])])


class SoundBank(Ragged):
    """Sounds of one rate as 16-bit samples; `read` returns one, float32 in -1..1."""

    def __init__(self, file: Path, names: Sequence[str], read: Read) -> None:
        super().__init__(file, names, lambda name: _as_int16(read(name)), np.dtype(np.int16))

    def __getitem__(self, row: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return one sound, float32 in -1..1."""
        return self.row(row).astype(np.float32) / np.float32(32767)


Sounds = SoundBank | Sequence[np.ndarray[Any, np.dtype[np.float32]]]
"""Sounds by row."""


def _as_int16(sound: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.round(np.clip(sound, -1, 1) * 32767).astype(np.int16)


def _write(file: Path, names: Sequence[str], read: Read, dtype: np.dtype[Any]) -> list[int]:
    """Write what `read` returns of each path to one file, which appears when it is whole; return how many
    items each had."""
    counts = []
    with (new_file(file) as temporary, open(temporary, "wb") as out,
          work_bar("reading", len(names), "file") as bar):
        for name in names:
            items = np.ascontiguousarray(read(name), dtype=dtype)
            out.write(items.tobytes())
            counts.append(items.size)
            bar.update(1)
    return counts

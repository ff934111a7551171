"""The media files that a codec is trained from, and which of them are held out."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from megatron_sov.errors import UserError

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

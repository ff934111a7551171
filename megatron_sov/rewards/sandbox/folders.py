"""A program's private folder on a file system that outlives it: what it holds, and its end."""

from __future__ import annotations

import os

MAX_ENTRIES = 10_000
"""Files and folders that are counted."""


def size_bytes(folder: str) -> tuple[int, int]:
    """Return how many bytes and entries lie in a folder, counted up to `MAX_ENTRIES`."""
    total = entries = 0
    waiting = [folder]
    while waiting and entries < MAX_ENTRIES:
        try:
            with os.scandir(waiting.pop()) as found:
                for entry in found:
                    entries += 1
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
        except OSError:  # it vanished, or its path is too long: as an entry it has been counted
            continue
    return total, entries


def remove(folder: str) -> None:
    """Remove a folder, however deep it is: what lies below is brought to the top first, so that no path
    becomes too long and nothing calls itself."""
    next_name = 0
    while inner := [entry for entry in _entries(folder) if entry.is_dir(follow_symlinks=False)]:
        for entry in inner:
            for below in _entries(entry.path):
                if below.is_dir(follow_symlinks=False):
                    while os.path.lexists(f"{folder}/{next_name}"):
                        next_name += 1
                    os.rename(below.path, f"{folder}/{next_name}")
                else:
                    os.unlink(below.path)
            os.rmdir(entry.path)
    for entry in _entries(folder):
        os.unlink(entry.path)
    os.rmdir(folder)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as found:
        return list(found)

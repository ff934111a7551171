"""A program's private folder on a file system that outlives it: what it holds, and its end."""

from __future__ import annotations

import contextlib
import errno
import os
import stat

MAX_ENTRIES = 10_000
"""Files and folders that are counted."""
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LONG_PATH = 700
"""Characters, behind which a path begins anew: the kernel takes none of more than 4,095 bytes."""
_VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def size_bytes(folder: str) -> tuple[int, int]:
    """Return how many bytes and entries lie in a folder, however deep, counted up to `MAX_ENTRIES`: so many
    where a part of it cannot be looked at, in which anything may lie."""
    total = entries = 0
    begins = [os.open(folder, _FOLDER)]
    waiting = [(begins[0], ".")]
    try:
        while waiting and entries < MAX_ENTRIES:
            begin, path = waiting.pop()
            try:
                fd = os.open(path, _FOLDER, dir_fd=begin)
            except OSError as e:
                if e.errno in _VANISHED:
                    continue
                return total, MAX_ENTRIES
            try:
                held, num_held, inner = _level(fd)
                if len(path) > _LONG_PATH:
                    begin, path = os.dup(fd), "."
                    begins.append(begin)
            finally:
                os.close(fd)
            total, entries = total + held, entries + num_held
            waiting += [(begin, f"{path}/{name}") for name in inner]
    except OSError:  # too many of them are open
        return total, MAX_ENTRIES
    finally:
        for fd in begins:
            os.close(fd)
    return total, entries


def _level(folder: int) -> tuple[int, int, list[str]]:
    """Return the bytes of an open folder's files, the number of its entries, and the folders among them."""
    total = entries = 0
    inner = []
    with os.scandir(folder) as found:
        for entry in found:
            entries += 1
            if entry.is_dir(follow_symlinks=False):
                inner.append(entry.name)
            else:
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
            if entries >= MAX_ENTRIES:
                break
    return total, entries, inner


def remove(folder: str) -> None:
    """Remove a folder, however deep it is: what lies below is brought to the top first, so that no path
    becomes too long and nothing calls itself."""
    next_name = 0
    while inner := [entry for entry in _entries(folder) if entry.is_dir(follow_symlinks=False)]:
        for entry in inner:
            for below in _entries(entry.path):
                if below.is_dir(follow_symlinks=False):
                    _make_writable(below.path)  # else it cannot be moved
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
    _make_writable(folder)
    with os.scandir(folder) as found:
        return list(found)


def _make_writable(folder: str) -> None:
    """Let the owner list and change a folder, which programs may have made without; none runs any more."""
    if os.lstat(folder).st_mode & stat.S_IRWXU != stat.S_IRWXU:
        os.chmod(folder, stat.S_IRWXU)

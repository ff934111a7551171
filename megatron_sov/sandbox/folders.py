"""Measure and remove folders that an untrusted program filled."""

import contextlib
import errno
import os
import stat

MAX_ENTRIES = 10_000
"""Most files and folders to count."""
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_PATH_CHARS = 700
"""Longest relative path to open; the kernel rejects paths above 4,095 bytes."""
_VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def measure_folder(folder: str) -> tuple[int, int]:
    """Return the bytes and the number of entries in a folder tree of any depth.

    Counting stops at `MAX_ENTRIES`. If a folder cannot be opened, the number is also `MAX_ENTRIES`, because
    the contents are unknown.
    """
    num_bytes = num_entries = 0
    # Open paths relative to file descriptors and without following links: the program may change the tree
    # at the same time.
    anchors = [os.open(folder, _OPEN_FOLDER)]
    queue = [(anchors[0], ".")]
    try:
        while queue and num_entries < MAX_ENTRIES:
            anchor, path = queue.pop()
            try:
                fd = os.open(path, _OPEN_FOLDER, dir_fd=anchor)
            except OSError as e:
                if e.errno in _VANISHED:
                    continue
                return num_bytes, MAX_ENTRIES
            try:
                level_bytes, level_entries, subfolders = _measure_level(fd)
                if len(path) > _MAX_PATH_CHARS:
                    anchor, path = os.dup(fd), "."
                    anchors.append(anchor)
            finally:
                os.close(fd)
            num_bytes, num_entries = num_bytes + level_bytes, num_entries + level_entries
            queue += [(anchor, f"{path}/{name}") for name in subfolders]
    except OSError:  # too many open files
        return num_bytes, MAX_ENTRIES
    finally:
        for fd in anchors:
            os.close(fd)
    return num_bytes, num_entries


def _measure_level(folder: int) -> tuple[int, int, list[str]]:
    """Return the bytes of an open folder's files, the number of entries, and the names of its subfolders."""
    num_bytes = num_entries = 0
    subfolders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            num_entries += 1
            if entry.is_dir(follow_symlinks=False):
                subfolders.append(entry.name)
            else:
                with contextlib.suppress(FileNotFoundError):
                    # Blocks instead of the length, because holes in a file use no disk space.
                    num_bytes += entry.stat(follow_symlinks=False).st_blocks * 512
            if num_entries >= MAX_ENTRIES:
                break
    return num_bytes, num_entries, subfolders


def remove_folder(folder: str) -> None:
    """Remove a folder tree of any depth, without recursion and without long paths."""
    next_name = 0
    # A round moves the second level to the top: the tree loses a level.
    while subfolders := [entry for entry in _list_entries(folder) if entry.is_dir(follow_symlinks=False)]:
        for subfolder in subfolders:
            for entry in _list_entries(subfolder.path):
                if entry.is_dir(follow_symlinks=False):
                    _grant_access(entry.path)  # a folder without write permission cannot be moved
                    while os.path.lexists(f"{folder}/{next_name}"):
                        next_name += 1
                    os.rename(entry.path, f"{folder}/{next_name}")
                else:
                    os.unlink(entry.path)
            os.rmdir(subfolder.path)
    for entry in _list_entries(folder):
        os.unlink(entry.path)
    os.rmdir(folder)


def _list_entries(folder: str) -> list[os.DirEntry[str]]:
    _grant_access(folder)
    with os.scandir(folder) as entries:
        return list(entries)


def _grant_access(folder: str) -> None:
    """Give the owner all permissions for a folder."""
    # Not through a link: the caller passes real folders, and no program runs any more.
    if os.lstat(folder).st_mode & stat.S_IRWXU != stat.S_IRWXU:
        os.chmod(folder, stat.S_IRWXU)

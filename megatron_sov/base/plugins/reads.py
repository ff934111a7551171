"""Which files a user's code opens to read, besides what is installed: its outcomes depend on them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path

from megatron_sov.version import OUR_PACKAGES

_INSTALLED = tuple(f"{os.path.realpath(folder)}{os.sep}" for folder in {
    "/dev", "/etc", "/proc", "/sys", "/usr", sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(),
    *(str(Path(__file__).parents[3] / name) for name in OUR_PACKAGES)})
_here = threading.local()
_start = threading.Thread.start
_written: set[str] = set()
"""What code that is listened to has written itself."""
_PROCESSES = {"subprocess.Popen": "a program", "os.system": "a program", "os.posix_spawn": "a program",
              "os.fork": "a process", "os.forkpty": "a process"}
"""Event -> what it starts."""
_LIBRARIES = ("sqlite3.connect", "ctypes.dlopen", "import")
"""Events of C code that opens the file that it names past Python."""


class Reads(set[Path]):
    """Files that were opened to be read."""

    def __init__(self) -> None:
        super().__init__()
        self.unseen = ""
        """What was started whose files nobody here sees; "": nothing."""


_of_threads = Reads()
"""Of threads that such code has started, until somebody asks."""
_is_listening = False


@contextlib.contextmanager
def recording_reads() -> Iterator[Reads]:
    """Give a set that receives the files that this thread, and threads that it starts, open to read: modules
    by their source, databases of SQLite and libraries of ctypes, nothing that is installed with Python or
    belongs to the system, and nothing that it has written itself.

    Not seen is what other processes open, which `unseen` tells of, and what C code opens past Python
    (pyarrow, safetensors, tokenizers): there are no events of it."""
    global _is_listening
    if not _is_listening:  # a hook stays for good
        sys.addaudithook(_note)
        threading.Thread.start = _start_noted  # type: ignore  # Python 3.11 has no event of it
        _is_listening = True
    before = getattr(_here, "reads", None)
    found = Reads()
    _here.reads = found
    try:
        yield found
    finally:
        _here.reads = before
        found |= _of_threads
        found.unseen = found.unseen or _of_threads.unseen
        _of_threads.clear()
        _of_threads.unseen = ""


def _note(event: str, arguments: tuple[object, ...]) -> None:
    reads = getattr(_here, "reads", None)
    if reads is None and _is_of_code():
        reads = _of_threads
    if reads is None:
        return
    if event in _PROCESSES:
        reads.unseen = _PROCESSES[event]
    elif event == "os.rename" and all(isinstance(name, (str, bytes)) for name in arguments[:2]):
        old, new = (os.path.realpath(os.fsdecode(name)) for name in arguments[:2])  # type: ignore[arg-type]
        if old in _written:  # what was written under another name first, as caches are
            _written.add(new)
    elif event in _LIBRARIES:
        named = arguments[event == "import"]
        if isinstance(named, (str, bytes, os.PathLike)) and os.fspath(named) not in ("", ":memory:"):
            name = os.fsdecode(named)
            if name.startswith("file:"):  # an address of SQLite
                name = name.removeprefix("file:").partition("?")[0]
            _take(os.path.realpath(name), reads, event == "sqlite3.connect", False, False)
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        _take(os.path.realpath(os.fsdecode(arguments[0])), reads, *_way(arguments[1], arguments[2]))


def _start_noted(thread: threading.Thread) -> None:
    """Start a thread, of which a pool has several, and note whose it is."""
    if getattr(_here, "reads", None) is not None or _is_of_code():
        thread.is_of_code = True  # type: ignore[attr-defined]
    _start(thread)


def _is_of_code() -> bool:
    """Return whether this thread was started by code that is listened to."""
    thread = threading._active.get(threading.get_ident())  # type: ignore[attr-defined]
    return getattr(thread, "is_of_code", False)


def _way(mode: object, flags: object) -> tuple[bool, bool, bool]:
    """Return whether a file that is opened may be created, is emptied, and cannot be read."""
    if isinstance(mode, str):
        return (any(c in mode for c in "xa"), "w" in mode, "x" in mode or ("a" in mode and "+" not in mode))
    bits = flags if isinstance(flags, int) else 0
    return (bool(bits & (os.O_CREAT | os.O_WRONLY)), bool(bits & os.O_TRUNC),
            bool(bits & os.O_EXCL) or bits & os.O_ACCMODE == os.O_WRONLY)


def _take(path: str, reads: Reads, creates: bool, empties: bool, reads_none: bool) -> None:
    """Take note of a file that is opened."""
    # a file that was there and is written on holds what its own code may not have written
    if empties or (creates and not (os.path.exists(path) and os.path.getsize(path))):
        _written.add(path)
        return
    if reads_none:
        return
    if path.endswith(".pyc"):
        with contextlib.suppress(ValueError):
            path = importlib.util.source_from_cache(path)
    is_installed = path.startswith(_INSTALLED) and not path.startswith("/dev/shm/")
    if (path not in _written and "/site-packages/" not in path and "/dist-packages/" not in path
            and not is_installed and os.path.isfile(path)):
        reads.add(Path(path))

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
    *(str(Path(__file__).parents[2] / name) for name in OUR_PACKAGES)})
_here = threading.local()
_is_listening = False


@contextlib.contextmanager
def recording_reads() -> Iterator[set[Path]]:
    """Give a set that receives the files that this thread opens to read: modules by their source, nothing
    that is installed with Python or belongs to the system, and nothing that it has written itself.

    What C code opens past Python is not seen."""
    global _is_listening
    if not _is_listening:  # a hook stays for good
        sys.addaudithook(_note)
        _is_listening = True
    before = getattr(_here, "reads", None)
    found: set[Path] = set()
    _here.reads, _here.written = found, getattr(_here, "written", set())
    try:
        yield found
    finally:
        _here.reads = before


def _note(event: str, arguments: tuple[object, ...]) -> None:
    reads = getattr(_here, "reads", None)
    if reads is None or event not in ("open", "os.rename") or not isinstance(arguments[0], (str, bytes)):
        return
    path, mode, flags = os.path.realpath(os.fsdecode(arguments[0])), arguments[1], arguments[2]
    if event == "os.rename":  # what was written under another name first, as caches are
        if path in _here.written and isinstance(mode, (str, bytes)):
            _here.written.add(os.path.realpath(os.fsdecode(mode)))
        return
    if isinstance(mode, str):
        empties, creates = "w" in mode, any(c in mode for c in "xa")
        reads_none = "x" in mode or ("a" in mode and "+" not in mode)
    else:
        bits = flags if isinstance(flags, int) else 0
        empties, creates = bool(bits & os.O_TRUNC), bool(bits & (os.O_CREAT | os.O_WRONLY))
        reads_none = bool(bits & os.O_EXCL) or bits & os.O_ACCMODE == os.O_WRONLY
    # a file that was there and is written on holds what its own code may not have written
    if empties or (creates and not (os.path.exists(path) and os.path.getsize(path))):
        _here.written.add(path)
        return
    if reads_none:
        return
    if path.endswith(".pyc"):
        with contextlib.suppress(ValueError):
            path = importlib.util.source_from_cache(path)
    is_installed = path.startswith(_INSTALLED) and not path.startswith("/dev/shm/")
    if (path not in _here.written and "/site-packages/" not in path and "/dist-packages/" not in path
            and not is_installed and os.path.isfile(path)):
        reads.add(Path(path))


"""What a program may read: the interpreter, the system's programs and libraries, a few devices."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

SYSTEM = ("/usr/bin", "/usr/include", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec", "/bin", "/lib",
          "/lib32", "/lib64", "/etc/alternatives", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def readable_paths(more: Iterable[str] = ()) -> list[str]:
    """Return folders and files, none inside another; where a symbolic link leads, too.

    Args:
        more: further folders, as of another language's interpreter.
    """
    wanted = [*SYSTEM, *_interpreter(), *_loaded_libraries(), *more]
    existing = sorted({form for path in wanted if os.path.exists(path)
                       for form in (os.path.normpath(path), os.path.realpath(path))})
    return [path for path in existing if not any(path.startswith(f"{other}/") for other in existing)]


def folders_of(executable: str) -> list[str]:
    """Return what a program needs to run that lies outside of the system's folders: the prefix that it is
    installed in, or its own folder where that is none."""
    folder = Path(executable).resolve().parent
    return [str(folder.parent if folder.name == "bin" and len(folder.parts) > 3 else folder)]


def _interpreter() -> list[str]:
    prefix = sys.base_prefix
    if prefix == "/usr":
        return []
    return [f"{prefix}/bin", f"{prefix}/lib"] if prefix == "/usr/local" else [prefix]


def _loaded_libraries() -> list[str]:
    """Return the folders of the shared libraries that this process has loaded from elsewhere: an
    environment module's, say, which others of them will come from."""
    try:
        lines = Path("/proc/self/maps").read_text().split("\n")
    except OSError:
        return []
    files = {fields[5] for fields in (line.split(None, 5) for line in lines) if len(fields) == 6}
    return sorted({os.path.dirname(file) for file in files if file.startswith("/") and ".so" in file})

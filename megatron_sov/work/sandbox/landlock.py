"""Landlock: rules about files, TCP, signals and abstract sockets that an ordinary process gives itself.

Constants and layouts are those of linux/landlock.h; see landlock(7).
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterable

from megatron_sov.work.sandbox.system_calls import call

NEEDED_ABI = 3
"""Linux 6.2: an older one lets every file be cut to nothing by truncate(2)."""
SIGNAL_SCOPE_ABI = 6
"""Linux 6.12."""
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE, _IOCTL_DEV = 1, 2, 4, 8, 1 << 14, 1 << 15
_MAKE_CHAR, _MAKE_BLOCK = 1 << 6, 1 << 11
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_FILES_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_TCP_ABI, _TCP, _SCOPES = 4, 3, 3
_VERSION, _BENEATH = 1, 1


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64)]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("rights", ctypes.c_uint64), ("fd", ctypes.c_int32)]


def abi() -> int:
    """Return the version that the kernel has; 0: none, or it is switched off."""
    try:
        return call("landlock_create_ruleset", None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION))
    except OSError as e:
        if e.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, None):
            return 0
        raise


def restrict(version: int, readable: Iterable[str], writable: Iterable[str]) -> None:
    """Keep this process, and all that it starts, to some paths, without TCP, for good; raises OSError.

    Args:
        version: as `abi` says.
        readable: folders and files that may be read and run.
        writable: those that may also be changed.
    """
    rights = max((bits for first, bits in _FILES_BY_ABI.items() if first <= version))
    rules = _Ruleset(rights, _TCP if version >= _TCP_ABI else 0,
                     _SCOPES if version >= SIGNAL_SCOPE_ABI else 0)
    fd = call("landlock_create_ruleset", ctypes.byref(rules), ctypes.c_size_t(ctypes.sizeof(rules)),
              ctypes.c_uint32(0))
    try:
        for path in readable:
            _allow(fd, path, rights & (_EXECUTE | _READ_FILE | _READ_DIR))
        for path in writable:
            _allow(fd, path, rights & ~(_MAKE_CHAR | _MAKE_BLOCK))
        call("landlock_restrict_self", ctypes.c_int(fd), ctypes.c_uint32(0))
    finally:
        os.close(fd)


def _allow(ruleset: int, path: str, rights: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _FILE_RIGHTS
        rule = _Beneath(rights, fd)
        call("landlock_add_rule", ctypes.c_int(ruleset), ctypes.c_int(_BENEATH), ctypes.byref(rule),
             ctypes.c_uint32(0))
    finally:
        os.close(fd)

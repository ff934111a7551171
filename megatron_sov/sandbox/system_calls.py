"""Linux system calls for enclosing a process, beyond the functions of Python 3.11.

Numbers in system_calls.json come from `unistd.h`: x86-64, and `asm-generic` for aarch64. null: the machine
has no such call.
"""

import ctypes
import json
import os
import platform
from pathlib import Path

_GROUPS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
_CONDITIONAL = _GROUPS.pop("allowed with conditions")
FORBIDDEN_CALLS: dict[str, list[int | None]] = {
    call: numbers for group in _GROUPS.values() for call, numbers in group.items()}
"""Calls that no program may make -> number on x86-64, and on aarch64."""
NUMBERS = FORBIDDEN_CALLS | _CONDITIONAL
"""Call -> number on x86-64, and on aarch64."""
LAST_KNOWN = 450
"""Largest number in Linux 6.1, the version of `NUMBERS`."""
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine -> column of `NUMBERS`, and AUDIT_ARCH constant in `linux/audit.h`."""

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 2, 4, 4096, 8192, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 8, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
CAP_SETUID = 7
_CAPABILITY_VERSION_3 = 0x20080522
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)
# Look up the functions before forking, because a fork copies the pages that change.
_syscall, _prctl, _unshare, _mount = _libc.syscall, _libc.prctl, _libc.unshare, _libc.mount
_COLUMN = MACHINES[platform.machine()][0] if platform.machine() in MACHINES else None


class _MountAttributes(ctypes.Structure):
    _fields_ = [("set", ctypes.c_uint64), ("clear", ctypes.c_uint64), ("propagation", ctypes.c_uint64),
                ("userns_fd", ctypes.c_uint64)]


def get_call_number(name: str) -> int | None:
    """Return the number of a system call on this machine, or None on machines outside `MACHINES`."""
    return None if _COLUMN is None else NUMBERS[name][_COLUMN]


def call_by_number(name: str, *arguments: object) -> int:
    """Make a system call through `syscall(2)` and return the result. Raises `OSError`: the call failed, as
    for all functions in this module."""
    number = get_call_number(name)
    if number is None:
        raise OSError(f"{name}: {platform.machine()} is not among {', '.join(MACHINES)}")
    return _raise_errno(name, _syscall(ctypes.c_long(number), *arguments))


def unshare(flags: int) -> None:
    _raise_errno("unshare", _unshare(flags))


def enter_namespace(fd: int, kind: int) -> None:
    """Enter a namespace; `fd` is an open file in `/proc/PID/ns`."""
    _raise_errno("setns", _libc.setns(fd, kind))


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    _raise_errno(f"mount {source} at {target}", _mount(
        os.fsencode(source), os.fsencode(target), kind.encode() if kind else None,
        ctypes.c_ulong(flags), options.encode() or None))


def make_read_only(target: str) -> None:
    """Make a mount and the mounts below it read-only, without setuid."""
    attributes = _MountAttributes(_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    call_by_number("mount_setattr", ctypes.c_int(_AT_FDCWD), os.fsencode(target),
                   ctypes.c_uint(_AT_RECURSIVE), ctypes.byref(attributes),
                   ctypes.c_size_t(ctypes.sizeof(attributes)))


def change_root(folder: str) -> None:
    """Make a mounted folder the root of this mount namespace and unmount the old root."""
    os.chdir(folder)
    # pivot_root(2): with equal arguments the old root ends on top of the new root, and is unmounted there
    call_by_number("pivot_root", b".", b".")
    _raise_errno("umount of the old root", _libc.umount2(b".", MNT_DETACH))
    os.chdir("/")


def prctl(option: int, *values: object) -> int:
    # prctl reads five words; an omitted word would contain a register's old value
    words = [*values, *[ctypes.c_ulong(0)] * (4 - len(values))]
    words = [ctypes.c_ulong(word) if isinstance(word, int) else word for word in words]
    return _raise_errno(f"prctl {option}", _prctl(option, *words))


def set_capabilities(mask: int) -> None:
    """Set the permitted and effective capabilities to `mask`; clear the inheritable capabilities."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    call_by_number("capset", ctypes.byref(header), ctypes.byref(data))


def has_capability(capability: int) -> bool:
    status = Path("/proc/self/status").read_text()
    effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> capability & 1)


def set_file_uid(uid: int) -> None:
    """Set the user for file access (setfsuid); signals and limits keep the process's user."""
    _libc.setfsuid(uid)
    # setfsuid reports no error; a second call returns the current value
    if _libc.setfsuid(-1) != uid:
        raise OSError(f"setfsuid {uid} has no effect")


def drop_bounding_set() -> None:
    """Empty the bounding set: no executed program gains a capability."""
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:  # above the kernel's last capability, or without CAP_SETPCAP
            return


def close_files_from(fd: int) -> None:
    call_by_number("close_range", ctypes.c_uint(fd), ctypes.c_uint(0xFFFFFFFF), ctypes.c_uint(0))


def _raise_errno(call: str, result: int) -> int:
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"{call}: {os.strerror(error)}")
    return result

"""Limits, Landlock rules and system call filters of a process; none can be lifted again.

Landlock restricts files, TCP, signals and abstract sockets; constants and layouts are those of
`linux/landlock.h`, see landlock(7). The system call filter is a classic BPF program, see seccomp(2) and
`linux/filter.h`. Calls in `system_calls.FORBIDDEN_CALLS`, and calls above `LAST_KNOWN`, fail with an error.
"""

import ctypes
import errno
import os
import platform
import resource
import stat
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_sov.sandbox import system_calls as sc

SYSTEM_PATHS = ("/usr/bin", "/usr/include", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec", "/bin",
                "/lib", "/lib32", "/lib64", "/etc/alternatives", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
MAX_OPEN_FILES = 256
"""RLIMIT_NOFILE for `enclose_reader`."""
MIN_LANDLOCK_VERSION = 3
"""Linux 6.2; older versions do not restrict truncate(2)."""
SIGNAL_SCOPE_VERSION = 6
"""Linux 6.12."""
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE, _IOCTL_DEV = 1, 2, 4, 8, 1 << 14, 1 << 15
_MAKE_CHAR, _MAKE_BLOCK = 1 << 6, 1 << 11
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_RIGHTS_BY_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}  # all rights
_TCP_VERSION, _TCP, _SCOPES = 4, 0b11, 0b11  # bind and connect; abstract sockets and signals
_CREATE_RULESET_VERSION, _RULE_PATH_BENEATH = 1, 1
CALLS_WITHOUT_NAMESPACES = {  # calls -> error; 0: skip the call and report success
    # would leave the process group, by which the sandbox kills programs
    "setsid setpgid": errno.EPERM,
    # not restricted by Landlock; pretend success, because `shutil.copy` ends with a chmod
    "chmod fchmod fchmodat utime utimes futimesat utimensat": 0,
    "chown lchown fchown fchownat inotify_add_watch": errno.EPERM,
    "setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr": errno.ENOTSUP,
}
CALLS_WITHOUT_SIGNAL_SCOPE = ("tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo")
_NEW_NAMESPACES = 0x7E020080  # all CLONE_NEW* flags
_AF_UNIX, _SOCK_STREAM, _SOCK_FLAGS = 1, 1, 0o2004000  # flags: SOCK_CLOEXEC, SOCK_NONBLOCK
_FCNTL = (8, 15, 1024, 1026)
"""F_SETOWN and F_SETOWN_EX signal other processes; F_SETLEASE and F_NOTIFY observe other processes."""
_IOCTL = (0x8901, 0x8902, 0x5412, 0x541C, 0x40086602, 0x40047602, 0x401C5820)
"""FIOSETOWN, SIOCSPGRP, TIOCSTI, TIOCLINUX; FS_IOC_SETFLAGS, FS_IOC_SETVERSION and FS_IOC_FSSETXATTR change
files that are open for reading."""
_LOAD, _AND, _IF_EQUAL, _IF_ABOVE, _IF_SET, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x45, 0x06
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW, and SECCOMP_RET_ERRNO with the error's number
_SECCOMP_MODE_FILTER = 2
_Instruction = tuple[int, int, int, int]
"""BPF code, instructions to skip if true, if false, and value."""


def enclose_reader(readable: list[str], memory_bytes: int) -> None:
    """Restrict this process to reading files: limit memory, forbid writing and the network.

    Where the kernel has Landlock, only folders in `readable`, system and interpreter paths remain accessible.
    """
    set_limit(resource.RLIMIT_AS, memory_bytes)
    set_limit(resource.RLIMIT_FSIZE, 0)
    set_limit(resource.RLIMIT_CORE, 0)
    set_limit(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)
    version = get_landlock_version()
    if version < MIN_LANDLOCK_VERSION or find_seccomp_problem():
        return
    folders = [path for path in {sys.prefix, *readable} if os.path.isdir(path)]
    sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)
    restrict_files(version, [*list_readable_paths(folders), *list_devices()], [])
    install_filter(build_filter(namespaces=False, signal_scope=version >= SIGNAL_SCOPE_VERSION,
                                own_pid=os.getpid()))


def set_limit(kind: int, limit: float) -> None:
    """Set the soft and hard RLIMIT `kind` to `limit`, or to the present hard limit if lower."""
    hard = resource.getrlimit(kind)[1]
    # the hard limit too, or the process could raise the soft limit again
    value = int(limit) if hard == resource.RLIM_INFINITY else min(int(limit), hard)
    resource.setrlimit(kind, (value, value))


# Paths.


def list_devices() -> list[str]:
    return [device for device in DEVICES if os.path.exists(device)]


def list_readable_paths(folders: Iterable[str] = ()) -> list[str]:
    """Return readable folders and files, with symbolic links' targets and without nested paths.

    Args:
        folders: folders besides the system's and the interpreter's.
    """
    wanted = [*SYSTEM_PATHS, *_list_interpreter_folders(), *_list_library_folders(), *folders]
    existing: set[str] = set()
    for path in wanted:
        if os.path.exists(path):
            existing |= {os.path.normpath(path), os.path.realpath(path)}
    # a rule for a folder includes all paths below
    return [path for path in sorted(existing)
            if not any(path.startswith(f"{folder}/") for folder in existing)]


def _list_interpreter_folders() -> list[str]:
    prefix = sys.base_prefix
    if prefix == "/usr":
        return []
    return [f"{prefix}/bin", f"{prefix}/lib"] if prefix == "/usr/local" else [prefix]


def is_shared_folder(folder: str) -> bool:
    """Return whether a folder, like /tmp, has files of all users, which programs must not read."""
    return bool(os.stat(folder).st_mode & stat.S_ISVTX)


def _list_library_folders() -> list[str]:
    """Return the folders of libraries in `/proc/self/maps`, e.g. from an environment module; a library in a
    shared folder stands for itself."""
    try:
        lines = Path("/proc/self/maps").read_text().split("\n")
    except OSError:
        return []
    mappings = [line.split(None, 5) for line in lines]  # address, rights, offset, device, inode, file
    files = {fields[5] for fields in mappings if len(fields) == 6}
    libraries = [file for file in files if file.startswith("/") and ".so" in file and os.path.exists(file)]
    folders = {library: os.path.dirname(library) for library in libraries}
    return sorted({library if is_shared_folder(folder) else folder for library, folder in folders.items()})


# Landlock.


class _RulesetAttributes(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64)]


class _PathBeneathAttributes(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("rights", ctypes.c_uint64), ("fd", ctypes.c_int32)]


def get_landlock_version() -> int:
    """Return the kernel's Landlock ABI version; 0 without Landlock."""
    try:
        return sc.call_by_number("landlock_create_ruleset", None, ctypes.c_size_t(0),
                                 ctypes.c_uint32(_CREATE_RULESET_VERSION))
    except OSError as e:
        if e.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, None):
            return 0
        raise


def restrict_files(version: int, readable: Iterable[str], writable: Iterable[str]) -> None:
    """Restrict this process and its children to paths, without TCP.

    Args:
        version: result of `get_landlock_version`.
        readable: folders and files to read and execute.
        writable: folders and files to read, execute and change.

    Raises:
        OSError: the kernel rejects the rules.
    """
    # all rights that this kernel knows: an unknown bit makes the whole call fail
    rights = max(bits for first, bits in _RIGHTS_BY_VERSION.items() if first <= version)
    attributes = _RulesetAttributes(rights, _TCP if version >= _TCP_VERSION else 0,
                                    _SCOPES if version >= SIGNAL_SCOPE_VERSION else 0)
    fd = sc.call_by_number("landlock_create_ruleset", ctypes.byref(attributes),
                           ctypes.c_size_t(ctypes.sizeof(attributes)), ctypes.c_uint32(0))
    try:
        for path in readable:
            _add_path_rule(fd, path, rights & (_EXECUTE | _READ_FILE | _READ_DIR))
        for path in writable:
            # device files would bypass all rules
            _add_path_rule(fd, path, rights & ~(_MAKE_CHAR | _MAKE_BLOCK))
        sc.call_by_number("landlock_restrict_self", ctypes.c_int(fd), ctypes.c_uint32(0))
    finally:
        os.close(fd)


def _add_path_rule(ruleset: int, path: str, rights: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        # the kernel rejects folder rights in a rule for a file
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _FILE_RIGHTS
        rule = _PathBeneathAttributes(rights, fd)
        sc.call_by_number("landlock_add_rule", ctypes.c_int(ruleset), ctypes.c_int(_RULE_PATH_BENEATH),
                          ctypes.byref(rule), ctypes.c_uint32(0))
    finally:
        os.close(fd)


# System call filter.


@dataclass(frozen=True)
class _CallRule:
    """A system call that fails, always or for some values of an argument."""

    call: str
    error: int = errno.EPERM
    """errno; 0 skips the call and reports success."""
    word: int | None = None
    """Index of a 32-bit half of the arguments: `2 * n` is the low half of argument `n`. None: always fail."""
    fails: Literal["in", "not in", "any bit of"] = "in"
    """Relation of the masked word to `values` that makes the call fail."""
    values: tuple[int, ...] = ()
    mask: int = 0xFFFFFFFF
    """Bits to compare."""


class _BpfInstruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("if_true", ctypes.c_uint8), ("if_false", ctypes.c_uint8),
                ("value", ctypes.c_uint32)]


class CallFilter(ctypes.Structure):
    """`sock_fprog`: a compiled filter. Build it once, because building takes milliseconds."""

    _fields_ = [("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_BpfInstruction))]


def find_seccomp_problem() -> str:
    """Return the reason why this machine cannot filter system calls; "" if possible."""
    if platform.machine() not in sc.MACHINES:
        return f"no list of system calls for {platform.machine()}, only for {', '.join(sc.MACHINES)}"
    try:
        sc.prctl(21)  # PR_GET_SECCOMP
    except OSError as e:
        return f"the kernel has no seccomp ({e.strerror})"
    return ""


def build_filter(*, namespaces: bool, signal_scope: bool, own_pid: int) -> CallFilter:
    """Build the system call filter for a process.

    Args:
        namespaces: the process has its own process, mount and network namespaces.
        signal_scope: Landlock restricts the process's signals.
        own_pid: process number.
    """
    instructions = _compile_rules(_list_rules(namespaces, signal_scope, own_pid))
    array = (_BpfInstruction * len(instructions))(*[_BpfInstruction(*fields) for fields in instructions])
    return CallFilter(len(instructions), ctypes.cast(array, ctypes.POINTER(_BpfInstruction)))


def install_filter(call_filter: CallFilter) -> None:
    """Filter the system calls of this process and its children. Set PR_SET_NO_NEW_PRIVS before. Raises
    `OSError`: the kernel rejects the filter."""
    sc.prctl(sc.PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(call_filter))


def _list_rules(namespaces: bool, signal_scope: bool, own_pid: int) -> list[_CallRule]:
    rules = [_CallRule(name) for name in sc.FORBIDDEN_CALLS]
    rules += [
        # a filter cannot read flags in memory; for ENOSYS the C library calls clone instead
        _CallRule("clone3", errno.ENOSYS),
        _CallRule("clone", word=0, fails="any bit of", values=(_NEW_NAMESPACES,)),
        _CallRule("socketpair", word=0, fails="not in", values=(_AF_UNIX,)),
        # datagram sockets can send to other addresses
        _CallRule("socketpair", word=2, fails="not in", values=(_SOCK_STREAM,),
                  mask=0xFFFFFFFF ^ _SOCK_FLAGS),
        _CallRule("sendto", word=8, fails="not in", values=(0,)),  # argument 4, the address, must be null:
        _CallRule("sendto", word=9, fails="not in", values=(0,)),  # lower and upper half
        _CallRule("fcntl", word=2, values=_FCNTL),
        _CallRule("ioctl", word=2, values=_IOCTL),
        _CallRule("prlimit64", word=0, fails="not in", values=(0,)),  # process 0: the caller
        _CallRule("sched_setaffinity", word=0, fails="not in", values=(0,)),
    ]
    if not namespaces:
        rules += [_CallRule(name, error) for names, error in CALLS_WITHOUT_NAMESPACES.items()
                  for name in names.split()]
        if not signal_scope:
            rules += [_CallRule(name) for name in CALLS_WITHOUT_SIGNAL_SCOPE]
            rules += [_CallRule("kill", word=0, fails="not in", values=(0, own_pid)),
                      _CallRule("tgkill", word=0, fails="not in", values=(own_pid,))]
    return rules


def _compile_rules(rules: Sequence[_CallRule]) -> list[_Instruction]:
    architecture = sc.MACHINES[platform.machine()][1]
    instructions: list[_Instruction] = [
        # offset 4 of seccomp_data is the architecture: 32-bit calls on x86-64 have other numbers
        (_LOAD, 0, 0, 4), (_IF_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _ERROR | errno.ENOSYS),
        (_LOAD, 0, 0, 0),  # offset 0 is the call's number
        # newer calls, and calls of the x32 ABI, whose numbers have bit 30
        (_IF_ABOVE, 0, 1, sc.LAST_KNOWN), (_RETURN, 0, 0, _ERROR | errno.ENOSYS)]
    for rule in rules:
        number = sc.get_call_number(rule.call)
        if number is not None:
            block = _compile_rule(rule)
            instructions += [(_IF_EQUAL, 0, len(block), number), *block]
    return [*instructions, (_RETURN, 0, 0, _ALLOW)]


def _compile_rule(rule: _CallRule) -> list[_Instruction]:
    """Return the instructions for a call: its arguments begin at offset 16; the end reloads its number."""
    fail = (_RETURN, 0, 0, _ERROR | rule.error)
    if rule.word is None:
        return [fail]
    tests: list[_Instruction] = []
    for i, value in enumerate(rule.values):
        # jumps count instructions to skip, forward only
        remaining = len(rule.values) - 1 - i
        if rule.fails == "not in":  # a match skips the failure
            tests.append((_IF_EQUAL, remaining + 1, 0, value))
        else:  # a match jumps to the failure, the last mismatch skips the failure
            code = _IF_EQUAL if rule.fails == "in" else _IF_SET
            tests.append((code, remaining, 0 if remaining else 1, value))
    return [(_LOAD, 0, 0, 16 + 4 * rule.word), (_AND, 0, 0, rule.mask), *tests, fail, (_LOAD, 0, 0, 0)]

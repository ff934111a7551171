"""What a process takes from itself for good: memory, files, system calls.  The enclosures and the readers of
files of others are made of it.

Landlock has rules about files, TCP, signals and abstract sockets; constants and layouts are those of
linux/landlock.h, see landlock(7).  The filter of system calls holds what a program has no use for and what
leads out of its enclosure: a classic BPF program, see seccomp(2) and linux/filter.h. Calls that are not named
pass, calls that are newer than the list do not exist for the program, and no call ends it: it sees an error.
"""

from __future__ import annotations

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

SYSTEM = ("/usr/bin", "/usr/include", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec", "/bin", "/lib",
          "/lib32", "/lib64", "/etc/alternatives", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
MAX_OPEN_FILES = 256
"""Of a reader."""
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
# names and not numbers: `system_calls` has both machines' numbers
ALWAYS = (
    # other processes
    "ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "process_mrelease", "kcmp",
    "pidfd_open", "pidfd_getfd", "pidfd_send_signal", "migrate_pages", "move_pages", "sched_setscheduler",
    "sched_setparam", "sched_setattr", "setpriority", "ioprio_set",
    # the network; socketpair stays, which event loops need
    "socket", "connect", "bind", "listen", "accept", "accept4",
    # large and rarely used parts of the kernel, which is where its holes are
    "io_uring_setup", "io_uring_enter", "io_uring_register", "bpf", "perf_event_open", "userfaultfd",
    "keyctl", "add_key", "request_key", "modify_ldt", "personality", "uselib", "lookup_dcookie", "mbind",
    "set_mempolicy", "set_mempolicy_home_node",
    # namespaces, file systems, files by handles
    "mount", "umount2", "pivot_root", "chroot", "move_mount", "open_tree", "fsopen", "fsconfig", "fsmount",
    "fspick", "mount_setattr", "unshare", "setns", "name_to_handle_at", "open_by_handle_at", "fanotify_init",
    "fanotify_mark", "quotactl", "quotactl_fd", "landlock_create_ruleset", "landlock_add_rule",
    "landlock_restrict_self",
    # the machine
    "init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot", "swapon",
    "swapoff", "acct", "settimeofday", "clock_settime", "adjtimex", "clock_adjtime", "sethostname",
    "setdomainname", "iopl", "ioperm", "syslog", "vhangup",
    # memory that no limit of a process counts, and that may outlive it
    "shmget", "shmat", "shmctl", "semget", "semop", "semctl", "semtimedop", "msgget", "msgsnd", "msgrcv",
    "msgctl", "mq_open", "mq_unlink", "memfd_create", "memfd_secret",
)
WITHOUT_NAMESPACES = {
    # with these a process leaves the group in which all are ended at once
    "setsid setpgid": errno.EPERM,
    # Landlock does not watch them. They do nothing and say that they did: copying a file ends with them
    "chmod fchmod fchmodat utime utimes futimesat utimensat": 0,
    "chown lchown fchown fchownat inotify_add_watch": errno.EPERM,
    "setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr": errno.ENOTSUP,
}
WITHOUT_SIGNAL_SCOPE = ("tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo")
_NEW_NAMESPACES = 0x7E020080
_AF_UNIX, _SOCK_STREAM, _SOCK_FLAGS = 1, 1, 0o2004000
_FCNTL = (8, 15, 1024, 1026)
"""F_SETOWN, F_SETOWN_EX, which signal others; F_SETLEASE, F_NOTIFY, which look at what others do."""
_IOCTL = (0x8901, 0x8902, 0x5412, 0x541C, 0x40086602, 0x40047602, 0x401C5820)
"""FIOSETOWN, SIOCSPGRP, TIOCSTI, TIOCLINUX; FS_IOC_SETFLAGS, FS_IOC_SETVERSION, FS_IOC_FSSETXATTR, which
change files that are open for reading."""
_LOAD, _AND, _IF_EQUAL, _IF_ABOVE, _IF_SET, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x45, 0x06
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
_SECCOMP_MODE_FILTER = 2
_Instruction = tuple[int, int, int, int]


def limit(kind: int, most: float) -> None:
    """Let this process and those that it starts have no more, or less where the machine has a lower limit."""
    hard = resource.getrlimit(kind)[1]
    # hard and soft together: the process cannot raise it again
    value = int(most) if hard == resource.RLIM_INFINITY else min(int(most), hard)
    resource.setrlimit(kind, (value, value))


def enclose_reader(readable: list[str], memory_bytes: int) -> None:
    """Take from this process, for good, what reading needs not: memory without end, writing, the network, and
    where the kernel knows Landlock all files but those of `readable` and the interpreter's."""
    limit(resource.RLIMIT_AS, memory_bytes)
    limit(resource.RLIMIT_FSIZE, 0)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)
    version = landlock_version()
    if version < NEEDED_ABI or seccomp_problem():
        return
    prefixes = [path for path in {sys.prefix, *readable} if os.path.isdir(path)]
    sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)
    restrict_files(version, [*readable_paths(prefixes), *devices()], [])
    install_filter(prepare_filter(namespaces=False, signal_scope=version >= SIGNAL_SCOPE_ABI,
                                  own_pid=os.getpid()))


def devices() -> list[str]:
    return [device for device in DEVICES if os.path.exists(device)]


def readable_paths(more: Iterable[str] = ()) -> list[str]:
    """Return folders and files, none inside another; where a symbolic link leads, too.

    Args:
        more: further folders, as of another language's interpreter.
    """
    wanted = [*SYSTEM, *_interpreter(), *_loaded_libraries(), *more]
    existing = sorted({form for path in wanted if os.path.exists(path)
                       for form in (os.path.normpath(path), os.path.realpath(path))})
    # a rule for a folder covers all below it
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
    mapped = [line.split(None, 5) for line in lines]  # address, rights, offset, device, inode, file
    files = {fields[5] for fields in mapped if len(fields) == 6}
    return sorted({os.path.dirname(file) for file in files if file.startswith("/") and ".so" in file})


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64)]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("rights", ctypes.c_uint64), ("fd", ctypes.c_int32)]


def landlock_version() -> int:
    """Return the version that the kernel has; 0: none, or it is switched off."""
    try:
        return sc.call("landlock_create_ruleset", None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION))
    except OSError as e:
        if e.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, None):
            return 0
        raise


def restrict_files(version: int, readable: Iterable[str], writable: Iterable[str]) -> None:
    """Keep this process, and all that it starts, to some paths, without TCP, for good; raises OSError.

    Args:
        version: as `landlock_version` says.
        readable: folders and files that may be read and run.
        writable: those that may also be changed.
    """
    # the newest set of rights that this kernel knows: an unknown bit is refused as a whole
    rights = max((bits for first, bits in _FILES_BY_ABI.items() if first <= version))
    rules = _Ruleset(rights, _TCP if version >= _TCP_ABI else 0,
                     _SCOPES if version >= SIGNAL_SCOPE_ABI else 0)
    fd = sc.call("landlock_create_ruleset", ctypes.byref(rules), ctypes.c_size_t(ctypes.sizeof(rules)),
              ctypes.c_uint32(0))
    try:
        for path in readable:
            _allow(fd, path, rights & (_EXECUTE | _READ_FILE | _READ_DIR))
        for path in writable:
            # no device files: they would lead past all of this
            _allow(fd, path, rights & ~(_MAKE_CHAR | _MAKE_BLOCK))
        sc.call("landlock_restrict_self", ctypes.c_int(fd), ctypes.c_uint32(0))
    finally:
        os.close(fd)


def _allow(ruleset: int, path: str, rights: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        # the kernel refuses rights of folders in a rule for a file
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _FILE_RIGHTS
        rule = _Beneath(rights, fd)
        sc.call("landlock_add_rule", ctypes.c_int(ruleset), ctypes.c_int(_BENEATH), ctypes.byref(rule),
             ctypes.c_uint32(0))
    finally:
        os.close(fd)


@dataclass(frozen=True)
class PathRule:
    """A call that fails, always or by the value of an argument."""

    call: str
    error: int = errno.EPERM
    """What it fails with; 0: it does nothing and seems to succeed."""
    word: int | None = None
    """Half of an argument that is looked at: 2 n is the lower half of argument n; None: none is."""
    fails: Literal["in", "not in", "any bit of"] = "in"
    """How the word has to stand to the values."""
    values: tuple[int, ...] = ()
    mask: int = 0xFFFFFFFF
    """Bits of the word that count."""


class _Code(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8),
                ("value", ctypes.c_uint32)]


class Filter(ctypes.Structure):
    """A filter that is ready: making one takes milliseconds, as long as all the rest of a program's start."""

    _fields_ = [("length", ctypes.c_uint16), ("code", ctypes.POINTER(_Code))]


def _rules(namespaces: bool, signal_scope: bool, own_pid: int) -> list[PathRule]:
    found = [PathRule(name) for name in ALWAYS]
    found += [
        PathRule("clone3", errno.ENOSYS),  # its flags lie in memory; the C library falls back on clone
        PathRule("clone", word=0, fails="any bit of", values=(_NEW_NAMESPACES,)),
        PathRule("socketpair", word=0, fails="not in", values=(_AF_UNIX,)),
        # a pair of datagram sockets can be sent to other addresses
        PathRule("socketpair", word=2, fails="not in", values=(_SOCK_STREAM,), mask=0xFFFFFFFF ^ _SOCK_FLAGS),
        PathRule("sendto", word=8, fails="not in", values=(0,)),
        PathRule("sendto", word=9, fails="not in", values=(0,)),
        PathRule("fcntl", word=2, values=_FCNTL),
        PathRule("ioctl", word=2, values=_IOCTL),
        PathRule("prlimit64", word=0, fails="not in", values=(0,)),
        PathRule("sched_setaffinity", word=0, fails="not in", values=(0,)),
    ]
    if not namespaces:
        found += [PathRule(name, error) for names,
                  error in WITHOUT_NAMESPACES.items() for name in names.split()]
    if not (namespaces or signal_scope):
        found += [PathRule(name) for name in WITHOUT_SIGNAL_SCOPE]
        found += [PathRule("kill", word=0, fails="not in", values=(0, own_pid)),
                  PathRule("tgkill", word=0, fails="not in", values=(own_pid,))]
    return found


def seccomp_problem() -> str:
    """Return why this machine has no filter; empty: it has one."""
    if platform.machine() not in sc.MACHINES:
        return f"no list of system calls for {platform.machine()}, only for {', '.join(sc.MACHINES)}"
    try:
        sc.prctl(21)  # PR_GET_SECCOMP
    except OSError as e:
        return f"the kernel has no seccomp ({e.strerror})"
    return ""


def prepare_filter(*, namespaces: bool, signal_scope: bool, own_pid: int) -> Filter:
    """Return the filter of a process.

    Args:
        namespaces: it has process, mount and network namespaces of its own.
        signal_scope: Landlock keeps its signals inside.
        own_pid: its number.
    """
    made = _assembled(_rules(namespaces, signal_scope, own_pid))
    code = (_Code * len(made))(*[_Code(*instruction) for instruction in made])
    return Filter(len(made), ctypes.cast(code, ctypes.POINTER(_Code)))


def install_filter(made: Filter) -> None:
    """Filter the calls of this process and of all that it starts, for good; raises OSError.

    It must not be able to gain privileges (PR_SET_NO_NEW_PRIVS).
    """
    sc.prctl(sc.PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(made))


def _assembled(forbidden: Sequence[PathRule]) -> list[_Instruction]:
    """Return the filter's instructions: (code, steps to skip if so, if not, value)."""
    architecture = sc.MACHINES[platform.machine()][1]
    made: list[_Instruction] = [
        # offset 4 of seccomp_data: numbers mean other calls on another architecture (32-bit calls of x86-64)
        (_LOAD, 0, 0, 4), (_IF_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _ERROR | errno.ENOSYS),
        (_LOAD, 0, 0, 0),
        # newer calls, and those of the x32 ABI, whose numbers have bit 30
        (_IF_ABOVE, 0, 1, sc.LAST_KNOWN), (_RETURN, 0, 0, _ERROR | errno.ENOSYS)]
    for rule in forbidden:
        n = sc.number(rule.call)
        if n is not None:
            block = _block(rule)
            made += [(_IF_EQUAL, 0, len(block), n), *block]
    return [*made, (_RETURN, 0, 0, _ALLOW)]


def _block(rule: PathRule) -> list[_Instruction]:
    """Return what is done for the call of a rule; it ends with the call's number loaded again."""
    fail = (_RETURN, 0, 0, _ERROR | rule.error)
    if rule.word is None:
        return [fail]
    tests: list[_Instruction] = []
    for i, value in enumerate(rule.values):
        # jumps count instructions to skip, and only go forward
        behind = len(rule.values) - 1 - i
        if rule.fails == "not in":  # any of them leads over the failure
            tests.append((_IF_EQUAL, behind + 1, 0, value))
        else:  # any of them leads to the failure, the last miss over it
            kind = _IF_EQUAL if rule.fails == "in" else _IF_SET
            tests.append((kind, behind, 0 if behind else 1, value))
    return [(_LOAD, 0, 0, 16 + 4 * rule.word), (_AND, 0, 0, rule.mask), *tests, fail, (_LOAD, 0, 0, 0)]

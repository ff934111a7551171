"""A filter of system calls: what a program has no use for and what leads out of its enclosure.

The filter is a classic BPF program, see seccomp(2) and linux/filter.h. Calls that are not named pass, calls
that are newer than the list do not exist for the program, and no call ends it: it sees an error.
"""

from __future__ import annotations

import ctypes
import errno
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_sov.work.sandbox.system_calls import (
    LAST_KNOWN,
    MACHINES,
    PR_SET_SECCOMP,
    number,
    prctl,
)

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


@dataclass(frozen=True)
class Rule:
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


def rules(*, namespaces: bool, signal_scope: bool, own_pid: int) -> list[Rule]:
    """Return what is forbidden.

    Args:
        namespaces: the program has process, mount and network namespaces of its own.
        signal_scope: Landlock keeps its signals inside.
        own_pid: of the process that the filter is for.
    """
    found = [Rule(name) for name in ALWAYS]
    found += [
        Rule("clone3", errno.ENOSYS),  # its flags lie in memory; the C library falls back on clone
        Rule("clone", word=0, fails="any bit of", values=(_NEW_NAMESPACES,)),
        Rule("socketpair", word=0, fails="not in", values=(_AF_UNIX,)),
        # a pair of datagram sockets can be sent to other addresses
        Rule("socketpair", word=2, fails="not in", values=(_SOCK_STREAM,), mask=0xFFFFFFFF ^ _SOCK_FLAGS),
        Rule("sendto", word=8, fails="not in", values=(0,)),
        Rule("sendto", word=9, fails="not in", values=(0,)),
        Rule("fcntl", word=2, values=_FCNTL),
        Rule("ioctl", word=2, values=_IOCTL),
        Rule("prlimit64", word=0, fails="not in", values=(0,)),
        Rule("sched_setaffinity", word=0, fails="not in", values=(0,)),
    ]
    if not namespaces:
        found += [Rule(name, error) for names, error in WITHOUT_NAMESPACES.items() for name in names.split()]
    if not (namespaces or signal_scope):
        found += [Rule(name) for name in WITHOUT_SIGNAL_SCOPE]
        found += [Rule("kill", word=0, fails="not in", values=(0, own_pid)),
                  Rule("tgkill", word=0, fails="not in", values=(own_pid,))]
    return found


def supported() -> str:
    """Return why this machine has no filter; empty: it has one."""
    if platform.machine() not in MACHINES:
        return f"no list of system calls for {platform.machine()}, only for {', '.join(MACHINES)}"
    try:
        prctl(21)  # PR_GET_SECCOMP
    except OSError as e:
        return f"the kernel has no seccomp ({e.strerror})"
    return ""


def prepare(forbidden: Sequence[Rule]) -> Filter:
    """Return the filter of some rules."""
    made = _assembled(forbidden)
    code = (_Code * len(made))(*[_Code(*instruction) for instruction in made])
    return Filter(len(made), ctypes.cast(code, ctypes.POINTER(_Code)))


def install(made: Filter) -> None:
    """Filter the calls of this process and of all that it starts, for good; raises OSError.

    It must not be able to gain privileges (PR_SET_NO_NEW_PRIVS).
    """
    prctl(PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(made))


def _assembled(forbidden: Sequence[Rule]) -> list[_Instruction]:
    """Return the filter's instructions: (code, steps to skip if so, if not, value)."""
    architecture = MACHINES[platform.machine()][1]
    made: list[_Instruction] = [
        (_LOAD, 0, 0, 4), (_IF_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _ERROR | errno.ENOSYS),
        (_LOAD, 0, 0, 0),
        # newer calls, and those of the x32 ABI, whose numbers have bit 30
        (_IF_ABOVE, 0, 1, LAST_KNOWN), (_RETURN, 0, 0, _ERROR | errno.ENOSYS)]
    for rule in forbidden:
        n = number(rule.call)
        if n is not None:
            block = _block(rule)
            made += [(_IF_EQUAL, 0, len(block), n), *block]
    return [*made, (_RETURN, 0, 0, _ALLOW)]


def _block(rule: Rule) -> list[_Instruction]:
    """Return what is done for the call of a rule; it ends with the call's number loaded again."""
    fail = (_RETURN, 0, 0, _ERROR | rule.error)
    if rule.word is None:
        return [fail]
    tests: list[_Instruction] = []
    for i, value in enumerate(rule.values):
        behind = len(rule.values) - 1 - i
        if rule.fails == "not in":  # any of them leads over the failure
            tests.append((_IF_EQUAL, behind + 1, 0, value))
        else:  # any of them leads to the failure, the last miss over it
            kind = _IF_EQUAL if rule.fails == "in" else _IF_SET
            tests.append((kind, behind, 0 if behind else 1, value))
    return [(_LOAD, 0, 0, 16 + 4 * rule.word), (_AND, 0, 0, rule.mask), *tests, fail, (_LOAD, 0, 0, 0)]

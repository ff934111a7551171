"""Linux system calls for enclosing a process, beyond the functions of Python 3.11.

Numbers come from `unistd.h`: x86-64, and `asm-generic` for aarch64. None: the machine has no such call.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

FORBIDDEN_CALLS: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "migrate_pages": (256, 238), "move_pages": (279, 239), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    # the network, except socketpair for event loops
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242),
    # large, rarely used parts of the kernel, where most vulnerabilities are
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "modify_ldt": (154, None), "personality": (135, 92),
    "uselib": (134, None), "lookup_dcookie": (212, 18), "mbind": (237, 235), "set_mempolicy": (238, 237),
    "set_mempolicy_home_node": (450, 450),
    # namespaces, file systems, file handles
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "move_mount": (429, 429), "open_tree": (428, 428), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "unshare": (272, 97),
    "setns": (308, 268), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262), "fanotify_mark": (301, 263), "quotactl": (179, 60),
    "quotactl_fd": (443, 443), "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
    # the machine
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "acct": (163, 89), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "sethostname": (170, 161),
    "setdomainname": (171, 162), "iopl": (172, None), "ioperm": (173, None), "syslog": (103, 116),
    "vhangup": (153, 58),
    # memory outside RLIMIT_AS that may outlive the process
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190), "semop": (65, 193),
    "semctl": (66, 191), "semtimedop": (220, 192), "msgget": (68, 186), "msgsnd": (69, 189),
    "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180), "mq_unlink": (241, 181),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
}
"""Calls that no program may make -> number on x86-64, and on aarch64."""
NUMBERS = FORBIDDEN_CALLS | {
    "socketpair": (53, 199), "sendto": (44, 206), "clone": (56, 220), "clone3": (435, 435),
    "inotify_add_watch": (254, 27), "sched_setaffinity": (203, 122), "prlimit64": (302, 261),
    "ioctl": (16, 29), "fcntl": (72, 25), "setsid": (112, 157), "setpgid": (109, 154), "chmod": (90, None),
    "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None), "lchown": (94, None), "fchown": (93, 55),
    "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None), "futimesat": (261, None),
    "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "kill": (62, 129),
    "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "capset": (126, 91), "close_range": (436, 436)}
"""Call -> number on x86-64, and on aarch64."""
LAST_KNOWN = 450
"""Largest number in Linux 6.1, the version of `NUMBERS`."""
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine -> column of `NUMBERS`, and AUDIT_ARCH constant in `linux/audit.h`."""

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
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

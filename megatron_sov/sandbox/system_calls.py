"""The system calls that enclose a process and that Python 3.11 has no functions for.

Numbers are those of Linux's unistd.h for x86-64, and of asm-generic/unistd.h for aarch64; None: that
machine has no such call.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "move_mount": (429, 429), "open_tree": (428, 428),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268), "socket": (41, 198),
    "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242), "sendto": (44, 206), "clone": (56, 220),
    "clone3": (435, 435), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "sethostname": (170, 161), "setdomainname": (171, 162), "iopl": (172, None), "ioperm": (173, None),
    "syslog": (103, 116), "vhangup": (153, 58), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "lookup_dcookie": (212, 18), "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263), "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195),
    "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192),
    "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_unlink": (241, 181),
    "inotify_add_watch": (254, 27), "msgget": (68, 186), "mq_open": (240, 180), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "personality": (135, 92), "modify_ldt": (154, None),
    "migrate_pages": (256, 238), "move_pages": (279, 239), "mbind": (237, 235), "set_mempolicy": (238, 237),
    "set_mempolicy_home_node": (450, 450), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "prlimit64": (302, 261),
    "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446), "ioctl": (16, 29), "fcntl": (72, 25), "setsid": (112, 157),
    "setpgid": (109, 154), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53),
    "chown": (92, None), "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "kill": (62, 129), "tkill": (200, 130),
    "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "capset": (126, 91), "uselib": (134, None), "close_range": (436, 436),
}
"""Name -> number on x86-64, on aarch64."""
LAST_KNOWN = 450
"""Linux 6.1; calls behind it are newer than this list."""
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine -> column of `NUMBERS`, and its AUDIT_ARCH of linux/audit.h."""

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 8, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
CAP_SETUID = 7
_CAPABILITY_VERSION_3 = 0x20080522
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)
# looked up here, so that no fork does: every page that it touches is copied for it
_syscall, _prctl, _unshare, _mount = _libc.syscall, _libc.prctl, _libc.unshare, _libc.mount
_COLUMN = MACHINES[platform.machine()][0] if platform.machine() in MACHINES else None


class _MountAttributes(ctypes.Structure):
    _fields_ = [("set", ctypes.c_uint64), ("clear", ctypes.c_uint64), ("propagation", ctypes.c_uint64),
                ("userns_fd", ctypes.c_uint64)]


def number(name: str) -> int | None:
    """Return the number of a call on this machine; None where it has none, or is no machine of the list."""
    return None if _COLUMN is None else NUMBERS[name][_COLUMN]


def call(name: str, *arguments: object) -> int:
    """Return what a call by number returns.

    Raises:
        OSError: it fails.
    """
    n = number(name)
    if n is None:
        raise OSError(f"{name}: {platform.machine()} is not among {', '.join(MACHINES)}")
    return _checked(name, _syscall(ctypes.c_long(n), *arguments))


def unshare(flags: int) -> None:
    """Leave namespaces for new ones; raises OSError as all here."""
    _checked("unshare", _unshare(flags))


def enter_namespace(fd: int, kind: int) -> None:
    """Enter the namespace that a file of /proc/*/ns stands for."""
    _checked("setns", _libc.setns(fd, kind))


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    _checked(f"mount {source} at {target}", _mount(
        os.fsencode(source), os.fsencode(target), kind.encode() if kind else None,
        ctypes.c_ulong(flags), options.encode() or None))


def make_read_only(target: str) -> None:
    """Let nobody write through a mount or those below it, nor gain rights by what lies there."""
    attributes = _MountAttributes(_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    call("mount_setattr", ctypes.c_int(_AT_FDCWD), os.fsencode(target), ctypes.c_uint(_AT_RECURSIVE),
         ctypes.byref(attributes), ctypes.c_size_t(ctypes.sizeof(attributes)))


def make_root(folder: str) -> None:
    """Make a folder, which must be a mount, the root of this mount namespace, and drop what was there."""
    os.chdir(folder)
    # the trick of pivot_root(2): the old root ends on top of the new one and is taken off
    call("pivot_root", b".", b".")
    _checked("umount of the old root", _libc.umount2(b".", MNT_DETACH))
    os.chdir("/")


def prctl(option: int, *values: object) -> int:
    # prctl takes five words; unset ones would be what the registers hold
    filled = [*values, *[ctypes.c_ulong(0)] * (4 - len(values))]
    filled = [ctypes.c_ulong(v) if isinstance(v, int) else v for v in filled]
    return _checked(f"prctl {option}", _prctl(option, *filled))


def set_capabilities(mask: int) -> None:
    """Have these capabilities and no others."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    call("capset", ctypes.byref(header), ctypes.byref(data))


def has_capability(capability: int) -> bool:
    status = Path("/proc/self/status").read_text()
    effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> capability & 1)


def set_file_uid(uid: int) -> None:
    """Own files as another user than signals and limits go by."""
    _libc.setfsuid(uid)
    # setfsuid reports no error; a second call returns what is in effect
    if _libc.setfsuid(-1) != uid:
        raise OSError(f"setfsuid {uid} has no effect")


def drop_bounding_set() -> None:
    """Let no program that is started from here gain a capability."""
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:  # the kernel knows no more, or this process never could gain one
            return


def close_above(fd: int) -> None:
    call("close_range", ctypes.c_uint(fd), ctypes.c_uint(0xFFFFFFFF), ctypes.c_uint(0))


def _checked(what: str, result: int) -> int:
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result

"""The stronger enclosure: user, process, mount, network, IPC and host name namespaces, see namespaces(7).

The server lives in namespaces of its own, in a file tree that has only what may be read, and each program
in a process namespace and a private /tmp in memory: with its first process all others of it end.
"""

from __future__ import annotations

import os
import resource
import signal
import socket

from megatron_sov.work.sandbox import landlock, seccomp
from megatron_sov.work.sandbox import system_calls as sc
from megatron_sov.work.sandbox.channel import receive, send
from megatron_sov.work.sandbox.enclosure import Unavailable
from megatron_sov.work.sandbox.program import Limits
from megatron_sov.work.sandbox.readable import DEVICES, readable_paths
from megatron_sov.work.sandbox.resources import limit
from megatron_sov.work.watch import Watch

UID = 1000
"""Of programs, inside."""
OUTER_UID = 65534
"""Of programs, outside, where root makes the sandbox: nobody, so that limits hold for them."""
PRIVATE = "/tmp"
_MAX_INODES = 4096
_MOUNT_POINT = "/sys"
"""Any folder that every machine has and no program needs."""
_KINDS = (sc.CLONE_NEWUSER | sc.CLONE_NEWPID | sc.CLONE_NEWNS | sc.CLONE_NEWNET | sc.CLONE_NEWIPC
          | sc.CLONE_NEWUTS)


def identity_maps(uid: int, gid: int) -> list[tuple[str, str, str]]:
    """Return what to write to a process's setgroups, uid_map and gid_map, the better choice first.

    Args:
        uid: of the user that makes the sandbox.
        gid: likewise.
    """
    alone = ("deny", f"{UID} {uid} 1", f"{UID} {gid} 1")
    if uid:
        return [alone]
    return [("allow", f"0 0 1\n{UID} {OUTER_UID} 1", f"0 {gid} 1\n{UID} {OUTER_UID} 1"), alone]


class Namespaces:
    """The enclosure, made in a process that becomes its server; see `Enclosure`."""

    name = "namespaces"

    def __init__(self, channel: socket.socket, more_readable: list[str]) -> None:
        """Enter the namespaces; returns in a new process, while the one before waits for its end.

        Raises:
            Unavailable: this machine has none, or forbids them.
        """
        if reason := seccomp.supported():
            raise Unavailable(reason)
        readable = readable_paths(more_readable)
        try:
            sc.unshare(_KINDS)
        except OSError as e:
            raise Unavailable(f"namespaces are not allowed ({e.strerror or e})") from None
        send(channel, {"map": os.getpid()})
        if error := receive(channel)["error"]:
            raise Unavailable(f"users cannot be mapped ({error})")
        self.watch = Watch(_become_first_process(), forks=True)
        self._own_processes = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _build_view(readable)
        except OSError as e:
            raise Unavailable(f"a file tree cannot be made ({e.strerror or e})") from None
        self._landlock_abi = landlock.abi()
        sc.drop_bounding_set()  # the server runs no other program, and its children inherit this
        self._filter = seccomp.prepare(seccomp.rules(namespaces=True, signal_scope=True, own_pid=1))
        self._own_uid = os.getuid() != UID
        """Programs have a user that the server has not."""

    def prepare(self) -> str:
        """Return the folder, which each program has of its own."""
        return PRIVATE

    def fork(self) -> int:
        """As os.fork(), the child being the first process of its namespace."""
        sc.unshare(sc.CLONE_NEWPID)
        pid = -1
        try:
            pid = os.fork()
        finally:
            if pid:  # the next child must not be born into the namespace of this one
                sc.enter_namespace(self._own_processes, sc.CLONE_NEWPID)
        return pid

    def enter(self, folder: str, limits: Limits) -> None:
        """Give this process its private folder, and take its privileges."""
        sc.unshare(sc.CLONE_NEWNS)
        sc.mount("tmpfs", folder, "tmpfs", sc.MS_NOSUID | sc.MS_NODEV,
                 f"size={limits.file_bytes},nr_inodes={_MAX_INODES},mode=700,uid={UID},gid={UID}")
        if self._own_uid:
            os.setgroups([])
            os.setresgid(UID, UID, UID)
            os.setresuid(UID, UID, UID)
        sc.set_capabilities(0)
        sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)

    def lock(self, folder: str, limits: Limits) -> None:
        """Restrict this process's system calls; Landlock stands behind the file tree, where there is one."""
        # counted per user and namespace: where this user is the server's, too, server, guard and template are
        limit(resource.RLIMIT_NPROC, limits.processes + (0 if self._own_uid else 3))
        if self._landlock_abi:
            landlock.restrict(self._landlock_abi, ["/"],
                              [folder, *(device for device in DEVICES if os.path.exists(device))])
        seccomp.install(self._filter)

    def kill(self, pid: int) -> None:
        """End a program with all of its processes."""
        os.kill(pid, signal.SIGKILL)

    def clean(self) -> None:
        """Nothing is left: folder and processes end with the namespaces."""

    def close(self) -> None:
        """Nothing is left."""

    def overfull(self, limits: Limits) -> str:
        """Return why a program's files are too large; the file system in memory refuses that itself."""
        return ""


def _become_first_process() -> int:
    """Return, in a new process that is the first of the new process namespace, its number outside."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid:
        os.write(tell, str(pid).encode())
        os.waitpid(pid, 0)
        os._exit(0)
    sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
    number = int(os.read(told, 32))
    os.close(told)
    os.close(tell)
    return number


def _build_view(readable: list[str]) -> None:
    """Make a file tree of what may be read the root of this mount namespace."""
    sc.mount("none", "/", None, sc.MS_REC | sc.MS_PRIVATE)
    root = _MOUNT_POINT
    sc.mount("tmpfs", root, "tmpfs", sc.MS_NOSUID, "size=1m,mode=755")
    for path in [*readable, *filter(os.path.exists, DEVICES)]:
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        sc.mount(path, target, None, sc.MS_BIND | sc.MS_REC)
    os.makedirs(f"{root}{PRIVATE}", exist_ok=True)
    os.symlink(PRIVATE, f"{root}/dev/shm")  # where the C library keeps named semaphores
    sc.make_read_only(root)
    sc.make_root(root)

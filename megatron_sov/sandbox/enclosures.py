"""What encloses a program, made in the process of the server that has them forked.

`Namespaces` is the stronger one: user, process, mount, network, IPC and host name namespaces, see
namespaces(7). The server lives in namespaces of its own, in a file tree that has only what may be read, and
each program in a process namespace and a private /tmp in memory: with its first process all others of it end.

`Landlocked` is for kernels that allow none: Landlock, a filter of system calls, limits.  All processes of a
program stay in one process group, which they cannot leave, so that one signal ends them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import socket
import stat
import tempfile
from pathlib import Path
from typing import Protocol

from megatron_sov.sandbox import restrictions, system_calls as sc
from megatron_sov.sandbox.program import Limits
from megatron_sov.work.processes.channel import receive_message, send_message
from megatron_sov.work.processes.process_tree import ProcessTreeUsage

MAX_ENTRIES = 10_000
"""Files and folders that are counted."""
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LONG_PATH = 700
"""Characters, behind which a path begins anew: the kernel takes none of more than 4,095 bytes."""
_VANISHED = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def size_bytes(folder: str) -> tuple[int, int]:
    """Return how many bytes and entries lie in a folder, however deep, counted up to `MAX_ENTRIES`: so many
    where a part of it cannot be looked at, in which anything may lie."""
    total = entries = 0
    # paths are opened from file descriptors and never through links: the program may change the tree
    # meanwhile
    begins = [os.open(folder, _FOLDER)]
    waiting = [(begins[0], ".")]
    try:
        while waiting and entries < MAX_ENTRIES:
            begin, path = waiting.pop()
            try:
                fd = os.open(path, _FOLDER, dir_fd=begin)
            except OSError as e:
                if e.errno in _VANISHED:
                    continue
                return total, MAX_ENTRIES
            try:
                held, num_held, inner = _level(fd)
                if len(path) > _LONG_PATH:
                    begin, path = os.dup(fd), "."
                    begins.append(begin)
            finally:
                os.close(fd)
            total, entries = total + held, entries + num_held
            waiting += [(begin, f"{path}/{name}") for name in inner]
    except OSError:  # too many of them are open
        return total, MAX_ENTRIES
    finally:
        for fd in begins:
            os.close(fd)
    return total, entries


def _level(folder: int) -> tuple[int, int, list[str]]:
    """Return the bytes of an open folder's files, the number of its entries, and the folders among them."""
    total = entries = 0
    inner = []
    with os.scandir(folder) as found:
        for entry in found:
            entries += 1
            if entry.is_dir(follow_symlinks=False):
                inner.append(entry.name)
            else:
                with contextlib.suppress(FileNotFoundError):
                    # blocks and not the length: a file with holes takes no room
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
            if entries >= MAX_ENTRIES:
                break
    return total, entries, inner


def remove(folder: str) -> None:
    """Remove a folder, however deep it is: what lies below is brought to the top first, so that no path
    becomes too long and nothing calls itself."""
    next_name = 0
    # each round takes one level away, so that depth costs rounds and no stack
    while inner := [entry for entry in _entries(folder) if entry.is_dir(follow_symlinks=False)]:
        for entry in inner:
            for below in _entries(entry.path):
                if below.is_dir(follow_symlinks=False):
                    _make_writable(below.path)  # else it cannot be moved
                    while os.path.lexists(f"{folder}/{next_name}"):
                        next_name += 1
                    os.rename(below.path, f"{folder}/{next_name}")
                else:
                    os.unlink(below.path)
            os.rmdir(entry.path)
    for entry in _entries(folder):
        os.unlink(entry.path)
    os.rmdir(folder)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    _make_writable(folder)
    with os.scandir(folder) as found:
        return list(found)


def _make_writable(folder: str) -> None:
    """Let the owner list and change a folder, which programs may have made without; none runs any more."""
    if os.lstat(folder).st_mode & stat.S_IRWXU != stat.S_IRWXU:
        os.chmod(folder, stat.S_IRWXU)


FIRST_UID, NUM_UIDS = 61184, 4336
"""systemd's range for users that exist for a moment; root's sandboxes take one of them each."""
MOST_FOLDERS_FULL = 4
"""A folder may hold so many times the size of a file."""
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


class EnclosureUnavailable(Exception):
    """This machine cannot give an enclosure; why, in a few words."""


class Enclosure(Protocol):
    """Made in the server's process, which its template is a fork of; used for one program at a time."""

    name: str
    watch: ProcessTreeUsage
    """Of the processes below the template."""

    def prepare(self) -> str:
        """In the server: return the folder that a program will have."""
        ...

    def fork(self) -> int:
        """In the template: as os.fork()."""
        ...

    def enter(self, folder: str, limits: Limits) -> None:
        """In the program's process: see to it that it has that folder, give up all privileges."""
        ...

    def lock(self, folder: str, limits: Limits) -> None:
        """In the program's process: restrict what it may do, for good."""
        ...

    def kill(self, pid: int) -> None:
        """End all processes of the program whose first process that is."""
        ...

    def clean(self) -> None:
        """Remove a program's folder."""
        return

    def close(self) -> None:
        """Remove what it made for all programs."""
        return

    def overfull(self, limits: Limits) -> str:
        """Return why a program's files are too large; empty: they are not."""
        return ""


class Landlocked(Enclosure):
    """The weaker one."""

    name = "landlock"

    def __init__(self, more_readable: list[str], folder: str) -> None:
        """Look whether the kernel can do this.

        Args:
            more_readable: further folders that programs may read.
            folder: where programs' folders are made; it goes with this server.

        Raises:
            Unavailable: it cannot.
        """
        self._abi = restrictions.landlock_version()
        if self._abi < restrictions.NEEDED_ABI:
            raise EnclosureUnavailable(f"Landlock has version {self._abi}, and {restrictions.NEEDED_ABI} is "
                                       "needed (Linux 6.2, and 'landlock' in its list of security modules)")
        if reason := restrictions.seccomp_problem():
            raise EnclosureUnavailable(reason)
        self._readable = restrictions.readable_paths(more_readable)
        # without Landlock's scope of signals each process has a filter of its own
        self._filter = self._filter_of(0) if self._abi >= restrictions.SIGNAL_SCOPE_ABI else None
        # a user that nobody else has: the kernel's count of processes is then this sandbox's alone
        self._uid = _free_uid()
        sc.drop_bounding_set()  # the server runs no other program, and its children inherit this
        self.watch = ProcessTreeUsage(os.getpid(), forks=True)
        self._parent, self._folder = folder, ""
        os.chmod(folder, 0o711 if self._uid else 0o700)  # to be passed, not listed
        self._tasks_of_user = 0

    def prepare(self) -> str:
        self._folder = tempfile.mkdtemp(prefix="program-", dir=self._parent)
        if self._uid is not None:
            os.chmod(self._folder, 0o777)  # of all who could find it, Landlock lets this program in
        return self._folder

    def fork(self) -> int:
        if self._uid is None:
            self._tasks_of_user = _count_tasks(os.geteuid())
        return os.fork()

    def enter(self, folder: str, limits: Limits) -> None:
        if self._uid is None:
            sc.set_capabilities(0)  # root of a container that has no other user
        else:
            _become(self._uid)
        sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)

    def lock(self, folder: str, limits: Limits) -> None:
        # the kernel counts all processes of a user; root's programs have users of their own
        restrictions.limit(resource.RLIMIT_NPROC, self._tasks_of_user + limits.processes)
        restrictions.restrict_files(self._abi, self._readable, [folder, *restrictions.devices()])
        restrictions.install_filter(self._filter or self._filter_of(os.getpid()))

    def _filter_of(self, pid: int) -> restrictions.Filter:
        scope = self._abi >= restrictions.SIGNAL_SCOPE_ABI
        return restrictions.prepare_filter(namespaces=False, signal_scope=scope, own_pid=pid)

    def kill(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has not made its group yet, or is gone
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def clean(self) -> None:
        if self._folder:
            remove(self._folder)
            self._folder = ""

    def close(self) -> None:
        remove(self._parent)

    def overfull(self, limits: Limits) -> str:
        total, entries = size_bytes(self._folder)
        if entries >= MAX_ENTRIES:
            return f"made {MAX_ENTRIES:,} files or more, or a folder that cannot be listed"
        most = MOST_FOLDERS_FULL * limits.file_bytes
        return f"wrote more than {most:,} bytes into files" if total > most else ""


def _free_uid() -> int | None:
    """Return a user that root may become and that nobody is; None: this process is not root, or cannot."""
    # by the process number, so that sandboxes at one time hardly ever share a user
    uid = FIRST_UID + os.getpid() % NUM_UIDS
    maps = [list(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    known = any(first <= uid < first + count for first, _, count in maps)
    return uid if os.geteuid() == 0 and known and sc.has_capability(sc.CAP_SETUID) else None


def _become(uid: int) -> None:
    """Be that user for limits and signals, for good, and root only as the owner of files: the interpreter
    may lie in a folder that none but root enters. What may be read and written is Landlock's to say."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    # capabilities would vanish with root; one is needed for the last step, then none
    sc.prctl(sc.PR_SET_KEEPCAPS, 1)
    os.setresuid(uid, uid, uid)
    sc.set_capabilities(1 << sc.CAP_SETUID)
    sc.set_file_uid(0)
    sc.set_capabilities(0)


def _count_tasks(uid: int) -> int:
    total = 0
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with contextlib.suppress(OSError):
                if process.stat().st_uid == uid:
                    total += len(os.listdir(process / "task"))
    return total


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


class Namespaces(Enclosure):
    """The stronger one, made in a process that becomes its server.

    Nothing is left of a program: its folder is a file system in memory, which refuses to become too large,
    and both it and its processes end with its namespaces.
    """

    name = "namespaces"

    def __init__(self, channel: socket.socket, more_readable: list[str]) -> None:
        """Enter the namespaces; returns in a new process, while the one before waits for its end.

        Raises:
            Unavailable: this machine has none, or forbids them.
        """
        if reason := restrictions.seccomp_problem():
            raise EnclosureUnavailable(reason)
        readable = restrictions.readable_paths(more_readable)
        try:
            # all at once: the user namespace gives the rights to make the others
            sc.unshare(_KINDS)
        except OSError as e:
            raise EnclosureUnavailable(f"namespaces are not allowed ({e.strerror or e})") from None
        # a map of more than one user has to be written from outside of the namespace
        send_message(channel, {"map": os.getpid()})
        if error := receive_message(channel)["error"]:
            raise EnclosureUnavailable(f"users cannot be mapped ({error})")
        self.watch = ProcessTreeUsage(_become_first_process(), forks=True)
        self._own_processes = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _build_view(readable)
        except OSError as e:
            raise EnclosureUnavailable(f"a file tree cannot be made ({e.strerror or e})") from None
        self._landlock_abi = restrictions.landlock_version()
        sc.drop_bounding_set()  # the server runs no other program, and its children inherit this
        self._filter = restrictions.prepare_filter(namespaces=True, signal_scope=True, own_pid=1)
        self._own_uid = os.getuid() != UID
        """Programs have a user that the server has not."""

    def prepare(self) -> str:
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
        # a mount namespace of its own, so that the tmpfs goes with the program
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
        restrictions.limit(resource.RLIMIT_NPROC, limits.processes + (0 if self._own_uid else 3))
        if self._landlock_abi:
            restrictions.restrict_files(self._landlock_abi, ["/"], [folder, *restrictions.devices()])
        restrictions.install_filter(self._filter)

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)


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
    # private first: mounts made here must not show up in the machine's own tree
    sc.mount("none", "/", None, sc.MS_REC | sc.MS_PRIVATE)
    root = _MOUNT_POINT
    sc.mount("tmpfs", root, "tmpfs", sc.MS_NOSUID, "size=1m,mode=755")
    for path in [*readable, *filter(os.path.exists, restrictions.DEVICES)]:
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        # links are made again as links: /bin leads to /usr/bin in the view too
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
    # after the binds, so that it reaches all of them
    sc.make_read_only(root)
    sc.make_root(root)

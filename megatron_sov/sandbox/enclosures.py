"""Enclosures for programs: by namespaces, or by Landlock on kernels without unprivileged namespaces.

`NamespaceEnclosure` is stronger: user, process, mount, network, IPC and host name namespaces, see
namespaces(7). The server lives in its own namespaces with only readable paths in the file tree. Each program
gets its own process namespace and a private /tmp in memory, which has the readable paths below /tmp; when the
first process ends, the kernel kills the others.

`LandlockEnclosure` uses Landlock, a system call filter and limits. A program's processes cannot leave their
process group, by which the server kills them.
"""

import contextlib
import os
import resource
import signal
import socket
import tempfile
from pathlib import Path
from typing import Protocol

from megatron_sov.sandbox import restrictions, system_calls as sc
from megatron_sov.sandbox.folders import MAX_ENTRIES, measure_folder, remove_folder
from megatron_sov.sandbox.program import Limits
from megatron_sov.work.processes.channel import receive_message, send_message
from megatron_sov.work.processes.process_tree import ProcessTreeUsage

FIRST_UID, NUM_UIDS = 61184, 4336
"""systemd's range for dynamic users; a `LandlockEnclosure` of root takes one user."""
FOLDER_FACTOR = 4
"""Largest folder under Landlock, in multiples of `Limits.file_bytes`."""
PROGRAM_UID = 1000
"""User for programs inside a user namespace."""
OUTER_UID = 65534
"""User `nobody` for root's programs outside the user namespace, because root has no limits."""
PRIVATE_FOLDER = "/tmp"
_STAGING_FOLDER = "/.private"
"""Mount point of a private /tmp while the program's process binds readable paths into it."""
_MAX_INODES = 4096
_MOUNT_POINT = "/sys"
"""A folder that every machine has and no program needs."""
_NAMESPACES = (sc.CLONE_NEWUSER | sc.CLONE_NEWPID | sc.CLONE_NEWNS | sc.CLONE_NEWNET | sc.CLONE_NEWIPC
               | sc.CLONE_NEWUTS)
_SERVER_PROCESSES = 3
"""Server, the process that waits for the server, and template."""


class EnclosureUnavailable(Exception):
    """The reason why this machine cannot provide an enclosure."""


class Enclosure(Protocol):
    """Encloses one program at a time; created in the server process, from which the template is forked."""

    name: str
    usage: ProcessTreeUsage
    """Resource usage of the template's descendants."""

    def create_folder(self) -> str:
        """Return the program's folder; called in the server."""

    def fork_program(self) -> int:
        """Fork like `os.fork`; called in the template."""

    def drop_privileges(self, folder: str, limits: Limits) -> None:
        """Make the folder available and drop all privileges; called in the program's process."""

    def restrict_process(self, folder: str, limits: Limits) -> None:
        """Restrict files, system calls and the number of processes; called in the program's process."""

    def kill_program(self, pid: int) -> None:
        """Kill all processes of the program with first process `pid`."""

    def delete_folder(self) -> None:
        """Remove the program's folder."""
        return

    def close(self) -> None:
        """Remove the files of the enclosure."""
        return

    def find_excess(self, limits: Limits) -> str:
        """Return the reason why the program's files are too large; "" within the limits."""
        return ""


class NamespaceEnclosure(Enclosure):
    """Encloses programs by namespaces; a program's folder is a file system in memory with a size limit."""

    name = "namespaces"

    def __init__(self, channel: socket.socket, readable_folders: list[str]) -> None:
        """Enter new namespaces; return in a forked process, while the calling process waits for its exit.

        Args:
            channel: socket to the parent process, which writes the user maps.
            readable_folders: readable folders besides the system's and the interpreter's.

        Raises:
            EnclosureUnavailable: this machine has no namespaces, or forbids them.
        """
        if reason := restrictions.find_seccomp_problem():
            raise EnclosureUnavailable(reason)
        readable = restrictions.list_readable_paths(readable_folders)
        try:
            # in a single call, because the new user namespace grants the right to create the others
            sc.unshare(_NAMESPACES)
        except OSError as e:
            raise EnclosureUnavailable(f"namespaces are not allowed ({e.strerror or e})") from None
        # only a process outside the namespace may write a map with two users
        send_message(channel, {"map": os.getpid()})
        if error := receive_message(channel)["error"]:
            raise EnclosureUnavailable(f"users cannot be mapped ({error})")
        self.usage = ProcessTreeUsage(_fork_first_process(), forks=True)
        self._hidden_paths = [path for path in readable if path.startswith(f"{PRIVATE_FOLDER}/")]
        """Readable paths below /tmp, e.g. a virtual environment's; a private /tmp would hide them."""
        self._pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _build_file_tree(readable)
        except OSError as e:
            raise EnclosureUnavailable(f"a file tree cannot be made ({e.strerror or e})") from None
        self._landlock_version = restrictions.get_landlock_version()
        sc.drop_bounding_set()  # inherited by the template and all programs
        self._filter = restrictions.build_filter(namespaces=True, signal_scope=True, own_pid=1)
        self._has_program_user = os.getuid() != PROGRAM_UID
        """Programs run as `PROGRAM_UID`, the server does not."""

    def create_folder(self) -> str:
        return f"{PRIVATE_FOLDER}/sandboxed"

    def fork_program(self) -> int:
        """Fork like `os.fork`; the child is the first process of a new process namespace."""
        sc.unshare(sc.CLONE_NEWPID)
        pid = -1
        try:
            pid = os.fork()
        finally:
            if pid:  # the next program must not be forked into this program's namespace
                sc.enter_namespace(self._pid_namespace, sc.CLONE_NEWPID)
        return pid

    def drop_privileges(self, folder: str, limits: Limits) -> None:
        # the tmpfs vanishes with the program's own mount namespace
        sc.unshare(sc.CLONE_NEWNS)
        sc.mount("tmpfs", _STAGING_FOLDER, "tmpfs", sc.MS_NOSUID | sc.MS_NODEV,
                 f"size={limits.file_bytes},nr_inodes={_MAX_INODES},mode=700,uid={PROGRAM_UID},"
                 f"gid={PROGRAM_UID}")
        for path in self._hidden_paths:
            # the bind mount of a read-only mount is read-only, too
            _bind_path(path, _STAGING_FOLDER + path.removeprefix(PRIVATE_FOLDER))
        sc.mount(_STAGING_FOLDER, PRIVATE_FOLDER, None, sc.MS_MOVE)
        if self._has_program_user:
            os.setgroups([])
            os.setresgid(PROGRAM_UID, PROGRAM_UID, PROGRAM_UID)
            os.setresuid(PROGRAM_UID, PROGRAM_UID, PROGRAM_UID)
        os.mkdir(folder)
        sc.set_capabilities(0)
        sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)

    def restrict_process(self, folder: str, limits: Limits) -> None:
        # the kernel counts the processes of a user in a namespace, with the server's if the user is the same
        other_processes = 0 if self._has_program_user else _SERVER_PROCESSES
        restrictions.set_limit(resource.RLIMIT_NPROC, limits.processes + other_processes)
        # Landlock in addition to the file tree, if the kernel has Landlock
        if self._landlock_version:
            restrictions.restrict_files(self._landlock_version, ["/"],
                                        [PRIVATE_FOLDER, *restrictions.list_devices()])
        restrictions.install_filter(self._filter)

    def kill_program(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)


def build_id_maps(uid: int, gid: int) -> list[tuple[str, str, str]]:
    """Return contents for `setgroups`, `uid_map` and `gid_map`, for user `uid` and group `gid` outside the
    namespace; the preferred choice comes first."""
    one_user = ("deny", f"{PROGRAM_UID} {uid} 1", f"{PROGRAM_UID} {gid} 1")
    if uid:
        return [one_user]
    return [("allow", f"0 0 1\n{PROGRAM_UID} {OUTER_UID} 1", f"0 {gid} 1\n{PROGRAM_UID} {OUTER_UID} 1"),
            one_user]


def _fork_first_process() -> int:
    """Fork the first process of the new process namespace; return its process number outside, in the child.

    The calling process waits for the child and exits.
    """
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid:
        os.write(write_end, str(pid).encode())
        os.waitpid(pid, 0)
        os._exit(0)
    sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
    outer_pid = int(os.read(read_end, 32))
    os.close(read_end)
    os.close(write_end)
    return outer_pid


def _build_file_tree(readable: list[str]) -> None:
    """Build a file tree of readable paths and `pivot_root` to the tree."""
    # private first: the machine must not see the mounts
    sc.mount("none", "/", None, sc.MS_REC | sc.MS_PRIVATE)
    root = _MOUNT_POINT
    sc.mount("tmpfs", root, "tmpfs", sc.MS_NOSUID, "size=1m,mode=755")
    for path in [*readable, *restrictions.list_devices()]:
        _bind_path(path, root + path)
    os.mkdir(root + _STAGING_FOLDER)
    os.makedirs(f"{root}{PRIVATE_FOLDER}", exist_ok=True)
    os.symlink(PRIVATE_FOLDER, f"{root}/dev/shm")  # the C library's folder for named semaphores
    # after the bind mounts, which become read-only too
    sc.make_read_only(root)
    sc.change_root(root)


def _bind_path(path: str, target: str) -> None:
    """Bind-mount the file or folder `path` at `target`; copy a link as a link, e.g. /bin -> /usr/bin."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    sc.mount(path, target, None, sc.MS_BIND | sc.MS_REC)


class LandlockEnclosure(Enclosure):
    """Encloses programs by Landlock, a system call filter and limits."""

    name = "landlock"

    def __init__(self, readable_folders: list[str], parent_folder: str) -> None:
        """Check the kernel and choose a user for programs.

        Args:
            readable_folders: readable folders besides the system's and the interpreter's.
            parent_folder: folder for the programs' folders, which `close` removes.

        Raises:
            EnclosureUnavailable: the kernel has no suitable Landlock, or no seccomp.
        """
        self._version = restrictions.get_landlock_version()
        if self._version < restrictions.MIN_LANDLOCK_VERSION:
            raise EnclosureUnavailable(
                f"Landlock has version {self._version}, and {restrictions.MIN_LANDLOCK_VERSION} is needed "
                "(Linux 6.2, and 'landlock' in its list of security modules)")
        if reason := restrictions.find_seccomp_problem():
            raise EnclosureUnavailable(reason)
        self._readable = restrictions.list_readable_paths(readable_folders)
        # without Landlock's signal scope, the filter contains the process number
        self._filter = (self._build_filter(0) if self._version >= restrictions.SIGNAL_SCOPE_VERSION else None)
        # a user without other processes, so that the kernel counts only this sandbox's
        self._uid = _find_free_uid()
        sc.drop_bounding_set()  # inherited by the template and all programs
        self.usage = ProcessTreeUsage(os.getpid(), forks=True)
        self._parent_folder, self._folder = parent_folder, ""
        # programs may pass through the parent folder but not list it
        os.chmod(parent_folder, 0o711 if self._uid else 0o700)
        self._user_tasks = 0

    def create_folder(self) -> str:
        self._folder = tempfile.mkdtemp(prefix="program-", dir=self._parent_folder)
        if self._uid is not None:
            os.chmod(self._folder, 0o777)  # Landlock keeps other programs out
        return self._folder

    def fork_program(self) -> int:
        if self._uid is None:
            self._user_tasks = _count_tasks(os.geteuid())
        return os.fork()

    def drop_privileges(self, folder: str, limits: Limits) -> None:
        if self._uid is None:
            sc.set_capabilities(0)  # may be root of a container without other users
        else:
            _become_user(self._uid)
        sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)

    def restrict_process(self, folder: str, limits: Limits) -> None:
        # the kernel counts all processes of a user
        restrictions.set_limit(resource.RLIMIT_NPROC, self._user_tasks + limits.processes)
        restrictions.restrict_files(self._version, self._readable, [folder, *restrictions.list_devices()])
        restrictions.install_filter(self._filter or self._build_filter(os.getpid()))

    def _build_filter(self, pid: int) -> restrictions.CallFilter:
        signal_scope = self._version >= restrictions.SIGNAL_SCOPE_VERSION
        return restrictions.build_filter(namespaces=False, signal_scope=signal_scope, own_pid=pid)

    def kill_program(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # before `os.setsid`, or after the end
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def delete_folder(self) -> None:
        if self._folder:
            remove_folder(self._folder)
            self._folder = ""

    def close(self) -> None:
        remove_folder(self._parent_folder)

    def find_excess(self, limits: Limits) -> str:
        num_bytes, num_entries = measure_folder(self._folder)
        if num_entries >= MAX_ENTRIES:
            return f"made {MAX_ENTRIES:,} files or more, or a folder that cannot be listed"
        max_bytes = FOLDER_FACTOR * limits.file_bytes
        return f"wrote more than {max_bytes:,} bytes into files" if num_bytes > max_bytes else ""


def _find_free_uid() -> int | None:
    """Return a user for root's programs; None without root or `CAP_SETUID`."""
    # by process number, so that concurrent sandboxes rarely share a user
    uid = FIRST_UID + os.getpid() % NUM_UIDS
    maps = [list(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    is_mapped = any(first <= uid < first + count for first, _, count in maps)
    return uid if os.geteuid() == 0 and is_mapped and sc.has_capability(sc.CAP_SETUID) else None


def _become_user(uid: int) -> None:
    """Become user `uid` for limits and signals, and stay root for file access.

    The interpreter may be in a folder that only root can enter. Landlock restricts file access.
    """
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    # keep CAP_SETUID, which the last step needs, across the change of user
    sc.prctl(sc.PR_SET_KEEPCAPS, 1)
    os.setresuid(uid, uid, uid)
    sc.set_capabilities(1 << sc.CAP_SETUID)
    sc.set_file_uid(0)
    sc.set_capabilities(0)


def _count_tasks(uid: int) -> int:
    """Count the processes and threads of a user."""
    num_tasks = 0
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with contextlib.suppress(OSError):
                if process.stat().st_uid == uid:
                    num_tasks += len(os.listdir(process / "task"))
    return num_tasks

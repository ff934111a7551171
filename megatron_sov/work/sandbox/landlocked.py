"""The enclosure where the kernel allows no namespaces: Landlock, a filter of system calls, limits.

All processes of a program stay in one process group, which they cannot leave, so that one signal ends them.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import tempfile
from pathlib import Path

from megatron_sov.work.sandbox import landlock, seccomp
from megatron_sov.work.sandbox import system_calls as sc
from megatron_sov.work.sandbox.enclosure import Unavailable
from megatron_sov.work.sandbox.folders import MAX_ENTRIES, remove, size_bytes
from megatron_sov.work.sandbox.program import Limits
from megatron_sov.work.sandbox.readable import DEVICES, readable_paths
from megatron_sov.work.sandbox.resources import limit
from megatron_sov.work.watch import Watch

FIRST_UID, NUM_UIDS = 61184, 4336
"""systemd's range for users that exist for a moment; root's sandboxes take one of them each."""
MOST_FOLDERS_FULL = 4
"""A folder may hold so many times the size of a file."""


class Landlocked:
    """The enclosure; see `Enclosure`."""

    name = "landlock"

    def __init__(self, more_readable: list[str], folder: str) -> None:
        """Look whether the kernel can do this.

        Args:
            more_readable: further folders that programs may read.
            folder: where programs' folders are made; it goes with this server.

        Raises:
            Unavailable: it cannot.
        """
        self._abi = landlock.abi()
        if self._abi < landlock.NEEDED_ABI:
            raise Unavailable(f"Landlock has version {self._abi}, and {landlock.NEEDED_ABI} is needed "
                              "(Linux 6.2, and 'landlock' in its list of security modules)")
        if reason := seccomp.supported():
            raise Unavailable(reason)
        self._readable = readable_paths(more_readable)
        # without Landlock's scope of signals each process has a filter of its own
        self._filter = self._filter_of(0) if self._abi >= landlock.SIGNAL_SCOPE_ABI else None
        self._uid = _free_uid()
        sc.drop_bounding_set()  # the server runs no other program, and its children inherit this
        self.watch = Watch(os.getpid(), forks=True)
        self._parent, self._folder = folder, ""
        os.chmod(folder, 0o711 if self._uid else 0o700)  # to be passed, not listed
        self._tasks_of_user = 0

    def prepare(self) -> str:
        """Return the folder that a program will have."""
        self._folder = tempfile.mkdtemp(prefix="program-", dir=self._parent)
        if self._uid is not None:
            os.chmod(self._folder, 0o777)  # of all who could find it, Landlock lets this program in
        return self._folder

    def fork(self) -> int:
        """As os.fork()."""
        if self._uid is None:
            self._tasks_of_user = _count_tasks(os.geteuid())
        return os.fork()

    def enter(self, folder: str, limits: Limits) -> None:
        """Take this process's privileges."""
        if self._uid is None:
            sc.set_capabilities(0)  # root of a container that has no other user
        else:
            _become(self._uid)
        sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)

    def lock(self, folder: str, limits: Limits) -> None:
        """Restrict what this process may read, write and call."""
        # the kernel counts all processes of a user; root's programs have users of their own
        limit(resource.RLIMIT_NPROC, self._tasks_of_user + limits.processes)
        devices = [device for device in DEVICES if os.path.exists(device)]
        landlock.restrict(self._abi, self._readable, [folder, *devices])
        seccomp.install(self._filter or self._filter_of(os.getpid()))

    def _filter_of(self, pid: int) -> seccomp.Filter:
        scope = self._abi >= landlock.SIGNAL_SCOPE_ABI
        return seccomp.prepare(seccomp.rules(namespaces=False, signal_scope=scope, own_pid=pid))

    def kill(self, pid: int) -> None:
        """End a program with all of its processes."""
        with contextlib.suppress(ProcessLookupError):  # it has not made its group yet, or is gone
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def clean(self) -> None:
        """Remove a program's folder."""
        if self._folder:
            remove(self._folder)
            self._folder = ""

    def close(self) -> None:
        """Remove what programs' folders were made in."""
        remove(self._parent)

    def overfull(self, limits: Limits) -> str:
        """Return why a program's files are too large; empty: they are not."""
        total, entries = size_bytes(self._folder)
        if entries >= MAX_ENTRIES:
            return f"made {MAX_ENTRIES:,} files or more, or a folder that cannot be listed"
        most = MOST_FOLDERS_FULL * limits.file_bytes
        return f"wrote more than {most:,} bytes into files" if total > most else ""


def _free_uid() -> int | None:
    """Return a user that root may become and that nobody is; None: this process is not root, or cannot."""
    uid = FIRST_UID + os.getpid() % NUM_UIDS
    maps = [list(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    known = any(first <= uid < first + count for first, _, count in maps)
    return uid if os.geteuid() == 0 and known and sc.has_capability(sc.CAP_SETUID) else None


def _become(uid: int) -> None:
    """Be that user for limits and signals, for good, and root only as the owner of files: the interpreter
    may lie in a folder that none but root enters. What may be read and written is Landlock's to say."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    sc.prctl(sc.PR_SET_KEEPCAPS, 1)
    os.setresuid(uid, uid, uid)
    sc.set_capabilities(1 << sc.CAP_SETUID)
    sc.set_file_uid(0)
    sc.set_capabilities(0)


def _count_tasks(uid: int) -> int:
    """Return how many processes and threads a user has."""
    total = 0
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with contextlib.suppress(OSError):
                if process.stat().st_uid == uid:
                    total += len(os.listdir(process / "task"))
    return total

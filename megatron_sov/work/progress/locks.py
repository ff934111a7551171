"""Who works on what: locks of folders, claims of pieces, and which process wrote a record.

The kernel keeps a folder's lock, so it is seen from other containers, and on most network file systems from
other machines; it ends with its process, however that ends.

A claim's n-th holder is the one process that could make its file n: who lost never believes to have won, on
any file system.  A sign of life is a counter in that file, which others watch on their own clock: no two
machines' clocks are compared, and a clock that is set harms nothing.  A holder whose process can be looked up
from here, and has ended, need not be watched: a job that is started again goes on at once.  A claim only
saves work: should two jobs ever do the same, the store keeps what is published first.

    CLAIMS/NAME/1.json                    its first holder, and so on; the last one counts
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import atomic_write, disk_errors, holds
from megatron_sov.base.errors import UserError, warn

CLOCK_TOLERANCE_S = 5.0
"""Start times of one process, as read by two others, may differ by the corrections of
the clock in between."""


def identity() -> dict[str, Any]:
    """Return what tells this process from all others: host, process_table (where its number means something),
    pid, and started_s."""
    return {"host": socket.gethostname(), "process_table": process_table(), **_process_here(os.getpid())}


def has_ended(record: Mapping[str, Any]) -> bool | None:
    """Return whether a process has ended; None: nothing can be known from here, on another machine or in
    another container of the same one.

    Args:
        record: its `identity`, or something else that somebody wrote.
    """
    import psutil

    pid, started_s = record.get("pid"), record.get("started_s")
    here = (socket.gethostname(), process_table())
    # a number means something in its own table of processes alone
    if (record.get("host"), record.get("process_table")) != here or not isinstance(pid, int) \
            or not isinstance(started_s, float):
        return None
    try:
        holder = psutil.Process(pid)
        if holder.status() == psutil.STATUS_ZOMBIE:  # it has ended, and its parent may never take note of it
            return True
        return bool(abs(holder.create_time() - started_s) >= CLOCK_TOLERANCE_S)
    except psutil.NoSuchProcess:
        return True


@cache
def process_table() -> str:
    """Return what tells one table of processes from others: the boot of the kernel, and the namespace of
    process numbers in it, which a container has of its own.  Empty where the kernel does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


@cache
def _process_here(pid: int) -> dict[str, Any]:
    """Return number and start of this process; a fork has others."""
    import psutil

    return {"pid": pid, "started_s": psutil.Process(pid).create_time()}


POLL_S = 5.0
"""Between two looks at what can be done, where nothing can at this moment."""
RENEWALS = 4
"""Signs of life within a lease, so that some may be late."""


@dataclass(frozen=True)
class Holder:
    """The last holder of a claim, as its file tells."""

    name: str
    """What it works on."""
    host: str
    """Machine; empty where the file does not tell."""
    pid: int
    """Process on that machine."""
    slurm_job: str
    """Empty outside of Slurm."""
    is_released: bool
    """It has given the claim back."""
    changed_s: float
    """Unix time of the last sign of life, by the clock of the disk."""


@dataclass
class Patience:
    """How a job waits where nothing can be done at this moment."""

    sleep: Callable[[float], object] = time.sleep
    waited_s: float = 0.0
    """Since something could be done."""

    def wait(self, most_s: float, watches: bool) -> bool:
        """Wait for a moment; returns False where that was done long enough.

        Args:
            most_s: how long to wait at most.
            watches: whether to wait longer, since a claim may be a dead job's.
        """
        left_s = most_s - self.waited_s
        if left_s <= 0 and not watches:
            return False
        pause_s = min(POLL_S, left_s) if left_s > 0 else POLL_S
        self.sleep(pause_s)
        self.waited_s += pause_s
        return True


class Claims:
    """The claims of a folder, as one job sees them; it has to ask again to see that a lease runs out."""

    def __init__(self, folder: Path, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Args:
            folder: of all claims.
            lease_s: seconds without a sign of life after which a claim may be taken over.
            clock: seconds, from anywhere, that never go back.
        """
        self._folder, self._lease_s, self._clock = folder, lease_s, clock
        self._seen: dict[str, tuple[int, bytes, float]] = {}
        self._watched: set[str] = set()

    def take(self, name: str) -> Claim | None:
        """Return a claim on something, or None where another job holds it.

        One that shows no sign of life for a whole lease, from the first time that this job looked at it,
        is taken over; one whose process has ended on this machine, at once.

        Raises:
            UserError: the folder cannot be written.
        """
        with disk_errors(self._folder):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
            try:
                # file n + 1 can be made by one process only (O_EXCL): that is the whole protocol, no lock is
                # needed
                number = _last_number(self._folder / name)
                if number and not self._is_free(name, number):
                    return None
                self._watched.discard(name)
                file = _file(self._folder, name, number + 1)
                os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except (FileExistsError, FileNotFoundError):  # another was faster; or cleared away: it is done
                return None
            return Claim(self._folder, name, number + 1, self._lease_s)

    def may_be_dead(self, name: str) -> bool:
        """Return whether a claim that was not given has shown no sign of life yet: who stops to ask for it
        leaves it to nobody, where its holder was killed."""
        return name in self._watched

    def _is_free(self, name: str, number: int) -> bool:
        """Return whether a claim's last holder gave it back, has ended, or showed no sign of life for a
        lease."""
        try:
            content = _file(self._folder, name, number).read_bytes()
        except FileNotFoundError:
            return False
        told = _read_claim(content)
        if told.get("is_released") or has_ended(told):
            return True
        # since when this job has seen the same content, by its own clock
        seen_number, seen, since_s = self._seen.get(name, (0, b"", 0.0))
        # a sign of life, or the first look: the lease begins again
        if (seen_number, seen) != (number, content):
            (self._watched.discard if seen_number else self._watched.add)(name)
            self._seen[name] = (number, content, self._clock())
            return False
        return self._clock() - since_s >= self._lease_s


class Claim:
    """A claim that this job holds; obtained from `Claims.take`."""

    def __init__(self, folder: Path, name: str, number: int, lease_s: float) -> None:
        self.name = name
        self._folder, self._number, self._lease_s = folder, number, lease_s
        self._beat, self._is_over = 0, False
        self._lock = threading.Lock()
        self.renew()

    def renew(self) -> bool:
        """Show a sign of life; returns whether the claim is still this job's.

        Raises:
            UserError: the folder cannot be written.
        """
        return self._write(is_released=False)

    def release(self) -> None:
        """Give the claim back, at the end of the work, be it done or not.

        Raises:
            UserError: the folder cannot be written.
        """
        self._write(is_released=True)

    @contextlib.contextmanager
    def renewing(self) -> Iterator[Claim]:
        """Show signs of life from a thread, as long as the block runs; then give the claim back."""
        stop = threading.Event()
        thread = threading.Thread(target=self._renew, args=(stop,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            stop.set()
            thread.join()
            self.release()

    def _renew(self, stop: threading.Event) -> None:
        while not stop.wait(self._lease_s / RENEWALS):
            try:
                if not self.renew():
                    return
            except (UserError, OSError) as e:  # the lease is good for some more attempts
                warn(f"{self._folder / self.name}: the claim could not be renewed ({e})")

    def _write(self, is_released: bool) -> bool:
        """Write the next state; returns whether the claim was still held."""
        file = _file(self._folder, self.name, self._number)
        next_file = _file(self._folder, self.name, self._number + 1)
        with self._lock:
            # a file n + 1 means that another job took over; writing n again would bring no claim back
            if self._is_over or not file.exists() or next_file.exists():
                self._is_over = True
                return False
            self._beat += 1
            self._is_over = is_released
            told = {**identity(), "beat": self._beat, "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
                    "is_released": is_released}
            try:
                atomic_write(file, json.dumps(told))
            except FileNotFoundError:  # cleared away: what it was for is done
                self._is_over = True
            return not self._is_over


def holders(folder: Path) -> list[Holder]:
    """Return the last holder of every claim of a folder, by name."""
    found = []
    for name in sorted(os.listdir(folder)):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # cleared away meanwhile; a stranger
            if number := _last_number(folder / name):
                file = _file(folder, name, number)
                told = _read_claim(file.read_bytes())
                pid = told.get("pid")
                found.append(Holder(name, str(told.get("host", "")), pid if isinstance(pid, int) else 0,
                                    str(told.get("slurm_job", "")), bool(told.get("is_released")),
                                    file.stat().st_mtime))
    return found


def _file(folder: Path, name: str, number: int) -> Path:
    return folder / name / f"{number}.json"


def _last_number(folder: Path) -> int:
    """Return the number of a claim's last holder, 0 where it had none."""
    stems = [name.removesuffix(".json") for name in os.listdir(folder) if name.endswith(".json")]
    return max((int(stem) for stem in stems if stem.isascii() and stem.isdigit()), default=0)


def _read_claim(content: bytes) -> dict[str, Any]:
    """Return what a claim's file tells; nothing where its holder was killed before it could write."""
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


LOCK = ".lock"
"""File that is held in place of its folder, where a file system locks files alone."""


@contextlib.contextmanager
def holding(folder: Path, said: str | Path) -> Iterator[None]:
    """Make a folder, where it is missing, and hold it.

    Args:
        folder: where.
        said: what is made in it, for messages: an option and its value, or a path.

    Raises:
        UserError: another process holds it, or it cannot be made.
    """
    with _trying(folder) as is_ours:
        if not is_ours:
            raise UserError(f"{said}: is being written by another process ({folder} is held); wait for it, "
                            "or name another output")
        yield


@contextlib.contextmanager
def taking(folder: Path) -> Iterator[bool]:
    """Hold a folder that is there only as long as somebody holds it; gives whether it is held by this block,
    and not by another one, of whatever process.

    Raises:
        UserError: it cannot be made.
    """
    with _trying(folder) as is_ours:
        try:
            yield is_ours
        finally:
            if is_ours:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _trying(folder: Path) -> Iterator[bool]:
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        # closing the files gives the lock back, also where the block raises
        yield _hold(folder, stack)


def _hold(folder: Path, stack: contextlib.ExitStack) -> bool:
    """Return whether no other process holds a folder, which is then held as long as `stack` is open."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, fd)
        # the folder itself, so that no lock file is left in outputs
        is_ours = holds(fd)
        if is_ours is None:  # NFS locks files that are open for writing, and nothing else
            lock = os.open(folder / LOCK, os.O_WRONLY | os.O_CREAT, 0o666)
            stack.callback(os.close, lock)
            is_ours = holds(lock)
        # one that its holder has just finished with and removed is another folder than the next one's
        return is_ours is not False and os.path.samestat(os.stat(folder), os.fstat(fd))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Wait until no other process is in this block for a folder; where nothing can be locked, go on."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)

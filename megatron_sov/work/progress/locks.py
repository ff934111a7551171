"""Folder locks, leased claims on work items, and process identities in lock files.

Folder locks are kernel locks: visible in other containers and on most network file systems, released when the
process ends.

Claims are files: the n-th holder of a claim is the process that created file n exclusively, on any file
system. The holder increments a counter in its file as a heartbeat; other processes watch it by their own
clocks, so clocks of machines are never compared. If the holder's process can be looked up and has ended, the
claim is free at once. A claim only avoids duplicate work: if two jobs compute the same part, the table keeps
the first.

    CLAIMS/NAME/1.json                    first holder; the highest number is current
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import translate_disk_errors, try_lock, write_atomically
from megatron_sov.base.errors import UserError, stop_check, warn

CLOCK_TOLERANCE_S = 5.0
"""Tolerance between two readings of a process's start time, for clock corrections in between."""
POLL_S = 5.0
"""Interval between attempts to find available work."""
RENEWALS = 4
"""Heartbeats per lease; late heartbeats do not lose the claim."""
LOCK = ".lock"
"""File locked in place of the folder on file systems that only lock files."""


def process_identity() -> dict[str, Any]:
    """Return the identity of the current process: host, process_table (pid namespace), pid, started_s."""
    return {"host": socket.gethostname(), "process_table": process_table(), **_own_process(os.getpid())}


def has_ended(record: Mapping[str, Any]) -> bool | None:
    """Return whether a process has ended; None for processes on other machines and in other containers.

    Args:
        record: `process_identity()` of the process, possibly from an untrusted file.
    """
    pid, started_s = record.get("pid"), record.get("started_s")
    own_place = (socket.gethostname(), process_table())
    # a pid is only meaningful in its own process table
    if (record.get("host"), record.get("process_table")) != own_place or not isinstance(pid, int) \
            or not isinstance(started_s, float):
        return None
    found_s = _find_start_time(pid)
    return found_s is None or abs(found_s - started_s) >= CLOCK_TOLERANCE_S


@cache
def process_table() -> str:
    """Return boot id and pid namespace, distinct per container; "" if /proc is not readable."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


@cache
def _own_process(pid: int) -> dict[str, Any]:
    """Return pid and start time; cached per pid because forks differ."""
    return {"pid": pid, "started_s": _find_start_time(pid)}


def _find_start_time(pid: int) -> float | None:
    """Return the Unix time at which a process started; None if it has ended."""
    import psutil  # not at the top: it is slow to import, and most commands lock nothing

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:  # ended, but not yet reaped by its parent
            return None
        return float(process.create_time())
    except psutil.NoSuchProcess:
        return None


@dataclass(frozen=True)
class Holder:
    """Last holder of a claim, read from its file."""

    name: str
    host: str
    """Machine; empty if unknown."""
    pid: int
    slurm_job: str
    is_released: bool
    """Whether the holder released the claim."""
    changed_s: float
    """Unix time of the last heartbeat by the file system's clock."""


@dataclass
class IdleTimeout:
    """Waits for available work up to a limit."""

    sleep: Callable[[float], object] = time.sleep
    waited_s: float = 0.0
    """Seconds since work was last available."""

    def wait(self, most_s: float, watches: bool) -> bool:
        """Sleep for one interval; return False if the limit has passed.

        Args:
            most_s: limit in seconds.
            watches: wait beyond the limit, because a claim may belong to a dead job.
        """
        remaining_s = most_s - self.waited_s
        if remaining_s <= 0 and not watches:
            return False
        pause_s = min(POLL_S, remaining_s) if remaining_s > 0 else POLL_S
        self.sleep(pause_s)
        self.waited_s += pause_s
        return True


class Claims:
    """A job's view on the claims in a folder. Call `take` repeatedly: expired leases show only over time."""

    def __init__(self, folder: Path, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Args:
            folder: folder of all claims.
            lease_s: seconds without heartbeat after which a claim is free.
            clock: monotonic clock in seconds.
        """
        self._folder, self._lease_s, self._clock = folder, lease_s, clock
        self._seen: dict[str, tuple[int, bytes, float]] = {}
        self._watched: set[str] = set()

    def take(self, name: str) -> "Claim | None":
        """Claim an item; return None for items of living jobs.

        A claim without heartbeat for a whole lease since this job's first look is taken over, as is a claim
        whose process has ended on this machine. Raises `UserError`: the folder is not writable.
        """
        with translate_disk_errors(self._folder):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
            try:
                # Exclusive creation of file n + 1 (O_EXCL) is the whole protocol; no lock is needed.
                number = _last_number(self._folder / name)
                if number and not self._is_available(name, number):
                    return None
                self._watched.discard(name)
                file = _claim_file(self._folder, name, number + 1)
                os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except (FileExistsError, FileNotFoundError):  # another job was faster, or the item is done
                return None
            return Claim(self._folder, name, number + 1, self._lease_s)

    def may_be_dead(self, name: str) -> bool:
        """Return whether a refused claim has shown no heartbeat yet: the holder may be dead."""
        return name in self._watched

    def _is_available(self, name: str, number: int) -> bool:
        """Return whether a claim's last holder released it, ended, or showed no heartbeat for a lease."""
        try:
            content = _claim_file(self._folder, name, number).read_bytes()
        except FileNotFoundError:
            return False
        record = _read_claim(content)
        if record.get("is_released") or has_ended(record):
            return True
        # time of the first look at the unchanged content, by the local clock
        seen_number, seen_content, since_s = self._seen.get(name, (0, b"", 0.0))
        # a heartbeat or the first look restarts the lease
        if (seen_number, seen_content) != (number, content):
            (self._watched.discard if seen_number else self._watched.add)(name)
            self._seen[name] = (number, content, self._clock())
            return False
        return self._clock() - since_s >= self._lease_s


class Claim:
    def __init__(self, folder: Path, name: str, number: int, lease_s: float) -> None:
        self.name = name
        self._folder, self._number, self._lease_s = folder, number, lease_s
        self._beat, self._is_over = 0, False
        self._lock = threading.Lock()
        self.renew()

    def renew(self) -> bool:
        """Write a heartbeat; return whether this job still holds the claim. Raises `UserError`: the folder is
        not writable."""
        return self._write_state(is_released=False)

    def release(self) -> None:
        """Release the claim after finished or failed work. Raises `UserError`: the folder is not writable."""
        self._write_state(is_released=True)

    @contextlib.contextmanager
    def renew_while_open(self) -> "Iterator[Claim]":
        """Write heartbeats from a thread during the block, then release the claim."""
        stop = threading.Event()
        thread = threading.Thread(target=self._renew_periodically, args=(stop,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            stop.set()
            thread.join()
            self.release()

    def _renew_periodically(self, stop: threading.Event) -> None:
        while not stop.wait(self._lease_s / RENEWALS):
            try:
                if not self.renew():
                    return
            except (UserError, OSError) as e:  # later heartbeats may still renew the lease
                warn(f"{self._folder / self.name}: the claim could not be renewed ({e})")

    def _write_state(self, is_released: bool) -> bool:
        """Write the claim file; return whether this job still held the claim."""
        file = _claim_file(self._folder, self.name, self._number)
        next_file = _claim_file(self._folder, self.name, self._number + 1)
        with self._lock:
            # if file n + 1 exists, the claim is lost; rewriting file n would not help
            if self._is_over or not file.exists() or next_file.exists():
                self._is_over = True
                return False
            self._beat += 1
            self._is_over = is_released
            record = {**process_identity(), "beat": self._beat,
                      "slurm_job": os.environ.get("SLURM_JOB_ID", ""), "is_released": is_released}
            try:
                write_atomically(file, json.dumps(record))
            except FileNotFoundError:  # deleted: the claimed item is done
                self._is_over = True
            return not self._is_over


def list_holders(folder: Path) -> list[Holder]:
    """Return the last holder of each claim in a folder, sorted by name."""
    last_holders = []
    for name in sorted(os.listdir(folder)):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # deleted, or foreign
            if number := _last_number(folder / name):
                file = _claim_file(folder, name, number)
                record = _read_claim(file.read_bytes())
                pid = record.get("pid")
                last_holders.append(Holder(
                    name, str(record.get("host", "")), pid if isinstance(pid, int) else 0,
                    str(record.get("slurm_job", "")), bool(record.get("is_released")), file.stat().st_mtime))
    return last_holders


def _claim_file(folder: Path, name: str, number: int) -> Path:
    return folder / name / f"{number}.json"


def _last_number(folder: Path) -> int:
    """Return the number of a claim's last holder, 0 without holder."""
    stems = [name.removesuffix(".json") for name in os.listdir(folder) if name.endswith(".json")]
    return max((int(stem) for stem in stems if stem.isascii() and stem.isdigit()), default=0)


def _read_claim(content: bytes) -> dict[str, Any]:
    """Parse a claim file; return {} if its writer was killed first."""
    try:
        claim = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return claim if isinstance(claim, dict) else {}


@contextlib.contextmanager
def lock_folder(folder: Path, label: str | Path) -> Iterator[None]:
    """Create a folder if missing and lock it during the block.

    Args:
        folder: the folder.
        label: name for messages: an option with its value, or a path.

    Raises:
        UserError: another process holds the lock, or the folder cannot be created.
    """
    with translate_disk_errors(folder):
        stop_check()
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        # closing the files releases the lock, also after an exception
        if not _lock_until_close(folder, stack):
            raise UserError(f"{label}: is being written by another process ({folder} is held); wait for it, "
                            "or name another output")
        yield


def _lock_until_close(folder: Path, stack: contextlib.ExitStack) -> bool:
    """Lock a folder until `stack` closes; return whether that succeeded."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, fd)
        # lock the folder itself to keep outputs free of lock files
        is_ours = try_lock(fd)
        if is_ours is None:  # NFS only locks files open for writing
            lock = os.open(folder / LOCK, os.O_WRONLY | os.O_CREAT, 0o666)
            stack.callback(os.close, lock)
            is_ours = try_lock(lock)
        # the folder may have been deleted and created again meanwhile
        return is_ours is not False and os.path.samestat(os.stat(folder), os.fstat(fd))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def critical_section(folder: Path) -> Iterator[None]:
    """Enter a critical section per folder across processes; without lock support, enter anyway."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)

"""Claims: who works on which piece, so that no two jobs do the same.

A claim's n-th holder is the one process that could make its file n: who lost never believes to have won, on
whatever file system.  A sign of life is a counter in that file, which others watch on their own clock: no two
machines' clocks are compared, and a clock that is set harms nothing.  A holder whose process can be looked up
from here, and has ended, need not be watched: a job that is started again goes on at once.  A claim only
saves work: should two jobs ever do the same, the store keeps what is published first.

    CLAIMS/NAME/1.json                    its first holder, and so on; the last one counts
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import atomic_write, disk_errors
from megatron_sov.base.errors import UserError, warn
from megatron_sov.work.processes.process_identity import has_ended, identity

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
        told = _told(content)
        if told.get("is_released") or has_ended(told):
            return True
        seen_number, seen, since_s = self._seen.get(name, (0, b"", 0.0))
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
                told = _told(file.read_bytes())
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


def _told(content: bytes) -> dict[str, Any]:
    """Return what a claim's file tells; nothing where its holder was killed before it could write."""
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}

"""A run folder's lock: one living run at a time, and a killed one can be continued.

The lock is a file in which its holder counts up, as a sign of life.  Where the holder's process can be looked
up, a dead one frees it at once; from another machine, or another container of the same machine, the file is
watched for a lease, by this process's own clock: no two machines' clocks are compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import atomic_write, disk_errors
from megatron_sov.base.errors import ExitCode, UserError, warn
from megatron_sov.work.progress.locks import has_ended, identity, in_turn

LOCK = "lock.json"
LEASE_S = 60.0
"""Time without a sign of life after which a holder that cannot be looked up is taken to be dead."""
RENEWALS = 4
"""Signs of life within a lease, so that some may be late."""


class RunLock:
    """Holds a run folder until `release`, showing signs of life from a background thread."""

    def __init__(self, run: Path, lease_s: float = LEASE_S) -> None:
        self._file = run / LOCK
        self._lease_s, self._beat = lease_s, 0
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            UserError: a living run holds it, or the folder cannot be written.
        """
        # Reading, judging and writing are one turn: two starters that both find a dead holder must not both
        # write.
        with disk_errors(self._file), in_turn(self._file.parent):
            record = recorded_holder(self._file.parent)
            if record is not None and self._is_held(record):
                raise UserError(f"{self._file.parent}: is held by a living run (process {record['pid']} on "
                                f"{record['host']}); wait for it, stop it, or choose another --run")
            atomic_write(self._file, self._record())
        self._thread.start()

    def release(self) -> None:
        if self._thread.is_alive():
            self._stop.set()
            self._thread.join()
            # If another run took the folder over, the file is its lock, and stays.
            if not self._is_lost():
                self._file.unlink(missing_ok=True)

    def _record(self) -> str:
        # Each record differs from the one before, so a watcher sees life without comparing clocks.
        self._beat += 1
        return json.dumps({**identity(), "beat": self._beat, "token": self._token, **_slurm_job()})

    def _is_held(self, record: dict[str, Any]) -> bool:
        """Return whether the process that wrote a record works still; asks for its signs of life where it
        cannot be looked up."""
        # The process table of this machine is certain and costs nothing; watching takes up to a minute.
        if (lives := _lives(record)) is not None:
            return lives
        print(f"{self._file.parent}: process {record['pid']} on {record['host']} held it last, and cannot be "
              f"looked up from here; watching for a sign of life, {self._lease_s:g} s at most",
              file=sys.stderr, flush=True)
        # Monotonic: a clock that NTP sets must not end the lease early.
        end_s = time.monotonic() + self._lease_s
        while time.monotonic() < end_s:
            time.sleep(self._lease_s / 100)
            if (now := recorded_holder(self._file.parent)) != record:
                return now is not None  # else it was given back
        return False

    def _renew(self) -> None:
        # Some beats fit into a lease, so one slow write on a shared disk does not lose the lock.
        while not self._stop.wait(self._lease_s / RENEWALS):
            try:
                if self._is_lost():
                    print(f"error: {self._file.parent}: another run took this folder while this one was "
                          f"silent for {self._lease_s:g} s; this one ends here", file=sys.stderr, flush=True)
                    # two runs must not write into one folder, not even a last checkpoint
                    os._exit(ExitCode.CRASH)
                atomic_write(self._file, self._record())
            except (UserError, OSError) as e:  # the lease is good for some more attempts
                warn(f"{self._file}: no sign of life could be written ({e})")

    def _is_lost(self) -> bool:
        record = recorded_holder(self._file.parent)
        return record is not None and record["token"] != self._token


def recorded_holder(run: Path) -> dict[str, Any] | None:
    """Return what a run folder's lock says, None where it says nothing.

    Its fields: host, pid, started_s, beat (its signs of life so far), token (the holder's own), process_table
    (where its pid means something), and slurm_job (empty outside of Slurm) with slurm_restart.
    """
    try:
        record = json.loads((run / LOCK).read_text(encoding="utf-8"))
        kinds = (("host", str), ("pid", int), ("started_s", float))
        return {"slurm_job": "", "slurm_restart": 0, "token": "", "process_table": "", **record,
                **{name: kind(record[name]) for name, kind in kinds}}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def forget(run: Path) -> None:
    """Take away a lock whose holder has ended; only for someone who knows that it has."""
    with disk_errors(run):
        (run / LOCK).unlink(missing_ok=True)


def _slurm_job() -> dict[str, Any]:
    """Return the Slurm job that this process belongs to, and how often it was started anew;
    nothing outside of Slurm."""
    job = os.environ.get("SLURM_JOB_ID", "")
    return {"slurm_job": job, "slurm_restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0)} if job else {}


def living_holder(run: Path) -> dict[str, Any] | None:
    """Return host and pid of the process that seems to hold a run folder, or None; for people to read, since
    the age of a sign of life from elsewhere is told by the clock of its disk."""
    record = recorded_holder(run)
    if record is None:
        return None
    lives = _lives(record)
    if lives is None:
        with contextlib.suppress(FileNotFoundError):
            lives = time.time() - (run / LOCK).stat().st_mtime < LEASE_S
    return record if lives else None


def _lives(record: dict[str, Any]) -> bool | None:
    """Return whether the process that wrote a record works still; None: it cannot be looked up from here.

    Slurm starts a job anew when it has given up the nodes of the start before, so that one's processes need
    not be waited for.
    """
    # Same job, later restart: Slurm has killed the start before, whatever its record says.
    now = _slurm_job()
    if now and record["slurm_job"] == now["slurm_job"] and record["slurm_restart"] < now["slurm_restart"]:
        return False
    ended = has_ended(record)
    return None if ended is None else not ended

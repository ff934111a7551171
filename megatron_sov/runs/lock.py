"""Lock of a run folder: `lock.json` admits one living process tree, and a killed run can continue.

The holder increments a counter in `lock.json` as a heartbeat. If the holder's process can be looked up in
this machine's process table, a dead holder frees the lock at once. On another machine or in another
container, watch the file for one lease by this process's clock: clocks of different machines are never
compared.
"""

import contextlib
import json
import os
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import translate_disk_errors, write_atomically
from megatron_sov.base.errors import ExitCode, UserError, warn
from megatron_sov.work.progress.locks import critical_section, has_ended, process_identity

LOCK = "lock.json"
LEASE_S = 60.0
"""Seconds without a heartbeat after which an unreachable holder counts as dead."""
RENEWALS = 4
"""Heartbeats per lease; late heartbeats do not lose the lock."""


class RunLock:
    """Lock on a run folder with a heartbeat thread between `acquire` and `release`."""

    def __init__(self, run: Path, lease_s: float = LEASE_S) -> None:
        self._file = run / LOCK
        self._lease_s, self._beat = lease_s, 0
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_lease, daemon=True)

    def acquire(self) -> None:
        """Write `lock.json` and start the heartbeat. Raises `UserError`: a living run holds the lock, or the
        folder is not writable."""
        # One critical section: two starters that both find a dead holder must not both write.
        with translate_disk_errors(self._file), critical_section(self._file.parent):
            record = read_lock(self._file.parent)
            if record is not None and self._has_living_holder(record):
                raise UserError(f"{self._file.parent}: is held by a living run (process {record['pid']} on "
                                f"{record['host']}); wait for it, stop it, or choose another --run")
            write_atomically(self._file, self._format_record())
        self._thread.start()

    def release(self) -> None:
        if self._thread.is_alive():
            self._stop.set()
            self._thread.join()
            # After a takeover the file belongs to the other run.
            if not self._is_taken_over():
                self._file.unlink(missing_ok=True)

    def _format_record(self) -> str:
        # Each record differs from the previous, so a watcher needs no clock comparison.
        self._beat += 1
        return json.dumps({**process_identity(), "beat": self._beat, "token": self._token, **_slurm_job()})

    def _has_living_holder(self, record: dict[str, Any]) -> bool:
        """Return whether the process in `record` is alive; wait for a heartbeat of one elsewhere."""
        # The local process table is exact and fast; watching takes up to a minute.
        if (lives := _is_alive(record)) is not None:
            return lives
        print(f"{self._file.parent}: was last locked by process {record['pid']} on {record['host']}, which "
              f"cannot be looked up from here; waiting up to {self._lease_s:g} s for its heartbeat",
              file=sys.stderr, flush=True)
        # Monotonic: clock corrections by NTP must not end the lease early.
        end_s = time.monotonic() + self._lease_s
        while time.monotonic() < end_s:
            time.sleep(self._lease_s / 100)
            if (latest := read_lock(self._file.parent)) != record:
                return latest is not None  # None: the lock was released
        return False

    def _renew_lease(self) -> None:
        # Several heartbeats per lease: one slow write on a shared disk does not lose the lock.
        while not self._stop.wait(self._lease_s / RENEWALS):
            try:
                if self._is_taken_over():
                    print(f"error: {self._file.parent}: another run took this folder after "
                          f"{self._lease_s:g} s without a heartbeat from this run; exiting",
                          file=sys.stderr, flush=True)
                    # Two runs must not write into one folder, not even a last checkpoint.
                    os._exit(ExitCode.CRASH)
                write_atomically(self._file, self._format_record())
            except (UserError, OSError) as e:  # later heartbeats may still renew the lease
                warn(f"{self._file}: cannot write the heartbeat ({e})")

    def _is_taken_over(self) -> bool:
        record = read_lock(self._file.parent)
        return record is not None and record["token"] != self._token


def read_lock(run: Path) -> dict[str, Any] | None:
    """Read `lock.json`, or return None without a valid lock.

    Fields: host, pid, started_s, beat (heartbeat counter), token (random, unique per holder), process_table
    (namespace of the pid), slurm_job (empty outside Slurm), slurm_restart.
    """
    try:
        record = json.loads((run / LOCK).read_text(encoding="utf-8"))
        kinds = (("host", str), ("pid", int), ("started_s", float))
        return {"slurm_job": "", "slurm_restart": 0, "token": "", "process_table": "", **record,
                **{name: kind(record[name]) for name, kind in kinds}}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def delete_lock(run: Path) -> None:
    """Delete `lock.json` after the holder's death, which the caller has checked."""
    with translate_disk_errors(run):
        (run / LOCK).unlink(missing_ok=True)


def _slurm_job() -> dict[str, Any]:
    """Return Slurm job id and restart count of this process, or {} outside Slurm."""
    job = os.environ.get("SLURM_JOB_ID", "")
    return {"slurm_job": job, "slurm_restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0)} if job else {}


def find_living_holder(run: Path) -> dict[str, Any] | None:
    """Return the `lock.json` record if the holder is probably alive, else None.

    For display only: if the process cannot be looked up, compare the file's time with this machine's clock.
    """
    record = read_lock(run)
    if record is None:
        return None
    lives = _is_alive(record)
    if lives is None:
        with contextlib.suppress(FileNotFoundError):
            lives = time.time() - (run / LOCK).stat().st_mtime < LEASE_S
    return record if lives else None


def _is_alive(record: dict[str, Any]) -> bool | None:
    """Return whether the process in `record` is alive; None on other machines and containers.

    Slurm restarts a job only after releasing the nodes of its previous start, so earlier restarts are dead.
    """
    own_job = _slurm_job()
    is_own_job = own_job and record["slurm_job"] == own_job["slurm_job"]
    if is_own_job and record["slurm_restart"] < own_job["slurm_restart"]:
        return False
    ended = has_ended(record)
    return None if ended is None else not ended

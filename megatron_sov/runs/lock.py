"""A run folder's lock: one living run at a time, and a killed one can be continued.

The lock is a file with a lease that its holder renews.  Where the holder's process can be looked up, a dead
one frees it at once; from another machine, or another container of the same machine, it is free when the
lease has run out.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from megatron_sov.artifacts import atomic_write, disk_errors
from megatron_sov.errors import ExitCode, UserError
from megatron_sov.obs.warning import warn
from megatron_sov.work.locks import in_turn
from megatron_sov.work.process_identity import has_ended, identity

LOCK = "lock.json"
LEASE_S = 60.0


class RunLock:
    """Holds a run folder until `release`, renewing the lease in a background thread."""

    def __init__(self, run: Path, lease_s: float = LEASE_S) -> None:
        self._file = run / LOCK
        self._lease_s = lease_s
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            UserError: a living run holds it, or the folder cannot be written.
        """
        with disk_errors(self._file), in_turn(self._file.parent):
            record = recorded_holder(self._file.parent)
            if record is not None and _is_living(record):
                raise UserError(f"{self._file.parent}: is held by a living run (process {record['pid']} on "
                                f"{record['host']}); wait for it, stop it, or choose another --run")
            atomic_write(self._file, self._record())
        self._thread.start()

    def release(self) -> None:
        """Give the lock back."""
        if self._thread.is_alive():
            self._stop.set()
            self._thread.join()
            if not self._is_lost():
                self._file.unlink(missing_ok=True)

    def _record(self) -> str:
        return json.dumps({**identity(), "expires_s": time.time() + self._lease_s, "token": self._token,
                           **_slurm_job()})

    def _renew(self) -> None:
        while not self._stop.wait(self._lease_s / 4):
            try:
                if self._is_lost():
                    print(f"error: {self._file.parent}: another run took this folder while this one was "
                          f"silent for {self._lease_s:g} s; this one ends here", file=sys.stderr, flush=True)
                    # two runs must not write into one folder, not even a last checkpoint
                    os._exit(ExitCode.CRASH)
                atomic_write(self._file, self._record())
            except (UserError, OSError) as e:  # the lease is good for some more attempts
                warn(f"{self._file}: the lease could not be renewed ({e})")

    def _is_lost(self) -> bool:
        record = recorded_holder(self._file.parent)
        return record is not None and record["token"] != self._token


def recorded_holder(run: Path) -> dict[str, Any] | None:
    """Return what a run folder's lock says, None where it says nothing.

    Its fields: host, pid, started_s, expires_s, token (the holder's own), process_table (where its pid means
    something), and slurm_job (empty outside of Slurm) with slurm_restart.
    """
    try:
        record = json.loads((run / LOCK).read_text(encoding="utf-8"))
        kinds = (("host", str), ("pid", int), ("started_s", float), ("expires_s", float))
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
    """Return the host, pid and lease of the living process that holds a run folder, as far as can be known
    from here, or None."""
    record = recorded_holder(run)
    return record if record is not None and _is_living(record) else None


def _is_living(record: dict[str, Any]) -> bool:
    """Return whether the process that wrote a record works still, as far as can be known from here.

    Slurm starts a job anew when it has given up the nodes of the start before, so that one's processes need
    not be waited for.
    """
    now = _slurm_job()
    if now and record["slurm_job"] == now["slurm_job"] and record["slurm_restart"] < now["slurm_restart"]:
        return False
    ended = has_ended(record)
    return bool(time.time() < record["expires_s"]) if ended is None else not ended

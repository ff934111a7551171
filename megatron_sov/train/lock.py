"""A run folder's lock: one living run at a time, and a killed one can be continued.

The lock is a file with a lease that its holder renews.  On the holder's own machine a dead process frees it at once; from
another machine it is free when the lease has run out.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path

import psutil

from megatron_sov.artifacts import atomic_write
from megatron_sov.errors import UserError

LOCK = "lock.json"
LEASE_S = 60.0


class RunLock:
    """Holds a run folder until `release`, renewing the lease in a background thread."""

    def __init__(self, run: Path, lease_s: float = LEASE_S) -> None:
        self._file = run / LOCK
        self._lease_s = lease_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            UserError: a living run holds it.
        """
        holder = self._holder()
        if holder is not None:
            raise UserError(f"{self._file.parent}: is held by a living run (process {holder['pid']} on {holder['host']}); "
                            "wait for it, stop it, or choose another --run")
        self._file.unlink(missing_ok=True)
        try:
            fd = os.open(self._file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            raise UserError(f"{self._file.parent}: another run took this folder just now; choose another --run") from None
        with os.fdopen(fd, "w") as f:
            f.write(self._record())
        self._thread.start()

    def release(self) -> None:
        """Give the lock back."""
        self._stop.set()
        self._thread.join()
        self._file.unlink(missing_ok=True)

    def _record(self) -> str:
        me = psutil.Process()
        return json.dumps({"host": socket.gethostname(), "pid": me.pid, "started_s": me.create_time(),
                           "expires_s": time.time() + self._lease_s})

    def _renew(self) -> None:
        while not self._stop.wait(self._lease_s / 4):
            atomic_write(self._file, self._record())

    def _holder(self) -> dict | None:
        """Return the living holder's record, or None."""
        try:
            record = json.loads(self._file.read_text())
            if record["host"] == socket.gethostname():
                alive = psutil.Process(record["pid"]).create_time() == record["started_s"]
            else:
                alive = time.time() < record["expires_s"]
        except (FileNotFoundError, ValueError, KeyError, psutil.NoSuchProcess):
            return None
        return record if alive else None

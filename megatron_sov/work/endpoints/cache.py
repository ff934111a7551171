"""SQLite cache of endpoint answers by request hash, with a log of requests and costs."""

import contextlib
import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import UserError

_TABLES = """
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS requests (time_s REAL, key TEXT, outcome TEXT, input_tokens INTEGER,
                                     output_tokens INTEGER, cost REAL, wall_s REAL DEFAULT 0);
"""
ANSWERED = "200"
"""Outcome of an answered request: the HTTP status."""


@dataclass(frozen=True)
class Usage:
    """Billed tokens of one or more requests, and their cost by `input_price` and `output_price`."""

    input_tokens: int
    output_tokens: int
    cost: float
    """Cost in the currency of the prices."""


class EndpointCache:
    """Cached answers and request log; usable from several threads and processes.

    Args:
        path: the SQLite file, created if missing.

    >>> cache = EndpointCache(Path("cache.sqlite"))
    >>> cache.get(cache.key("http://here/v1", {"prompt": "A"})) is None
    True
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Autocommit with one connection: `_lock` serializes threads, SQLite's lock serializes processes.
            self._connection = sqlite3.connect(path, timeout=60, check_same_thread=False,
                                               isolation_level=None)
            self._connection.executescript(_TABLES)
        except (OSError, sqlite3.Error) as e:
            raise UserError(f"{path}: is no usable store of answers ({e}); name another file, restore it "
                            "from a copy, or delete it to request, and pay for, its answers again") from None

    @staticmethod
    def key(url: str, payload: Mapping[str, Any]) -> str:
        """Return the hash of a request's address and JSON body."""
        # sorted: equal requests have equal keys in any field order
        text = json.dumps([url, payload], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, key: str) -> Any | None:
        """Return the cached answer; None: not cached. Raises `UserError`: the answer is damaged."""
        rows = self._execute("SELECT answer FROM answers WHERE key = ?", (key,))
        if rows:
            try:
                return json.loads(rows[0][0])
            except (ValueError, TypeError, RecursionError):
                raise UserError(f"cache = {self._path}: the answer {key} is damaged; restore the file from a "
                                "copy, or delete it to request, and pay for, its answers again") from None
        return None

    def note(self, key: str, outcome: str, usage: Usage, wall_s: float, answer: Any | None = None) -> None:
        """Insert a row into `requests`, and the answer into `answers`, in a single transaction.

        Args:
            key: request hash.
            outcome: HTTP status or other short description.
            usage: billed tokens and cost.
            wall_s: duration in seconds.
            answer: the answer to cache; None for failures.
        """
        request = (time.time(), key, outcome, usage.input_tokens, usage.output_tokens, usage.cost, wall_s)
        with self._convert_errors(), self._lock, self._connection:
            # take the write lock first: two processes that start with reads would deadlock
            self._connection.execute("BEGIN IMMEDIATE")
            if answer is not None:
                self._connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)",
                                         (key, json.dumps(answer)))
            self._connection.execute("INSERT INTO requests VALUES (?, ?, ?, ?, ?, ?, ?)", request)

    def keys(self) -> set[str]:
        return {row[0] for row in self._execute("SELECT key FROM answers", ())}

    def cost(self) -> float:
        return float(self._execute("SELECT coalesce(sum(cost), 0) FROM requests", ())[0][0])

    def usage(self) -> Usage:
        return Usage(*self._execute("SELECT coalesce(sum(input_tokens), 0), coalesce(sum(output_tokens), 0), "
                                    "coalesce(sum(cost), 0.0) FROM requests", ())[0])

    def summarize_requests(self) -> dict[str, Any]:
        """Return counts of requests by outcome, failures included, and their tokens and seconds."""
        rows = self._execute("SELECT outcome, count(*), sum(input_tokens), sum(output_tokens), sum(wall_s) "
                             "FROM requests GROUP BY outcome ORDER BY outcome", ())
        outcomes = {str(outcome): count for outcome, count, *_ in rows}
        return {"num_requests": sum(outcomes.values()), "num_answered": outcomes.get(ANSWERED, 0),
                "outcomes": outcomes, "input_tokens": sum(row[2] for row in rows),
                "output_tokens": sum(row[3] for row in rows), "seconds": sum((row[4] for row in rows), 0.0)}

    def close(self) -> None:
        self._connection.close()

    def _execute(self, statement: str, values: tuple[Any, ...]) -> list[Any]:
        with self._convert_errors(), self._lock:
            return self._connection.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def _convert_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as e:
            raise UserError(f"cache = {self._path}: cannot be used ({e}); free some space, or name another "
                            "file, and run the same command again") from None

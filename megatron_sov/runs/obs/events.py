"""Run events: one JSON object per line in `events.jsonl`, appended as things happen.

Every line has `event` and `time_s` (Unix time), usually `step`.  Floats are written by their shortest exact
form, so they read back to the same bits.  Everything that watches a run (report, status,
trackers) reads this file.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import disk_errors
from megatron_sov.base.errors import UserError

EVENT = "eval_lm"
_SURROGATE = re.compile("[\ud800-\udfff]")


def score_events(results: Mapping[str, Any], step: int | None, output: Path) -> list[dict[str, Any]]:
    """Return the fields of one event for each metric of each task.

    Args:
        results: what the file holds.
        step: optimizer steps of the model that was measured; None where nobody knows.
        output: the file.

    Raises:
        UserError: it is of another kind or damaged.
    """
    try:
        return [{"step": step, "model_hash": results["model"]["hash"], "task": name,
                 "task_hash": task["task_hash"], "metric": metric["name"], "filter": metric["filter"],
                 "k": metric["k"], "value": metric["value"],
                 "interval": metric["interval"] and list(metric["interval"]), "items": task["items"],
                 "failed": task["failed"], "at_limit": task["at_limit"], "sampling": task["sampling"],
                 "mode": task["mode"], "contamination": None, "published_as": task["published_as"],
                 "output": str(output.absolute())}
                for name, task in results["tasks"].items() for metric in task["metrics"]]
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{output}: holds no results of `megatron-sov eval lm`, or is damaged ({e!r:.200}); "
                        "evaluate again") from None


def is_recorded(event: Mapping[str, Any], known: list[dict[str, Any]]) -> bool:
    """Return whether events of a run tell a score already, wherever its file lies now."""
    # A results file that was moved is the same measurement.
    said = {name: value for name, value in event.items() if name != "output"}
    return any(all(name in one and one[name] == value for name, value in said.items()) for one in known)


EVENTS = "events.jsonl"


class EventLog:
    """Appends events to a run's `events.jsonl`; a null log (path None) drops them.

    Args:
        path: the file.
        listener: is told every event that is written, as it stands in the file; must not raise.
    """

    def __init__(self, path: Path | None, listener: Callable[[dict[str, Any]], None] | None = None) -> None:
        self._file = None
        self._listener = listener
        self._turn = threading.RLock()  # a signal is answered from another thread
        if path is not None:
            with disk_errors(path):
                # A torn line stays in the file as it is: readers pass over it, and bytes are never taken
                # back.
                _end_last_line(path)
                self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (open for the life of the run)

    @property
    def is_open(self) -> bool:
        """Whether events are written, not dropped."""
        return self._file is not None

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; the line reaches the operating system before this returns.

        Raises:
            UserError: the disk is full.
        """
        with self._turn:
            if self._file is None:
                return
            record = {"event": event, "time_s": time.time(), **_finite(fields)}
            with disk_errors(Path(self._file.name)):
                # json writes a float by repr, the shortest text that reads back to the same bits.
                line = json.dumps(record, ensure_ascii=False)
                # A name that is no UTF-8 holds halves of characters, which only an escape can write.
                self._file.write((line if _SURROGATE.search(line) is None else json.dumps(record)) + "\n")
                # Flush, not fsync: a killed process loses nothing, and a step does not wait for the disk.
                # `close` syncs.
                self._file.flush()
            if self._listener is not None:
                self._listener(record)

    def close(self) -> None:
        """Sync the events to disk and close the file."""
        if self._file is not None:
            file, self._file = self._file, None
            with disk_errors(Path(file.name)):
                os.fsync(file.fileno())
                file.close()


def _finite(value: Any) -> Any:
    """Spell NaN and infinities as strings: bare `NaN` is not JSON and breaks other readers."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def _end_last_line(path: Path) -> None:
    """Close a line that a killed process left unfinished, so that the next event starts on its own line."""
    if path.exists() and path.stat().st_size:
        with open(path, "rb+") as f:
            # One byte is read, however long the file has become.
            f.seek(-1, os.SEEK_END)
            if f.read(1) != b"\n":
                f.write(b"\n")


def read_events(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield a run's events in order; lines that a killed process left unfinished, and those of a step that
    is no whole number, are passed over; an event may belong to no step."""
    if not Path(path).exists():
        return
    with open(path, "rb") as f:
        for line in f:
            if (event := parse_event(line)) is not None:
                yield event


def parse_event(line: bytes) -> dict[str, Any] | None:
    """Return the event of a line; None of a line that is none."""
    try:
        record = json.loads(line.decode(errors="replace"))
    # RecursionError: a hostile line of many brackets, which json cannot parse.
    except (ValueError, RecursionError):
        return None
    found = isinstance(record, dict) and "event" in record and _is_step(record.get("step"))
    return record if found else None


READ_BYTES = 1 << 16
LONGEST_LINE_BYTES = 1 << 20


class GrowingFile:
    """Reads the whole lines of a file as it grows; one that was replaced or cut back is read from its start.

    Args:
        path: the file; it may not be there yet, or any more.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""
        self._identity: tuple[int, int] | None = None
        self.generation = 0
        """Counts how often it was begun from its start again."""

    def lines(self, whole: bool = False) -> Iterator[bytes]:
        """Yield the lines that are complete and new.

        Args:
            whole: also the last one, which has no end yet.
        """
        try:
            with open(self._path, "rb") as f:
                self._begin(os.fstat(f.fileno()))
                f.seek(self._offset)
                while block := f.read(READ_BYTES):
                    self._offset += len(block)
                    # the last part has no line end yet: it waits for the next look
                    *complete, self._rest = (self._rest + block).split(b"\n")
                    yield from complete
                    if len(self._rest) > LONGEST_LINE_BYTES:  # a file that is no text
                        yield self._rest
                        self._rest = b""
        except OSError:  # it was deleted, as an export's log is when the export is there
            return
        if whole and self._rest:
            rest, self._rest = self._rest, b""
            yield rest

    def _begin(self, status: os.stat_result) -> None:
        identity = status.st_dev, status.st_ino
        if self._identity not in (None, identity) or status.st_size < self._offset:
            self._offset, self._rest, self.generation = 0, b"", self.generation + 1
        self._identity = identity


def _is_step(step: Any) -> bool:
    """Return whether a step is none, as of an evaluation of a folder, or a number that tables can hold."""
    return step is None or (isinstance(step, int) and abs(step) < 1 << 63)


def final_steps(events: list[dict[str, Any]], event: str = "step") -> list[dict[str, Any]]:
    """Return the events of one kind by step, ascending; of a step done again after a restart,
    the last one counts."""
    # Later entries of a dict replace earlier ones: the attempt that counts is the last one.
    by_step = {e["step"]: e for e in events if e["event"] == event and e.get("step") is not None}
    return [by_step[s] for s in sorted(by_step)]

"""Event log: `events.jsonl` in the run folder, one JSON object per line.

Each line contains `event` and `time_s` (Unix time), usually `step`. Floats use their shortest exact decimal
form and read back bit for bit. Reports, `status` and trackers read this file.
"""

import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import translate_disk_errors
from megatron_sov.base.errors import UserError

EVAL_LM_EVENT = "eval_lm"
_SURROGATE = re.compile("[\ud800-\udfff]")
EVENTS = "events.jsonl"
MAX_NUMBER, MAX_TIME_S = 1e100, 1e11
"""Limits for plausible values: squares of larger numbers overflow, larger times have no calendar date."""
READ_BYTES = 1 << 16
LONGEST_LINE_BYTES = 1 << 20


class EventLog:
    """Writer for `events.jsonl`; with `path=None`, `write` does nothing.

    Args:
        path: the file.
        listener: called with each written event; must not raise.
    """

    def __init__(self, path: Path | None, listener: Callable[[dict[str, Any]], None] | None = None) -> None:
        self._file = None
        self._listener = listener
        self._turn = threading.RLock()  # signal handlers write from another thread
        if path is not None:
            with translate_disk_errors(path):
                # Keep an incomplete last line: readers skip it, and the log never deletes bytes.
                _terminate_last_line(path)
                self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (open for the life of the run)

    @property
    def is_open(self) -> bool:
        """Whether the log writes events instead of dropping them."""
        return self._file is not None

    def write(self, event: str, **fields: Any) -> None:
        """Append an event and hand its line to the operating system. Raises `UserError`: the disk is full."""
        with self._turn:
            if self._file is None:
                return
            record = {"event": event, "time_s": time.time(), **_encode_nonfinite(fields)}
            with translate_disk_errors(Path(self._file.name)):
                # json formats floats by repr, the shortest text with the same bits.
                line = json.dumps(record, ensure_ascii=False)
                # File names outside UTF-8 contain lone surrogates, which need ASCII escapes.
                self._file.write((line if _SURROGATE.search(line) is None else json.dumps(record)) + "\n")
                # Flush, not fsync: a killed process loses nothing, and steps do not wait for the disk.
                # `close` syncs.
                self._file.flush()
            if self._listener is not None:
                self._listener(record)

    def close(self) -> None:
        """Sync the events to disk and close the file."""
        if self._file is not None:
            file, self._file = self._file, None
            with translate_disk_errors(Path(file.name)):
                os.fsync(file.fileno())
                file.close()


def _encode_nonfinite(value: Any) -> Any:
    """Replace NaN and infinities by strings, because bare `NaN` is invalid JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _encode_nonfinite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode_nonfinite(v) for v in value]
    return value


def _terminate_last_line(path: Path) -> None:
    """Terminate an incomplete last line (killed process) with a newline."""
    if path.exists() and path.stat().st_size:
        with open(path, "rb+") as f:
            # Read only the last byte; the file may be long.
            f.seek(-1, os.SEEK_END)
            if f.read(1) != b"\n":
                f.write(b"\n")


def read_events(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield a run's events in order; skip incomplete lines and events with an invalid `step`."""
    if not Path(path).exists():
        return
    with open(path, "rb") as f:
        for line in f:
            if (event := parse_event(line)) is not None:
                yield event


def parse_event(line: bytes) -> dict[str, Any] | None:
    """Parse an event and drop invalid fields; return None for invalid lines."""
    try:
        record = json.loads(line.decode(errors="replace"))
    # RecursionError: deeply nested brackets
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        return None
    step = record.get("step")  # None in evaluations of a folder
    if step is not None and not (isinstance(step, int) and abs(step) < 1 << 63):
        return None
    return _SHAPES.get(record["event"], _COMMON_SHAPE).check(record)


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return value in ("nan", "inf", "-inf")  # written by `_encode_nonfinite`
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER


@dataclass(frozen=True)
class _Number:
    low: float = -MAX_NUMBER
    high: float = MAX_NUMBER

    def check(self, value: Any) -> Any:
        """Return a number within the bounds, else None."""
        is_sound = _is_number(value) and (isinstance(value, str) or self.low <= value <= self.high)
        return value if is_sound else None


@dataclass(frozen=True)
class _Whole:
    def check(self, value: Any) -> Any:
        is_valid = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63
        return value if is_valid else None


@dataclass(frozen=True)
class _Pair:
    def check(self, value: Any) -> Any:
        """Return an interval [low, high], else None."""
        return value if isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)) else None


@dataclass(frozen=True)
class _List:
    """A list; `check` drops invalid items."""

    item: Any

    def check(self, value: Any) -> Any:
        if not isinstance(value, list):
            return None
        checked = [self.item.check(item) for item in value]
        return [item for item in checked if item is not None]


@dataclass(frozen=True)
class _Mapping:
    """A dict with values of one type; `check` drops invalid values."""

    item: Any

    def check(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return None
        checked = ((name, self.item.check(field_value)) for name, field_value in value.items())
        return {name: field_value for name, field_value in checked if field_value is not None}


@dataclass(frozen=True)
class _Any:
    def check(self, value: Any) -> Any:
        return value


@dataclass(frozen=True)
class _Shape:
    """A dict with typed fields; `check` drops wrong types."""

    fields: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    """Required fields."""

    def check(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return None
        sound = {}
        for name, item in value.items():
            checked = self.fields[name].check(item) if name in self.fields and item is not None else item
            if checked is not None or item is None:
                sound[name] = checked
        return sound if all(sound.get(name) is not None for name in self.needs) else None


_N, _COUNT, _NUMBERS = _Number(), _Number(0, 1 << 62), _Mapping(_Number())
_ESTIMATES = _List(_Shape({"k": _Number(1, 1 << 30), "value": _N, "interval": _Pair()}, ("k", "value")))
_JUDGED = dict.fromkeys(("reward", "response_tokens", "truncated", "num_prompts", "num_samples"), _N) | {
    "pass_at_k": _ESTIMATES, "components": _NUMBERS}
_SAMPLING = _Shape({}, ("temperature", "top_p", "seed"))
_CELL = _Shape({"length_tokens": _COUNT, "depth": _N, "correct": _N, "samples": _Number(1, 1 << 62),
                "distractors": _N, "interval": _Pair()},
               ("kind", "language", "length_tokens", "depth", "correct", "samples", "distractors",
                "interval"))
_HELDOUT = _Mapping(_Shape({"loss": _N, "bits_per_byte": _N, "tokens": _COUNT, "turns": _Mapping(_Any()),
                            "kinds": _Mapping(_Any())}))
_COMMON_FIELDS: dict[str, Any] = {"time_s": _Number(0, MAX_TIME_S)}
_FIELDS: dict[str, dict[str, Any]] = {
    "step": dict.fromkeys((
        "loss", "grad_norm", "lr", "step_time_s", "tokens_per_s", "max_violation", "padding_share", "mfu",
        "tflops_per_process", "peak_memory_bytes", "reserved_memory_bytes"), _N)
    | {"tokens": _COUNT, "losses": _NUMBERS, "losses_by_source": _NUMBERS, "meters": _NUMBERS},
    "skip": {"meters": _NUMBERS, "ranks": _List(_Whole())}, "hang": {"places": _Mapping(_List(_Whole()))},
    "run_start": {"num_params": _COUNT, "num_active_params": _COUNT, "num_ranks": _Whole(),
                  "num_steps": _Whole(), "resumed_from": _Whole(), "layout": _Mapping(_Any()),
                  "headline": _List(_Mapping(_Any())), "inputs": _List(_Mapping(_Any()))},
    "phase": {"seq_len": _COUNT, "global_batch_size": _COUNT, "blend": _NUMBERS},
    "expert_load": {"load": _List(_List(_N)), "layers": _List(_Whole())},
    "eval": {"heldout": _HELDOUT}, "needle": {"score": _N, "cells": _List(_CELL)},
    "gate": {"loss": _N, "start_loss": _N, "loss_limit": _N, "threshold": _N,
             "rows": _List(_Shape({"accuracy": _N}, ("accuracy",))), "failing_rows": _List(_Any()),
             "failing_cells": _List(_Any())},
    "passk": {"pass_at_k": _ESTIMATES, "maj_at_k": _ESTIMATES, "sampling": _SAMPLING, "num_prompts": _N,
              "num_samples": _N, "num_unscored": _N, "mean_reward": _N},
    "round": {"means": _Mapping(_Any()), "groups": _NUMBERS, "round": _Whole()},
    "validation": _JUDGED | {"domains": _Mapping(_Shape(_JUDGED))},
    "responses": {"rows": _List(_Mapping(_Any()))},
    "eval_lm": {"value": _N, "items": _N, "interval": _Pair(), "k": _Whole(), "sampling": _Mapping(_Any())},
    "score": {"mean_reward": _N, "scored": _N, "settings": _Mapping(_Any())},
    "conversion": {"checks": _List(_Mapping(_Any()))}, "checkpoint": {"save_s": _N, "stall_s": _N}}
"""Event -> field types for fields used in computations."""
_COMMON_SHAPE = _Shape(_COMMON_FIELDS)
_SHAPES = {event: _Shape(_COMMON_FIELDS | fields) for event, fields in _FIELDS.items()}


class GrowingFile:
    """Reads complete lines of a growing file; starts over when the file is replaced or truncated.

    Args:
        path: the file, which may be missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""
        self._identity: tuple[int, int] | None = None
        self.generation = 0
        """Number of restarts from the beginning."""

    def lines(self, include_unterminated: bool = False) -> Iterator[bytes]:
        """Yield complete lines since the previous call.

        Args:
            include_unterminated: also yield an unterminated last line.
        """
        try:
            with open(self._path, "rb") as f:
                self._detect_replacement(os.fstat(f.fileno()))
                f.seek(self._offset)
                while block := f.read(READ_BYTES):
                    self._offset += len(block)
                    # Keep the unterminated last part for the next call.
                    *complete, self._rest = (self._rest + block).split(b"\n")
                    yield from complete
                    if len(self._rest) > LONGEST_LINE_BYTES:  # binary file
                        yield self._rest
                        self._rest = b""
        except OSError:  # deleted, like the log of a finished export
            return
        if include_unterminated and self._rest:
            rest, self._rest = self._rest, b""
            yield rest

    def _detect_replacement(self, status: os.stat_result) -> None:
        identity = status.st_dev, status.st_ino
        if self._identity not in (None, identity) or status.st_size < self._offset:
            self._offset, self._rest, self.generation = 0, b"", self.generation + 1
        self._identity = identity


def final_step_events(events: list[dict[str, Any]], event: str = "step") -> list[dict[str, Any]]:
    """Return the events of a kind sorted by step; for repeated steps, the last event."""
    # Later dict entries replace earlier ones.
    by_step = {e["step"]: e for e in events if e["event"] == event and e.get("step") is not None}
    return [by_step[s] for s in sorted(by_step)]


def build_score_events(results: Mapping[str, Any], step: int | None, output: Path) -> list[dict[str, Any]]:
    """Build the `eval_lm` events for each metric in a results file.

    Args:
        results: content of the results file.
        step: optimizer step of the evaluated model, None if unknown.
        output: path of the results file.

    Raises:
        UserError: the file contains other results or is damaged.
    """
    try:
        return [{"step": step, "model_hash": results["model"]["hash"], "task": name,
                 "task_hash": task["task_hash"], "metric": metric["name"], "filter": metric["filter"],
                 "k": metric["k"], "value": metric["value"],
                 "interval": metric["interval"] and list(metric["interval"]), "items": task["items"],
                 "failed": task["failed"], "at_limit": task["at_limit"], "sampling": task["sampling"],
                 "mode": task["mode"], "output": str(output.absolute())}
                for name, task in results["tasks"].items() for metric in task["metrics"]]
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{output}: holds no results of `megatron-sov eval lm`, or is damaged ({e!r:.200}); "
                        "evaluate again") from None


def is_score_recorded(event: Mapping[str, Any], known: list[dict[str, Any]]) -> bool:
    """Return whether the run's events already contain a score, ignoring the path of its results file."""
    fields = {name: value for name, value in event.items() if name != "output"}
    return any(fields.items() <= recorded.items() for recorded in known)

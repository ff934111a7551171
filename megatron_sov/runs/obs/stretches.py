"""How long steps took, told by a run's events: by start and by stretch of the curriculum, steps of a stretch
being alike."""

from __future__ import annotations

import bisect
import math
import statistics
from array import array
from dataclasses import dataclass, field
from typing import Any

from megatron_sov.runs.obs.figures import number

MAX_WARM_UP_STEPS, WARM_UP_SHARE = 10, 0.2
"""Of a start's first steps so many, and no larger share, are left out: they compile, fill caches, and open
connections."""


@dataclass
class MeasuredStretch:
    """Steps of one phase, batch size and start of the processes."""

    start: dict[str, Any]
    """The `run_start` event."""
    phase: str
    seq_len: int
    """Tokens of a sample."""
    global_batch_size: int
    """Samples of a step."""
    first_step: int = 0
    """1-based; the first on record."""
    last_step: int = 0
    times_s: array[float] = field(default_factory=lambda: array("d"))
    """Seconds of each step on record."""
    follows: bool = False
    """Whether the start had done steps before it, and was warm."""

    def warm_times_s(self) -> list[float]:
        """Return the seconds of its steps, without those in which the start had to warm up."""
        sound = [t for t in self.times_s if math.isfinite(t) and t > 0]
        left_out = 0 if self.follows else min(MAX_WARM_UP_STEPS, int(WARM_UP_SHARE * len(sound)))
        return sound[left_out:]

    def typical_s(self) -> float:
        """Return the median of a step's seconds, which no stall moves; NaN without steps."""
        times_s = self.warm_times_s()
        return statistics.median(times_s) if times_s else math.nan


class Stretches:
    """Collects the stretches of one run, event by event, in order."""

    def __init__(self) -> None:
        self.all: list[MeasuredStretch] = []
        self._start: dict[str, Any] | None = None
        self._entries: list[tuple[int, dict[str, Any]]] = []
        self._last: dict[str, Any] | None = None

    def add(self, event: dict[str, Any]) -> None:
        """Take one event in; others than starts, phases and steps are passed over."""
        if event["event"] == "run_start":
            self._start, self._entries, self._last = event, [], None
        elif event["event"] == "phase" and self._start is not None:
            self._entries.append((_count(event.get("step")), event))
        elif event["event"] == "step" and _count(event.get("step")) and self._start is not None:
            self._add_step(self._start, _count(event["step"]), number(event.get("step_time_s")))

    def _add_step(self, start: dict[str, Any], step: int, seconds: float) -> None:
        i = bisect.bisect_right(self._entries, step - 1, key=lambda entry: entry[0]) - 1
        if i < 0:
            return  # the ledger's events are from its first step on: this is no event of ours
        entry = self._entries[i][1]
        if entry is not self._last:
            follows, self._last = self._last is not None, entry
            self.all.append(MeasuredStretch(
                start, str(entry.get("name") or ""), _count(entry.get("seq_len")),
                _count(entry.get("global_batch_size")), step, follows=follows))
        stretch = self.all[-1]
        stretch.last_step = step
        stretch.times_s.append(seconds)


def _count(value: object) -> int:
    """Return an event's count; 0 where it has none."""
    found = number(value)
    return int(found) if math.isfinite(found) else 0

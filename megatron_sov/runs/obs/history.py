"""Attempts, step times and incidents of a run, computed from its events.

`status` and `--help` import this module: it must import quickly and access no files.
"""

from __future__ import annotations

import bisect
import math
import statistics
from array import array
from dataclasses import dataclass, field
from typing import Any

from megatron_sov.runs.obs.figures import parse_number, parse_whole_number

UNFINISHED = "ended without a word (killed, or still running)"
COMPLETE = "complete"
MAX_WARM_UP_STEPS, WARM_UP_SHARE = 10, 0.2
"""Warm-up steps to ignore after a start (compilation, caches, connections): a number and a maximum share."""
INCIDENT_NAMES = {"skip": "step rejected", "attribution": "cause of a rejection",
                  "rollback": "rollback", "restart": "restart",
                  "hang": "hang", "sdc": "silent corruption", "alarm": "alarm", "fault": "injected fault",
                  "damaged_checkpoint": "damaged checkpoint", "failure": "ended by an error"}
"""Incident event -> name in reports."""
SKIPPED_BY_SETTING, NO_GRADIENT = INTENDED_SKIPS = ("data.skip_steps", "no advantages and no other gradient")
"""Intended skip reasons: `data.skip_steps`, and RL rounds without gradient."""
EVENT_TEXTS = {"run_start": "the run starts from step {resumed_from}, with {num_ranks} rank(s)",
        "stop": "the run stops: {reason}", "run_end": "the run is complete"}
"""Event -> text for events without a `text` field."""


@dataclass
class Attempt:
    """One start of the run's processes: the events from `run_start` to the next `run_start`."""

    start: dict[str, Any]
    """The `run_start` event."""
    resume_reason: str = ""
    outcome: str = UNFINISHED
    last_step: int | None = None
    last_time_s: float = 0.0
    stopping: str = ""
    """Text of the `stopping` event: work that continues after a stop request. Empty without request."""

    def wall_s(self) -> float:
        """Return the seconds from start to end, or to the last event of an unfinished attempt."""
        return max(0.0, self.last_time_s - parse_number(self.start.get("time_s")))


class Attempts:
    def __init__(self) -> None:
        self.all: list[Attempt] = []
        self._resume_reason = ""

    def add(self, event: dict[str, Any]) -> None:
        """Process an event; events after an attempt's end (a later conversion) have no effect."""
        # `resume` may precede or follow its `run_start`.
        kind, last = event["event"], self.all[-1] if self.all else None
        if kind == "run_start":
            self.all.append(last := Attempt(event, resume_reason=self._resume_reason))
            self._resume_reason = ""
        # If the last attempt has made steps, the reason belongs to the next start.
        elif kind == "resume" and (last is None or last.last_step is not None):
            self._resume_reason = str(event.get("reason") or "")
            return
        # A conversion days later must not lengthen a finished attempt.
        if last is None or last.outcome != UNFINISHED:
            return
        last.last_time_s = parse_number(event.get("time_s"))
        if kind in ("step", "run_end", "stop") and event.get("step") is not None:
            last.last_step = parse_whole_number(event["step"])
        if kind == "resume":
            last.resume_reason = str(event.get("reason") or "")
        elif kind == "stopping":
            last.stopping = str(event.get("text") or "asked to stop")
        elif kind == "stop":
            last.outcome = f"stopped: {event.get('reason') or 'no reason given'}"
        elif kind == "hang":
            last.outcome = f"stood still in step {event.get('step')}"
        elif kind == "failure":
            last.outcome = str(event.get("text") or "ended by an error")
        elif kind == "restart":
            last.outcome = str(event.get("text") or "restarted").partition(";")[0]
        elif kind == "run_end":
            last.outcome = COMPLETE


@dataclass
class StepTiming:
    """Timed steps with the same phase, batch size and process start."""

    start: dict[str, Any]
    phase: str
    seq_len: int
    """Tokens per sample."""
    global_batch_size: int
    """Samples per step."""
    first_step: int = 0
    """First recorded step, 1-based."""
    last_step: int = 0
    times_s: array[float] = field(default_factory=lambda: array("d"))
    """Seconds per recorded step."""
    follows: bool = False
    """Whether the processes had already made steps in an earlier phase and were warm."""

    def warm_times_s(self) -> list[float]:
        """Return step times in seconds without warm-up steps."""
        sound = [seconds for seconds in self.times_s if math.isfinite(seconds) and seconds > 0]
        num_warm_up = 0 if self.follows else min(MAX_WARM_UP_STEPS, int(WARM_UP_SHARE * len(sound)))
        return sound[num_warm_up:]

    def median_s(self) -> float:
        """Return the median step time in seconds, robust against stalls; NaN without steps."""
        times_s = self.warm_times_s()
        return statistics.median(times_s) if times_s else math.nan


class StepTimings:
    def __init__(self) -> None:
        self.all: list[StepTiming] = []
        self._start: dict[str, Any] | None = None
        self._entries: list[tuple[int, dict[str, Any]]] = []
        self._last: dict[str, Any] | None = None

    def add(self, event: dict[str, Any]) -> None:
        """Process a `run_start`, `phase` or `step` event; ignore others."""
        # A new start may use another layout, hence another speed: drop earlier phases.
        if event["event"] == "run_start":
            self._start, self._entries, self._last = event, [], None
        elif event["event"] == "phase" and self._start is not None:
            self._entries.append((parse_whole_number(event.get("step")), event))
        elif event["event"] == "step" and parse_whole_number(event.get("step")) and self._start is not None:
            self._add_step(self._start, parse_whole_number(event["step"]),
                           parse_number(event.get("step_time_s")))

    def _add_step(self, start: dict[str, Any], step: int, seconds: float) -> None:
        # Steps are 1-based; a phase event names its 0-based first step.
        i = bisect.bisect_right(self._entries, step - 1, key=lambda phase: phase[0]) - 1
        if i < 0:
            return  # no phase covers the step: the event comes from another program
        phase = self._entries[i][1]
        # Compare by identity: two phases with equal fields remain two stretches.
        if phase is not self._last:
            follows, self._last = self._last is not None, phase
            self.all.append(StepTiming(
                start, str(phase.get("name") or ""), parse_whole_number(phase.get("seq_len")),
                parse_whole_number(phase.get("global_batch_size")), step, follows=follows))
        stretch = self.all[-1]
        stretch.last_step = step
        stretch.times_s.append(seconds)


def is_incident(event: dict[str, Any]) -> bool:
    """Return whether an event reports an incident; intentionally skipped steps do not count."""
    return event["event"] in INCIDENT_NAMES and event.get("reason") not in INTENDED_SKIPS


def describe_incident(event: dict[str, Any]) -> str:
    kind = event["event"]
    if kind == "skip":
        ranks = event.get("ranks") or []
        return str(event.get("reason", "")) + (f"; not finite on rank {', '.join(map(str, ranks))}"
                                               if ranks else "")
    if kind == "hang":
        places = (f"rank {', '.join(map(str, ranks))} in {place}"
                  for place, ranks in (event.get("places") or {}).items())
        return f"no progress; every process wrote its stacks into hang/ and ended: {'; '.join(places)}"
    if kind == "fault":
        return f"--inject {event.get('fault', '')}"
    if kind == "damaged_checkpoint":
        return f"{event.get('reason', '')}; set aside as {event.get('renamed_to', '')}"
    return str(event.get("text", ""))


def describe_event(event: dict[str, Any]) -> str | None:
    """Format an event for people; None for purely technical events."""
    kind = event["event"]
    text = describe_incident(event) if is_incident(event) else event.get("text") or event.get("error")
    if text is not None:
        return f"{INCIDENT_NAMES.get(kind, kind)}: {text}"
    # Old events may lack fields, and formatting a log line must not fail.
    fields = {"reason": "no reason given", "num_ranks": "?", "resumed_from": 0, **event}
    return EVENT_TEXTS[kind].format_map(fields) if kind in EVENT_TEXTS else None

"""What a run's events tell of its past: its attempts and how each ended, how long steps took, its incidents.

Light on purpose: `status` and `--help` load it, so it does not read or write files.
"""

from __future__ import annotations

import bisect
import math
import statistics
from array import array
from dataclasses import dataclass, field
from typing import Any

from megatron_sov.runs.obs.figures import number, whole_number

UNFINISHED = "ended without a word (killed, or still running)"
COMPLETE = "complete"


@dataclass
class Attempt:
    """One start of the run's processes, from its `run_start` to the next one or the end."""

    start: dict[str, Any]
    """The `run_start` event."""
    resume_reason: str = ""
    outcome: str = UNFINISHED
    last_step: int | None = None
    last_time_s: float = 0.0
    stopping: str = ""
    """What it still finishes since it was asked to stop; empty: nobody asked."""

    def wall_s(self) -> float:
        """Return the seconds from this attempt's start to its end, or to its last event
        where it did not end."""
        return max(0.0, self.last_time_s - number(self.start.get("time_s")))


class Attempts:
    """Collects the attempts of one run, event by event, in order."""

    def __init__(self) -> None:
        self.all: list[Attempt] = []
        self._resume_reason = ""

    def add(self, event: dict[str, Any]) -> None:
        """Take one event in; one that comes after an attempt's end (a conversion,
        days later) belongs to none."""
        # `resume` may come before the `run_start` that it explains, or after it; both are taken.
        kind, last = event["event"], self.all[-1] if self.all else None
        if kind == "run_start":
            self.all.append(last := Attempt(event, resume_reason=self._resume_reason))
            self._resume_reason = ""
        # The attempt before has made steps, so this reason belongs to the next start.
        elif kind == "resume" and (last is None or last.last_step is not None):
            self._resume_reason = str(event.get("reason") or "")
            return
        # Ended attempts take nothing more in: a conversion days later must not lengthen them.
        if last is None or last.outcome != UNFINISHED:
            return
        last.last_time_s = number(event.get("time_s"))
        if kind in ("step", "run_end", "stop") and event.get("step") is not None:
            last.last_step = whole_number(event["step"])
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
        # Phases of an earlier start are forgotten: its layout, and so its speed, may have been another one.
        if event["event"] == "run_start":
            self._start, self._entries, self._last = event, [], None
        elif event["event"] == "phase" and self._start is not None:
            self._entries.append((whole_number(event.get("step")), event))
        elif event["event"] == "step" and whole_number(event.get("step")) and self._start is not None:
            self._add_step(self._start, whole_number(event["step"]), number(event.get("step_time_s")))

    def _add_step(self, start: dict[str, Any], step: int, seconds: float) -> None:
        # Steps are 1-based and a phase names the 0-based step from which it holds.
        i = bisect.bisect_right(self._entries, step - 1, key=lambda entry: entry[0]) - 1
        if i < 0:
            return  # the ledger's events are from its first step on: this is no event of ours
        entry = self._entries[i][1]
        # By identity: two phases may have equal fields and are still two stretches.
        if entry is not self._last:
            follows, self._last = self._last is not None, entry
            self.all.append(MeasuredStretch(
                start, str(entry.get("name") or ""), whole_number(entry.get("seq_len")),
                whole_number(entry.get("global_batch_size")), step, follows=follows))
        stretch = self.all[-1]
        stretch.last_step = step
        stretch.times_s.append(seconds)


KINDS = {"skip": "step not learned", "attribution": "why it was not learned",
         "rollback": "weights taken back", "restart": "started again",
         "hang": "hang", "sdc": "silent corruption", "alarm": "alarm", "fault": "fault on purpose",
         "damaged_checkpoint": "damaged checkpoint", "failure": "ended by an error"}
"""Event -> what people call it."""
BY_SETTING, NO_GRADIENT = PASSED_OVER = ("data.skip_steps", "no advantages and no other gradient")
"""Reasons of skipped steps that are no incidents: the settings name the step; it is of a round of
reinforcement learning and would change no weight."""


def is_incident(event: dict[str, Any]) -> bool:
    """Return whether an event tells of an incident; a step that is passed over is none."""
    return event["event"] in KINDS and event.get("reason") not in PASSED_OVER


def describe(event: dict[str, Any]) -> str:
    """Return an incident in words."""
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


TOLD = {"run_start": "the run starts from step {resumed_from}, with {num_ranks} rank(s)",
        "stop": "the run stops: {reason}", "run_end": "the run is complete"}
"""Event -> how it is told where it has no `text` of its own and is no incident."""


def tell(event: dict[str, Any]) -> str | None:
    """Return what an event says to people; None of most, which are for programs."""
    kind = event["event"]
    words = describe(event) if is_incident(event) else event.get("text") or event.get("error")
    if words is not None:
        return f"{KINDS.get(kind, kind)}: {words}"
    # an event may lack some of these, and a line of a log must not fail for that
    known = {"reason": "no reason given", "num_ranks": "?", "resumed_from": 0, **event}
    return TOLD[kind].format_map(known) if kind in TOLD else None

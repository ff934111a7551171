"""The starts of a run's processes, told by its events: from where each went on, how far it
came, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_sov.runs.obs.figures import number

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
        kind, last = event["event"], self.all[-1] if self.all else None
        if kind == "run_start":
            self.all.append(last := Attempt(event, resume_reason=self._resume_reason))
            self._resume_reason = ""
        elif kind == "resume" and (last is None or last.last_step is not None):
            self._resume_reason = str(event.get("reason") or "")
            return
        if last is None or last.outcome != UNFINISHED:
            return
        last.last_time_s = number(event.get("time_s"))
        if kind in ("step", "run_end", "stop") and event.get("step") is not None:
            last.last_step = int(event["step"])
        if kind == "resume":
            last.resume_reason = str(event.get("reason") or "")
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

"""Attempts and incidents of a run, computed from its events.

`status` and `--help` import this module: it must import quickly and access no files.
"""

from dataclasses import dataclass
from typing import Any

from megatron_sov.runs.obs.figures import parse_number, parse_whole_number

UNFINISHED = "ended without a word (killed, or still running)"
COMPLETE = "complete"
INCIDENT_NAMES = {"skip": "step rejected",
                  "rollback": "rollback", "restart": "restart",
                  "hang": "hang", "sdc": "silent corruption", "alarm": "alarm", "fault": "injected fault",
                  "damaged_checkpoint": "damaged checkpoint", "failure": "ended by an error"}
"""Incident event -> name in reports."""
SKIPPED_BY_SETTING, NO_GRADIENT = "data.skip_steps", "no advantages and no other gradient"
INTENDED_SKIPS = (SKIPPED_BY_SETTING, NO_GRADIENT)  # reasons; the second is for RL rounds
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
        kind, last = event["event"], self.all[-1] if self.all else None
        # `resume` may follow its `run_start`, or precede it, if the last attempt has made steps.
        if kind == "resume" and (last is None or last.last_step is not None):
            self._resume_reason = str(event.get("reason") or "")
            return
        if kind == "run_start":
            self.all.append(last := Attempt(event, resume_reason=self._resume_reason))
            self._resume_reason = ""
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


def is_incident(event: dict[str, Any]) -> bool:
    """Return whether an event reports an incident; intentionally skipped steps do not count."""
    return event["event"] in INCIDENT_NAMES and event.get("reason") not in INTENDED_SKIPS


def describe_incident(event: dict[str, Any]) -> str:
    kind = event["event"]
    if kind == "skip":
        reason, ranks = str(event.get("reason", "")), ", ".join(map(str, event.get("ranks") or []))
        return f"{reason}; not finite on rank {ranks}" if ranks else reason
    if kind == "hang":
        hung_ranks = (f"rank {', '.join(map(str, ranks))} in {place}"
                      for place, ranks in (event.get("places") or {}).items())
        return f"no progress; every process wrote its stacks into hang/ and ended: {'; '.join(hung_ranks)}"
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

"""What goes wrong in a run, and what the run does about it: the kinds of such events,
and their words for people."""

from __future__ import annotations

from typing import Any

KINDS = {"skip": "step not learned", "attribution": "why it was not learned",
         "rollback": "weights taken back", "restart": "started again",
         "hang": "hang", "sdc": "silent corruption", "alarm": "alarm", "fault": "fault on purpose",
         "damaged_checkpoint": "damaged checkpoint", "failure": "ended by an error"}
"""Event -> what people call it."""
BY_SETTING = "data.skip_steps"
"""Reason of a skipped step that the settings name."""


def is_incident(event: dict[str, Any]) -> bool:
    """Return whether an event tells of an incident; a step that the settings leave out is none."""
    return event["event"] in KINDS and event.get("reason") != BY_SETTING


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

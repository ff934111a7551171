"""Events that are added to a run after it has ended: what was measured on its checkpoints or exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_sov.errors import UserError
from megatron_sov.obs.events import EVENTS, EventLog, read_events


class RunEvents:
    """The events of a run that exists; with None for the folder nothing is recorded."""

    def __init__(self, run: Path | None) -> None:
        """Look at the folder; changes nothing.

        Raises:
            UserError: it holds no run.
        """
        if run is not None and not (run / EVENTS).is_file():
            raise UserError(f"--run {run}: holds no {EVENTS}, so it is not a run; "
                            "pass the folder of a training command's --run")
        self._path = None if run is None else run / EVENTS

    def last_step(self) -> int | None:
        """Return the last optimizer step on record, or None."""
        steps = ([e["step"] for e in read_events(self._path) if e["event"] == "step" and "step" in e]
                 if self._path else [])
        return max(steps, default=None)

    def add(self, event: str, **fields: Any) -> None:
        """Append one event."""
        log = EventLog(self._path)
        log.write(event, **fields)
        log.close()

"""Events that are added to a run after it has ended: what was measured on its checkpoints or exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.runs.folder import CONFIG
from megatron_sov.runs.obs.events import EVENTS, EventLog, read_events
from megatron_sov.runs.obs.telemetry.telemetry import alert




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
        """Append one event, and send an alert of it where the run's settings ask for that."""
        log = EventLog(self._path, self._alert)
        log.write(event, **fields)
        log.close()

    def _alert(self, record: dict[str, Any]) -> None:
        assert self._path is not None, "a log without a file tells nobody"
        try:
            config = json.loads((self._path.parent / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):  # the folder of a run that was refused at its start
            return
        if isinstance(config, dict):
            alert(config, self._path.parent, record)

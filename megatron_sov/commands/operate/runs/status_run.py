"""Runs `megatron-sov status`: one run in full, several runs in a table, or new events of one run."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import UserError, escape_controls, stop_check
from megatron_sov.base.figures import NO_VALUE, align_columns, format_count, format_duration, format_value
from megatron_sov.commands.operate.runs.run_state import (
    RunState, RunStateReader, find_runs, format_run_state, read_run_state)
from megatron_sov.commands.operate.runs.status import StatusOptions
from megatron_sov.runs.obs.events import EVENTS, GrowingFile, parse_event
from megatron_sov.runs.obs.figures import parse_number
from megatron_sov.runs.obs.history import describe_event

POLL_EVENTS_S, POLL_STATE_S = 0.5, 5.0
"""Seconds between reads of a followed run's events, and of its state."""
MAX_TIME_S = 1e11
ALIVE = ("running", "silent", "waiting", "not started")
"""States in which a run may still write events."""
HEAD = ("run", "stage", "recipe", "step", "loss", "held-out", "tokens", "state", "last change")
LEFT = ("run", "stage", "recipe", "state")
"""Right-aligned columns."""


def show_status(options: StatusOptions) -> None:
    """Print the state of the runs. Raises `UserError`: no run, or --follow with several runs."""
    paths = list(dict.fromkeys(run for path in options.runs for run in find_runs(path)))
    if options.follow:
        if len(paths) > 1:
            raise UserError(f"--follow: follows one run, not {len(paths)} "
                            f"({', '.join(map(str, paths[:3]))}); pass one")
        stop_check()
        follow_run(paths[0])
        return
    states = [read_run_state(path) for path in paths]
    if options.json:
        print(json.dumps([_list_fields(state) for state in states], indent=1, ensure_ascii=False))
    elif len(states) == 1:
        print(format_run_state(states[0]))
    else:
        print(format_runs(states, options.runs[0] if len(options.runs) == 1 else None))


def follow_run(run: Path) -> None:
    """Print a run's state, then a line per event, until the run ends or Ctrl-C."""
    file, reader = GrowingFile(run / EVENTS), RunStateReader(run)
    generation = file.generation
    polled_s = -math.inf
    try:
        while True:
            for raw in file.lines():
                if file.generation != generation:  # a new run in the same folder
                    generation, reader = file.generation, RunStateReader(run)
                event = parse_event(raw)
                if event is None:
                    continue
                reader.add(event)
                if math.isfinite(polled_s) and (line := _format_event(event, reader)):
                    print(escape_controls(line), flush=True)
            # reading the state may query Slurm
            if time.monotonic() - polled_s >= POLL_STATE_S:
                state = reader.state()
                if math.isinf(polled_s) or state.state not in ALIVE:
                    print(escape_controls(format_run_state(state)), flush=True)
                if state.state not in ALIVE:
                    return
                polled_s = time.monotonic()
            time.sleep(POLL_EVENTS_S)
    except KeyboardInterrupt:
        return


def _format_event(event: dict[str, Any], reader: RunStateReader) -> str | None:
    """Format an event as a line; None for events without a text for people."""
    text = describe_event(event)
    if event["event"] == "step":
        text = reader.progress()
    elif event["event"] == "eval":
        heldout = event.get("heldout")
        sources = heldout if isinstance(heldout, dict) else {}
        losses = [f"{name} {parse_number(row.get('loss')):.4f}" for name, row in sources.items()
                  if isinstance(row, dict)]
        text = f"held-out loss {', '.join(losses)}"
    elif event["event"] == "checkpoint":
        text = f"saved {event.get('path')}"
    if text is None:
        return None
    time_s = parse_number(event.get("time_s"))
    clock = time.strftime("%H:%M:%S", time.localtime(time_s)) if 0 <= time_s < MAX_TIME_S else "--:--:--"
    return f"{clock}  {text}"


def _list_fields(state: RunState) -> dict[str, Any]:
    """Return a state's fields as JSON values; NaN becomes null."""
    fields = {**asdict(state), "path": str(state.path), "restarts": state.restarts}
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in fields.items()}


def format_runs(states: Sequence[RunState], root: Path | None = None) -> str:
    """Format a table with a row per run; run names are relative to `root`."""
    rows = [HEAD, *(_list_cells(state, root) for state in states)]
    return align_columns(rows, left=[HEAD.index(name) for name in LEFT])


def _list_cells(state: RunState, root: Path | None) -> tuple[str, ...]:
    name = state.path.relative_to(root) if root and state.path.is_relative_to(root) else state.path
    age_s = state.last_event_age_s
    return (str(name), state.stage or NO_VALUE, state.recipe or NO_VALUE,
            f"{state.step:,}/{state.num_steps:,}", format_value(state.loss),
            format_value(state.heldout_bits_per_byte),
            format_count(state.tokens) if state.tokens else NO_VALUE,
            state.state, f"{format_duration(max(0.0, age_s))} ago" if math.isfinite(age_s) else NO_VALUE)

"""`megatron-sov status RUN [RUN ...] [--json | --follow]`: what a run folder says about its run: how far it
is, how fast, whether it lives, and if not, why."""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from megatron_sov.base.errors import UserError, escape_controls
from megatron_sov.base.settings import Flag, add_options, excludes_field, read_options

if TYPE_CHECKING:
    from megatron_sov.commands.operate.run_state import RunState, RunStateReader

LOOK_EVERY_S, STATE_EVERY_S = 0.5, 5.0
"""Between two looks at the events of a run that is followed, and at whether it still lives."""
MAX_TIME_S = 1e11
ALIVE = ("running", "silent", "waiting", "not started")
"""States in which a followed run may still write events."""


@dataclass(frozen=True, kw_only=True)
class StatusOptions:
    """Show the state of runs."""

    runs: Annotated[tuple[Path, ...], Flag("RUN")]
    """Run folders, or folders that hold runs."""
    json: Annotated[bool, excludes_field("follow")] = False
    """Print the state of every run as JSON."""
    follow: bool = False
    """Print a line for each new step, evaluation, checkpoint and incident of one run until it ends."""


add_arguments = partial(add_options, cls=StatusOptions)


def run(typed: argparse.Namespace) -> int:
    """Print how the runs stand: one in full, several as a table; with --follow one, event by event.

    Raises:
        UserError: a folder holds no run, or --follow has several.
    """
    from megatron_sov.commands.operate.run_state import find_runs, format_run_state, read_run_state
    from megatron_sov.commands.operate.run_table import format_runs

    args = read_options(StatusOptions, typed)
    paths = list(dict.fromkeys(found for path in args.runs for found in find_runs(path)))
    if args.follow:
        if len(paths) > 1:
            raise UserError(f"--follow: follows one run, and there are {len(paths)} "
                            f"({', '.join(map(str, paths[:3]))}); name one")
        return follow_run(paths[0])
    states = [read_run_state(path) for path in paths]
    if args.json:
        print(json.dumps([_plain(state) for state in states], indent=1, ensure_ascii=False))
    elif len(states) == 1:
        print(format_run_state(states[0]))
    else:
        print(format_runs(states, args.runs[0] if len(args.runs) == 1 else None))
    return 0


def follow_run(run: Path) -> int:
    """Print the state of a run, then a line for each event that tells people something, until the run ends or
    Ctrl-C."""
    from megatron_sov.commands.operate.run_state import RunStateReader, format_run_state
    from megatron_sov.runs.obs.events import EVENTS, GrowingFile, parse_event

    file, reader = GrowingFile(run / EVENTS), RunStateReader(run)
    generation = file.generation
    asked_s = -math.inf
    try:
        while True:
            for raw in file.lines():
                if file.generation != generation:  # the run was begun anew in the same folder
                    generation, reader = file.generation, RunStateReader(run)
                if (event := parse_event(raw)) is not None:
                    reader.add(event)
                    if math.isfinite(asked_s) and (line := _event_line(event, reader)):
                        print(escape_controls(line), flush=True)
            # the state may cost a question to Slurm, so it is asked less often than the file is read
            if time.monotonic() - asked_s >= STATE_EVERY_S:
                state = reader.state()
                if math.isinf(asked_s) or state.state not in ALIVE:
                    print(escape_controls(format_run_state(state)), flush=True)
                if state.state not in ALIVE:
                    return 0
                asked_s = time.monotonic()
            time.sleep(LOOK_EVERY_S)
    except KeyboardInterrupt:
        return 0


def _event_line(event: dict[str, Any], reader: RunStateReader) -> str | None:
    """Return an event in words; None of events that are for programs."""
    from megatron_sov.runs.obs.figures import parse_number
    from megatron_sov.runs.obs.history import describe_event

    words = describe_event(event)
    if event["event"] == "step":
        words = reader.progress()
    elif event["event"] == "eval":
        heldout = event.get("heldout")
        losses = [f"{name} {parse_number(found.get('loss')):.4f}" for name, found in heldout.items()
                  if isinstance(found, dict)] if isinstance(heldout, dict) else []
        words = f"held-out loss {', '.join(losses)}"
    elif event["event"] == "checkpoint":
        words = f"saved {event.get('path')}"
    if words is None:
        return None
    time_s = parse_number(event.get("time_s"))
    clock = time.strftime("%H:%M:%S", time.localtime(time_s)) if 0 <= time_s < MAX_TIME_S else "--:--:--"
    return f"{clock}  {words}"


def _plain(state: RunState) -> dict[str, Any]:
    """Return a state as plain JSON values: NaN becomes null."""
    raw = {**asdict(state), "path": str(state.path), "restarts": state.restarts}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in raw.items()}

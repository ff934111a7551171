"""`megatron-sov status RUN [RUN ...] [--json]`: what a run folder says about its run: how far it is, how
fast, whether it lives, and if not, why."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from megatron_sov.base.settings import Flag, add_options, read_options

if TYPE_CHECKING:
    from megatron_sov.commands.operate.run_state import RunState


@dataclass(frozen=True, kw_only=True)
class StatusOptions:
    """Show the state of runs."""

    runs: Annotated[tuple[Path, ...], Flag("RUN")]
    """Run folders, or folders that hold runs."""
    json: bool = False
    """Print the state of every run as JSON."""


add_arguments = partial(add_options, cls=StatusOptions)


def run(typed: argparse.Namespace) -> int:
    """Print how the runs stand: one in full, several as a table.

    Raises:
        UserError: a folder holds no run.
    """
    from megatron_sov.commands.operate.run_state import find_runs, in_full, read_state
    from megatron_sov.commands.operate.run_table import format_runs

    args = read_options(StatusOptions, typed)
    paths = list(dict.fromkeys(found for path in args.runs for found in find_runs(path)))
    states = [read_state(path) for path in paths]
    if args.json:
        print(json.dumps([_plain(state) for state in states], indent=1, ensure_ascii=False))
    elif len(states) == 1:
        print(in_full(states[0]))
    else:
        print(format_runs(states, args.runs[0] if len(args.runs) == 1 else None))
    return 0


def _plain(state: RunState) -> dict[str, Any]:
    """Return a state as plain JSON values: NaN becomes null."""
    raw = {**asdict(state), "path": str(state.path), "restarts": state.restarts}
    if state.wall_time is not None:
        share = state.wall_time.goodput
        raw["wall_time"] |= {"total_s": state.wall_time.total_s,
                             "goodput": share if math.isfinite(share) else None}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in raw.items()}

"""The table of runs that `megatron-sov status FOLDER` prints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sov.base.figures import NO_VALUE, format_count, format_duration, format_value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_sov.commands.operate.runs.run_state import RunState

HEAD = ("run", "stage", "recipe", "step", "loss", "held-out", "tokens", "state", "last change")
RIGHT = frozenset(("step", "loss", "held-out", "tokens", "last change"))
"""Columns of figures."""


def format_runs(states: Sequence[RunState], root: Path | None = None) -> str:
    """Return a row for each run, in columns; figures are aligned right.

    Args:
        states: the runs, in the order of the rows.
        root: the folder that holds them; run names are relative to it.
    """
    rows = [HEAD, *(_row(state, root) for state in states)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    return "\n".join("  ".join(cell.rjust(width) if name in RIGHT else cell.ljust(width)
                               for name, cell, width in zip(HEAD, row, widths, strict=True)).rstrip()
                     for row in rows)


def _row(state: RunState, root: Path | None) -> tuple[str, ...]:
    name = state.path.relative_to(root) if root and state.path.is_relative_to(root) else state.path
    age_s = state.last_event_age_s
    return (str(name), state.stage or NO_VALUE, state.recipe or NO_VALUE,
            f"{state.step:,}/{state.num_steps:,}", format_value(state.loss),
            format_value(state.heldout_bits_per_byte),
            format_count(state.tokens) if state.tokens else NO_VALUE,
            state.state, f"{format_duration(max(0.0, age_s))} ago" if math.isfinite(age_s) else NO_VALUE)

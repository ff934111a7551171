"""`megatron-sov status RUN [RUN ...] [--json]`: what a run folder says about its run: how far it is, how
fast, whether it lives, and if not, why."""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from megatron_sov.base.settings import Flag, add_options, read_options
from megatron_sov.runs.obs.figures import duration, figure, large
from megatron_sov.runs.obs.history import KINDS
from megatron_sov.runs.obs.wall_time import CATEGORIES, WallTime

if TYPE_CHECKING:
    from megatron_sov.commands.operate.run_state import RunState

BAR_CHARACTERS = 50
SIGNS = dict(zip(CATEGORIES, "#x%s>.", strict=True))
"""Category -> its character in the bar."""


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
    from megatron_sov.commands.operate.run_state import find_runs, read_state

    args = read_options(StatusOptions, typed)
    paths = list(dict.fromkeys(found for path in args.runs for found in find_runs(path)))
    states = [read_state(path) for path in paths]
    if args.json:
        print(json.dumps([_plain(state) for state in states], indent=1, ensure_ascii=False))
    elif len(states) == 1:
        print(in_full(states[0]))
    else:
        print(as_table(states))
    return 0


def _plain(state: RunState) -> dict[str, Any]:
    """Return a state as plain JSON values: NaN becomes null."""
    raw = {**asdict(state), "path": str(state.path), "restarts": state.restarts}
    if state.wall_time is not None:
        share = state.wall_time.goodput
        raw["wall_time"] |= {"total_s": state.wall_time.total_s,
                             "goodput": share if math.isfinite(share) else None}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in raw.items()}


def in_full(state: RunState) -> str:
    lines = [f"{state.path}: {', '.join(w for w in (state.stage, state.recipe) if w)}".rstrip(": "),
             f"  state       {state.state}{f' ({state.why})' if state.why else ''}"
             f"{_ago(', last event', state.last_event_age_s)}",
             "  step        "
             f"{_progress(state)}{f', phase {state.phase}' if state.phase else ''}{_measured(state)}"]
    if math.isfinite(state.tokens_per_s):
        left = f", {duration(state.eta_s)} left" if math.isfinite(state.eta_s) else ""
        lines.append(f"  speed       {state.tokens_per_s:,.0f} tokens/s{left}")
    lines.append(f"  checkpoint  {state.checkpoint or 'none yet'}{_ago(',', state.checkpoint_age_s)}")
    counted = {"warning": state.warnings, **{KINDS[kind]: count for kind, count in state.incidents.items()}}
    if told := ", ".join(f"{count:,} x {name}" for name, count in counted.items() if count):
        lines.append(f"  incidents   {told} (megatron-sov logs {state.path})")
    return "\n".join([*lines, *_starts(state), *_time(state.wall_time)])


def _progress(state: RunState) -> str:
    share = f" ({state.step / state.num_steps:.0%})" if state.num_steps else ""
    return f"{state.step:,} of {state.num_steps:,}{share}"


def _measured(state: RunState) -> str:
    tokens = f", {large(state.tokens)} tokens" if state.tokens else ""
    return tokens + (f", {state.told}" if state.told else "")


def _ago(before: str, age_s: float) -> str:
    return f"{before} {duration(max(0.0, age_s))} ago" if math.isfinite(age_s) else ""


def _starts(state: RunState) -> list[str]:
    rows = []
    for i, start in enumerate(state.starts, 1):
        began = (time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(start.began_s))
                 if math.isfinite(start.began_s) else "–")
        reached = "no step" if start.to_step is None else f"step {start.to_step:,}"
        rows.append(f"    {i:>3}  {began}  from step {start.from_step:,} to {reached}, {start.num_ranks:,} "
                    f"process{'' if start.num_ranks == 1 else 'es'}: {start.outcome}")
    return [f"  starts      {len(state.starts):,}", *rows] if rows else []


def _time(time: WallTime | None) -> list[str]:
    if time is None or time.total_s <= 0:
        return []
    lines = [f"  time        {duration(time.total_s)}, of which {time.goodput:.1%} moved the model forward",
             f"    [{bar(time)}]"]
    return lines + [f"    {SIGNS[name]} {label:<17} {time.spent_s[name] / time.total_s:>6.1%}  "
                    f"{duration(time.spent_s[name])}"
                    for name, label in CATEGORIES.items() if time.spent_s[name] > 0]


def bar(time: WallTime, width: int = BAR_CHARACTERS) -> str:
    """Return a line of `width` characters, as many of each category as its share of the time; the largest
    remainders round up."""
    exact = {name: width * spent_s / time.total_s for name, spent_s in time.spent_s.items()}
    # largest remainders: rounding each by itself would make the bar too long or too short
    counts = {name: int(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda n: counts[n] - exact[n])[:width - sum(counts.values())]:
        counts[name] += 1
    return "".join(SIGNS[name] * counts[name] for name in CATEGORIES)


def as_table(states: list[RunState]) -> str:
    head = ["run", "stage", "state", "step", "last step", "tokens/s", "left", "checkpoint", "restarts",
            "effective"]
    rows = [head, *map(_row, states)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)


def _row(state: RunState) -> list[str]:
    left = duration(state.eta_s) if math.isfinite(state.eta_s) else "–"
    effective = f"{state.wall_time.goodput:.0%}" if state.wall_time and state.wall_time.total_s else "–"
    checkpoint = f"{state.checkpoint_step:,}" if state.checkpoint else "–"
    return [str(state.path), state.stage or "–", state.state, f"{state.step:,}/{state.num_steps:,}",
            state.told or "–", figure(state.tokens_per_s), left, checkpoint, str(state.restarts), effective]

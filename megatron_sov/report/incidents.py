"""The report's section on what went wrong, and what the run did about it."""

from __future__ import annotations

import numpy as np

from megatron_sov.obs.figures import number
from megatron_sov.obs.incidents import KINDS, describe
from megatron_sov.pages.content import Section, Table
from megatron_sov.report.run_data import Run

MAX_ROWS = 200


def incident_section(run: Run) -> Section:
    """Return the section; without tables where nothing happened."""
    return Section("Warnings, guards and faults",
                   tables=[*_warning_tables(run), *_incident_tables(run), *_compute_tables(run)])


def _warning_tables(run: Run) -> list[Table]:
    """Return what the run warned of, and the stretches of steps that it passed over as the settings asked."""
    rows = [(int(w.get("step") or 0), str(w.get("text", ""))) for w in run.warnings]
    skipped = np.array(run.skipped_steps, dtype=np.int64)
    for stretch in np.split(skipped, np.flatnonzero(np.diff(skipped) > 1) + 1) if len(skipped) else []:
        first, last = int(stretch[0]), int(stretch[-1])
        steps = f"step {first:,} was" if first == last else f"steps {first:,} to {last:,} were"
        rows.append((first, f"{steps} passed over: their samples were drawn and not learned"))
    return [Table(["step", "what"], [[f"{step:,}", text] for step, text in sorted(rows)])] if rows else []


def _incident_tables(run: Run) -> list[Table]:
    """Return one row for each incident in the order of time."""
    rows = [[f"{int(e.get('step') or 0):,}", KINDS[e["event"]], describe(e)]
            for e in run.incidents[:MAX_ROWS]]
    if len(run.incidents) > MAX_ROWS:
        rows.append(["", "", f"… and {len(run.incidents) - MAX_ROWS:,} more in the run's events"])
    return [Table(["step", "incident", "what the run saw and did"], rows)] if rows else []


def _compute_tables(run: Run) -> list[Table]:
    """Return the computing time of each process, the slowest first, as it was last measured."""
    measured = run.compute_time or {}
    median_s = number(measured.get("median_s"))
    seconds = sorted((measured.get("seconds") or {}).items(), key=lambda item: -number(item[1]))
    if len(seconds) < 2:
        return []
    rows = [[rank, f"{number(s):.4g}", f"{number(s) / median_s:.2f}",
             "slow" if int(rank) in (measured.get("slow") or []) else ""]
            for rank, s in seconds[:16]]
    return [Table([f"process (step {int(measured.get('step') or 0):,})", "seconds of computing in a step",
                   "of the median process", ""], rows)]

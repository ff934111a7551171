"""What a run's kept plan predicted beside what was measured, and how far it was off."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_sov.base.pages.page import PageSection, PageTable
from megatron_sov.plan.footprint.kept import KeptPlan, StretchPlan
from megatron_sov.publish.report.run_data import Run
from megatron_sov.runs.obs.figures import duration, figure, number, size
from megatron_sov.runs.obs.history import COMPLETE, UNFINISHED, MeasuredStretch
from megatron_sov.work.clusters.units import GIB, JOULES_OF_A_KWH, SECONDS_OF_AN_HOUR

TITLE = "Plan against what happened"


@dataclass
class _AccountRow:
    """Steps that one stretch of a plan holds for, over all starts of the run under that plan."""

    plan: int
    planned: StretchPlan
    measured: list[MeasuredStretch] = field(default_factory=list)

    @property
    def step_s(self) -> float:
        """Median of a step's seconds, the first ones of each start left out."""
        return statistics.median(s for m in self.measured for s in m.warm_times_s())

    @property
    def num_steps(self) -> int:
        """Steps on record."""
        return sum(len(m.times_s) for m in self.measured)


def accounts_section(run: Run) -> PageSection:
    """Return the section; a run that has kept no plan has none."""
    if not run.plans:
        return PageSection(TITLE)
    rows = _rows(run)
    used = run.plans[_plan_of(run, len(run.attempts))] if run.attempts else run.plans[-1]
    tables = [*_speed_tables(run, rows), *_memory_tables(run), *_total_tables(run, rows, used)]
    text = ("The plan was written by the run itself before its first step; the error is planned / measured "
            f"- 1. Planned for {used.num_ranks:,} processes on {used.device or 'an unknown machine'}"
            + (f" with the parameters {used.parameters}." if not used.no_speed else f"; {used.no_speed}.")
            + (f" Network, storage and failures: {used.cluster}." if used.cluster else ""))
    return PageSection(TITLE, text=text if tables else "", tables=tables)


def _plan_of(run: Run, attempt: int) -> int:
    """Return the number of the plan that held for a start (1-based); the last one where it names none."""
    named = run.attempts[attempt - 1].start.get("plan")
    return named if isinstance(named, int) and 0 <= named < len(run.plans) else len(run.plans) - 1


def _rows(run: Run) -> list[_AccountRow]:
    """Return the stretches of the plans of which steps were measured, in the order of time."""
    rows: dict[tuple[int, str, int, int], _AccountRow] = {}
    numbers = {id(attempt.start): i for i, attempt in enumerate(run.attempts, 1)}
    for measured in run.stretches:
        plan = _plan_of(run, numbers[id(measured.start)])
        planned = run.plans[plan].stretch(measured.first_step)
        if planned is None or not measured.warm_times_s():
            continue
        key = (plan, planned.phase, planned.seq_len, planned.global_batch_size)
        rows.setdefault(key, _AccountRow(plan, planned)).measured.append(measured)
    return list(rows.values())


def _speed_tables(run: Run, rows: Sequence[_AccountRow]) -> list[PageTable]:
    """Return seconds of a step and tokens a second of each stretch."""
    body = []
    for row in rows:
        planned = row.planned
        steps = f"{row.measured[0].first_step:,} to {row.measured[-1].last_step:,}"
        seconds, tokens = planned.step_s, planned.step_tokens
        body.append([planned.phase, steps, _processes(run.plans[row.plan]),
                     f"{planned.global_batch_size:,} x {planned.seq_len:,}", _seconds(seconds),
                     _seconds(row.step_s), _error(seconds, row.step_s),
                     f"{tokens / seconds:,.0f}" if seconds else "–", f"{tokens / row.step_s:,.0f}"])
    head = ["phase", "steps", "processes", "samples x tokens", "step planned", "step measured (median)",
            "error", "tokens/s planned", "tokens/s measured"]
    return [PageTable(head, body)] if body else []


def _memory_tables(run: Run) -> list[PageTable]:
    """Return the memory of the fullest process of each pipeline stage."""
    body = []
    for number_, plan in enumerate(run.plans):
        starts = {i for i in range(1, len(run.attempts) + 1) if _plan_of(run, i) == number_}
        peaks = _peaks(run, plan, starts)
        for stage, peak in sorted(peaks.items()):
            planned = plan.stage_bytes(stage)
            items = ", ".join(f"{name.replace('_', ' ')} {value / GIB:.2f}" for name, value in
                              sorted(plan.memory_bytes[stage].items(), key=lambda item: -item[1])
                              if value >= 0.01 * planned)
            before = (f"{plan.memory_before_bytes / GIB:.2f} before the model, " if plan.memory_before_bytes
                      else "")
            body.append([_processes(plan), f"{stage + 1} of {len(plan.memory_bytes)}",
                         f"{planned / GIB:.2f} GiB", f"{peak / GIB:.2f} GiB", _error(planned, peak),
                         before + items])
    head = ["processes", "pipeline stage", "memory planned", "memory measured (most of a process)", "error",
            "planned for (GiB)"]
    return [PageTable(head, body)] if body else []


def _peaks(run: Run, plan: KeptPlan, starts: set[int]) -> dict[int, float]:
    """Return pipeline stage -> most memory of one of its processes, over some starts (1-based)."""
    found: dict[int, float] = {}
    for event in run.of("memory"):
        if event["attempt"] in starts:
            for stage, peak in enumerate(event.get("peak_memory_bytes") or []):
                found[stage] = max(found.get(stage, 0.0), number(peak))
    curve = run.curve("peak_memory_bytes")
    if not found and starts and len(run.attempts) in starts and curve is not None and len(curve.values):
        found[0] = float(curve.values[-1])  # the first process tells its own with each step
    return {stage: peak for stage, peak in found.items() if stage < len(plan.memory_bytes) and peak > 0}


def _total_tables(run: Run, rows: Sequence[_AccountRow], plan: KeptPlan) -> list[PageTable]:
    """Return what holds for the run as a whole, by the plan of its last start."""
    planned_s = sum(row.planned.step_s * row.num_steps for row in rows)
    measured_s = sum(s for row in rows for m in row.measured for s in m.times_s if math.isfinite(s))
    body = []
    if planned_s and measured_s:
        body.append(_line("time of the steps on record", planned_s, measured_s, duration))
        body += _energy_lines(run, plan, planned_s, measured_s)
    if math.isfinite(run.energy_j()):
        body.append(["energy of all GPUs, start-up, evaluation and saving counted in", "–",
                     f"{run.energy_j() / JOULES_OF_A_KWH:,.4g} kWh", "–"])
    if run.wall_time is not None and run.wall_time.total_s > 0:
        faults = sum(a.outcome not in (UNFINISHED, COMPLETE) and not a.outcome.startswith("stopped")
                     for a in run.attempts)
        planned = plan.failures_per_hour * run.wall_time.total_s / SECONDS_OF_AN_HOUR
        body.append(["starts that ended by a fault", figure(planned, 3) if plan.failures_per_hour else "–",
                     f"{faults:,}", "–"])
        body.append(_line("effective training time", plan.effective_share, run.wall_time.goodput,
                          "{:.1%}".format))
    if run.checkpoint_bytes:
        body.append(_line("size of a checkpoint", plan.checkpoint_bytes, run.checkpoint_bytes, size))
    saves_s = [s for s in (number(c.get("save_s")) for c in run.checkpoints) if math.isfinite(s)]
    if saves_s:
        body.append(_line("time to write one, mean", plan.checkpoint_s, statistics.mean(saves_s), duration))
    return [PageTable(["", "planned", "measured", "error"], body)] if body else []


def _line(label: str, planned: float, measured: float, as_text: Callable[[float], str]) -> list[str]:
    """Return a row; what was not planned is a dash."""
    return [label, as_text(planned) if planned else "–", as_text(measured), _error(planned, measured)]


def _energy_lines(run: Run, plan: KeptPlan, planned_s: float, measured_s: float) -> list[list[str]]:
    """Return the energy of the steps, where GPUs tell their power."""
    power = run.curve("gpu_power_w") or run.curve("power_w")  # the name that it had before
    if power is None or not len(power.finite().values) or not plan.power_w:
        return []
    kwh = plan.num_ranks / 1000 / SECONDS_OF_AN_HOUR
    mean_w = float(power.finite().values.mean())
    return [_line("energy of the GPUs for them, by that of process 0", plan.power_w * planned_s * kwh,
                  mean_w * measured_s * kwh, "{:,.4g} kWh".format)]


def _processes(plan: KeptPlan) -> str:
    """Return the number of processes and the layout."""
    sizes = ", ".join(f"{name} {plan.layout[name]}" for name in ("tp", "pp", "vpp", "cp", "ep", "etp")
                      if isinstance(plan.layout.get(name), int) and plan.layout[name] > 1)
    return f"{plan.num_ranks:,}" + (f" ({sizes})" if sizes else "")


def _seconds(seconds: float) -> str:
    return f"{figure(seconds, 3)} s" if seconds and math.isfinite(seconds) else "–"


def _error(planned: float, measured: float) -> str:
    return f"{planned / measured - 1:+.1%}" if planned and measured and math.isfinite(measured) else "–"

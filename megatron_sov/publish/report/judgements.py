"""What was judged of a run: gates, forgetting, pass@k, media, and all verdicts of a model in one table."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup

from megatron_sov.base.figures import format_duration, format_size, format_value
from megatron_sov.base.pages.markdown import is_picture, is_sound
from megatron_sov.base.pages.page import (
    Chart, Exhibit, PageTable, chart, colour, line_with_intervals, plain, tables)
from megatron_sov.plan.footprint.kept import KeptPlan, StretchPlan
from megatron_sov.publish.report.run_data import Run
from megatron_sov.publish.report.steps import last_value
from megatron_sov.runs.obs.figures import number, of_field
from megatron_sov.runs.obs.history import COMPLETE, UNFINISHED, MeasuredStretch
from megatron_sov.runs.rounds import LEARNS
from megatron_sov.work.clusters.units import GIB, JOULES_OF_A_KWH, SECONDS_OF_AN_HOUR


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
        return sum(len(m.times_s) for m in self.measured)


def accounts_tables(run: Run) -> list[PageTable]:
    """Return what a plan held for beside what was measured; a run that has kept no plan has none."""
    if not run.plans:
        return []
    rows = _rows(run)
    return [*_speed_tables(run, rows), *_memory_tables(run), *_total_tables(run, rows, _newest_plan(run))]


def accounts_text(run: Run) -> str:
    """Return what the plan was made for."""
    if not run.plans:
        return ""
    used = _newest_plan(run)
    return ("The plan was written by the run itself before its first step; the error is planned / measured "
            f"- 1. Planned for {used.num_ranks:,} processes on {used.device or 'an unknown machine'}"
            + (f" with the parameters {used.parameters}." if not used.no_speed else f"; {used.no_speed}.")
            + (f" Network, storage and failures: {used.cluster}." if used.cluster else ""))


def _newest_plan(run: Run) -> KeptPlan:
    return run.plans[_plan_of(run, len(run.attempts))] if run.attempts else run.plans[-1]


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
        # a start that ended within its first steps has no time that could be held against a plan
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
                              # what is less than a hundredth would fill the cell and explain nothing
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
        body.append(_line("time of the steps on record", planned_s, measured_s, format_duration))
        body += _energy_lines(run, plan, planned_s, measured_s)
    if math.isfinite(run.energy_j()):
        body.append(["energy of all GPUs, start-up, evaluation and saving counted in", "–",
                     f"{run.energy_j() / JOULES_OF_A_KWH:,.4g} kWh", "–"])
    if run.wall_time is not None and run.wall_time.total_s > 0:
        # a stop that was asked for is no fault
        faults = sum(a.outcome not in (UNFINISHED, COMPLETE) and not a.outcome.startswith("stopped")
                     for a in run.attempts)
        planned = plan.failures_per_hour * run.wall_time.total_s / SECONDS_OF_AN_HOUR
        body.append(["starts that ended by a fault",
                     format_value(planned, 3) if plan.failures_per_hour else "–",
                     f"{faults:,}", "–"])
        body.append(_line("effective training time", plan.effective_share, run.wall_time.goodput,
                          "{:.1%}".format))
    if run.checkpoint_bytes:
        body.append(_line("size of a checkpoint", plan.checkpoint_bytes, run.checkpoint_bytes, format_size))
    saves_s = [s for s in (number(c.get("save_s")) for c in run.checkpoints) if math.isfinite(s)]
    if saves_s:
        body.append(_line("time to write one, mean", plan.checkpoint_s, statistics.mean(saves_s),
                          format_duration))
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
    sizes = ", ".join(f"{name} {plan.layout[name]}" for name in ("tp", "pp", "vpp", "cp", "ep", "etp")
                      if isinstance(plan.layout.get(name), int) and plan.layout[name] > 1)
    return f"{plan.num_ranks:,}" + (f" ({sizes})" if sizes else "")


def _seconds(seconds: float) -> str:
    return f"{format_value(seconds, 3)} s" if seconds and math.isfinite(seconds) else "–"


def _error(planned: float, measured: float) -> str:
    return f"{planned / measured - 1:+.1%}" if planned and measured and math.isfinite(measured) else "–"


MAX_CELLS = 40
MAX_CURVES = 12
"""Curves of a chart of rounds at most, those with the most responses."""
MAX_ROUNDS = 40
"""Rounds in the table at most, the newest ones."""
SHOWN = 8
"""Samples of each pair of modalities."""
VERDICTS = {True: Markup('<span class="good">passed</span>'),
            False: Markup('<span class="bad">FAILED</span>')}
WORDS = {"kept": Markup('<span class="good">kept</span>'),
         "forgotten": Markup('<span class="bad">FORGOTTEN</span>'),
         "not known": Markup('<span class="bad">not known</span>')}
Event = dict[str, Any]
_STEP = of_field("step", ",.0f", "–")


def gate_tables(run: Run) -> list[PageTable]:
    """Return every check of an extension's gate with what failed, and the search that proves the test
    clean."""
    checks = run.gate_checks
    failing = (checks[-1].get("failing_cells") or []) if checks else []
    below = tables(failing[:MAX_CELLS], {
        "cells below at the last check": of_field("kind"), "language": of_field("language"),
        "tokens": lambda c: f"{int(c['length_tokens']):,}", "depth": of_field("depth", ".0%"),
        "right": lambda c: f"{c['correct']} of {c['samples']}",
        "95 % interval": lambda c: f"{number(c['interval'][0]):.1%} to {number(c['interval'][1]):.1%}"})
    if len(failing) > MAX_CELLS:
        below[0].rows.append([f"and {len(failing) - MAX_CELLS:,} more", "", "", "", "", ""])
    return [*tables(checks, {
        "step": lambda c: f"{int(c.get('step') or 0):,}",
        "worst row": lambda c: f"{min(worst):.1%}" if (worst := _accuracies(c)) else "–",
        "threshold": of_field("threshold", ".0%"),
        "rows below": lambda c: str(len(c.get("failing_rows") or [])),
        "cells below for sure": lambda c: str(len(c.get("failing_cells") or [])),
        "short-context loss": of_field("loss", ".4f"), "at the start": of_field("start_loss", ".4f"),
        "limit": of_field("loss_limit", ".4f"), "verdict": verdict,
    }), *below, *map(_search, run.of("decontamination")[-1:])]


def verdict(check: Event) -> Markup:
    """Return what a check found, in one word or two."""
    if check.get("judged") and not check.get("passed"):
        return Markup("good, before step {}").format(check.get("min_steps"))
    return VERDICTS[bool(check.get("passed"))]


def _accuracies(check: Event) -> list[float]:
    return [number(row.get("accuracy")) for row in check.get("rows") or []]


def _search(found: Event) -> PageTable:
    held = found.get("train_tokens") or {}
    rows = [
        ["questions of the test in the training text",
         f"{found.get('questions_found')} of {found.get('questions'):,}"],
        [f"windows of {found.get('window_tokens')} held-out tokens in the training text",
         f"{found.get('windows_found'):,} of {found.get('windows'):,} ({number(found.get('overlap')):.2%})"]]
    rows += [[f"tokens searched of {name}", f"{count:,} of {held.get(name, 0):,}"]
             for name, count in (found.get("scanned_tokens") or {}).items()]
    return PageTable(["search for the test in the training data", "found"], rows)


def forgetting_tables(run: Run) -> list[PageTable]:
    """Return each task of the newest `forgetting_gate` event before and after, with the paired difference."""
    return tables(_newest_gate(run).get("tasks") or [], {
        "task": of_field("task"), "metric": of_field("metric"),
        "at the start": lambda t: format_value(number(t.get("before"))),
        "at the end": lambda t: format_value(number(t.get("after"))),
        "difference": lambda t: _signed(t.get("value")),
        "90 % interval": lambda t: " to ".join(map(_signed, ends)) if len(
            ends := _list(t.get("interval"))) == 2 else "–",
        "items": of_field("items", ",.0f"),
        "verdict": lambda t: WORDS.get(str(t.get("verdict")), str(t.get("verdict")))})


def forgetting_text(run: Run) -> str:
    """Return what was held against what, and by which rule."""
    event = _newest_gate(run)
    step = number(event.get("step"))
    return ("What the stage started from against its last checkpoint (step "
            f"{'not known' if math.isnan(step) else f'{step:,.0f}'}), on the same items. "
            f"Forgotten: the whole interval lies below -{number(event.get('tolerance')):g}; not proven: too "
            "few items to tell.")


def _newest_gate(run: Run) -> Event:
    return (run.of("forgetting_gate") or [{}])[-1]


def _signed(value: Any) -> str:
    return "–" if math.isnan(found := number(value)) else f"{found:+.4f}"


def verdict_table(runs: list[Run], others: list[Run]) -> list[PageTable]:
    """Return the table, or nothing where nothing was judged.

    Args:
        runs: the stages of the model that the report is on.
        others: runs of other models; of these the gates alone are named, as another model's.
    """
    rows = [*_stages(runs), *(row for run in runs for row in (
        *gate(run), *_forgetting(run), *_needle_row(run), *_baseline(run))),
            *(row for run in runs for row in _exports(run))]
    for other in others:
        rows += [["Other's gate", word, f"another model, {found}"] for _, word, found in gate(other)]
    return [PageTable(["what", "verdict", "measured"], rows)] if rows else []


def gate(run: Run) -> list[list[str]]:
    """Return the gate's last check, in one row; nothing for a run without a gate."""
    if not run.gate_checks:
        return []
    check = run.gate_checks[-1]
    loss, limit = number(check.get("loss")), number(check.get("loss_limit"))
    found = f"short-context loss {loss:.3f}, limit {limit:.3f}; step {int(check.get('step') or 0):,}"
    if accuracies := _accuracies(check):
        found = f"needles {min(accuracies):.0%}, {number(check.get('threshold')):.0%} needed; {found}"
    return [["Gate", verdict(check), f"{run.name}: {found}"]]


def _forgetting(run: Run) -> list[list[str]]:
    """Return what the forgetting gate found."""
    if not run.of("forgetting_gate"):
        return []
    event = run.of("forgetting_gate")[-1]
    tasks = event.get("tasks") or []
    lost = [str(task.get("task")) for task in tasks if task.get("verdict") in ("forgotten", "not known")]
    unproven = sum(task.get("verdict") == "not proven" for task in tasks)
    found = f"worse on {', '.join(lost)}" if lost else f"{len(tasks) - unproven} of {len(tasks)} tasks kept"
    if unproven:
        found += f", {unproven} not proven"
    return [["Forgetting", VERDICTS[bool(event.get("passed"))],
             f"{run.name}: {found}; tolerance {number(event.get('tolerance')):g}"]]


def _stages(runs: list[Run]) -> list[list[str]]:
    """Return whether every stage came to its end."""
    started = [run for run in runs if run.attempts]
    open_ones = [f"{run.name} {run.attempts[-1].outcome}" for run in started
                 if run.attempts[-1].outcome != COMPLETE]
    if not started:
        return []
    count = f"{len(started) - len(open_ones)} of {len(started)}"
    word = Markup('<span class="bad">{}</span>').format(count) if open_ones else Markup(
        '<span class="good">{}</span>').format(count)
    return [["Stages", word, "; ".join(open_ones) or f"{', '.join(run.name for run in started)}: complete"]]


def _needle_row(run: Run) -> list[list[str]]:
    """Return what a needle test without a gate found: a figure and no verdict."""
    found = [n for n in run.needles if n.get("cells")]
    if run.gate_checks or not found:
        return []
    longest = max(int(cell["length_tokens"]) for cell in found[-1]["cells"])
    return [["Needles", "no gate set",
             f"{run.name}: {number(found[-1].get('score')):.1%} found, up to {longest:,} tokens"]]


def _baseline(run: Run) -> list[list[str]]:
    """Return on how many sources the model needs fewer bits than a bigram model."""
    judged = {name: last_value(h.bits_per_byte) < h.baseline_bits_per_byte
              for name, h in run.heldout.items() if h.baseline_bits_per_byte is not None}
    if not judged:
        return []
    worse = [name for name, better in judged.items() if not better]
    why = f"more on {', '.join(worse)}" if worse else f"fewer on {len(judged)} of {len(judged)} sources"
    return [["Bigram model", VERDICTS[not worse], f"{run.name}: bits per byte, {why}"]]


def _exports(run: Run) -> list[list[str]]:
    proofs = [c for c in run.of("conversion") if c.get("checks")]
    if not proofs:
        return []
    passed = [bool(check.get("passed")) for check in proofs[-1]["checks"]]
    return [["Export", VERDICTS[all(passed)], f"{run.name}: {sum(passed)} of {len(passed)} checks"]]


def _passk_events(run: Run) -> list[tuple[str, Event]]:
    """Return the `passk` events with their names; of one set of prompts, reward and step the newest
    counts."""
    # a later event takes the key of an earlier one: the newest counts
    found = {(str(e.get("input")), e.get("reward"), e.get("step")): e for e in run.of("passk")
             if e.get("pass_at_k")}
    shared = Counter(file.rpartition("/")[2] for file in {file for file, *_ in found})
    # the path where several files have one name
    return [(f"{file if shared[last] > 1 else last}, {reward}", event)
            for (file, reward, _), event in found.items() for last in [file.rpartition("/")[2]]]


def passk_charts(run: Run) -> list[Chart]:
    """Return a curve over k for each set of prompts."""
    return [_passk_chart(event, name) for name, event in _passk_events(run)]


def passk_tables(run: Run) -> list[PageTable]:
    """Return what the responses to each set of prompts were."""
    def share(event: Event, at: int) -> str:
        return f"{number(event['pass_at_k'][at]['value']):.1%} (k = {event['pass_at_k'][at]['k']})"

    def of(cell: Callable[[Event], str]) -> Callable[[tuple[str, Event]], str]:
        return lambda named: cell(named[1])

    return tables(_passk_events(run), {"prompts, reward": lambda named: named[0], **{
        head: of(cell) for head, cell in {
            "step": _STEP, "prompts": of_field("num_prompts", ",.0f"),
            "responses": of_field("num_samples", ",.0f"),
            "without a reward": of_field("num_unscored", ",.0f"),
            "pass@k": lambda e: share(e, 0), "at most": lambda e: share(e, -1),
            "mean reward": of_field("mean_reward", ".4f"),
            "sampling": lambda e: "temperature {temperature}, top-p {top_p}, seed {seed}".format_map(
                e["sampling"]) if e.get("sampling") else "sampled elsewhere"}.items()}})


def _passk_chart(event: Event, name: str) -> Chart:
    lines = {}
    for name_of_field, label in (("pass_at_k", "pass@k"), ("maj_at_k", "maj@k")):
        rows = [r for r in event.get(name_of_field) or [] if len(r["interval"]) == 2]
        if rows:
            lines[label] = np.array([[number(r["k"]), number(r["value"]), *map(number, r["interval"])]
                                     for r in rows]).T
    drawn = go.Figure()
    for i, (label, (k, value, low, high)) in enumerate(lines.items()):
        drawn.add_trace(line_with_intervals(label, i, k.astype(np.int32), value, low, high))
    drawn.update_layout(xaxis={"title": "k", "type": "log", "dtick": "D1"},
                        yaxis={"title": "share of prompts", "tickformat": ".0%", "rangemode": "tozero"})
    return chart(drawn, f"{name}, step {_STEP(event)}: 95 % intervals over "
                        f"{int(number(event.get('num_prompts'))):,} prompts.")


def _newest_media(run: Run, kind: str, count: str) -> list[Event]:
    """Return the events of a kind in which something was counted; of one pair and step the newest."""
    return list({(str(e.get("pair")), str(e.get("step"))): e for e in run.of(kind)
                 if number(e.get(count)) > 0}.values())


def media_tables(run: Run) -> list[PageTable]:
    """Return how often others recognised what a model made of pictures and speech, and how often it found
    the right candidate."""
    def share(event: Event, name: str, more: str = "") -> str:
        low, high = (*_list(event.get(f"{name}_interval")), 0, 0)[:2]
        return f"{number(event.get(name)):.1%} ({number(low):.1%} to {number(high):.1%}{more})"

    def recall(event: Event, k: int) -> str:
        return share(event, f"recall_at_{k}", f"; {number(event.get(f'chance_at_{k}')):.1%}")

    return [*tables(_newest_media(run, "media", "num_rows"), {
        "pair": of_field("pair"), "step": _STEP, "rows": of_field("num_rows", ",.0f"),
        "right (95 %)": lambda e: share(e, "accuracy"), "chance": of_field("chance", ".1%", "–"),
        "words wrong": of_field("wer", ".3f", "–"), "characters wrong": of_field("cer", ".3f", "–"),
    }), *tables(_newest_media(run, "media_retrieval", "num_questions"), {
        "retrieval": of_field("pair"), "step": _STEP, "questions": of_field("num_questions", ",.0f"),
        "candidates": of_field("num_candidates", ",.0f"),
        "right first (95 %; chance)": lambda e: recall(e, 1), "among the first 5": lambda e: recall(e, 5),
        "mean rank (chance)": lambda e: f"{number(e.get('mean_rank')):.2f} "
                                        f"({number(e.get('chance_mean_rank')):.2f})"})]


def media_exhibits(run: Run) -> list[Exhibit]:
    """Return what a model was shown, and what it made of it."""
    return [_exhibit(e, sample) for e in _newest_media(run, "media", "num_rows")
            for sample in _list(e.get("samples"))[:SHOWN] if isinstance(sample, dict)]


def _exhibit(event: dict[str, Any], sample: dict[str, Any]) -> Exhibit:
    parts = [part for part in _list(sample.get("content")) if isinstance(part, dict)]
    asked = [str(part["text"]) for part in parts if part.get("type") == "text" and "text" in part]
    shown, made = [part.get("address") for part in parts], _list(sample.get("addresses"))
    return Exhibit(
        f"{event.get('pair')}, asked for {sample.get('answer')}", " ".join(asked),
        [str(a) for a in shown if is_picture(a)], [str(a) for a in shown if is_sound(a)],
        str(sample.get("text") or ""), [str(a) for a in made if is_picture(a)],
        [str(a) for a in made if is_sound(a)], str(sample.get("recognised") or "nothing"))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def round_charts(run: Run) -> list[Chart]:
    """Return reward, length and groups over the rounds of reinforcement learning."""
    rounds = run.rounds
    means = [content["means"] for content in rounds]
    charts = [
        _round_chart(rounds, {"reward": _values(means, "reward"), **_of_names(means, "components")}, "reward",
                     "Mean reward of a round's responses, and the parts that it is made of."),
        _round_chart(rounds, _of_domains(means), "reward", "Mean reward by domain of the prompts."),
        _round_chart(rounds, _from_teachers(run), "nats per token",
                     "KL(student || teacher), as the responses tell it, in all and by domain of prompts."),
        _round_chart(rounds, {"tokens": _values(means, "response_tokens")}, "tokens",
                     "Mean length of responses, in tokens that the policy wrote."),
        _round_chart(rounds, {"truncated": _values(means, "truncated")}, "share",
                     "Share of responses that were as long as allowed and did not end."),
        _round_chart(rounds, {"staleness": _values(means, "staleness_steps")}, "optimizer steps",
                     "Age of the policy that wrote a token, when its round began to be trained."),
        _round_chart(rounds, {reason: np.array([number(c.get("groups", {}).get(reason, 0)) for c in rounds])
                              for reason in _reasons(rounds)}, "groups",
                     "What became of each group of responses.")]
    return [c for c in charts if c is not None]


def _values(means: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([number(m.get(name)) for m in means])


def _of_names(means: Sequence[dict[str, Any]], field: str,
              of: Callable[[Any], Any] = lambda value: value) -> dict[str, np.ndarray]:
    """Return a curve for each name of a field, those that most rounds have first."""
    counts: dict[str, int] = {}
    for m in means:
        for name in m.get(field) or {}:
            counts[name] = counts.get(name, 0) + 1
    kept = sorted(counts, key=lambda name: (-counts[name], name))[:MAX_CURVES]
    return {name: np.array([number(of((m.get(field) or {}).get(name))) for m in means]) for name in kept}


def _of_domains(means: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    return _of_names(means, "domains", lambda found: found.get("reward") if isinstance(found, dict) else None)


def _from_teachers(run: Run) -> dict[str, np.ndarray]:
    """Return how far a student is from its teachers over the rounds, of which the events tell."""
    told = {number(event.get("round")): event for event in run.events.get("round", ())}
    events = [told.get(number(content["round"]), {}) for content in run.rounds]
    return {"all": _values(events, "reverse_kl"), **_of_names(events, "reverse_kl_domains")}


def _reasons(rounds: Sequence[dict[str, Any]]) -> list[str]:
    return sorted({reason for content in rounds for reason in content.get("groups") or {}})


def _round_chart(rounds: Sequence[dict[str, Any]], curves: dict[str, np.ndarray], title: str,
           caption: str) -> Chart | None:
    """Draw curves over rounds; None where there is nothing to draw."""
    at = np.array([int(number(content["round"])) for content in rounds], np.int32)
    figure = go.Figure()
    for i, (name, values) in enumerate(curves.items()):
        known = np.isfinite(values)
        if known.any():
            figure.add_trace(go.Scatter(
                x=at[known], y=values[known].astype(np.float32), name=plain(name),
                mode="lines+markers" if len(at) <= 20 else "lines", line={"color": colour(i), "width": 1.8}))
    if not figure.data:
        return None
    figure.update_layout(xaxis={"title": "round"}, yaxis={"title": title})
    return chart(figure, caption)


def round_tables(run: Run) -> list[PageTable]:
    """Return a row for each of the newest rounds."""
    def counts(of: Event | None, *, but: str = "") -> str:
        return ", ".join(f"{name} {number(count):,.0f}" for name, count in sorted((of or {}).items())
                         if name != but) or "–"

    def mean(name: str, form: str) -> Callable[[Event], str]:
        return lambda c: of_field(name, form, "–")(c["means"])

    return tables(run.rounds[-MAX_ROUNDS:], {
        "round": of_field("round", ",.0f"), "judged responses": mean("responses", ",.0f"),
        "mean reward": mean("reward", ".4f"), "pass rate": mean("pass_rate", ".1%"),
        "mean tokens": mean("response_tokens", ",.1f"),
        "did not end": mean("truncated", ".1%"),
        "groups that learn": lambda c: f"{number((c.get('groups') or {}).get(LEARNS, 0)):,.0f}",
        "groups that do not": lambda c: counts(c.get("groups"), but=LEARNS),
        "without a reward": lambda c: counts(c.get("unjudged")),
        "left out as late": lambda c: f"{len(c.get('late') or []):,}",
        "late ones joined": lambda c: f"{len(c.get('late_from') or []):,}"})

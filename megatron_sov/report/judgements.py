"""What was judged of a run: gates, forgetting, pass@k, media, and all verdicts of a model in one table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup

from megatron_sov.obs.attempts import COMPLETE
from megatron_sov.obs.figures import figure, number
from megatron_sov.pages.markdown import is_picture, is_sound
from megatron_sov.pages.page import Chart, Exhibit, Section, Table, chart, colour
from megatron_sov.report.run_data import Run
from megatron_sov.report.steps import last_value

# The gate of an extension in the report: every check with what failed, and the search that
# proves the test clean.

MAX_CELLS = 40
VERDICTS = {True: Markup('<span class="good">passed</span>'),
            False: Markup('<span class="bad">FAILED</span>')}


def gate_section(checks: list[dict[str, Any]], searches: list[dict[str, Any]]) -> Section:
    """Return the section; without checks it has no content, and is left out.

    Args:
        checks: `gate` events in the order of steps.
        searches: `decontamination` events.
    """
    tables = [_checks(checks)] if checks else []
    failing = (checks[-1].get("failing_cells") or []) if checks else []
    if failing:
        tables.append(_cells(failing))
    tables += [_search(s) for s in searches[-1:]]
    return Section("Gate", tables=tables, text=(
        "A stage is complete when every row of needles (kind, language, length) reaches the threshold, "
        "no single cell lies below it with its whole confidence interval, and the loss on the short context "
        "is within its tolerance."))


def verdict(check: dict[str, Any]) -> Markup:
    """Return what a check found, in one word or two."""
    if check.get("judged") and not check.get("passed"):
        return Markup("good, before step {}").format(check.get("min_steps"))
    return VERDICTS[bool(check.get("passed"))]


def _checks(checks: list[dict[str, Any]]) -> Table:
    rows = []
    for check in checks:
        accuracies = [number(r.get("accuracy")) for r in check.get("rows") or []]
        rows.append([
            f"{int(check.get('step') or 0):,}", f"{min(accuracies):.1%}" if accuracies else "–",
            f"{number(check.get('threshold')):.0%}", str(len(check.get("failing_rows") or [])),
            str(len(check.get("failing_cells") or [])), f"{number(check.get('loss')):.4f}",
            f"{number(check.get('start_loss')):.4f}", f"{number(check.get('loss_limit')):.4f}",
            verdict(check)])
    return Table(["step", "worst row", "threshold", "rows below", "cells below for sure",
                  "short-context loss", "at the start", "limit", "verdict"], rows)


def _cells(cells: list[dict[str, Any]]) -> Table:
    rows = [[str(c.get("kind")), str(c.get("language")), f"{int(c['length_tokens']):,}",
             f"{number(c['depth']):.0%}", f"{c['correct']} of {c['samples']}",
             f"{number(c['interval'][0]):.1%} to {number(c['interval'][1]):.1%}"]
            for c in cells[:MAX_CELLS]]
    if len(cells) > MAX_CELLS:
        rows.append([f"and {len(cells) - MAX_CELLS:,} more", "", "", "", "", ""])
    return Table(["cells below at the last check", "language", "tokens", "depth", "right", "95 % interval"],
                 rows)


def _search(found: dict[str, Any]) -> Table:
    scanned, held = found.get("scanned_tokens") or {}, found.get("train_tokens") or {}
    rows = [
        ["questions of the test in the training text",
         f"{found.get('questions_found')} of {found.get('questions'):,}"],
        [f"windows of {found.get('window_tokens')} held-out tokens in the training text",
         f"{found.get('windows_found'):,} of {found.get('windows'):,} ({number(found.get('overlap')):.2%})"]]
    rows += [[f"tokens searched of {name}", f"{count:,} of {held.get(name, 0):,}"]
             for name, count in scanned.items()]
    return Table(["search for the test in the training data", "found"], rows)


# The forgetting gate in the report: each task before and after, with the paired difference.

WORDS = {"kept": Markup('<span class="good">kept</span>'),
         "forgotten": Markup('<span class="bad">FORGOTTEN</span>'),
         "not known": Markup('<span class="bad">not known</span>')}


def forgetting_section(events: list[dict[str, Any]]) -> Section:
    """Return the section of the newest `forgetting_gate` event; without one it has no content."""
    title = "Forgetting gate"
    if not events:
        return Section(title)
    event = events[-1]
    rows = []
    for task in event.get("tasks") or []:
        word = str(task.get("verdict"))
        rows.append([str(task.get("task")), str(task.get("metric")), figure(number(task.get("before"))),
                     figure(number(task.get("after"))), _signed(task.get("value")),
                     _interval(task.get("interval")), f"{number(task.get('items')):,.0f}",
                     WORDS.get(word, word)])
    return Section(title, tables=[Table(
        ["task", "metric", "at the start", "at the end", "difference", "90 % interval", "items", "verdict"],
        rows)], text=(
        f"What the stage started from against its last checkpoint (step {_step(event)}), on the same items. "
        f"Forgotten: the whole interval lies below -{number(event.get('tolerance')):g}; not proven: too few "
        "items to tell."))


def forgetting_verdict(name: str, events: list[dict[str, Any]]) -> list[list[str]]:
    """Return the row of the table of verdicts, or nothing.

    Args:
        name: of the run.
        events: `forgetting_gate` events.
    """
    if not events:
        return []
    tasks = events[-1].get("tasks") or []
    lost = [str(task.get("task")) for task in tasks if task.get("verdict") in ("forgotten", "not known")]
    unproven = sum(task.get("verdict") == "not proven" for task in tasks)
    found = f"worse on {', '.join(lost)}" if lost else f"{len(tasks) - unproven} of {len(tasks)} tasks kept"
    if unproven:
        found += f", {unproven} not proven"
    return [["Forgetting", VERDICTS[bool(events[-1].get("passed"))],
             f"{name}: {found}; tolerance {number(events[-1].get('tolerance')):g}"]]


def _signed(value: Any) -> str:
    found = number(value)
    return "–" if math.isnan(found) else f"{found:+.4f}"


def _interval(value: Any) -> str:
    if not isinstance(value, list) or len(value) != 2:
        return "–"
    return f"{_signed(value[0])} to {_signed(value[1])}"


def _step(event: dict[str, Any]) -> str:
    step = number(event.get("step"))
    return "not known" if math.isnan(step) else f"{step:,.0f}"


# What was judged of a model, one row each: its stages, gates, baselines and exports.

def verdict_table(runs: list[Run], others: list[Run]) -> list[Table]:
    """Return the table, or nothing where nothing was judged.

    Args:
        runs: the stages of the model that the report is on.
        others: runs of other models; of these the gates alone are named, as another model's.
    """
    rows = [*_stages(runs), *(row for run in runs for row in (
        *gate(run), *forgetting_verdict(run.name, run.forgetting), *_needle_row(run), *_baseline(run))),
            *(row for run in runs for row in _exports(run))]
    for other in others:
        rows += [["Other's gate", word, f"another model, {found}"] for _, word, found in gate(other)]
    return [Table(["what", "verdict", "measured"], rows)] if rows else []


def gate(run: Run) -> list[list[str]]:
    """Return the gate's last check, in one row; nothing for a run without a gate."""
    if not run.gate_checks:
        return []
    check = run.gate_checks[-1]
    loss, limit = number(check.get("loss")), number(check.get("loss_limit"))
    found = f"short-context loss {loss:.3f}, limit {limit:.3f}; step {int(check.get('step') or 0):,}"
    accuracies = [number(row.get("accuracy")) for row in check.get("rows") or []]
    if accuracies:
        found = f"needles {min(accuracies):.0%}, {number(check.get('threshold')):.0%} needed; {found}"
    return [["Gate", verdict(check), f"{run.name}: {found}"]]


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
    """Return the last proof of an export."""
    proofs = [c for c in run.conversions if c.get("checks")]
    if not proofs:
        return []
    passed = [bool(check.get("passed")) for check in proofs[-1]["checks"]]
    return [["Export", VERDICTS[all(passed)], f"{run.name}: {sum(passed)} of {len(passed)} checks"]]


# pass@k in the report: a curve over k for each set of prompts, and what the responses were.

def passk_section(events: list[dict[str, Any]]) -> Section:
    """Return the section; without events it has no content, and is left out.

    Args:
        events: `passk` events; of one set of prompts, reward and step the newest counts.
    """
    found = {(str(e.get("input")), e.get("reward"), e.get("step")): e for e in events
             if e.get("pass_at_k")}
    files = {file for file, *_ in found}
    shared = Counter(map(_file_name, files))
    newest = [{**e, "name": _name(e, shared)} for e in found.values()]
    return Section("pass@k", charts=[_passk_chart(e) for e in newest],
                   tables=[_passk_table(newest)] if newest else [],
                   side_by_side=True, text="The probability that of k responses to a prompt one at least is "
                                           "right (pass@k), or the most frequent answer (maj@k).")


def _file_name(file: str) -> str:
    return file.rpartition("/")[2]


def _name(event: dict[str, Any], shared: Counter[str]) -> str:
    """Return what tells prompts and reward from others: the path where files have one name."""
    file = str(event.get("input"))
    return f"{file if shared[_file_name(file)] > 1 else _file_name(file)}, {event.get('reward')}"


def _step_of(event: dict[str, Any]) -> str:
    return "–" if event.get("step") is None else f"{int(event['step']):,}"


def _passk_chart(event: dict[str, Any]) -> Chart:
    figure = go.Figure()
    for i, (field, name) in enumerate((("pass_at_k", "pass@k"), ("maj_at_k", "maj@k"))):
        rows = [r for r in event.get(field) or [] if len(r["interval"]) == 2]
        values = np.array([[number(r["k"]), number(r["value"]), *map(number, r["interval"])] for r in rows])
        if not len(values):
            continue
        k, value, low, high = values.T
        figure.add_trace(go.Scatter(
            x=k.astype(np.int32), y=value.astype(np.float32), name=name, mode="lines+markers",
            line={"color": colour(i), "width": 1.8},
            error_y={"type": "data", "symmetric": False, "array": (high - value).astype(np.float32),
                     "arrayminus": (value - low).astype(np.float32), "thickness": 1}))
    figure.update_layout(xaxis={"title": "k", "type": "log", "dtick": "D1"},
                         yaxis={"title": "share of prompts", "tickformat": ".0%", "rangemode": "tozero"})
    return chart(figure, f"{event['name']}, step {_step_of(event)}: 95 % intervals over "
                         f"{int(number(event.get('num_prompts'))):,} prompts.")


def _passk_table(events: list[dict[str, Any]]) -> Table:
    rows = []
    for event in events:
        first, last = event["pass_at_k"][0], event["pass_at_k"][-1]
        sampling = event.get("sampling") or {}
        rows.append([event["name"], _step_of(event), f"{int(number(event.get('num_prompts'))):,}",
                     f"{int(number(event.get('num_samples'))):,}",
                     f"{int(number(event.get('num_unscored'))):,}",
                     f"{number(first['value']):.1%} (k = {first['k']})",
                     f"{number(last['value']):.1%} (k = {last['k']})",
                     f"{number(event.get('mean_reward')):.4f}",
                     f"temperature {sampling['temperature']}, top-p {sampling['top_p']}, "
                     f"seed {sampling['seed']}" if sampling else "sampled elsewhere"])
    return Table(["prompts, reward", "step", "prompts", "responses", "without a reward", "pass@k", "at most",
                  "mean reward", "sampling"], rows)


# Pictures and speech in the report: what a model was shown, what it made of it, what others recognised.

SHOWN = 8
"""Samples of each pair."""


def media_section(events: list[dict[str, Any]], retrieval: Sequence[dict[str, Any]] = ()) -> Section:
    """Return the section; without events it has no content, and is left out.

    Args:
        events: `media` events; of one pair and step the newest counts.
        retrieval: `media_retrieval` events, likewise.
    """
    found, ranked = _newest_of(events, "num_rows"), _newest_of(retrieval, "num_questions")
    exhibits = [_exhibit(e, sample) for e in found.values() for sample in _list(e.get("samples"))[:SHOWN]
                if isinstance(sample, dict)]
    tables = [table(list(of.values())) for table, of in ((_media_table, found), (_ranks, ranked)) if of]
    return Section("From one modality to another", tables=tables, exhibits=exhibits,
                   text="What was recognised in what the model wrote, drew or said, and samples of it; and "
                        "how often a right candidate is among those that it holds for the most probable.")


def _newest_of(events: Sequence[dict[str, Any]], count: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(str(e.get("pair")), str(e.get("step"))): e for e in events if number(e.get(count)) > 0}


def _media_table(events: list[dict[str, Any]]) -> Table:
    rows = []
    for e in events:
        low, high = (*_list(e.get("accuracy_interval")), 0, 0)[:2]
        rows.append([str(e.get("pair")), _step_of_medium(e),
                     f"{number(e.get('num_rows')):,.0f}",
                     f"{number(e.get('accuracy')):.1%} ({number(low):.1%} to {number(high):.1%})",
                     f"{number(e['chance']):.1%}" if "chance" in e else "–",
                     f"{number(e['wer']):.3f}" if "wer" in e else "–",
                     f"{number(e['cer']):.3f}" if "cer" in e else "–"])
    return Table(["pair", "step", "rows", "right (95 %)", "chance", "words wrong", "characters wrong"], rows)


def _ranks(events: list[dict[str, Any]]) -> Table:
    def recall(e: dict[str, Any], k: int) -> str:
        low, high = (*_list(e.get(f"recall_at_{k}_interval")), 0, 0)[:2]
        return (f"{number(e.get(f'recall_at_{k}')):.1%} ({number(low):.1%} to {number(high):.1%}; "
                f"{number(e.get(f'chance_at_{k}')):.1%})")

    return Table(["retrieval", "step", "questions", "candidates", "right first (95 %; chance)",
                  "among the first 5", "mean rank (chance)"],
                 [[str(e.get("pair")), _step_of_medium(e), f"{number(e.get('num_questions')):,.0f}",
                   f"{number(e.get('num_candidates')):,.0f}", recall(e, 1), recall(e, 5),
                   f"{number(e.get('mean_rank')):.2f} ({number(e.get('chance_mean_rank')):.2f})"]
                  for e in events])


def _step_of_medium(event: dict[str, Any]) -> str:
    return "–" if event.get("step") is None else f"{number(event['step']):,.0f}"


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

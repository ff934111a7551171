"""What was judged of a run: gates, forgetting, pass@k, media, and all verdicts of a model in one table."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from megatron_sov.base.figures import format_share, format_value
from megatron_sov.base.pages.page import Chart, PageTable, build_tables
from megatron_sov.base.pages.plots import Axis, LinePlot, Series, series_colour
from megatron_sov.publish.report.headline import heldout_text
from megatron_sov.publish.report.run_data import Run
from megatron_sov.runs.obs.figures import NumberFormat, field_formatter, parse_number, parse_whole_number
from megatron_sov.runs.obs.history import COMPLETE
from megatron_sov.runs.rounds import TRAINED_GROUPS

MAX_CURVES = 12
"""Curves of a chart of rounds at most, those with the most responses."""
MAX_ROUNDS = 40
"""Rounds in the table at most, the newest ones."""
VERDICTS = {True: Markup('<span class="good">passed</span>'),
            False: Markup('<span class="bad">FAILED</span>')}
NOT_SET = "no gate set"
SENTENCE_END = re.compile(r"[.!?。！？][\"'”’`)\]]*$")
Event = dict[str, Any]
_STEP = field_formatter("step", ",.0f", "–")


def verdict(check: Event) -> Markup:
    """Return what a check found, in one word or two."""
    if check.get("judged") and not check.get("passed"):
        return Markup("good, before step {}").format(check.get("min_steps"))
    return VERDICTS[bool(check.get("passed"))]


def _accuracies(check: Event) -> list[float]:
    return [parse_number(row.get("accuracy")) for row in check.get("rows") or []]


def verdict_table(runs: list[Run]) -> list[PageTable]:
    """Return the verdicts on the stages of a model; nothing if nothing was judged."""
    rows = [*_stages(runs), *(row for run in runs for row in (
        *gate(run), *_forgetting(run), *_needle_row(run))),
            *(row for run in runs for row in _exports(run))]
    return [PageTable(["check", "verdict", "measured"], rows)] if rows else []


def verdict_sentence(runs: list[Run]) -> str:
    """Return the report's first sentence: checks, samples, held-out text, and gates that are not set."""
    table = verdict_table(runs)
    rows = table[0].rows if table else []
    failed = [row[0] for row in rows if 'class="bad"' in row[1]]
    num_judged = len([row for row in rows if row[1] != NOT_SET])
    parts = []
    if num_judged:
        parts.append(f"{num_judged - len(failed)} of {num_judged} checks passed"
                     + (f" (failed: {', '.join(failed)})" if failed else ""))
    if sentences := _count_sentences(runs):
        parts.append(sentences)
    before, after = heldout_text(runs)
    if math.isfinite(before + after):
        parts.append(f"held-out text {format_value(before, 3)} → {format_value(after, 3)} bits per byte")
    parts += [f"no gate set for {row[0].lower()}" for row in rows if row[1] == NOT_SET]
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _count_sentences(runs: list[Run]) -> str:
    """Return how many samples of the last sampled stage are whole sentences: three words or more that end
    as a sentence does."""
    samples = next((run.samples for run in reversed(runs) if run.samples), [])
    texts = [str(sample.get("text") or "").strip() for sample in samples]
    whole = [text for text in texts if len(text.split()) >= 3 and SENTENCE_END.search(text)]
    if not texts:
        return ""
    return f"{len(whole):,} of {len(texts):,} answers are whole sentences"


def gate(run: Run) -> list[list[str]]:
    """Return the gate's last check, in one row; nothing for a run without a gate."""
    if not run.gate_checks:
        return []
    check = run.gate_checks[-1]
    loss, limit = parse_number(check.get("loss")), parse_number(check.get("loss_limit"))
    found = f"short-context loss {loss:.3f}, limit {limit:.3f}; step {int(check.get('step') or 0):,}"
    if accuracies := _accuracies(check):
        needed = format_share(parse_number(check.get("threshold")))
        found = f"needles {format_share(min(accuracies))}, {needed} needed; {found}"
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
             f"{run.name}: {found}; tolerance {parse_number(event.get('tolerance')):g}"]]


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
    score = format_share(parse_number(found[-1].get("score")))
    return [["Needles", NOT_SET, f"{run.name}: {score} found, up to {longest:,} tokens"]]


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
    found = {(str(e.get("input")), str(e.get("reward")), e.get("step")): e for e in run.of("passk")
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
        estimate = event["pass_at_k"][at]
        return f"{format_share(parse_number(estimate['value']))} (k = {estimate['k']})"

    def of(cell: Callable[[Event], str]) -> Callable[[tuple[str, Event]], str]:
        return lambda named: cell(named[1])

    return build_tables(_passk_events(run), {"prompts, reward": lambda named: named[0], **{
        head: of(cell) for head, cell in {
            "step": _STEP, "prompts": field_formatter("num_prompts", ",.0f"),
            "responses": field_formatter("num_samples", ",.0f"),
            "without a reward": field_formatter("num_unscored", ",.0f"),
            "pass@k": lambda e: share(e, 0), "at most": lambda e: share(e, -1),
            "mean reward": field_formatter("mean_reward", ".4f"),
            "sampling": lambda e: "temperature {temperature}, top-p {top_p}, seed {seed}".format_map(
                e["sampling"]) if e.get("sampling") else "sampled elsewhere"}.items()}})


def _passk_chart(event: Event, name: str) -> Chart:
    series: list[Series] = []
    for name_of_field, label in (("pass_at_k", "pass@k"), ("maj_at_k", "maj@k")):
        rows = [r for r in event.get(name_of_field) or [] if len(r.get("interval") or ()) == 2]
        if rows:
            series.append(Series(label, [parse_number(r["k"]) for r in rows],
                                 [parse_number(r["value"]) for r in rows],
                                 series_colour(len(series)), intervals=[
                (parse_number(r["interval"][0]), parse_number(r["interval"][1])) for r in rows]))
    return Chart(LinePlot(series, Axis("k", is_log=True), Axis("share of prompts", low=0.0, is_share=True)),
                 f"{name}, step {_STEP(event)}: 95 % intervals over "
                 f"{parse_whole_number(event.get('num_prompts')):,} prompts.")


def round_charts(run: Run) -> list[Chart]:
    """Return reward, length and groups over the rounds of reinforcement learning."""
    rounds = run.rounds
    means = [content["means"] for content in rounds]
    charts = [
        _round_chart(rounds, {"reward": _values(means, "reward"), **_of_names(means, "components")}, "reward",
                     "Mean reward of a round's responses, and the parts that it is made of."),
        _round_chart(rounds, {"tokens": _values(means, "response_tokens")}, "tokens",
                     "Mean length of responses, in tokens that the policy wrote."),
        _round_chart(rounds, {"truncated": _values(means, "truncated")}, "share",
                     "Share of responses that were as long as allowed and did not end."),
        _round_chart(rounds, {reason: np.array([
            parse_number(c.get("groups", {}).get(reason, 0)) for c in rounds])
                              for reason in _reasons(rounds)}, "groups",
                     "What became of each group of responses.")]
    return [c for c in charts if c is not None]


def _values(means: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([parse_number(m.get(name)) for m in means])


def _of_names(means: Sequence[dict[str, Any]], field: str,
              of: Callable[[Any], Any] = lambda value: value) -> dict[str, np.ndarray]:
    """Return a curve for each name of a field, those that most rounds have first."""
    counts: dict[str, int] = {}
    for m in means:
        for name in m.get(field) or {}:
            counts[name] = counts.get(name, 0) + 1
    kept = sorted(counts, key=lambda name: (-counts[name], name))[:MAX_CURVES]
    return {name: np.array([parse_number(of((m.get(field) or {}).get(name))) for m in means])
            for name in kept}


def _reasons(rounds: Sequence[dict[str, Any]]) -> list[str]:
    return sorted({reason for content in rounds for reason in content.get("groups") or {}})


def _round_chart(rounds: Sequence[dict[str, Any]], curves: dict[str, np.ndarray], title: str,
                 caption: str) -> Chart | None:
    """Draw curves over rounds; None where there is nothing to draw."""
    at = np.array([int(parse_number(content["round"])) for content in rounds], np.int32)
    series = []
    for i, (name, values) in enumerate(curves.items()):
        known = np.isfinite(values)
        if known.any():
            series.append(Series(name, at[known].tolist(), values[known].tolist(), series_colour(i)))
    return Chart(LinePlot(series, Axis("round"), Axis(title)), caption) if series else None


def round_tables(run: Run) -> list[PageTable]:
    """Return a row for each of the newest rounds."""
    def counts(of: Event | None, *, but: str = "") -> str:
        return ", ".join(f"{name} {parse_number(count):,.0f}" for name, count in sorted((of or {}).items())
                         if name != but) or "–"

    def mean(name: str, form: NumberFormat) -> Callable[[Event], str]:
        return lambda c: field_formatter(name, form, "–")(c["means"])

    return build_tables(run.rounds[-MAX_ROUNDS:], {
        "round": field_formatter("round", ",.0f"), "judged responses": mean("responses", ",.0f"),
        "mean reward": mean("reward", ".4f"), "pass rate": mean("pass_rate", format_share),
        "mean tokens": mean("response_tokens", ",.1f"),
        "did not end": mean("truncated", format_share),
        "groups that learn": lambda c: f"{parse_number((c.get('groups') or {}).get(TRAINED_GROUPS, 0)):,.0f}",
        "groups that do not": lambda c: counts(c.get("groups"), but=TRAINED_GROUPS),
        "without a reward": lambda c: counts(c.get("unjudged"))})


# Scores of `eval lm`: by checkpoint over training, with intervals.


MAX_TASKS = 8
"""Tasks of one chart."""
MAX_CHARTS = 6
MAX_NAME_CHARACTERS = 40
"""Of a line, in a chart's legend."""


@dataclass(frozen=True)
class ReportedScore:
    """One figure of one checkpoint."""

    task: str
    """Name of the task."""
    metric: str
    """Its name with k, and filter and mode where they are not the usual ones."""
    step: int | None
    """Optimizer steps of the checkpoint; None where nobody knows."""
    value: float
    """NaN: not known."""
    interval: tuple[float, float] | None
    """95 percent."""
    event: dict[str, Any]
    """All that was recorded."""

    @property
    def is_share(self) -> bool:
        """Whether it lies from 0 to 1, and is shown in percent."""
        return not math.isfinite(self.value) or 0 <= self.value <= 1

    def shown(self, value: float) -> str:
        """Return a value in the figure's unit."""
        if not math.isfinite(value):
            return "not known"
        return format_share(value) if self.is_share else format_value(value)


def scores_of(events: Iterable[dict[str, Any]]) -> list[ReportedScore]:
    """Return the scores of `eval_lm` events; of one task, metric, mode, data and checkpoint the newest one
    counts.  They stand in the order of tasks, metrics, steps."""
    found: dict[tuple[Any, ...], ReportedScore] = {}
    for event in events:
        metric = metric_of(event)
        step = event.get("step")
        key = (str(event.get("task")), metric, step, str(event.get("task_hash")),
               str(event.get("model_hash")))
        # taken out first: among scores of one step the newest then stands last
        found.pop(key, None)
        found[key] = ReportedScore(key[0], metric, step, parse_number(event.get("value")),
                                   _interval(event.get("interval")), event)
    order = {name: i for i, name in enumerate(dict.fromkeys((s.task, s.metric) for s in found.values()))}
    return sorted(found.values(), key=lambda s: (order[s.task, s.metric], -1 if s.step is None else s.step))


def metric_of(event: dict[str, Any]) -> str:
    """Return the name of an event's metric: with k, and filter and mode where they are not the usual ones."""
    name, k = str(event.get("metric")), event.get("k")
    if k is not None and name.endswith("@k"):
        name = f"{name[:-1]}{k}"
    notes = [str(event[field]) for field, usual in (("filter", "none"), ("mode", "default"))
             if event.get(field) not in (None, usual)]
    return f"{name} ({', '.join(notes)})" if notes else name


def _interval(value: Any) -> tuple[float, float] | None:
    if not isinstance(value, list) or len(value) != 2:
        return None
    low, high = parse_number(value[0]), parse_number(value[1])
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def score_tables(run: Run) -> list[PageTable]:
    """Return the score of the last checkpoint for each task and metric."""
    def count(name: str) -> Callable[[ReportedScore], str]:
        return lambda s: "–" if math.isnan(n := parse_number(s.event.get(name))) else f"{n:,.0f}"

    newest = {(s.task, s.metric): s for s in scores_of(run.scores)}
    return build_tables(newest.values(), {
        "task": lambda s: s.task, "metric": lambda s: s.metric,
        "step": lambda s: "–" if s.step is None else f"{s.step:,}", "value": lambda s: s.shown(s.value),
        "95 % interval": lambda s: " to ".join(map(s.shown, s.interval)) if s.interval else "–",
        "items": count("items"), "failed": count("failed"), "cut at the limit": count("at_limit")})


def checkpoint_score_charts(run: Run) -> list[Chart]:
    """Return scores over steps, of tasks that several checkpoints were judged by."""
    scores = scores_of(run.scores)
    lines: dict[tuple[str, str], list[ReportedScore]] = {}
    for s in scores:
        if s.step is not None and math.isfinite(s.value):
            lines.setdefault((s.task, s.metric), []).append(s)
    drawn = {name: points for name, points in lines.items() if len({s.step for s in points}) > 1}
    shares = [n for n, points in drawn.items() if all(s.is_share for s in points)]
    groups = [shares[i:i + MAX_TASKS] for i in range(0, len(shares), MAX_TASKS)]
    # a chart each: their units differ, and the largest would flatten the others
    groups += [[name] for name in drawn if name not in shares]
    notes = [f"{len(groups) - MAX_CHARTS:,} more charts are left out."] if len(groups) > MAX_CHARTS else []
    return [score_chart({f"{task}, {metric}": drawn[task, metric] for task, metric in group},
                        "Scores of checkpoints, with 95 % intervals.", notes)
            for group in groups[:MAX_CHARTS]]


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME_CHARACTERS else f"{name[:MAX_NAME_CHARACTERS]} …"


def score_chart(lines: dict[str, list[ReportedScore]], caption: str, notes: Iterable[str] = ()) -> Chart:
    """Return lines of scores over steps with their intervals."""
    series = []
    for i, (name, points) in enumerate(lines.items()):
        by_step = {s.step: s for s in points if s.step is not None}  # the newest of a step
        newest = list(by_step.values())
        series.append(Series(_short(name), list(by_step), [s.value for s in newest], series_colour(i),
                             intervals=[
            s.interval or (s.value, s.value) for s in newest]))
    shares = all(s.is_share for points in lines.values() for s in points)
    return Chart(LinePlot(series, Axis("optimizer step"), Axis("score", is_share=shares)), caption,
                 " ".join(notes))

"""Scores of `eval lm` in the report: by checkpoint over training, with intervals and what was found of each
task in the training data, and published figures of other models beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
from annotated_types import Ge, Le
from markupsafe import Markup

from megatron_sov.base.pages.page import (
    Chapter, Chart, PageSection, PageTable, Panel, chart, colour, line_with_intervals, plain,
    render as render_page, tables)
from megatron_sov.base.settings import ProblemCode, SettingsProblem, read_file
from megatron_sov.publish.report.charts import MAX_POINTS, MAX_WINDOW_STEPS, SMOOTH_FROM_STEPS
from megatron_sov.publish.report.judgements import verdict_table
from megatron_sov.publish.report.run_data import Run
from megatron_sov.publish.report.steps import Curve, downsample, last_value, moving_mean
from megatron_sov.runs.obs.figures import duration, figure, large, number

NOT_TOLD = "not told"
MAX_LINES = 8
"""Tasks of one chart."""
MAX_CHARTS = 6
MAX_NAME_CHARACTERS = 40
"""Of a line, in a chart's legend."""


# Published figures of other models, to stand beside a run's own scores: `published/*.yaml`, one file for
# each table of a document.


@dataclass(frozen=True)
class ScoreFigure:
    """One published figure."""

    name: str
    """What the document calls the benchmark."""
    value: Annotated[float, Ge(0), Le(100)]
    """In percent."""
    metric: str = NOT_TOLD
    """E.g. `avg@64`."""
    protocol: str = ""
    """Which of the table's protocols; empty: not told."""


@dataclass(frozen=True)
class PublishedTable:
    """A model's figures from one document."""

    model: str
    """As its authors call it."""
    document: str
    """Where the figures stand."""
    verified: bool
    """Whether they were seen there, and not told by others."""
    figures: dict[str, ScoreFigure]
    """Benchmark, as `metadata.sov.published_as` of a task names it -> figure."""
    protocols: dict[str, str] = field(default_factory=dict)
    """Name -> how figures were measured, as far as the document tells."""

    def protocol(self, figure: ScoreFigure) -> str:
        """Return how a figure was measured, in words."""
        return self.protocols.get(figure.protocol, NOT_TOLD)

    def problems(self) -> list[SettingsProblem]:
        """Return every figure whose protocol is not told."""
        return [SettingsProblem(ProblemCode.RULE, f"figures.{key}.protocol", "must be one of protocols",
                                figure.protocol)
                for key, figure in self.figures.items()
                if figure.protocol and figure.protocol not in self.protocols]


@lru_cache(maxsize=1)
def published_tables() -> tuple[PublishedTable, ...]:
    """Return all tables, by file name."""
    with resources.as_file(resources.files("megatron_sov.publish.report") / "published") as folder:
        return tuple(read_table(file) for file in sorted(folder.glob("*.yaml")))


def read_table(file: Path) -> PublishedTable:
    """Return the table of a file.

    Raises:
        UserError: it is no YAML, or a figure breaks a rule.
    """
    return read_file(PublishedTable, file, file.name)


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
        return f"{value:.1%}" if self.is_share else figure(value)


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
        found[key] = ReportedScore(key[0], metric, step, number(event.get("value")),
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


def newest_scores(scores: list[ReportedScore]) -> list[ReportedScore]:
    """Return of each task and metric the score of the last checkpoint."""
    return list({(s.task, s.metric): s for s in scores}.values())


def score_section(events: list[dict[str, Any]], checks: list[dict[str, Any]]) -> PageSection:
    """Return the section; without events it has no content, and is left out.

    Args:
        events: `eval_lm` events, in the order of time.
        checks: `eval_contamination` events.
    """
    scores = scores_of(events)
    if not scores:
        return PageSection("Scores")
    newest = newest_scores(scores)
    found = [*_table(newest, checks), *_published(newest), *_protocols(newest)]
    return PageSection("Scores", charts=_charts(scores), tables=found, side_by_side=True, text=(
        "Tasks of eval lm with 95 % intervals over clusters of items. A published figure stands beside a "
        "score by the benchmark's name alone: its prompts, examples and sampling are its authors', so that a "
        "difference is no comparison of models unless both were measured in the same way."))


def _interval(value: Any) -> tuple[float, float] | None:
    if not isinstance(value, list) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def _table(newest: list[ReportedScore], checks: list[dict[str, Any]]) -> list[PageTable]:
    def count(name: str) -> Callable[[ReportedScore], str]:
        return lambda s: "–" if math.isnan(n := number(s.event.get(name))) else f"{n:,.0f}"

    return tables(newest, {
        "task": lambda s: s.task, "metric": lambda s: s.metric,
        "step": lambda s: "–" if s.step is None else f"{s.step:,}", "value": lambda s: s.shown(s.value),
        "95 % interval": lambda s: " to ".join(map(s.shown, s.interval)) if s.interval else "–",
        "items": count("items"), "failed": count("failed"), "cut at the limit": count("at_limit"),
        "found in training data": lambda s: _contamination(s, checks)})


def _contamination(score: ReportedScore, checks: list[dict[str, Any]]) -> str:
    """Return what the newest check of the same task, data and model found."""
    same = ("task", "task_hash", "model_hash")
    found = [c for c in checks if all(c.get(name) == score.event.get(name) for name in same)]
    check = found[-1] if found else score.event.get("contamination")
    if not isinstance(check, dict):
        return "not checked"
    hit, items = number(check.get("items_hit")), number(score.event.get("items"))
    said = f"{hit:,.0f} of {items:,.0f} items" if math.isfinite(items) else f"{hit:,.0f} items"
    without = number(check.get("value_without"))
    if hit > 0 and str(check.get("metric", score.metric)) == score.metric:
        said += f"; {score.shown(without)} without them"
    return said


def _published(newest: list[ReportedScore]) -> list[PageTable]:
    """Return figures of other models beside each task's first figure: pass@8 is no mean of answers."""
    rows = []
    for s in {s.task: s for s in reversed(newest)}.values():
        key = str(s.event.get("published_as") or s.task)
        for table in published_tables():
            # published figures are in percent: one of another unit cannot stand beside them
            if key in table.figures and s.is_share:
                f = table.figures[key]
                rows.append([f.name, s.task, f"{s.shown(s.value)} ({s.metric})", table.model,
                             f"{f.value:g} %", f.metric, table.protocol(f),
                             table.document if table.verified else f"{table.document} (not verified)"])
    rows.sort(key=lambda row: [s.task for s in newest].index(row[1]))
    head = ["benchmark", "task", "this model", "published for", "published", "its metric", "its protocol",
            "source"]
    return [PageTable(head, rows)] if rows else []


def _protocols(newest: list[ReportedScore]) -> list[PageTable]:
    """Return how scores were measured, one row for each way."""
    ways: dict[tuple[str, ...], list[str]] = {}
    for s in newest:
        sampling = s.event.get("sampling")
        # where likelihoods are compared nothing was sampled
        words = ", ".join(f"{name} {value}" for name, value in sampling.items()) if isinstance(
            sampling, dict) and s.event.get("output_type", "generate_until") == "generate_until" else "–"
        way = (words, str(s.event.get("mode") or "default"), str(s.event.get("judge") or "–"))
        tasks = ways.setdefault(way, [])
        if s.task not in tasks:
            tasks.append(s.task)
    return [PageTable(["measured with", "mode", "judge", "tasks"],
                      [[*way, ", ".join(tasks)] for way, tasks in ways.items()])]


def _charts(scores: list[ReportedScore]) -> list[Chart]:
    """Return scores over steps, of tasks that several checkpoints were judged by."""
    lines: dict[tuple[str, str], list[ReportedScore]] = {}
    for s in scores:
        if s.step is not None and math.isfinite(s.value):
            lines.setdefault((s.task, s.metric), []).append(s)
    drawn = {name: points for name, points in lines.items() if len({s.step for s in points}) > 1}
    shares = [n for n, points in drawn.items() if all(s.is_share for s in points)]
    groups = [shares[i:i + MAX_LINES] for i in range(0, len(shares), MAX_LINES)]
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
    drawn = go.Figure()
    for i, (name, points) in enumerate(lines.items()):
        by_step = {s.step: s for s in points}  # the newest of a step
        value = np.array([s.value for s in by_step.values()])
        low, high = np.array([s.interval or (s.value, s.value) for s in by_step.values()]).T
        drawn.add_trace(line_with_intervals(plain(_short(name)), i, np.array(list(by_step), dtype=np.float64),
                                            value, low, high))
    shares = all(s.is_share for points in lines.values() for s in points)
    drawn.update_layout(xaxis={"title": "optimizer step"},
                        yaxis={"title": "score", **({"tickformat": ".0%"} if shares else {})})
    return chart(drawn, caption, notes)


MAX_SOURCES = 4
"""Held-out sources that have a chart of their own."""
MAX_TASKS = 6
MAX_CHARACTERS = 200
"""Of a setting's value."""
NOTHING = "–"


# Curves of several runs in one chart.


def loss_charts(runs: Sequence[Run], names: list[str]) -> list[Chart]:
    """Return the training loss and the held-out bits per byte over tokens, in all and of common sources."""
    found = [_over_tokens(runs, names, lambda run: run.curve("loss"), "loss (nats per token)",
                          "Training loss over tokens.", smooth=True),
             _over_tokens(runs, names, lambda run: run.overall_bits_per_byte, "bits per byte",
                          "Held-out bits per byte over tokens; comparable between tokenizers.")]
    common = [name for name in runs[0].heldout if all(name in run.heldout for run in runs)]
    for source in common[:MAX_SOURCES] if len(common) > 1 else []:
        found.append(_over_tokens(runs, names, partial(_bits_of, source), "bits per byte",
                                  f"Held-out bits per byte of {source}."))
    return [one for one in found if one]


def _bits_of(source: str, run: Run) -> Curve:
    return run.heldout[source].bits_per_byte


def speed_charts(runs: Sequence[Run], names: list[str]) -> list[Chart]:
    """Return tokens per second, utilisation and memory over steps."""
    wanted = (("tokens_per_s", "tokens per second", "Tokens per second, all processes together."),
              ("mfu", "share", "Model FLOPs utilisation."),
              ("step_time_s", "seconds", "Time of one optimizer step."),
              ("peak_memory_bytes", "bytes", "Most memory that process 0 has had."))
    return _over_steps(runs, names, wanted)


def routing_charts(runs: Sequence[Run], names: list[str]) -> list[Chart]:
    """Return the balance of experts over steps."""
    return _over_steps(runs, names, (("max_violation", "MaxVio", "MaxVio of the worst layer over steps."),))


def score_charts(runs: Sequence[Run], names: list[str]) -> list[Chart]:
    """Return a chart of each task and metric that several runs, or several checkpoints, were judged by."""
    lines: dict[tuple[str, str], dict[str, list[ReportedScore]]] = {}
    for run, name in zip(runs, names, strict=True):
        for score in scores_of(run.scores):
            if score.step is not None and np.isfinite(score.value):
                lines.setdefault((score.task, score.metric), {}).setdefault(name, []).append(score)
    firsts: dict[str, str] = {}
    for task, metric in lines:
        firsts.setdefault(task, metric)
    return [score_chart(lines[task, metric], f"{task}, {metric}: 95 % intervals.")
            for task, metric in list(firsts.items())[:MAX_TASKS]]


def _over_steps(runs: Sequence[Run], names: list[str], wanted: Sequence[tuple[str, str, str]]) -> list[Chart]:
    found = []
    for column, title, caption in wanted:
        curves = [(name, curve.steps.astype(np.float64), curve) for run, name in zip(runs, names, strict=True)
                  if (curve := run.curve(column)) is not None and len(curve.finite().steps)]
        if curves:
            found.append(_chart(curves, "optimizer step", title, caption, smooth=True))
    return found


def _over_tokens(runs: Sequence[Run], names: list[str], of: Callable[[Run], Curve | None], title: str,
                 caption: str, *, smooth: bool = False) -> Chart | None:
    """Draw curves over tokens where all runs have counted them, else over steps."""
    curves = []
    by_tokens = all(run.curve("tokens") for run in runs)
    for run, name in zip(runs, names, strict=True):
        curve, tokens = of(run), run.curve("tokens")
        if curve is None or not len(curve.finite().steps):
            continue
        at = curve.steps.astype(np.float64)
        if by_tokens and tokens is not None:
            at = np.interp(at, np.append(0, tokens.steps), np.append(0.0, tokens.values))
        curves.append((name, at, curve))
    return _chart(curves, "tokens" if by_tokens else "optimizer step", title, caption,
                  smooth=smooth) if curves else None


def _chart(curves: Sequence[tuple[str, npt.NDArray[np.float64], Curve]], axis: str, title: str, caption: str,
           *, smooth: bool) -> Chart:
    """Draw curves; `curves` has name, the place of each point on the axis, and values."""
    figure, notes = go.Figure(), []
    for i, (name, at, curve) in enumerate(curves):
        place = dict(zip(curve.steps.tolist(), at.tolist(), strict=True))
        drawn = curve.finite()
        if len(drawn.steps) < len(curve.steps):
            notes.append(f"{len(curve.steps) - len(drawn.steps):,} values of {name} are not finite and not "
                         "drawn.")
        if smooth and len(drawn.steps) >= SMOOTH_FROM_STEPS:
            window = min(MAX_WINDOW_STEPS, max(5, len(drawn.steps) // 50))
            drawn = moving_mean(drawn, window)
            notes.append(f"Moving means over {window:,} steps.")
        drawn = downsample(drawn, MAX_POINTS)
        figure.add_trace(go.Scatter(
            x=np.array([place[step] for step in drawn.steps.tolist()], dtype=np.float32),
            y=drawn.values.astype(np.float32), name=plain(name),
            mode="lines+markers" if len(drawn.steps) <= 20 else "lines",
            line={"color": colour(i), "width": 1.8}))
    figure.update_layout(xaxis={"title": axis, "exponentformat": "SI"}, yaxis={
        "title": title, "exponentformat": "power", "minexponent": 5, "separatethousands": True})
    return chart(figure, caption, notes)


def render(runs: Sequence[Run], differences: Sequence[dict[str, Any]] = (), now_s: float | None = None
           ) -> str:
    """Return the HTML of a comparison.

    Args:
        runs: at least two; the first is what the others are compared with.
        differences: of scores on the same items: `eval.score_differences.Difference.fields()` with `first`
            and `second`, the names of two runs, and `problem` in the place of figures where scores cannot
            be compared.
        now_s: Unix time to print as the time of writing; the current one by default.
    """
    names = unique_names(runs)
    sections = [
        PageSection("Training loss", charts=loss_charts(runs, names), side_by_side=True,
                    text="Over the tokens that each run has consumed, so that batch sizes may differ."),
        _scores(runs, names, differences),
        PageSection("Speed", charts=speed_charts(runs, names), side_by_side=True),
        PageSection("Routing", charts=routing_charts(runs, names), side_by_side=True,
                    text="MaxVio is the load of the busiest expert over the fair load, less 1; 0 is perfect "
                         "balance."),
        PageSection("Gates and verdicts", tables=_verdicts(runs, names)),
        PageSection("Settings that differ", tables=_settings(runs, names)),
        PageSection("Data that differ", tables=[*_inputs(runs, names), *_tokens(runs, names)]),
    ]
    chapter = Chapter("Comparison", "", [], [s for s in sections if s.charts or s.tables])
    opening = [Panel("What was reached", 12, tables=[_facts(runs, names)])]
    return render_page("Comparison of runs", " against ".join(names), "", [chapter], opening=opening,
                       anchor="comparison", now_s=now_s)


def unique_names(runs: Sequence[Run]) -> list[str]:
    """Return the runs' names, numbered where two have the same."""
    names = [run.name for run in runs]
    return [f"{name} ({names[:i + 1].count(name)})" if names.count(name) > 1 else name
            for i, name in enumerate(names)]


def _facts(runs: Sequence[Run], names: list[str]) -> PageTable:
    """Return one row for each figure, one column for each run."""
    told = [dict(_of_run(run)) for run in runs]
    labels = list(dict.fromkeys(label for facts in told for label in facts))
    return PageTable(["", *names], [[label, *(facts.get(label,
                                                        NOTHING) for facts in told)] for label in labels])


def _of_run(run: Run) -> list[tuple[str, str]]:
    params, active = run.start("num_params"), run.start("num_active_params")
    tokens, loss, bits = run.curve("tokens"), run.curve("loss"), run.overall_bits_per_byte
    speed, mfu = run.curve("tokens_per_s"), run.curve("mfu")
    of_them = f" ({large(active)} active)" if active else ""
    found = [("model", run.recipe()), ("parameters", f"{large(params)}{of_them}" if params else ""),
             ("objective", str(run.setting("objective", "name") or "")),
             ("steps", f"{int(loss.steps[-1]):,}" if loss and len(loss.steps) else ""),
             ("tokens", large(last_value(tokens)) if math.isfinite(last_value(tokens)) else ""),
             ("wall time", duration(run.wall_s()) if run.wall_s() > 0 else ""),
             ("processes", str(run.start("num_ranks") or "")),
             ("last training loss", _figure(last_value(loss))),
             ("last held-out bits per byte", _figure(last_value(bits))),
             ("tokens a second, median", _median(speed)), ("MFU, median", _median(mfu)),
             ("incidents", f"{len(run.incidents):,}"),
             ("outcome", run.attempts[-1].outcome if run.attempts else "")]
    return [(label, value) for label, value in found if value]


def _figure(value: float) -> str:
    return "" if math.isnan(value) else figure(value)


def _median(curve: Any) -> str:
    finite = sorted(curve.finite().values.tolist()) if curve is not None else []
    return figure(finite[len(finite) // 2]) if finite else ""


def _scores(runs: Sequence[Run], names: list[str], differences: Sequence[dict[str, Any]]) -> PageSection:
    """Return each run's newest scores beside one another, and the differences that items tell."""
    told = [{(s.task, s.metric): s for s in newest_scores(scores_of(run.scores))} for run in runs]
    labels = list(dict.fromkeys(label for scores in told for label in scores))
    tables = []
    if labels:
        rows = [[*label, *(_score(scores[label]) if label in scores else NOTHING for scores in told)]
                for label in labels]
        tables.append(PageTable(["task", "metric", *names], rows))
    if differences:
        tables.append(PageTable(["second against first", "task", "metric", "difference", "95 % interval",
                                 "items", "the second is"], [_difference(d) for d in differences]))
    return PageSection("Scores", charts=score_charts(runs, names), tables=tables, side_by_side=True, text=(
        "The newest score of each run. A difference is of the items that both were asked: its interval is "
        "narrower than those of the two scores suggest."))


def _score(score: Any) -> str:
    interval = ("" if score.interval is None
                else f" ({score.shown(score.interval[0])} to {score.shown(score.interval[1])})")
    step = "" if score.step is None else f", step {score.step:,}"
    return f"{score.shown(score.value)}{interval}{step}"


def _difference(found: dict[str, Any]) -> list[str]:
    pair = f"{found.get('second')} against {found.get('first')}"
    if found.get("problem"):
        return [pair, str(found.get("task") or NOTHING), NOTHING, NOTHING, str(found["problem"]), NOTHING,
                "not compared"]
    interval = found.get("interval")
    value = number(found.get("value"))
    word = str(found.get("verdict"))
    mark = {"better": "good", "worse": "bad"}.get(word)
    said = (f"{number(interval[0]):+.4f} to {number(interval[1]):+.4f}" if interval
            else str(found.get("note")))
    return [pair, str(found.get("task")), str(found.get("metric")),
            "not known" if math.isnan(value) else f"{value:+.4f}", said,
            f"{number(found.get('items')):,.0f}",
            Markup('<span class="{}">{}</span>').format(mark, word) if mark else word]


def _verdicts(runs: Sequence[Run], names: list[str]) -> list[PageTable]:
    rows = [[name, *row] for run, name in zip(runs, names, strict=True)
            for table in verdict_table([run], []) for row in table.rows]
    return [PageTable(["run", "what", "verdict", "measured"], rows)] if rows else []


def flat(settings: Any, name: str = "") -> dict[str, str]:
    """Return settings as name with dots -> value in text."""
    if isinstance(settings, dict) and settings:
        return {key: value for part, inner in settings.items()
                for key, value in flat(inner, f"{name}.{part}" if name else str(part)).items()}
    return {name: str(settings)}


def _settings(runs: Sequence[Run], names: list[str]) -> list[PageTable]:
    """Return the settings whose values are not the same; of lists of phases each counts as one value."""
    told = [flat({k: v for k, v in run.config.items() if k != "code"}) if run.config else {} for run in runs]
    labels = list(dict.fromkeys(label for settings in told for label in settings))
    differ = [label for label in labels if len({settings.get(label) for settings in told}) > 1
              and not label.startswith("data.paths")]
    if not differ:
        return [PageTable(["settings"], [["all are the same"]])] if any(told) else []
    return [PageTable(["setting", *names], [[label,
                                             *(_cut(settings.get(label, NOTHING)) for settings in told)]
                                            for label in differ])]


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} …"


def _inputs(runs: Sequence[Run], names: list[str]) -> list[PageTable]:
    """Return what each run read, by the hash of its manifest: a folder of one name may hold other data."""
    told = [{p.manifest_sha256: p for p in run.provenance if p.role == "read"} for run in runs]
    found = {digest: p for read in told for digest, p in read.items()}
    rows = [[p.kind, Path(p.path).name, Markup("<code>{}</code>").format(digest[:16]),
             *("read" if digest in read else NOTHING for read in told)] for digest, p in found.items()]
    return [PageTable(["kind", "artifact", "SHA-256 of its manifest", *names], rows)] if rows else []


def _tokens(runs: Sequence[Run], names: list[str]) -> list[PageTable]:
    """Return each run's tokens of each source, with its share."""
    told = [{name: number(count) for name, count in ((run.data_consumed or {}).get("tokens") or {}).items()}
            for run in runs]
    labels = list(dict.fromkeys(label for tokens in told for label in tokens))
    rows = [[label, *(f"{large(tokens[label])} ({tokens[label] / sum(tokens.values()):.1%})"
                      if tokens.get(label, 0) > 0 else NOTHING for tokens in told)] for label in labels]
    return [PageTable(["source", *names], rows)] if rows else []

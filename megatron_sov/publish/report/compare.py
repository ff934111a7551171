"""Runs side by side on one page: what they reached, how, and what was different between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
from markupsafe import Markup

from megatron_sov.base.pages.page import (
    Chapter, Chart, PageSection, PageTable, Panel, chart, colour, plain, render as render_page)
from megatron_sov.publish.report.charts import MAX_POINTS, MAX_WINDOW_STEPS, SMOOTH_FROM_STEPS
from megatron_sov.publish.report.judgements import verdict_table
from megatron_sov.publish.report.run_data import Run
from megatron_sov.publish.report.scores import ReportedScore, newest_scores, score_chart, scores_of
from megatron_sov.publish.report.steps import Curve, downsample, last_value, moving_mean
from megatron_sov.runs.obs.figures import duration, figure, large, number

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
    for field, title, caption in wanted:
        curves = [(name, curve.steps.astype(np.float64), curve) for run, name in zip(runs, names, strict=True)
                  if (curve := run.curve(field)) is not None and len(curve.finite().steps)]
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

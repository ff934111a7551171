"""Several runs side by side, on one page: curves in one chart, figures with their differences, settings and
data that are not the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from megatron_sov.base.figures import format_count, format_duration, format_value
from megatron_sov.base.pages.page import Chapter, Chart, PageSection, PageTable, Panel, render as render_page
from megatron_sov.base.settings import by_name
from megatron_sov.publish.report.charts import (
    BALANCE, COMPARED_SPEED, PER_TOKEN, STEP, by_tokens, draw_lines, lines_of, loss_in, loss_unit, named,
    step_charts)
from megatron_sov.publish.report.headline import HIGHER, LOWER, headline_charts, headlines
from megatron_sov.publish.report.judgements import verdict_table
from megatron_sov.publish.report.run_data import Run
from megatron_sov.publish.report.scores import ReportedScore, newest_scores, score_chart, scores_of
from megatron_sov.publish.report.steps import Curve, last_value
from megatron_sov.runs.obs.figures import number
from megatron_sov.work.clusters.units import GIB

MAX_SOURCES = 4
"""Held-out sources that have a chart of their own."""
MAX_TASKS = 6
MAX_CHARACTERS = 200
"""Of a setting's value."""
NOTHING = "–"


# Curves of several runs in one chart.


def _loss_charts(runs: Sequence[Run]) -> list[Chart]:
    """Return the loss and the held-out bits per byte over tokens, in all and of common sources.  Losses of
    several objectives share no axis, so that each objective has a chart."""
    units = dict.fromkeys(loss_unit(run) for run in runs)
    found = [_over_tokens(runs, partial(loss_in, unit), f"loss ({unit})", "Training loss over tokens."
                          if unit == PER_TOKEN else f"Training loss over tokens: {unit}.", smooth=True)
             for unit in units]
    found.append(_over_tokens(runs, lambda run: run.overall_bits_per_byte, "bits per byte",
                              "Held-out bits per byte over tokens; comparable between tokenizers."))
    common = [name for name in runs[0].heldout if all(name in run.heldout for run in runs)]
    for source in common[:MAX_SOURCES] if len(common) > 1 else []:
        found.append(_over_tokens(runs, partial(_bits_of, source), "bits per byte",
                                  f"Held-out bits per byte of {source}."))
    return [one for one in found if one]


def _bits_of(source: str, run: Run) -> Curve:
    return run.heldout[source].bits_per_byte


def _over_tokens(runs: Sequence[Run], of: Callable[[Run], Curve | None], unit: str, caption: str, *,
                 smooth: bool = False) -> Chart | None:
    """Draw curves over tokens where all runs have counted them, else over steps."""
    counted = all(run.curve("tokens") for run in runs)
    places = {name: by_tokens(run) for run, name in named(runs)}
    lines = [replace(line, place=places[line.name]) if counted else line for line in lines_of(runs, of)]
    return draw_lines(lines, unit, caption, axis="tokens" if counted else STEP, smooth=smooth)


def _headline_charts(runs: Sequence[Run]) -> list[Chart]:
    return headline_charts(runs, but_loss=True)


def _score_charts(runs: Sequence[Run]) -> list[Chart]:
    """Return a chart of each task and metric that several runs, or several checkpoints, were judged by."""
    lines: dict[tuple[str, str], dict[str, list[ReportedScore]]] = {}
    for run, name in named(runs):
        for score in scores_of(run.scores):
            if score.step is not None and np.isfinite(score.value):
                lines.setdefault((score.task, score.metric), {}).setdefault(name, []).append(score)
    firsts: dict[str, str] = {}
    for task, metric in lines:
        firsts.setdefault(task, metric)
    return [score_chart(lines[task, metric], f"{task}, {metric}: 95 % intervals.")
            for task, metric in list(firsts.items())[:MAX_TASKS]]


# The table of sections.


@dataclass(frozen=True)
class ComparedSection:
    """What a section shows of several runs; it is left out where that is nothing."""

    title: str
    text: str = ""
    charts: Callable[[Sequence[Run]], list[Chart]] = lambda runs: []
    tables: Callable[[Sequence[Run]], list[PageTable]] = lambda runs: []


def sections(runs: Sequence[Run], differences: Sequence[dict[str, Any]]) -> list[PageSection]:
    """Return the sections of a comparison that have something to show, in reading order."""
    declared = (
        ComparedSection("Headline meters", "What each objective is after.", _headline_charts),
        ComparedSection("Training loss", "Over the tokens that each run has consumed, so that batch sizes "
                        "may differ.", _loss_charts),
        ComparedSection("Scores", "The newest score of each run. A difference is of the items that both were "
                        "asked: its interval is narrower than those of the two scores suggest.",
                        _score_charts, partial(_score_tables, differences)),
        ComparedSection("Speed", charts=lambda runs: step_charts(runs, COMPARED_SPEED)),
        ComparedSection("Routing", "MaxVio is the load of the busiest expert over the fair load, less 1; 0 "
                        "is perfect balance.", lambda runs: step_charts(runs, BALANCE)),
        ComparedSection("Gates and verdicts", tables=_verdicts),
        ComparedSection("Settings that differ", tables=_settings),
        ComparedSection("Data that differ", tables=lambda runs: [*_inputs(runs), *_tokens(runs)]))
    found = [PageSection(one.title, one.text, one.charts(runs), one.tables(runs), side_by_side=True)
             for one in declared]
    return [s for s in found if s.charts or s.tables]


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
    chapter = Chapter("Comparison", "", [], sections(runs, differences))
    opening = [Panel("What was reached", 12, tables=[figure_table(runs)])]
    return render_page("Comparison of runs", " against ".join(name for _, name in named(runs)), "", [chapter],
                       opening=opening, anchor="comparison", now_s=now_s)


@dataclass(frozen=True)
class ComparedFigure:
    """A figure of a run, as the first table of a comparison shows it."""

    text: str
    value: float = math.nan
    """NaN: it is no number that could be compared."""
    better: str = ""
    unit: str = ""
    """Values of other units are not compared."""


def figure_table(runs: Sequence[Run]) -> PageTable:
    """Return one row for each figure, one column for each run: the difference from the first run stands
    behind each number, the best one is marked, and rows in which all are the same are faint."""
    told = [_figures(run) for run in runs]
    labels = list(dict.fromkeys(label for figures in told for label in figures))
    return PageTable(["", *(name for _, name in named(runs))],
                     [[label, *_cells([figures.get(label) for figures in told])] for label in labels])


def _cells(figures: Sequence[ComparedFigure | None]) -> list[str]:
    """Return the cells of a row."""
    known = [one for one in figures if one is not None]
    if len(known) == len(figures) and len({one.text for one in known}) == 1:
        return [Markup('<span class="same">{}</span>').format(one.text) for one in known]
    first = figures[0]
    numbers = [one.value for one in known if not math.isnan(one.value)]
    # values that are shown alike are no better than one another
    is_one_unit = len({one.unit for one in known}) == 1 and len({one.text for one in known}) > 1
    best = ({HIGHER: max, LOWER: min}[known[0].better](numbers)
            if known[0].better and is_one_unit and len(numbers) > 1 else math.nan)
    cells = []
    for one in figures:
        text = NOTHING if one is None else one.text
        if (one is not None and first is not None and one is not first and one.unit == first.unit
                and first.value and not math.isnan(one.value / first.value)):
            text += f" ({(one.value - first.value) / abs(first.value):+.1%})"
        is_best = one is not None and one.value == best
        cells.append(Markup('<span class="good">{}, best</span>').format(text) if is_best else text)
    return cells


def _figures(run: Run) -> Mapping[str, ComparedFigure]:
    params, active = run.start("num_params"), run.start("num_active_params")
    tokens, loss, bits = run.curve("tokens"), run.curve("loss"), run.overall_bits_per_byte
    memory = last_value(run.curve("peak_memory_bytes")) / GIB
    of_them = f" ({format_count(active)} active)" if active else ""
    unit = loss_unit(run)
    found = {
        "model": ComparedFigure(run.recipe()),
        "parameters": ComparedFigure(f"{format_count(params)}{of_them}" if params else ""),
        "objective": ComparedFigure(str(run.setting("objective", "name") or "")),
        "steps": ComparedFigure(f"{int(loss.steps[-1]):,}" if loss and len(loss.steps) else ""),
        "tokens": _measured(last_value(tokens), format_count),
        "wall time": _measured(run.wall_s() or math.nan, format_duration, LOWER),
        "processes": ComparedFigure(str(run.start("num_ranks") or "")),
        **{meter.title: _measured(last_value(curve.finite()), meter.text, meter.better, meter.unit)
           for meter, curve in headlines(run) if meter.name != "loss"},
        "last training loss": _measured(last_value(loss), format_value, LOWER if unit == PER_TOKEN else "",
                                        unit),
        "last held-out bits per byte": _measured(last_value(bits), format_value, LOWER),
        "tokens a second, median": _measured(_median(run.curve("tokens_per_s")), format_value, HIGHER),
        "MFU, median": _measured(_median(run.curve("mfu")), format_value, HIGHER),
        "peak memory of process 0": _measured(memory, lambda value: f"{value:.2f} GiB", LOWER),
        "incidents": _measured(len(run.incidents), "{:,.0f}".format, LOWER),
        "outcome": ComparedFigure(run.attempts[-1].outcome if run.attempts else "")}
    return {label: one for label, one in found.items() if one.text}


def _measured(value: float, shown: Callable[[float], str], better: str = "", unit: str = ""
              ) -> ComparedFigure:
    return ComparedFigure("" if math.isnan(value) else shown(value), value, better, unit)


def _median(curve: Curve | None) -> float:
    finite = sorted(curve.finite().values.tolist()) if curve is not None else []
    return float(finite[len(finite) // 2]) if finite else math.nan


def _score_tables(differences: Sequence[dict[str, Any]], runs: Sequence[Run]) -> list[PageTable]:
    """Return each run's newest scores beside one another, and the differences that items tell."""
    told = [{(s.task, s.metric): s for s in newest_scores(scores_of(run.scores))} for run in runs]
    labels = list(dict.fromkeys(label for scores in told for label in scores))
    tables = []
    if labels:
        rows = [[*label, *(_score(scores[label]) if label in scores else NOTHING for scores in told)]
                for label in labels]
        tables.append(PageTable(["task", "metric", *(name for _, name in named(runs))], rows))
    if differences:
        tables.append(PageTable(["second against first", "task", "metric", "difference", "95 % interval",
                                 "items", "the second is"], [_difference(d) for d in differences]))
    return tables


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


def _verdicts(runs: Sequence[Run]) -> list[PageTable]:
    rows = [[name, *row] for run, name in named(runs)
            for table in verdict_table([run], []) for row in table.rows]
    return [PageTable(["run", "what", "verdict", "measured"], rows)] if rows else []


def _settings(runs: Sequence[Run]) -> list[PageTable]:
    """Return the settings whose values are not the same; of lists of phases each counts as one value."""
    configs = [{k: v for k, v in (run.config or {}).items() if k != "code"} for run in runs]
    told = [{name: str(value) for name, value in by_name(config)} for config in configs]
    labels = list(dict.fromkeys(label for settings in told for label in settings))
    differ = [label for label in labels if len({settings.get(label) for settings in told}) > 1
              and not label.startswith("data.paths")]
    if not differ:
        return [PageTable(["settings"], [["all are the same"]])] if any(told) else []
    return [PageTable(["setting", *(name for _, name in named(runs))], [[label,
                                             *(_cut(settings.get(label, NOTHING)) for settings in told)]
                                            for label in differ])]


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} …"


def _inputs(runs: Sequence[Run]) -> list[PageTable]:
    """Return what each run read, by the hash of its manifest: a folder of one name may hold other data."""
    told = [{p.manifest_sha256: p for p in run.provenance if p.role == "read"} for run in runs]
    found = {digest: p for read in told for digest, p in read.items()}
    rows = [[p.kind, Path(p.path).name, Markup("<code>{}</code>").format(digest[:16]),
             *("read" if digest in read else NOTHING for read in told)] for digest, p in found.items()]
    head = ["kind", "artifact", "SHA-256 of its manifest", *(name for _, name in named(runs))]
    return [PageTable(head, rows)] if rows else []


def _tokens(runs: Sequence[Run]) -> list[PageTable]:
    """Return each run's tokens of each source, with its share."""
    told = [{name: number(count) for name, count in ((run.data_consumed or {}).get("tokens") or {}).items()}
            for run in runs]
    labels = list(dict.fromkeys(label for tokens in told for label in tokens))
    rows = [[label, *(f"{format_count(tokens[label])} ({tokens[label] / sum(tokens.values()):.1%})"
                      if tokens.get(label, 0) > 0 else NOTHING for tokens in told)] for label in labels]
    return [PageTable(["source", *(name for _, name in named(runs))], rows)] if rows else []

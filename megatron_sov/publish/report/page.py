"""The report's page: runs -> one HTML file that opens without a network."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_sov.base.figures import format_count, format_duration, format_value
from megatron_sov.base.pages.page import (
    Chapter, Chart, Comparison, PageSection, PageTable, Panel, chart, render as render_page)
from megatron_sov.model.config.data import named_shards
from megatron_sov.publish.report.charts import (
    OVERVIEW_HEIGHT_PX, PER_TOKEN, DrawnLine, Place, by_tokens, draw_lines, loss_unit, needle_map)
from megatron_sov.publish.report.headline import facts_of, gains, headline_charts
from megatron_sov.publish.report.judgements import gate, verdict_table
from megatron_sov.publish.report.run_data import Run
from megatron_sov.publish.report.sections import key_figures, measured, sections
from megatron_sov.publish.report.steps import Curve, last_value
from megatron_sov.runs.obs.figures import number

# The first screen of a report: what was trained, on what, what was proved of it, and what it writes.

MAX_PICTURES = 3
MAX_SOURCES = 6
"""Rows of the table of data; the smallest sources share the last one."""
MAX_CHARACTERS = 600
"""Of a prompt or an answer; the chapters show more of it."""


# The pictures of a report's first screen: one line through all stages of a model, over the tokens that it
# has seen.


def pictures(runs: list[Run]) -> list[Chart]:
    """Return at most three charts of a model's stages: what the last one is after, the held-out figures, and
    the needles found last or, without any, the speed."""
    places = _places(runs)
    seen = "tokens" if _count_tokens(runs) else "optimizer steps"
    needles = [(run.name, n) for run in runs for n in run.needles if n.get("cells")]
    third = (_needles(*needles[-1]) if needles
             else _by_stage(runs, places, lambda run: run.curve("tokens_per_s"), "Tokens per second.", seen))
    found = [*_learned(runs, places, seen), _heldout(runs, places, seen), third]
    return [one for one in found if one][:MAX_PICTURES]


def _learned(runs: list[Run], places: list[Place], seen: str) -> list[Chart | None]:
    """Return the headline meters of a last stage that learns by no per-token loss, and that loss of all
    stages that do."""
    by_token = [run for run in runs if loss_unit(run) == PER_TOKEN]
    others = ", ".join(run.name for run in runs if run not in by_token)
    loss = _by_stage(runs, places, lambda run: run.curve("loss") if run in by_token else None,
                     "Training loss, nats per token"
                     + (f"; without {others}, which learns by another loss." if others else "."), seen)
    return [*(headline_charts(runs[-1:], small=True)[:2] if runs and runs[-1] not in by_token else []), loss]


def _count_tokens(runs: list[Run]) -> bool:
    return all(run.curve("tokens") for run in runs)


def _places(runs: list[Run]) -> list[Place]:
    """Return one function for each run: a curve -> the tokens of all stages up to each of its points.

    Steps stand for tokens where a run has not recorded any.
    """
    counted = _count_tokens(runs)
    found: list[Place] = []
    before = 0.0
    for run in runs:
        found.append(by_tokens(run, before) if counted else _by_steps(before))
        last = run.curve("tokens" if counted else "loss")
        before += float((last.values if counted else last.steps)[-1]) if last else 0.0
    return found


def _by_steps(before: float) -> Place:
    return lambda curve: curve.steps + before


def _by_stage(runs: list[Run], places: list[Place], of: Callable[[Run], Curve | None], caption: str,
              seen: str) -> Chart | None:
    """Return the moving mean of one figure of the steps, each stage in its own colour."""
    lines = [DrawnLine(run.name, curve, place) for run, place in zip(runs, places, strict=True)
             if (curve := of(run)) is not None]
    return draw_lines(lines, "", caption, axis=seen, smooth=True, small=True)


def _heldout(runs: list[Run], places: list[Place], seen: str) -> Chart | None:
    """Return bits per byte of each source; a line goes on from stage to stage."""
    points: dict[str, list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]] = {}
    for run, place in zip(runs, places, strict=True):
        for source, heldout in run.heldout.items():
            curve = heldout.bits_per_byte.finite()
            if len(curve.steps):
                points.setdefault(source, []).append((place(curve), curve.values))
    lines = [DrawnLine(source, Curve(source, np.arange(len(x := np.concatenate([x for x, _ in parts]))),
                                     np.concatenate([y for _, y in parts])), _at(x))
             for source, parts in points.items()]
    return draw_lines(lines, "", "Held-out bits per byte of each source.", axis=seen, small=True)


def _at(x: npt.NDArray[np.float64]) -> Place:
    """Return what places points that are counted and have no steps."""
    return lambda curve: x[curve.steps]


def _needles(stage: str, needle: dict[str, Any]) -> Chart:
    """Return the map of the test's first kind and language."""
    kind, language = (needle["cells"][0][name] for name in ("kind", "language"))
    figure = needle_map([c for c in needle["cells"] if (c["kind"], c["language"]) == (kind, language)])
    figure.update_layout(xaxis={"title": {"text": "context (tokens)", "standoff": 4}},
                         yaxis={"title": {"text": "depth", "standoff": 10}})
    return chart(figure, f"Needles found by {stage}: {kind}, {language}.", height_px=OVERVIEW_HEIGHT_PX,
                 small=True)


def opening(runs: list[Run], others: list[Run]) -> list[Panel]:
    """Return the panels; one without content is left out.

    Args:
        runs: the stages of the model that the report is on.
        others: runs of other models in the same report; only their gates are named here.
    """
    proof = [table for run in runs for table in _proof_tables(run)]
    panels = [
        Panel("What it writes", 12, comparisons=_samples(runs)),
        Panel("What each stage gained" if len(runs) > 1 else "What it gained", 12,
              tables=gains(runs, others)),
        Panel("What was trained", 4, facts=_trained(runs)),
        Panel("On what data", 3, facts=_origin(runs), tables=_sources(runs)),
        Panel("Verdicts", 5, tables=verdict_table(runs, others)),
        Panel("How it went", 12, charts=pictures(runs)),
        Panel("The export's proof", 12, tables=proof[-1:]),
    ]
    return [p for p in panels if not p.is_empty]


def num_tokens(runs: list[Run]) -> float:
    """Return the tokens that the runs trained on, all together; 0 where none has recorded any."""
    # NaN, of a run without tokens, is the one number that differs from itself
    return sum(n for run in runs if (n := last_value(run.curve("tokens"))) == n)


def newest(runs: list[Run], name: str) -> Any:
    """Return a field of the last run's start that has it, or None."""
    return next((run.start(name) for run in reversed(runs) if run.start(name)), None)


def _trained(runs: list[Run]) -> list[tuple[str, str]]:
    facts = [("Model", next((run.recipe() for run in runs if run.recipe()), ""))]
    params, active = newest(runs, "num_params"), newest(runs, "num_active_params")
    of_them = f" ({format_count(active)} active)" if active else ""
    facts.append(("Parameters", f"{format_count(params)}{of_them}" if params else ""))
    tokens = num_tokens(runs)
    facts.append(("Tokens", format_count(tokens) if tokens else ""))
    if len(runs) > 1:
        facts += [(run.name, f"{format_count(tokens)} in {steps} steps") for run in runs
                  if (tokens := num_tokens([run])) and (steps := _num_steps(run))]
    facts += facts_of(runs[-1])
    length = max((phase.seq_len_tokens for run in runs for phase in run.phases), default=0)
    facts.append(("Context", f"{length:,} tokens" if length else ""))
    wall_s = sum(run.wall_s() for run in runs)
    facts.append(("Wall time", format_duration(wall_s) if wall_s > 0 else ""))
    return [(label, value) for label, value in facts if value]


def _num_steps(run: Run) -> str:
    loss = run.curve("loss")
    return f"{int(loss.steps[-1]):,}" if loss else ""


def _origin(runs: list[Run]) -> list[tuple[str, str]]:
    """Return the folders of token shards by their names, and the size of the vocabulary."""
    paths = [run.setting("data", "paths") for run in runs]
    names = dict.fromkeys(Path(named_shards(path)[1]).name
                          for of_run in paths if isinstance(of_run, dict) for path in of_run)
    vocab_size = number(runs[-1].setting("model", "vocab_size"))
    facts = [("Token shards", ", ".join(names)),
             ("Vocabulary", f"{vocab_size:,.0f}" if vocab_size > 0 else "")]
    return [(label, value) for label, value in facts if value]


def _sources(runs: list[Run]) -> list[PageTable]:
    """Return the tokens of each source over all stages, the largest first."""
    counts: dict[str, float] = {}
    for run in runs:
        for name, count in ((run.data_consumed or {}).get("tokens") or {}).items():
            counts[name] = counts.get(name, 0) + number(count)
    total = sum(counts.values())
    if not total > 0:
        return []
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    if len(ranked) > MAX_SOURCES:
        rest = ranked[MAX_SOURCES - 1:]
        ranked = [*ranked[:MAX_SOURCES - 1], (f"{len(rest):,} more", sum(count for _, count in rest))]
    return [PageTable(["source", "tokens", "share"],
                      [[name, format_count(count), f"{count / total:.1%}"] for name, count in ranked])]


def _samples(runs: list[Run]) -> list[Comparison]:
    """Return one prompt with what the first and the last stage wrote to it; with two prompts where they
    were never asked the same."""
    asked = [run for run in runs if run.samples]
    if not asked:
        return []
    first, last = asked[0], asked[-1]
    if first is last:
        sample = last.samples[0]
        return [Comparison(_cut(sample.get("prompt")), [(_when(last), _cut(sample.get("text")))])]
    before = {str(s.get("prompt")): s for s in first.samples}
    common = next((s for s in last.samples if str(s.get("prompt")) in before), None)
    if common is not None:
        earlier, num = before[str(common.get("prompt"))], len(last.samples)
        return [Comparison(_cut(common.get("prompt")), [
            (f"Before: {_when(first)}", _cut(earlier.get("text"))),
            (f"After: {_when(last)}", _cut(common.get("text")))],
            f"Prompt, one of {num:,} that {last.name} was asked" if num > 1 else "Prompt")]
    return [Comparison(_cut(run.samples[0].get("prompt")),
                       [(f"{moment}: {_when(run)}", _cut(run.samples[0].get("text")))])
            for moment, run in (("Before", first), ("After", last))]


def _when(run: Run) -> str:
    return f"{run.name}, step {int(run.samples[0].get('step') or 0):,}"


def _cut(text: Any) -> str:
    text = "" if text is None else str(text).strip()
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} …"


def _proof_tables(run: Run) -> list[PageTable]:
    return [PageTable(["check", "measured", "limit"],
                      [[str(c.get("name", "")), _with_detail(c), measured(c.get("limit"))]
                       for c in conversion["checks"]])
            for conversion in run.of("conversion") if conversion.get("checks")]


def _with_detail(check: dict[str, Any]) -> str:
    detail = f" ({check['detail']})" if check.get("detail") else ""
    return f"{measured(check.get('value'))}{detail}"


# Which runs of a report trained one model. A report tells of one; what others reached is not its doing.


def of_one_model(runs: list[Run]) -> tuple[list[Run], list[Run]]:
    """Return the runs that trained the first run's model, and those that trained another one.

    A run's start records no ancestor, so that a model is known by what no stage changes: its architecture
    and its number of parameters.  What a run does not record speaks neither for nor against it.
    """
    known = [{"family": run.setting("model", "family"), "params": run.start("num_params")} for run in runs]
    same = [all(one[what] in (None, known[0][what]) or known[0][what] is None for what in one)
            for one in known]
    return ([run for run, own in zip(runs, same, strict=True) if own],
            [run for run, own in zip(runs, same, strict=True) if not own])


def render(runs: list[Run], now_s: float | None = None) -> str:
    """Return the HTML of a report on one model: the one that the first run trained.

    Args:
        runs: what `read_run` returned for each, in the order to be told; runs of other models stand at the
            end, in a part of their own.
        now_s: Unix time to print as the time of writing; the current one by default.
    """
    own, others = of_one_model(runs)
    recipe = next((run.recipe() for run in own if run.recipe()), "")
    names = " + ".join(run.name for run in own)
    chapters = [_chapter(run) for run in own]
    if others:
        chapters += [_others(others), *(_chapter(run) for run in others)]
    return render_page("Training report", f"{recipe}: {names}" if recipe else names, _subtitle(own),
                       chapters, opening=opening(own, others),
                       overview=("All stages", _summary(own)) if len(own) > 1 else None,
                       anchor="run", nothing="This run has recorded nothing yet.", now_s=now_s)


def _chapter(run: Run) -> Chapter:
    return Chapter(run.name, run.recipe(), key_figures(run), sections(run))


def _subtitle(runs: list[Run]) -> str:
    params, active = newest(runs, "num_params"), newest(runs, "num_active_params")
    tokens = num_tokens(runs)
    words = []
    if params:
        words.append(f"A model of {format_count(params)} parameters")
        if active:
            words[0] += f", {format_count(active)} of them active for each token"
        if tokens:
            words[0] += f", trained on {format_count(tokens)} tokens"
    last_s = max((a.last_time_s for run in runs for a in run.attempts), default=0.0)
    if last_s > 0:
        words.append(f"last event {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(last_s))}")
    return "; ".join(words) + "." if words else ""


def _summary(runs: list[Run]) -> PageTable:
    """Return one row for each run: what it was, how long it took, and how it ended."""
    return PageTable(["run", "objective", "steps", "tokens", "wall time", "last loss",
                      "held-out bits per byte", "outcome"], [[run.name, *_in_short(run)] for run in runs])


def _in_short(run: Run) -> list[str]:
    loss, tokens = run.curve("loss"), num_tokens([run])
    return [str(run.setting("objective", "name") or "–"),
            f"{int(loss.steps[-1]):,}" if loss else "–", format_count(tokens) if tokens else "–",
            format_duration(run.wall_s()), format_value(last_value(loss)),
            format_value(last_value(run.overall_bits_per_byte)),
            run.attempts[-1].outcome if run.attempts else "–"]


def _others(runs: list[Run]) -> Chapter:
    """Return what stands before the chapters of runs that trained other models."""
    rows = []
    for run in runs:
        params, judged = run.start("num_params"), gate(run)
        rows.append([run.name, run.recipe() or "–", format_count(params) if params else "–", *_in_short(run),
                     judged[0][1] if judged else "–"])
    table = PageTable(["run", "model", "parameters", "objective", "steps", "tokens", "wall time", "last loss",
                       "held-out bits per byte", "outcome", "gate"], rows)
    return Chapter("Other models", "", [], [PageSection(
        "Not stages of this model", tables=[table],
        text="These runs trained another architecture or size, each for a purpose of its own; none of their "
             "figures is counted above.")])

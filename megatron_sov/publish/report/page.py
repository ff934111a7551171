"""The report's page: runs -> one HTML file that opens without a network."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_sov.base.figures import format_count, format_duration, format_value
from megatron_sov.base.pages.page import (
    Chapter, Chart, Comparison, PageTable, Panel, render_page as render_page)
from megatron_sov.publish.report.charts import DrawnLine, Place, by_tokens, draw_lines
from megatron_sov.publish.report.headline import gains
from megatron_sov.publish.report.judgements import verdict_sentence, verdict_table
from megatron_sov.publish.report.run_data import Run
from megatron_sov.publish.report.sections import MAX_SAMPLES, cut_lines, key_figures, sections
from megatron_sov.publish.report.steps import Curve, last_value

# The first screen of a report: what was trained, on what, what was proved of it, and what it writes.

MAX_CHARACTERS = 600
"""Of a prompt or an answer."""
OPEN_SAMPLES = 5
"""Samples that are shown without a click."""
HELDOUT_HEIGHT_PX = 180


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


def _heldout(runs: list[Run]) -> Chart | None:
    """Return bits per byte of each source; a line goes on from stage to stage, and each stage is a band."""
    points: dict[str, list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]] = {}
    bands: list[tuple[str, float, float]] = []
    for run, place in zip(runs, _places(runs), strict=True):
        for source, heldout in run.heldout.items():
            curve = heldout.bits_per_byte.finite()
            if len(curve.steps):
                points.setdefault(source, []).append((place(curve), curve.values))
        if (loss := run.curve("loss")) is not None and len(loss.steps):
            start = bands[-1][2] if bands else 0.0
            bands.append((run.name, start, float(place(loss)[-1])))
    lines = [DrawnLine(source, Curve(source, np.arange(len(x := np.concatenate([x for x, _ in parts]))),
                                     np.concatenate([y for _, y in parts])), _at(x))
             for source, parts in points.items()]
    return draw_lines(lines, "", "Held-out bits per byte of each source over all stages; lower is better.",
                      axis="tokens" if _count_tokens(runs) else "optimizer steps", small=True,
                      height_px=HELDOUT_HEIGHT_PX, bands=bands if len(bands) > 1 else ())


def _at(x: npt.NDArray[np.float64]) -> Place:
    """Return what places points that are counted and have no steps."""
    return lambda curve: x[curve.steps]


def opening(runs: list[Run]) -> list[Panel]:
    """Return the panels on the stages of one model; panels without content are left out."""
    heldout = _heldout(runs)
    shown, more = _samples(runs)
    panels = [
        Panel("Held-out quality", 12, charts=[heldout] if heldout else []),
        Panel("What it writes", 12, comparisons=shown, more=more),
        Panel("What each stage gained" if len(runs) > 1 else "What it gained", 12, tables=gains(runs)),
        Panel("Verdicts", 12, tables=verdict_table(runs)),
    ]
    return [p for p in panels if not p.is_empty]


def num_tokens(runs: list[Run]) -> float:
    """Return the tokens that the runs trained on, all together; 0 where none has recorded any."""
    # NaN, of a run without tokens, is the one number that differs from itself
    return sum(n for run in runs if (n := last_value(run.curve("tokens"))) == n)


def newest(runs: list[Run], name: str) -> Any:
    """Return a field of the last run's start that has it, or None."""
    return next((run.start(name) for run in reversed(runs) if run.start(name)), None)


def _samples(runs: list[Run]) -> tuple[list[Comparison], list[Comparison]]:
    """Return the first samples of the last stage, and more of them.

    Prompts that an earlier stage was asked too come first, with what it wrote to them.
    """
    asked = [run for run in runs if run.samples]
    if not asked:
        return [], []
    first, last = asked[0], asked[-1]
    before = {str(s.get("prompt")): s for s in first.samples} if first is not last else {}
    ranked = sorted(last.samples, key=lambda s: str(s.get("prompt")) not in before)[:MAX_SAMPLES]
    found = []
    for sample in ranked:
        texts = [(f"After: {_when(last)}" if before else _when(last), _cut(sample.get("text")))]
        if earlier := before.get(str(sample.get("prompt"))):
            texts.insert(0, (f"Before: {_when(first)}", _cut(earlier.get("text"))))
        if sample.get("target"):
            texts.append(("Expected", _cut(sample.get("target"))))
        found.append(Comparison(_cut(sample.get("prompt")), texts))
    return found[:OPEN_SAMPLES], found[OPEN_SAMPLES:]


def _when(run: Run) -> str:
    return f"{run.name}, step {int(run.samples[0].get('step') or 0):,}"


def _cut(text: Any) -> str:
    return cut_lines("" if text is None else str(text).strip(), MAX_CHARACTERS)


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
        runs: what `read_run` returned for each, in the order to be told; runs of other models get one
            sentence.
        now_s: Unix time to print as the time of writing; the current one by default.
    """
    own, others = of_one_model(runs)
    recipe = next((run.recipe() for run in own if run.recipe()), "")
    names = " + ".join(run.name for run in own)
    return render_page("Training report", f"{recipe}: {names}" if recipe else names,
                       f"{_subtitle(own)} {_left_out(others)}".strip(), [_chapter(run, own) for run in own],
                       verdict=verdict_sentence(own), opening=opening(own),
                       overview=("All stages", _summary(own)) if len(own) > 1 else None,
                       anchor="run", nothing="This run has recorded nothing yet.", now_s=now_s)


def _left_out(others: list[Run]) -> str:
    """Return a sentence on runs that trained other models."""
    if not others:
        return ""
    names = ", ".join(f"{run.name} ({run.recipe() or 'unknown recipe'})" for run in others)
    return f"Not in this report, because another model was trained: {names}; report such runs alone."


def _chapter(run: Run, stages: list[Run]) -> Chapter:
    # the samples of the last stage that has any stand on the first screen
    last = next((one for one in reversed(stages) if one.samples), None)
    left_out = ("Samples",) if run is last else ()
    return Chapter(run.name, run.recipe(), key_figures(run), sections(run, left_out))


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

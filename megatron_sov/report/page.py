"""The report's page: runs -> one HTML file that opens without a network."""

from __future__ import annotations

import time

from megatron_sov.obs.figures import duration, figure, large
from megatron_sov.pages.content import Chapter, Section, Table
from megatron_sov.pages.page import render as render_page
from megatron_sov.report.opening import newest, num_tokens, opening
from megatron_sov.report.run_data import Run
from megatron_sov.report.sections import key_figures, sections
from megatron_sov.report.steps import last_value
from megatron_sov.report.verdicts import gate

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
        words.append(f"A model of {large(params)} parameters")
        if active:
            words[0] += f", {large(active)} of them active for each token"
        if tokens:
            words[0] += f", trained on {large(tokens)} tokens"
    last_s = max((a.last_time_s for run in runs for a in run.attempts), default=0.0)
    if last_s > 0:
        words.append(f"last event {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(last_s))}")
    return "; ".join(words) + "." if words else ""


def _summary(runs: list[Run]) -> Table:
    """Return one row for each run: what it was, how long it took, and how it ended."""
    return Table(["run", "objective", "steps", "tokens", "wall time", "last loss", "held-out bits per byte",
                  "outcome"], [[run.name, *_in_short(run)] for run in runs])


def _in_short(run: Run) -> list[str]:
    loss, tokens = run.curve("loss"), num_tokens([run])
    return [str(run.setting("objective", "name") or "–"),
            f"{int(loss.steps[-1]):,}" if loss else "–", large(tokens) if tokens else "–",
            duration(run.wall_s()), figure(last_value(loss)), figure(last_value(run.overall_bits_per_byte)),
            run.attempts[-1].outcome if run.attempts else "–"]


def _others(runs: list[Run]) -> Chapter:
    """Return what stands before the chapters of runs that trained other models."""
    rows = []
    for run in runs:
        params, judged = run.start("num_params"), gate(run)
        rows.append([run.name, run.recipe() or "–", large(params) if params else "–", *_in_short(run),
                     judged[0][1] if judged else "–"])
    table = Table(["run", "model", "parameters", "objective", "steps", "tokens", "wall time", "last loss",
                   "held-out bits per byte", "outcome", "gate"], rows)
    return Chapter("Other models", "", [], [Section(
        "Not stages of this model", tables=[table],
        text="These runs trained another architecture or size, each for a purpose of its own; none of their "
             "figures is counted above.")])

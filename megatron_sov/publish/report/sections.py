"""What the report says about one run: key figures and sections.  A section without data is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_sov.base.figures import format_count, format_duration, format_share, format_value
from megatron_sov.base.pages.page import Chart, PageSection, PageTable, build_tables
from megatron_sov.publish.report.charts import (
    LEARNING, SPEED, StepLine, beside_charts, heldout_charts, loss_charts, loss_unit, meter_charts,
    needle_charts, step_charts)
from megatron_sov.publish.report.judgements import (
    checkpoint_score_charts, passk_charts, passk_tables, round_charts, round_tables, score_tables)
from megatron_sov.publish.report.run_data import Run
from megatron_sov.publish.report.steps import last_value
from megatron_sov.publish.report.validations import sample_tables, validation_charts, validation_tables
from megatron_sov.runs.obs.figures import field_formatter, parse_number
from megatron_sov.runs.obs.history import INCIDENT_NAMES, describe_incident

MAX_ROWS = 200
MAX_SAMPLES = 24
MAX_SAMPLE_CHARACTERS = 2000


# The report's section on what went wrong, and what the run did about it.


def _warning_tables(run: Run) -> list[PageTable]:
    return build_tables(run.of("warning")[-MAX_ROWS:], {
        "step": lambda w: f"{int(w.get('step') or 0):,}", "warning": field_formatter("text", none="")})


def _incident_tables(run: Run) -> list[PageTable]:
    """Return one row for each incident in the order of time."""
    rows = [[f"{int(e.get('step') or 0):,}", INCIDENT_NAMES[e["event"]], describe_incident(e)]
            for e in run.incidents[:MAX_ROWS]]
    if len(run.incidents) > MAX_ROWS:
        rows.append(["", "", f"… and {len(run.incidents) - MAX_ROWS:,} more in the run's events"])
    return [PageTable(["step", "incident", "what the run saw and did"], rows)] if rows else []


def key_figures(run: Run) -> list[tuple[str, str, str]]:
    """Return (label, value, detail) of what a reader asks first; figures that the run lacks are left out."""
    found = []
    if run.start("num_params"):
        active = run.start("num_active_params")
        found.append(("Parameters", format_count(run.start("num_params")),
                      f"{format_count(active)} active for each token" if active else ""))
    tokens = last_value(run.curve("tokens"))
    if math.isfinite(tokens):
        loss = run.curve("loss")
        found.append(("Tokens trained", format_count(tokens),
                      f"{int(loss.steps[-1]):,} steps" if loss else ""))
    if run.wall_s() > 0:
        ranks = run.start("num_ranks")
        found.append(("Wall time", format_duration(run.wall_s()),
                      f"{ranks:,} process{'es' if ranks > 1 else ''}" if ranks else ""))
    speed = run.curve("tokens_per_s")
    if speed and len(speed.finite().steps):
        found.append(("Tokens a second", f"{np.median(speed.finite().values):,.0f}", "median over steps"))
    bits = run.overall_bits_per_byte
    if bits:
        best = int(np.argmin(bits.values))
        found.append(("Best held-out", f"{bits.values[best]:.4f}",
                      f"bits per byte, step {int(bits.steps[best]):,}"))
    final = run.curve("loss")
    if final and math.isfinite(last_value(final)):
        found.append(("Last training loss", f"{last_value(final):.4f}", loss_unit(run)))
    for needle in run.needles[-1:]:
        if needle.get("cells"):
            longest = max(int(c["length_tokens"]) for c in needle["cells"])
            found.append(("Needle score", format_share(parse_number(needle.get("score"))),
                          f"up to {longest:,} tokens"))
    return found


def sections(run: Run, left_out: Collection[str] = ()) -> list[PageSection]:
    """Return a run's sections in reading order, without empty ones and the titles in `left_out`."""
    found = [declared.of(run) for declared in SECTIONS.values() if declared.title not in left_out]
    return [s for s in found if s.charts or s.tables or s.samples]


def _beside_tables(run: Run) -> list[PageTable]:
    return build_tables([b for b in run.evaluations if b.failure], {
        "step": lambda b: f"{b.step:,}", "task": lambda b: b.task,
        "why there is no figure": lambda b: b.failure})


def _heldout_tables(run: Run) -> list[PageTable]:
    return build_tables(run.heldout.items(), {
        "source": lambda item: item[0], "tokens": lambda item: f"{item[1].num_tokens:,}",
        "first loss": lambda item: format_value(float(item[1].loss.values[0])),
        "last loss": lambda item: format_value(last_value(item[1].loss)),
        "bits per byte": lambda item: format_value(last_value(item[1].bits_per_byte))})


def _checkpoint_tables(run: Run) -> list[PageTable]:
    save_s = [parse_number(c["save_s"]) for c in run.checkpoints if c.get("save_s") is not None]
    if not save_s:
        return []
    stall_s = [parse_number(c.get("stall_s", c["save_s"])) for c in run.checkpoints
               if c.get("save_s") is not None]
    row = [f"{len(save_s):,}", f"{int(run.checkpoints[-1]['step']):,}",
           format_duration(float(np.mean(save_s))), format_duration(max(save_s)),
           format_duration(float(np.mean(stall_s)))]
    return [PageTable(["checkpoints", "last at step", "mean time to save", "longest",
                       "mean stall of training"],
                      [row])]


def _samples(run: Run) -> list[dict[str, str]]:
    return [{k: _cut(s.get(k)) for k in ("prompt", "text", "target")} for s in run.samples[:MAX_SAMPLES]]


def _sample_text(run: Run) -> str:
    left_out = len(run.samples) - MAX_SAMPLES
    more = f" {left_out:,} more are in the run's events." if left_out > 0 else ""
    step = int(run.samples[0].get("step") or 0) if run.samples else 0
    return f"What the model wrote at step {step:,}, unedited.{more}"


def _cut(text: Any) -> str:
    return cut_lines("" if text is None else str(text), MAX_SAMPLE_CHARACTERS)


def cut_lines(text: str, max_characters: int) -> str:
    """Shorten a text to whole lines, or its first line to whole words, and say how much is left out."""
    if len(text) <= max_characters:
        return text
    # a character more: the limit may fall on the end of a line or a word
    head = text[:max_characters + 1]
    end = head.rfind("\n")
    if end <= 0:
        end = head.rfind(" ")
    shown = head[:end if end > 0 else max_characters]
    return f"{shown.rstrip()}\n… ({len(text) - len(shown):,} more characters)"


# The table of sections, in reading order.


def _nothing(run: Run) -> list[Any]:
    return []


def _joined(*parts: Callable[[Run], list[PageTable]]) -> Callable[[Run], list[PageTable]]:
    return lambda run: [table for part in parts for table in part(run)]


@dataclass(frozen=True)
class ReportSection:
    """What a section of the report shows of a run; it is left out where that is nothing."""

    title: str
    text: str | Callable[[Run], str] = ""
    lines: tuple[StepLine, ...] = ()
    """Columns of the step events, a chart each."""
    charts: Callable[[Run], list[Chart]] = _nothing
    tables: Callable[[Run], list[PageTable]] = _nothing
    samples: Callable[[Run], list[dict[str, str]]] = _nothing
    side_by_side: bool = True

    def of(self, run: Run) -> PageSection:
        return PageSection(
            self.title, self.text if isinstance(self.text, str) else self.text(run),
            [*step_charts(run, self.lines), *self.charts(run)], self.tables(run), self.samples(run),
            side_by_side=self.side_by_side)


SECTIONS = {section.title: section for section in (
    ReportSection("Training loss", charts=loss_charts, side_by_side=False),
    ReportSection("Meters", "What the objective measures in addition to its loss.", charts=meter_charts),
    ReportSection("Held-out loss", charts=heldout_charts, tables=_heldout_tables),
    ReportSection("Learning rate and gradient norm", lines=LEARNING),
    ReportSection("Speed", lines=SPEED, tables=_checkpoint_tables),
    ReportSection("Scores", "Tasks of eval lm with 95 % intervals over clusters of items.",
                  charts=checkpoint_score_charts, tables=score_tables),
    ReportSection("Evaluation during training", charts=beside_charts, tables=_beside_tables),
    ReportSection("Needle in a haystack", "Share of questions about hidden facts that the model answers, by "
                  "the length of the context and their depth in it.",
                  charts=lambda run: [c for n in run.needles if n.get("cells") for c in needle_charts(n)]),
    ReportSection("pass@k", "The probability that of k responses to a prompt one at least is right (pass@k), "
                  "or the most frequent answer (maj@k).", charts=passk_charts, tables=passk_tables),
    ReportSection("Rounds", "A round is written by a policy, judged, and trained; a group is the responses "
                  "to one prompt.", charts=round_charts, tables=round_tables),
    ReportSection("Validation", "Held-out prompts under the run's own reward (`rl run --validation`); RUN/"
                  "validation is a store of the responses.", charts=validation_charts,
                  tables=validation_tables),
    ReportSection("Samples of responses", "Of the newest rounds that were sampled, unedited.",
                  tables=sample_tables),
    ReportSection("Samples", _sample_text, samples=_samples),
    ReportSection("Warnings and faults", tables=_joined(_warning_tables, _incident_tables)),
)}

"""Key figures and sections of a run's chapter in the report; sections without data are omitted."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_sov.base.figures import format_count, format_duration, format_share, format_value
from megatron_sov.base.pages.page import Chart, PageSection, PageTable, build_tables
from megatron_sov.publish.report.charts import (
    LEARNING, SPEED, StepField, draw_evaluation_charts, draw_field_charts, draw_heldout_charts,
    draw_loss_charts, draw_meter_charts, draw_needle_charts, get_loss_unit)
from megatron_sov.publish.report.rl_rounds import (
    build_response_tables, build_round_tables, build_validation_tables, draw_round_charts,
    draw_validation_charts)
from megatron_sov.publish.report.run_data import Run
from megatron_sov.publish.report.scores import (
    build_passk_tables, build_score_tables, draw_passk_charts, draw_score_charts)
from megatron_sov.publish.report.steps import get_last_value
from megatron_sov.runs.obs.figures import field_formatter, parse_number
from megatron_sov.runs.obs.history import INCIDENT_NAMES, describe_incident

MAX_ROWS = 200
MAX_SAMPLES = 24
MAX_SAMPLE_CHARACTERS = 2000


def list_key_figures(run: Run) -> list[tuple[str, str, str]]:
    """Return (label, value, detail) from `run_start`, `step`, `eval` and `needle` events, without missing
    numbers."""
    figures = []
    loss = run.get_curve("loss")
    if num_params := run.get_start_field("num_params"):
        active = run.get_start_field("num_active_params")
        figures.append(("Parameters", format_count(num_params),
                        f"{format_count(active)} active for each token" if active else ""))
    tokens = get_last_value(run.get_curve("tokens"))
    if math.isfinite(tokens):
        figures.append(("Tokens trained", format_count(tokens),
                        f"{int(loss.steps[-1]):,} steps" if loss else ""))
    if run.wall_time_s > 0:
        ranks = run.get_start_field("num_ranks")
        detail = f"processes: {ranks:,}" if ranks else ""
        figures.append(("Wall time", format_duration(run.wall_time_s), detail))
    speed = run.get_curve("tokens_per_s")
    if speed and len(speed.drop_nonfinite().steps):
        figures.append(("Tokens a second", f"{np.median(speed.drop_nonfinite().values):,.0f}",
                        "median over steps"))
    if bits := run.overall_bits_per_byte:
        best = int(np.argmin(bits.values))
        figures.append(("Best held-out", f"{bits.values[best]:.4f}",
                        f"bits per byte, step {int(bits.steps[best]):,}"))
    if math.isfinite(get_last_value(loss)):
        figures.append(("Last training loss", f"{get_last_value(loss):.4f}", get_loss_unit(run)))
    for needle in run.needles[-1:]:
        if needle.get("cells"):
            longest = max(int(cell["length_tokens"]) for cell in needle["cells"])
            figures.append(("Needle score", format_share(parse_number(needle.get("score"))),
                            f"up to {longest:,} tokens"))
    return figures


def build_sections(run: Run, excluded_titles: Collection[str] = ()) -> list[PageSection]:
    """Return a run's `SECTIONS` in reading order, without empty sections."""
    sections = [section.build(run) for title, section in SECTIONS.items() if title not in excluded_titles]
    return [section for section in sections if section.charts or section.tables or section.samples]


def cut_lines(text: str, max_characters: int) -> str:
    """Shorten a text to whole lines, or its first line to whole words, and append the omitted length."""
    if len(text) <= max_characters:
        return text
    # one more character, because the limit may be the end of a line or a word
    head = text[:max_characters + 1]
    end = head.rfind("\n")
    if end <= 0:
        end = head.rfind(" ")
    head = head[:end if end > 0 else max_characters]
    return f"{head.rstrip()}\n… ({len(text) - len(head):,} more characters)"


# The table of sections, in reading order.


def _build_heldout_tables(run: Run) -> list[PageTable]:
    return build_tables(run.heldout.items(), {
        "source": lambda item: item[0], "tokens": lambda item: f"{item[1].num_tokens:,}",
        "first loss": lambda item: format_value(float(item[1].loss.values[0])),
        "last loss": lambda item: format_value(get_last_value(item[1].loss)),
        "bits per byte": lambda item: format_value(get_last_value(item[1].bits_per_byte))})


def _build_checkpoint_tables(run: Run) -> list[PageTable]:
    timed = [event for event in run.checkpoints if event.get("save_s") is not None]
    if not timed:
        return []
    save_s = [parse_number(event["save_s"]) for event in timed]
    stall_s = [parse_number(event.get("stall_s", event["save_s"])) for event in timed]
    seconds = (float(np.mean(save_s)), max(save_s), float(np.mean(stall_s)))
    return [PageTable(
        ["checkpoints", "last at step", "mean time to save", "longest", "mean stall of training"],
        [[f"{len(save_s):,}", f"{int(run.checkpoints[-1]['step']):,}", *map(format_duration, seconds)]])]


def _build_failure_tables(run: Run) -> list[PageTable]:
    failures = [evaluation for evaluation in run.evaluations if evaluation.failure]
    return build_tables(failures, {
        "step": lambda evaluation: f"{evaluation.step:,}", "task": lambda evaluation: evaluation.task,
        "why there is no figure": lambda evaluation: evaluation.failure})


def _list_samples(run: Run) -> list[dict[str, str]]:
    samples = []
    for event in run.samples[:MAX_SAMPLES]:
        texts = {field: event.get(field) for field in ("prompt", "text", "target")}
        samples.append({field: "" if text is None else cut_lines(str(text), MAX_SAMPLE_CHARACTERS)
                        for field, text in texts.items()})
    return samples


def _describe_samples(run: Run) -> str:
    num_omitted = len(run.samples) - MAX_SAMPLES
    more = f" {num_omitted:,} more are in the run's events." if num_omitted > 0 else ""
    step = int(run.samples[0].get("step") or 0) if run.samples else 0
    return f"What the model wrote at step {step:,}, unedited.{more}"


def _build_fault_tables(run: Run) -> list[PageTable]:
    """Return the newest `warning` events, and `Run.incidents` in time order."""
    tables = build_tables(run.get_events("warning")[-MAX_ROWS:], {
        "step": _format_step, "warning": field_formatter("text", none="")})
    rows = [[_format_step(event), INCIDENT_NAMES[event["event"]], describe_incident(event)]
            for event in run.incidents[:MAX_ROWS]]
    if len(run.incidents) > MAX_ROWS:
        rows.append(["", "", f"… and {len(run.incidents) - MAX_ROWS:,} more in the run's events"])
    return [*tables, PageTable(["step", "incident", "what the run saw and did"], rows)] if rows else tables


def _format_step(event: dict[str, Any]) -> str:
    return f"{int(event.get('step') or 0):,}"


def _return_nothing(run: Run) -> list[Any]:
    return []


@dataclass(frozen=True)
class ReportSection:
    """A section's contents, as functions that take a `Run`."""

    title: str
    text: str | Callable[[Run], str] = ""
    fields: tuple[StepField, ...] = ()
    """Fields in `step` events, a chart per field."""
    charts: Callable[[Run], list[Chart]] = _return_nothing
    tables: Callable[[Run], list[PageTable]] = _return_nothing
    samples: Callable[[Run], list[dict[str, str]]] = _return_nothing
    side_by_side: bool = True

    def build(self, run: Run) -> PageSection:
        return PageSection(
            self.title, self.text if isinstance(self.text, str) else self.text(run),
            [*draw_field_charts(run, self.fields), *self.charts(run)], self.tables(run), self.samples(run),
            side_by_side=self.side_by_side)


SECTIONS = {section.title: section for section in (
    ReportSection("Training loss", charts=draw_loss_charts, side_by_side=False),
    ReportSection("Meters", "What the objective measures in addition to its loss.", charts=draw_meter_charts),
    ReportSection("Held-out loss", charts=draw_heldout_charts, tables=_build_heldout_tables),
    ReportSection("Learning rate and gradient norm", fields=LEARNING),
    ReportSection("Speed", fields=SPEED, tables=_build_checkpoint_tables),
    ReportSection("Scores", "Tasks of eval lm with 95 % intervals over clusters of items.",
                  charts=draw_score_charts, tables=build_score_tables),
    ReportSection("Evaluation during training", charts=draw_evaluation_charts, tables=_build_failure_tables),
    ReportSection("Needle in a haystack", "Share of questions about hidden facts that the model answers, by "
                  "the length of the context and their depth in it.", charts=lambda run: [
                      chart for needle in run.needles if needle.get("cells")
                      for chart in draw_needle_charts(needle)]),
    ReportSection("pass@k", "The probability that at least one of k responses to a prompt is correct "
                  "(pass@k), or the most frequent answer (maj@k).", charts=draw_passk_charts,
                  tables=build_passk_tables),
    ReportSection("Rounds", "In a round the policy writes responses, which are judged and trained; a group "
                  "is the responses to one prompt.", charts=draw_round_charts, tables=build_round_tables),
    ReportSection("Validation", "Held-out prompts under the run's own reward (`rl run --validation`); "
                  "RUN/validation stores the responses.", charts=draw_validation_charts,
                  tables=build_validation_tables),
    ReportSection("Samples of responses", "From the newest sampled rounds, unedited.",
                  tables=build_response_tables),
    ReportSection("Samples", _describe_samples, samples=_list_samples),
    ReportSection("Warnings and faults", tables=_build_fault_tables))}

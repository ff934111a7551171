"""Read the evaluations of a run's exports, `RUN/evaluations`, and return them as curves over steps."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.base.errors import UserError
from megatron_sov.publish.report.steps import Curve, build_curve
from megatron_sov.runs.folder import EVALUATIONS
from megatron_sov.runs.obs.events import build_score_events, is_score_recorded
from megatron_sov.runs.obs.figures import parse_number

EVALUATION_FILE = re.compile(r"^step-(\d+)\.(\w+)\.(json|failed)$")


@dataclass(frozen=True)
class ExportEvaluation:
    """Results from a single task on a single export."""

    step: int
    task: str
    """ppl, needle, pairs or lm."""
    figures: dict[str, Any]
    """JSON output from `megatron-sov eval`; empty after a failure."""
    failure: str = ""
    """Reason for missing figures."""
    scores: tuple[dict[str, Any], ...] = ()
    """For task lm: the figures as `eval_lm` events."""


def read_evaluations(run: Path) -> list[ExportEvaluation]:
    """Read a run's evaluations in step order; an unreadable file counts as a failure."""
    evaluations = []
    for file in (run / EVALUATIONS).glob("step-*"):
        if match := EVALUATION_FILE.match(file.name):
            evaluations.append(_read_evaluation(file, int(match[1]), match[2]))
    return sorted(evaluations, key=lambda evaluation: (evaluation.step, evaluation.task))


def _read_evaluation(file: Path, step: int, task: str) -> ExportEvaluation:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
        if file.suffix == ".failed":
            return ExportEvaluation(step, task, {}, text.strip() or f"{file.name} is empty")
        figures = json.loads(text)
    except (OSError, ValueError, RecursionError) as e:
        return ExportEvaluation(step, task, {}, f"{file.name} cannot be read ({e})")
    if not isinstance(figures, dict):
        return ExportEvaluation(step, task, {}, f"{file.name} contains no figures")
    try:
        scores = build_score_events(figures, step, file) if task == "lm" else []
    except UserError as e:
        return ExportEvaluation(step, task, {}, str(e))
    return ExportEvaluation(step, task, figures, scores=tuple(scores))


def find_unrecorded_scores(evaluations: list[ExportEvaluation], recorded: list[dict[str, Any]]
                           ) -> list[dict[str, Any]]:
    """Return the scores missing from a run's `eval_lm` events: their jobs finished after the run."""
    return [score for evaluation in evaluations for score in evaluation.scores
            if not is_score_recorded(score, recorded)]


def extract_source_curves(evaluations: list[ExportEvaluation], task: str, field: str, factor: float = 1.0
                          ) -> list[Curve]:
    """Return a field per source over steps, for task ppl or pairs, multiplied by `factor`."""
    values: dict[str, dict[int, float]] = {}
    for evaluation in evaluations:
        figures = evaluation.figures if evaluation.task == task else {}
        for source, row in figures.items():
            value = row.get(field) if isinstance(row, dict) else None
            values.setdefault(source, {})[evaluation.step] = factor * parse_number(value)
    return [build_curve(source, by_step) for source, by_step in values.items()]


def extract_needle_curves(evaluations: list[ExportEvaluation]) -> list[Curve]:
    """Return the percentage of correct answers per needle kind and language over steps."""
    shares: dict[str, dict[int, list[float]]] = {}
    for evaluation in evaluations:
        cells = evaluation.figures.get("cells") if evaluation.task == "needle" else None
        for cell in cells or []:
            name = f"{cell.get('kind')}, {cell.get('language')}"
            share = 100 * parse_number(cell.get("correct")) / max(1.0, parse_number(cell.get("samples")))
            shares.setdefault(name, {}).setdefault(evaluation.step, []).append(share)
    return [build_curve(name, {step: float(np.mean(values)) for step, values in by_step.items()})
            for name, by_step in shares.items()]

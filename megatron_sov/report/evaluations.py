"""Evaluations of a run's exports beside training: the files that they left, as curves over steps."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.errors import UserError
from megatron_sov.obs.figures import number
from megatron_sov.report.steps import Curve
from megatron_sov.runs.folder import EVALUATIONS
from megatron_sov.runs.score_events import is_told, score_events

FILE = re.compile(r"^step-(\d+)\.(\w+)\.(json|failed)$")


@dataclass(frozen=True)
class ExportEvaluation:
    """What one task found on one export."""

    step: int
    task: str
    """ppl, needle, pairs or lm."""
    figures: dict[str, Any]
    """What `megatron-sov eval` gives; empty where it failed."""
    failure: str = ""
    """Why there are no figures."""
    scores: tuple[dict[str, Any], ...] = ()
    """lm: the figures as the run's events tell them (`runs.score_events`)."""


def read_evaluations(run: Path) -> list[ExportEvaluation]:
    """Return the evaluations of a run by step; a file that cannot be read counts as a failure."""
    found = []
    for file in (run / EVALUATIONS).glob("step-*"):
        name = FILE.match(file.name)
        if name is None:
            continue
        figures, failure = {}, ""
        try:
            text = file.read_text(encoding="utf-8", errors="replace")
            figures, failure = (json.loads(text), "") if name[3] == "json" else ({}, text.strip())
        except (OSError, ValueError) as e:
            failure = f"{file.name} cannot be read ({e})"
        if not isinstance(figures, dict):
            figures, failure = {}, f"{file.name} holds no figures"
        step = int(name[1])
        scores: list[dict[str, Any]] = []
        if name[2] == "lm" and not failure:
            try:
                scores = score_events(figures, step, file)
            except UserError as e:
                figures, failure = {}, str(e)
        found.append(ExportEvaluation(step, name[2], figures, failure, tuple(scores)))
    return sorted(found, key=lambda b: (b.step, b.task))


def untold_scores(evaluations: list[ExportEvaluation], told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the scores that no event tells: a job brought them behind the run's end.

    Args:
        evaluations: of a run.
        told: its `eval_lm` events.
    """
    return [score for one in evaluations for score in one.scores if not is_told(score, told)]


def curves(evaluations: list[ExportEvaluation], field: str) -> list[Curve]:
    """Return one figure of each source over steps, e.g. bits_per_byte."""
    values: dict[str, dict[int, float]] = {}
    for one in evaluations:
        if one.task == "ppl":
            for source, row in one.figures.items():
                values.setdefault(source, {})[one.step] = number(
                    row.get(field) if isinstance(row, dict) else None)
    return [_curve(source, by_step) for source, by_step in values.items()]


def needle_curves(evaluations: list[ExportEvaluation]) -> list[Curve]:
    """Return the share of right answers, in percent, of each kind and language over steps."""
    rights: dict[str, dict[int, list[float]]] = {}
    for one in evaluations:
        for cell in one.figures.get("cells") or [] if one.task == "needle" else []:
            name = f"{cell.get('kind')}, {cell.get('language')}"
            share = 100 * number(cell.get("correct")) / max(1.0, number(cell.get("samples")))
            rights.setdefault(name, {}).setdefault(one.step, []).append(share)
    return [_curve(name, {step: float(np.mean(shares)) for step, shares in by_step.items()})
            for name, by_step in rights.items()]


def pair_curves(evaluations: list[ExportEvaluation]) -> list[Curve]:
    """Return the share of held-out pairs that is ranked right, in percent, of each source over steps."""
    values: dict[str, dict[int, float]] = {}
    for one in evaluations:
        for source, row in one.figures.items() if one.task == "pairs" else ():
            share = number(row.get("right") if isinstance(row, dict) else None)
            values.setdefault(source, {})[one.step] = 100 * share
    return [_curve(source, by_step) for source, by_step in values.items()]


def _curve(name: str, by_step: dict[int, float]) -> Curve:
    steps = sorted(by_step)
    return Curve(name, np.array(steps, dtype=np.int64),
                 np.array([by_step[step] for step in steps], dtype=np.float64))

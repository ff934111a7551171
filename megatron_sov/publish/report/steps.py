"""The `step` events of a run as columns: hundreds of thousands of steps fit into a few megabytes."""

from __future__ import annotations

import json
import math
import re
from array import array
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_sov.base.errors import UserError
from megatron_sov.runs.folder import EVALUATIONS
from megatron_sov.runs.obs.events import build_score_events, is_score_recorded
from megatron_sov.runs.obs.figures import parse_number

SCALARS = ("loss", "grad_norm", "lr", "tokens", "step_time_s", "tokens_per_s", "max_violation",
           "padding_share", "tflops_per_process", "mfu", "peak_memory_bytes", "reserved_memory_bytes")
GROUPS = ("losses", "losses_by_source", "meters")


@dataclass(frozen=True)
class Curve:
    """Values over optimizer steps, steps ascending and distinct; values may be NaN or infinite."""

    name: str
    """What the values are, e.g. "loss", or within a group the term or source."""
    steps: npt.NDArray[np.int64]
    """Optimizer steps, shape [n]."""
    values: npt.NDArray[np.float64]
    """One value for each step, shape [n]."""

    def finite(self) -> Curve:
        """Return the curve without its NaN and infinite values."""
        keep = np.isfinite(self.values)
        return Curve(self.name, self.steps[keep], self.values[keep])

    def times(self, factor: float) -> Curve:
        """Return the curve in another unit."""
        return self if factor == 1 else Curve(self.name, self.steps, self.values * factor)


def last_value(curve: Curve | None) -> float:
    """Return a curve's last value, NaN without one."""
    return float(curve.values[-1]) if curve is not None and len(curve.values) else math.nan


class StepTable:
    """Collects `step` events one by one; of a step done again after a restart the last one counts,
    as in `final_step_events`."""

    def __init__(self) -> None:
        # machine arrays: a Python number for each value would take many times as much
        self._steps = array("q")
        self._phases = array("q")
        self._phase_names: dict[str, int] = {}
        self._columns: dict[tuple[str, str], tuple[array[int], array[float]]] = {}

    def add(self, event: dict[str, Any]) -> None:
        """Take one `step` event in; fields that it lacks stay absent from their curves."""
        row = len(self._steps)
        self._steps.append(int(event["step"]))
        self._phases.append(self._phase_names.setdefault(str(event.get("phase") or ""),
                                                         len(self._phase_names)))
        for name in SCALARS:
            if event.get(name) is not None:
                self._put(("", name), row, event[name])
        for group in GROUPS:
            for name, value in (event.get(group) or {}).items():
                self._put((group, name), row, value)

    def _put(self, key: tuple[str, str], row: int, value: Any) -> None:
        column = self._columns.get(key)
        if column is None:
            column = self._columns[key] = (array("q"), array("d"))
        # the row and not the step: which row of a repeated step counts is known at the end
        column[0].append(row)
        column[1].append(parse_number(value))

    def curves(self) -> dict[str, dict[str, Curve]]:
        """Return group -> name -> curve; the group of plain fields (loss, lr, ...) is ""."""
        steps = _numbers(self._steps)
        is_last = np.zeros(len(steps), dtype=bool)
        # values of steps that were done again belong to no model any more
        is_last[self._last_rows()] = True
        found: dict[str, dict[str, Curve]] = {"": {}, **{group: {} for group in GROUPS}}
        for (group, name), (row_array, value_array) in self._columns.items():
            rows, values = (np.frombuffer(row_array, dtype=np.int64),
                            np.frombuffer(value_array, dtype=np.float64))
            keep = is_last[rows]
            # after a restart steps come in another order than rows
            order = np.argsort(steps[rows[keep]], kind="stable")
            found[group][name] = Curve(name, steps[rows[keep]][order], values[keep][order])
        return found

    def phases(self) -> list[tuple[str, int, int]]:
        """Return (name, first step, last step) of each phase in order, as the steps themselves name it."""
        rows = self._last_rows()
        if not len(rows):
            return []
        steps, phases = _numbers(self._steps)[rows], _numbers(self._phases)[rows]
        # a phase begins where its number changes
        starts = [0, *(np.flatnonzero(np.diff(phases)) + 1).tolist()]
        names = list(self._phase_names)
        return [(names[phases[start]], int(steps[start]), int(steps[end - 1]))
                for start, end in pairwise([*starts, len(rows)])]

    def _last_rows(self) -> npt.NDArray[np.int64]:
        """Return the row that counts of each distinct step, steps ascending."""
        steps = _numbers(self._steps)
        # np.unique returns first occurrences; of the reversed steps these are the last ones.
        return len(steps) - 1 - np.unique(steps[::-1], return_index=True)[1]


def _numbers(column: array[int]) -> npt.NDArray[np.int64]:
    return np.frombuffer(column, dtype=np.int64) if column else np.empty(0, np.int64)


def downsample(curve: Curve, max_points: int = 2000) -> Curve:
    """Return at most `max_points` points of a curve: its ends, and the lowest and highest
    value of every stretch.

    A moving minimum and maximum keeps every spike and dip visible, which taking each n-th point would lose.
    """
    n = len(curve.steps)
    if n <= max_points:
        return curve
    # two points from each stretch, and the ends
    edges = np.linspace(0, n, (max_points - 2) // 2 + 1).astype(int)
    keep = [0, n - 1]
    for low, high in pairwise(edges):
        stretch = curve.values[low:high]
        keep += [low + int(np.argmin(stretch)), low + int(np.argmax(stretch))]
    chosen = np.unique(keep)
    return Curve(curve.name, curve.steps[chosen], curve.values[chosen])


def moving_mean(curve: Curve, window: int) -> Curve:
    """Return the centred mean over `window` neighbouring values; at the ends over those that exist.

    All values must be finite.
    """
    # sums before each place: a window's sum is one difference, whatever its width
    sums = np.concatenate([[0.0], np.cumsum(curve.values)])
    centre = np.arange(len(curve.values))
    low = np.maximum(centre - window // 2, 0)
    high = np.minimum(centre + (window + 1) // 2, len(curve.values))
    return Curve(curve.name, curve.steps, (sums[high] - sums[low]) / (high - low))


# Evaluations of a run's exports beside training: the files that they left, as curves over steps.

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
    """lm: the figures as the run's events tell them (`runs.obs.events.build_score_events`)."""


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
            # .failed holds the reason as text
            figures, failure = (json.loads(text), "") if name[3] == "json" else ({}, text.strip())
        except (OSError, ValueError) as e:
            failure = f"{file.name} cannot be read ({e})"
        if not isinstance(figures, dict):
            figures, failure = {}, f"{file.name} holds no figures"
        step = int(name[1])
        scores: list[dict[str, Any]] = []
        if name[2] == "lm" and not failure:
            try:
                scores = build_score_events(figures, step, file)
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
    return [score for one in evaluations for score in one.scores if not is_score_recorded(score, told)]


def curves(evaluations: list[ExportEvaluation], field: str) -> list[Curve]:
    """Return one figure of each source over steps, e.g. bits_per_byte."""
    values: dict[str, dict[int, float]] = {}
    for one in evaluations:
        if one.task == "ppl":
            for source, row in one.figures.items():
                values.setdefault(source, {})[one.step] = parse_number(
                    row.get(field) if isinstance(row, dict) else None)
    return [sorted_curve(source, by_step) for source, by_step in values.items()]


def needle_curves(evaluations: list[ExportEvaluation]) -> list[Curve]:
    """Return the share of right answers, in percent, of each kind and language over steps."""
    rights: dict[str, dict[int, list[float]]] = {}
    for one in evaluations:
        for cell in one.figures.get("cells") or [] if one.task == "needle" else []:
            name = f"{cell.get('kind')}, {cell.get('language')}"
            share = 100 * parse_number(cell.get("correct")) / max(1.0, parse_number(cell.get("samples")))
            rights.setdefault(name, {}).setdefault(one.step, []).append(share)
    return [sorted_curve(name, {step: float(np.mean(shares)) for step, shares in by_step.items()})
            for name, by_step in rights.items()]


def pair_curves(evaluations: list[ExportEvaluation]) -> list[Curve]:
    """Return the share of held-out pairs whose chosen response is likelier, in percent, of each source over
    steps."""
    values: dict[str, dict[int, float]] = {}
    for one in evaluations:
        for source, row in one.figures.items() if one.task == "pairs" else ():
            share = parse_number(row.get("chosen_likelier") if isinstance(row, dict) else None)
            values.setdefault(source, {})[one.step] = 100 * share
    return [sorted_curve(source, by_step) for source, by_step in values.items()]


def sorted_curve(name: str, by_step: dict[int, float]) -> Curve:
    """Return step -> value as a curve."""
    steps = sorted(by_step)
    return Curve(name, np.array(steps, dtype=np.int64),
                 np.array([by_step[step] for step in steps], dtype=np.float64))

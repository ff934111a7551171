"""Collect a run's `step` events in columns and return them as curves."""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_sov.runs.obs.figures import parse_number

SCALAR_FIELDS = ("loss", "grad_norm", "lr", "tokens", "tokens_per_s", "mfu", "peak_memory_bytes")
CURVE_GROUPS = ("losses", "losses_by_source", "meters")
"""Fields in `step` events that map names to numbers."""


@dataclass(frozen=True)
class Curve:
    """Values over optimizer steps; values may be NaN or infinite."""

    name: str
    """Field in `step` events, or the loss term, source or meter within its group."""
    steps: npt.NDArray[Any]
    """Ascending optimizer steps without repetition (int64), or trained tokens (float64); shape [n]."""
    values: npt.NDArray[np.float64]
    """Shape [n]."""

    def drop_nonfinite(self) -> Curve:
        """Return the curve without NaN and infinite values."""
        is_finite = np.isfinite(self.values)
        return Curve(self.name, self.steps[is_finite], self.values[is_finite])


class StepTable:
    """Columns from `step` events. If a step runs again after a restart, its last event counts, as in
    `final_step_events`."""

    def __init__(self) -> None:
        # Arrays of machine numbers: a Python object per value takes several times the memory.
        self._steps = array("q")
        self._phases = array("q")
        self._phase_indices: dict[str, int] = {}
        # (group, name) -> event rows and values; `curves` decides later which rows count
        self._columns: dict[tuple[str, str], tuple[array[int], array[float]]] = defaultdict(
            lambda: (array("q"), array("d")))

    def add_event(self, event: dict[str, Any]) -> None:
        """Append a `step` event; a missing field adds no point to its curve."""
        row = len(self._steps)
        self._steps.append(int(event["step"]))
        phase = str(event.get("phase") or "")
        self._phases.append(self._phase_indices.setdefault(phase, len(self._phase_indices)))
        fields = [("", name, event[name]) for name in SCALAR_FIELDS if event.get(name) is not None]
        for group in CURVE_GROUPS:
            fields += [(group, name, value) for name, value in (event.get(group) or {}).items()]
        for group, name, value in fields:
            rows, values = self._columns[group, name]
            rows.append(row)
            values.append(parse_number(value))

    def build_curves(self) -> dict[str, dict[str, Curve]]:
        """Return group -> name -> curve; the group for plain fields (loss, lr, ...) is ""."""
        steps = _to_int64(self._steps)
        is_last = np.zeros(len(steps), dtype=bool)
        is_last[self._find_last_rows()] = True
        curves: dict[str, dict[str, Curve]] = {"": {}, **{group: {} for group in CURVE_GROUPS}}
        for (group, name), (row_array, value_array) in self._columns.items():
            rows, values = _to_int64(row_array), np.frombuffer(value_array, dtype=np.float64)
            counts = is_last[rows]
            # After a restart the order of steps differs from the order of rows.
            order = np.argsort(steps[rows[counts]], kind="stable")
            curves[group][name] = Curve(name, steps[rows[counts]][order], values[counts][order])
        return curves

    def find_phases(self) -> list[tuple[str, int, int]]:
        """Return (name, first step, last step) per phase in step order."""
        rows = self._find_last_rows()
        if not len(rows):
            return []
        steps, phases = _to_int64(self._steps)[rows], _to_int64(self._phases)[rows]
        starts = [0, *(np.flatnonzero(np.diff(phases)) + 1).tolist()]
        names = list(self._phase_indices)
        return [(names[phases[start]], int(steps[start]), int(steps[end - 1]))
                for start, end in pairwise([*starts, len(rows)])]

    def _find_last_rows(self) -> npt.NDArray[np.int64]:
        """Return the last row per distinct step, in step order."""
        steps = _to_int64(self._steps)
        # np.unique returns first occurrences: reversed, they are the last.
        return len(steps) - 1 - np.unique(steps[::-1], return_index=True)[1]


def build_curve(name: str, values_by_step: dict[int, float]) -> Curve:
    steps = sorted(values_by_step)
    return Curve(name, np.array(steps, dtype=np.int64),
                 np.array([values_by_step[step] for step in steps], dtype=np.float64))


def get_last_value(curve: Curve | None) -> float:
    """Return a curve's last value, or NaN without a curve or points."""
    return float(curve.values[-1]) if curve is not None and len(curve.values) else math.nan


def downsample(curve: Curve, max_points: int) -> Curve:
    """Reduce a curve to at most `max_points` points: its ends, and minimum and maximum per stretch.

    Unlike every n-th point, this shows all spikes and dips. Values must be finite.
    """
    num_points = len(curve.steps)
    if num_points <= max_points:
        return curve
    # two points per stretch, and the ends
    edges = np.linspace(0, num_points, (max_points - 2) // 2 + 1).astype(int)
    indices = [0, num_points - 1]
    for low, high in pairwise(edges):
        stretch = curve.values[low:high]
        indices += [low + int(np.argmin(stretch)), low + int(np.argmax(stretch))]
    chosen = np.unique(indices)
    return Curve(curve.name, curve.steps[chosen], curve.values[chosen])


def compute_moving_mean(curve: Curve, window: int) -> Curve:
    """Return the centred mean over `window` neighbouring values, fewer at the ends. Values must be finite."""
    # With cumulative sums, a window's sum is a single difference.
    sums = np.concatenate([[0.0], np.cumsum(curve.values)])
    centre = np.arange(len(curve.values))
    low = np.maximum(centre - window // 2, 0)
    high = np.minimum(centre + (window + 1) // 2, len(curve.values))
    return Curve(curve.name, curve.steps, (sums[high] - sums[low]) / (high - low))


def _to_int64(column: array[int]) -> npt.NDArray[np.int64]:
    return np.frombuffer(column, dtype=np.int64) if column else np.empty(0, np.int64)

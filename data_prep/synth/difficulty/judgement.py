"""How good expected pass rates are: their order, and whether of problems with an expected 0.7 seven in ten
answers are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep.synth.difficulty.estimator import Estimator
from data_prep.synth.difficulty.labels import LabelledProblem
from megatron_sov.base.documents.scripts import letters_by_script

NUM_BINS = 10
"""Of the reliability table and the expected calibration error."""


def figures(problems: Sequence[LabelledProblem], estimator: Estimator) -> dict[str, Any]:
    """Return the figures of all problems, and under "scripts" those of each script that most letters of some
    problems are of."""
    expected = np.array([estimator.pass_rate(problem.text) for problem in problems])
    measured = np.array([problem.pass_rate for problem in problems])
    scripts = [_script(problem.text) for problem in problems]
    return {**compared(expected, measured), "reliability": reliability(expected, measured), "scripts": {
        name: compared(expected[places], measured[places]) for name in sorted(set(scripts))
        for places in [[i for i, script in enumerate(scripts) if script == name]]}}


def compared(expected: np.ndarray, measured: np.ndarray) -> dict[str, Any]:
    """Return Spearman's rank correlation (null where one of both does not differ), the expected calibration
    error, the mean error, and what the latter is where the mean alone is expected of all."""
    from scipy.stats import spearmanr

    differ = len(set(expected.tolist())) > 1 and len(set(measured.tolist())) > 1
    return {"num_problems": len(measured),
            "spearman": float(spearmanr(expected, measured).statistic) if differ else None,
            "calibration_error": sum(
                abs(row["measured"] - row["expected"]) * row["num_problems"]
                for row in reliability(expected, measured)) / max(1, len(measured)),
            "mean_absolute_error": float(np.mean(np.abs(expected - measured))) if len(measured) else None,
            "mean_absolute_error_of_mean": float(np.mean(np.abs(measured - measured.mean())))
            if len(measured) else None}


def reliability(expected: np.ndarray, measured: np.ndarray) -> list[dict[str, Any]]:
    """Return for each tenth of expected pass rates how many problems there are, the mean expected rate and
    the mean measured one (Guo et al., arXiv 1706.04599, section 2)."""
    bins = np.minimum((expected * NUM_BINS).astype(int), NUM_BINS - 1)
    return [{"from": i / NUM_BINS, "to": (i + 1) / NUM_BINS, "num_problems": int((bins == i).sum()),
             "expected": float(expected[bins == i].mean()), "measured": float(measured[bins == i].mean())}
            for i in sorted(set(bins.tolist()))]


def told(content: dict[str, Any]) -> list[str]:
    """Return figures as lines for a terminal."""
    lines = [f"  {_line(content)}", *(f"  {name.lower()}: {_line(of)}"
                                      for name, of in content["scripts"].items())]
    lines += ["  expected    problems  mean expected  mean measured"]
    return lines + [f"  {row['from']:.1f} to {row['to']:.1f}  {row['num_problems']:8,}  "
                    f"{row['expected']:13.3f}  {row['measured']:13.3f}" for row in content["reliability"]]


def _line(row: dict[str, Any]) -> str:
    if not row["num_problems"]:
        return "no problems"
    spearman = "-" if row["spearman"] is None else f"{row['spearman']:.3f}"
    return (f"{row['num_problems']:,} problems: Spearman {spearman}, calibration error "
            f"{row['calibration_error']:.3f}, mean error {row['mean_absolute_error']:.3f} (the mean alone: "
            f"{row['mean_absolute_error_of_mean']:.3f})")


def _script(text: str) -> str:
    counts = letters_by_script(text)
    return max(sorted(counts), key=counts.__getitem__) if counts else "none"

"""A figure over the seeds of a benchmark: its mean, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from megatron_sov.eval.statistics import CONFIDENCE, student_quantile


def half_width(values: Sequence[float]) -> float:
    """Return half of the interval of Student's t around the mean of seeds; NaN of a single one."""
    if len(values) < 2:
        return math.nan
    quantile = student_quantile((1 + CONFIDENCE) / 2, len(values) - 1)
    return quantile * stdev(values) / math.sqrt(len(values))


def over_seeds(values: Sequence[float], form: str) -> str:
    """Return the mean of seeds, each written by `form`, with its interval where there are several."""
    mean = format(fmean(values), form)
    return mean if len(values) < 2 else f"{mean} ± {format(half_width(values), form.lstrip('+'))}"


def print_beside(lifts: Mapping[str, Mapping[str, float]], baseline: str) -> None:
    """Print how far each arm is from each kind of its baseline, seed by seed.

    Args:
        lifts: arm -> seed -> points more than before.
        baseline: fine-tuning on right responses of the start; what its arms' names begin with.
    """
    print("\nless fine-tuning on right responses of the start (above 0: the arm is better), points, "
          "95 % interval of Student's t around the difference of each seed")
    for arm in (name for name in lifts if not name.startswith(baseline)):
        for best in (name for name in lifts if name.startswith(baseline)):
            apart = [lift - lifts[best][seed] for seed, lift in lifts[arm].items() if seed in lifts[best]]
            if apart:
                print(f"  {arm:<10} less {best.removeprefix(baseline + '-')}   "
                      f"{over_seeds(apart, '+6.1f'):<14}   {', '.join(f'{value:+.1f}' for value in apart)}")

"""Mean and confidence interval of a figure over the seeds of a benchmark."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from megatron_sov.eval.statistics import CONFIDENCE, compute_student_quantile


def half_width(values: Sequence[float]) -> float:
    """Return half of the interval of Student's t around the mean of seeds; NaN of a single one."""
    if len(values) < 2:
        return math.nan
    quantile = compute_student_quantile((1 + CONFIDENCE) / 2, len(values) - 1)
    return quantile * stdev(values) / math.sqrt(len(values))


def over_seeds(values: Sequence[float], form: str) -> str:
    """Return the mean of seeds, each written by `form`, with its interval where there are several."""
    mean = format(fmean(values), form)
    return mean if len(values) < 2 else f"{mean} ± {format(half_width(values), form.lstrip('+'))}"

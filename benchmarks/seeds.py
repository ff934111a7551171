"""Mean and confidence interval of a figure over the seeds of a benchmark."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from megatron_sov.eval.statistics import CONFIDENCE, compute_student_quantile


def half_width(values: Sequence[float]) -> float:
    """Return half the width of Student's confidence interval of the mean over seeds; NaN for a single
    seed."""
    if len(values) < 2:
        return math.nan
    quantile = compute_student_quantile((1 + CONFIDENCE) / 2, len(values) - 1)
    return quantile * stdev(values) / math.sqrt(len(values))


def over_seeds(values: Sequence[float], form: str) -> str:
    """Format the mean over seeds with the format specification `form`; for several seeds with its
    interval."""
    mean = format(fmean(values), form)
    return mean if len(values) < 2 else f"{mean} ± {format(half_width(values), form.lstrip('+'))}"

"""Mean and confidence interval of a figure over the seeds of a benchmark."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from megatron_sov.eval.statistics import CONFIDENCE, compute_student_quantile


def compute_half_width(values: Sequence[float]) -> float:
    """Return half the width of Student's confidence interval of the mean; NaN for a single value."""
    if len(values) < 2:
        return math.nan
    quantile = compute_student_quantile((1 + CONFIDENCE) / 2, len(values) - 1)
    return quantile * stdev(values) / math.sqrt(len(values))


def format_over_seeds(values: Sequence[float], form: str) -> str:
    """Format the mean with the format specification `form`, and its interval if there are several values."""
    mean = format(fmean(values), form)
    return mean if len(values) < 2 else f"{mean} ± {format(compute_half_width(values), form.lstrip('+'))}"

"""How sure a share of right answers is."""

from __future__ import annotations

import math
from statistics import NormalDist

CONFIDENCE = 0.95


def wilson_interval(correct: int, samples: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return Wilson's score interval of a share (J. Am. Stat. Assoc. 22, 1927):
    what `correct` of `samples` does not refute.

    Its ends solve |correct / samples - p| = z sqrt(p (1 - p) / samples).

    Raises:
        ValueError: there is no sample, or `correct` is no count of them.
    """
    if not 0 <= correct <= samples or samples < 1:
        raise ValueError(f"{correct} of {samples} is no share")
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    share = correct / samples
    middle = (share + z2 / (2 * samples)) / (1 + z2 / samples)
    half = math.sqrt(z2 * (share * (1 - share) / samples + z2 / (4 * samples**2))) / (1 + z2 / samples)
    return (0.0 if correct == 0 else middle - half), (1.0 if correct == samples else middle + half)

"""How sure a share of right answers is, and a mean of such shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, variance

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
    return _score_interval(correct / samples, samples, confidence)


def mean_interval(shares: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return an interval of the mean that shares from 0 to 1 are drawn around, e.g. each prompt's pass@k.

    Wilson's interval with the effective sample size of Korn and Graubard (Survey Methodology 24, 1998): as
    many yes-or-no samples as would vary as much.  Shares that are all 0 or 1 give Wilson's own; where all
    prompts are solved it does not shrink to a point, as a bootstrap over prompts would.

    Raises:
        ValueError: there is none, or one is no share.
    """
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise ValueError("a mean needs shares from 0 to 1")
    share = fmean(shares)
    most = share * (1 - share)  # the variance of a yes or no; that of shares is no larger
    spread = variance(shares) * (len(shares) - 1) / len(shares) if len(shares) > 1 else most
    if most <= 0 or math.isclose(spread, most):
        return _score_interval(share, len(shares), confidence)
    # equal shares between 0 and 1 tell nothing about others: they count as no more than a thousand each
    return _score_interval(share, len(shares) * most / max(spread, most / 1000), confidence)


def _score_interval(share: float, samples: float, confidence: float) -> tuple[float, float]:
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    middle = (share + z2 / (2 * samples)) / (1 + z2 / samples)
    half = math.sqrt(z2 * (share * (1 - share) / samples + z2 / (4 * samples**2))) / (1 + z2 / samples)
    return (0.0 if share == 0 else middle - half), (1.0 if share == 1 else middle + half)

"""What seeds say of a claim: Student's t over paired differences, and how likely a true one would be seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist, fmean, stdev

import numpy as np

from megatron_sov.bench.reproduce.claims import Claim, OrderTest
from megatron_sov.eval.statistics import CONFIDENCE, student_quantile

Figures = Mapping[str, Mapping[str, float]]
"""Arm -> measure -> what it was."""
NUM_NODES = 4001


class Outcome(StrEnum):
    """What a claim comes to."""

    HOLDS = "holds"
    FAILS = "does not hold"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Tested:
    """A test over seeds."""

    test: OrderTest
    differences: tuple[float, ...]
    """Higher less lower, seed by seed."""
    interval: tuple[float, float] | None
    """Of their mean; None: one seed tells nothing."""
    outcome: Outcome
    power: float
    """Chance to see the difference that was planned for, with the seeds of the claim."""


def paired_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Return Student's interval of the mean; None of fewer than two."""
    if len(differences) < 2:
        return None
    half = (student_quantile((1 + CONFIDENCE) / 2, len(differences) - 1) * stdev(differences)
            / math.sqrt(len(differences)))
    return fmean(differences) - half, fmean(differences) + half


def power_of(difference: float, sd: float, num_seeds: int) -> float:
    """Return how often the interval of paired differences lies above 0 where they are drawn around
    `difference`: P(T > t) of a noncentral t, as the integral of Phi(d sqrt(n) / sd - t s) over s, the spread
    of a sample beside the true one, s^2 (n - 1) ~ chi^2."""
    freedom = num_seeds - 1
    quantile = student_quantile((1 + CONFIDENCE) / 2, freedom)
    s = np.linspace(1e-9, 1 + 12 / math.sqrt(2 * freedom), NUM_NODES)
    log_density = ((freedom - 1) * np.log(s) - freedom * s**2 / 2 + freedom / 2 * math.log(freedom / 2)
                   + math.log(2) - math.lgamma(freedom / 2))
    normal = NormalDist()
    above = np.array([normal.cdf(difference * math.sqrt(num_seeds) / sd - quantile * value) for value in s])
    return float(np.trapezoid(np.exp(log_density) * above, s))


def apply_test(test: OrderTest, claim: Claim, found: Mapping[int, Figures]) -> Tested:
    """Return what seeds say of a test; fewer of them than the claim asks for decide nothing."""
    differences = tuple(figures[test.higher][test.measure] - figures[test.lower][test.measure]
                        for _, figures in sorted(found.items()))
    interval = paired_interval(differences)
    outcome = Outcome.UNDECIDED
    if interval is not None and len(differences) >= claim.seeds:
        outcome = (Outcome.HOLDS if interval[0] > test.more_than
                   else Outcome.FAILS if interval[1] <= test.more_than else Outcome.UNDECIDED)
    return Tested(test, differences, interval, outcome,
                  power_of(test.power.difference, test.power.sd, claim.seeds))


def outcome_of(tested: Sequence[Tested]) -> Outcome:
    """Return what the tests of a claim come to: it holds where all do."""
    outcomes = {t.outcome for t in tested}
    if Outcome.FAILS in outcomes:
        return Outcome.FAILS
    return Outcome.HOLDS if outcomes == {Outcome.HOLDS} else Outcome.UNDECIDED

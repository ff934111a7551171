"""What seeds say of a claim: Student's t over paired differences, how likely a true one would be seen, and
the page that tells it beside the paper."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any

from megatron_sov.base.artifacts import to_json
from megatron_sov.base.pages.page import Chapter, PageSection, PageTable, render
from megatron_sov.bench.reproduce.claims import ClaimChange, ClaimsFile, OrderTest, PaperClaim, Registered
from megatron_sov.bench.reproduce.running import changed, claim_folder, codes_of, earlier_forms, seeds_of
from megatron_sov.eval.statistics import CONFIDENCE, student_quantile

Figures = Mapping[str, Mapping[str, float]]
"""Arm -> measure -> what it was."""
NUM_NODES = 4001
WHOLE = 1e4
"""From here on figures are told without a fraction."""
ROUNDING = 1e-9
"""Share of a figure within which differences are the same, but for how they are computed."""
PAGE = "reproduce.html"
HEAD = ["claim", "test", "bound", "difference over seeds", "planned", "power", "seeds", "verdict"]


class ClaimOutcome(StrEnum):
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
    outcome: ClaimOutcome
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
    import numpy as np

    freedom = num_seeds - 1
    quantile = student_quantile((1 + CONFIDENCE) / 2, freedom)
    s = np.linspace(1e-9, 1 + 12 / math.sqrt(2 * freedom), NUM_NODES)
    log_density = ((freedom - 1) * np.log(s) - freedom * s**2 / 2 + freedom / 2 * math.log(freedom / 2)
                   + math.log(2) - math.lgamma(freedom / 2))
    normal = NormalDist()
    above = np.array([normal.cdf(difference * math.sqrt(num_seeds) / sd - quantile * value) for value in s])
    return float(np.trapezoid(np.exp(log_density) * above, s))


def apply_test(test: OrderTest, claim: PaperClaim, found: Mapping[int, Figures]) -> Tested:
    """Return what seeds say of a test.

    Fewer of them than the claim asks for decide nothing, nor do seeds that draw nothing: where all give the
    same difference, it has no spread to be held against.
    """
    pairs = [(figures[test.higher][test.measure], figures[test.lower][test.measure])
             for _, figures in sorted(found.items())]
    differences = tuple(higher - lower for higher, lower in pairs)
    rounding = ROUNDING * max((abs(value) for pair in pairs for value in pair), default=0.0)
    interval = paired_interval(differences)
    outcome = ClaimOutcome.UNDECIDED
    if (interval is not None and len(differences) >= claim.seeds
            and max(differences) - min(differences) > rounding):
        outcome = (ClaimOutcome.HOLDS if interval[0] > test.more_than
                   else ClaimOutcome.FAILS if interval[1] <= test.more_than else ClaimOutcome.UNDECIDED)
    return Tested(test, differences, interval, outcome,
                  power_of(test.power.difference, test.power.sd, claim.seeds))


def outcome_of(tested: Sequence[Tested]) -> ClaimOutcome:
    """Return what the tests of a claim come to: it holds where all do."""
    outcomes = {t.outcome for t in tested}
    if ClaimOutcome.FAILS in outcomes:
        return ClaimOutcome.FAILS
    return ClaimOutcome.HOLDS if outcomes == {ClaimOutcome.HOLDS} else ClaimOutcome.UNDECIDED


@dataclass(frozen=True)
class Judged:
    """A claim, with what its seeds say."""

    registered: Registered
    found: Mapping[int, Figures]
    """Seed -> figures."""
    earlier: Mapping[str, str] = field(default_factory=dict)
    """Address of each form that ran before -> how it differs, and what it gave."""
    codes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Code that commands ran with -> setups and seeds that did."""

    @property
    def tested(self) -> list[Tested]:
        claim = self.registered.claim
        return [apply_test(test, claim, self.found) for test in claim.tests]

    @property
    def outcome(self) -> ClaimOutcome:
        return outcome_of(self.tested)


def judge(output: Path, claim: Registered, found: Mapping[int, Figures]) -> Judged:
    """Return a claim with its seeds and with what earlier forms of it gave."""
    earlier = {}
    for address, declared in earlier_forms(output, claim).items():
        seeds = seeds_of(claim_folder(output, claim).with_name(address), declared)
        gave = "; ".join(f"seed {seed}: {json.dumps(figures)}" for seed, figures in sorted(seeds.items()))
        earlier[address] = ("; ".join(changed(declared, claim.declared))
                            + f". It gave: {gave or 'no complete seed'}")
    return Judged(claim, found, earlier, codes_of(output, claim))


def result(judged: Sequence[Judged]) -> dict[str, Any]:
    """Return results as plain values."""
    return {"claims": {
        j.registered.name: {
            "sha256": j.registered.sha256, "outcome": j.outcome, "code": j.codes,
            "seeds": {str(seed): figures for seed, figures in sorted(j.found.items())},
            "tests": [{"test": _name(t.test), "differences": t.differences, "interval": t.interval,
                       "bound": t.test.more_than, "power": round(t.power, 4), "outcome": t.outcome}
                      for t in j.tested]} for j in judged}}


def rows(judged: Sequence[Judged]) -> PageTable:
    """Return the table of all tests."""
    return PageTable(HEAD, [
        [j.registered.name, _name(t.test), f"{t.test.more_than:g}", differences_told(t.differences),
         f"{t.test.power.difference:g} (sd {t.test.power.sd:g})", f"{t.power:.0%}",
         f"{len(t.differences)} of {j.registered.claim.seeds}", t.outcome]
        for j in judged for t in j.tested])


def differences_told(values: Sequence[float]) -> str:
    """Return a mean with its interval, as far as it is known, both with a sign."""
    return _told(values, "+")


def figures_told(values: Sequence[float]) -> str:
    """Return a mean with its interval, as far as it is known."""
    return _told(values, "")


def _told(values: Sequence[float], sign: str) -> str:
    if not values:
        return "has not run"
    mean, found = _digits(fmean(values), sign), paired_interval(values)
    return mean + (f" ({_digits(found[0], sign)} to {_digits(found[1], sign)})" if found else "")


def _digits(value: float, sign: str = "", digits: int = 4) -> str:
    # 39,132 and not 3.913e+04
    return f"{value:{sign},.0f}" if abs(value) >= WHOLE else f"{value:{sign}.{digits}g}"


def _name(test: OrderTest) -> str:
    return f"{test.lower} < {test.higher} in {test.measure}"


def page(claims: ClaimsFile, judged: Sequence[Judged]) -> str:
    """Return the page as HTML."""
    held = sum(j.outcome == ClaimOutcome.HOLDS for j in judged)
    left = len(claims.claims) - len(judged)
    return render("Reproduction", f"{claims.seed}: {held} of {len(judged)} claims hold"
                  + (f", {left} more have not run" if left else ""), claims.paper,
                  [_chapter(j) for j in judged], overview=("Claims", rows(judged)), anchor="claim")


def _chapter(judged: Judged) -> Chapter:
    registered, claim, found = judged.registered, judged.registered.claim, sorted(judged.found.items())
    arms = PageTable(["arm", *(f"{name}, {m.unit}" for name, m in claim.measures.items()), "seed by seed"], [
        [arm, *(figures_told([f[arm][name] for _, f in found]) for name in claim.measures),
         "; ".join(f"{seed}: " + ", ".join(_digits(f[arm][name], digits=5) for name in claim.measures)
                   for seed, f in found)] for arm in claim.arms])
    planned = PageTable(["test", "difference to be seen", "sd", "power", "known from"], [
        [_name(t.test), f"{t.test.power.difference:g}", f"{t.test.power.sd:g}", f"{t.power:.0%}",
         t.test.power.source] for t in judged.tested])
    return Chapter(registered.name, judged.outcome, [], [
        PageSection("The paper", f"{claim.says} ({claim.source})",
                    tables=[PageTable([*claim.published.head], [[*row] for row in claim.published.rows])]),
        PageSection("Here", claim.here, tables=[arms, rows([judged])]),
        PageSection("Planned before the runs",
                    f"{claim.seeds} seeds, {claim.minutes:g} minutes of one core. Intervals are Student's t "
                    "over paired seeds, 95 %; a test holds where the whole interval lies above the bound, "
                    "does not hold where it lies below, and is undecided otherwise; a claim holds where all "
                    "its tests do.",
                    tables=[planned]),
        PageSection("Changes", "Each form that ran before, and what it gave." if judged.earlier or
                    claim.changes else "None: the arms are as they were before the first run.",
                    tables=_changes(claim.changes, judged.earlier)),
        PageSection("Code", "Hash of the sources that the commands ran with. " + (
                    "All ran with one." if len(judged.codes) == 1 else "They ran with more than one: where "
                    "that changed an arm, its seeds are not of one kind. Run all with one in a new folder."
                    if judged.codes else "Nothing has run."),
                    tables=[PageTable(["sha256", "ran with it"], [
                        [code or "not told", ", ".join(parts)] for code, parts in judged.codes.items()])]
                    if judged.codes else []),
        PageSection("Declared", f"sha256 {registered.sha256}", json=to_json(dict(registered.declared)))])


def _changes(changes: Sequence[ClaimChange], earlier: Mapping[str, str]) -> list[PageTable]:
    if not changes:
        return []
    return [PageTable(["form", "date", "why", "what it was, and gave here"], [
        [change.sha256, change.date, change.what,
         next((text for address, text in earlier.items() if change.sha256.startswith(address)),
              "has not run in this folder")] for change in changes])]

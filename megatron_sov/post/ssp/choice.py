"""Which checkpoint is best in a domain, how sure that is, and what a merged one gains over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from megatron_sov.eval.pass_at_k import JudgedItem, pass_at_k
from megatron_sov.eval.statistics import difference_interval


@dataclass(frozen=True)
class MeasuredCheckpoint:
    """What one checkpoint does in one domain."""

    checkpoint: str
    """Its name."""
    domain: str
    figures: Mapping[str, Any]
    """Of `JudgedItem.figures`."""
    solved: Mapping[int, Mapping[str, float]]
    """k -> problem -> its pass@k; problems with fewer than k scored samples are left out."""

    @staticmethod
    def of(checkpoint: str, domain: str, judged: JudgedItem, ks: Sequence[int]) -> MeasuredCheckpoint:
        """Return what the judged responses of a checkpoint say."""
        return MeasuredCheckpoint(checkpoint, domain, judged.figures(ks), {
            k: {problem: pass_at_k(counts.num_scored, counts.num_right, k)
                for problem, counts in judged.prompts.items() if counts.num_scored >= k} for k in ks})

    def value(self, k: int) -> float:
        """Return pass@k, the mean over problems."""
        return fmean(self.solved[k].values())

    def row(self, ks: Sequence[int]) -> dict[str, Any]:
        """Return the figures of a table's cell."""
        return {"checkpoint": self.checkpoint, "domain": self.domain,
                **{name: self.figures.get(name)
                   for name in ("num_prompts", "num_unscored", "mean_reward", "share_at_limit")},
                "pass_at_k": [e for e in self.figures["pass_at_k"] if e["k"] in ks]}


@dataclass(frozen=True)
class DomainChoice:
    """The best checkpoint of a domain: the argmax of pass@k, of equals the first one."""

    domain: str
    checkpoint: str
    value: float
    """Its pass@k; the greatest of several estimates is likely to flatter."""
    as_good: tuple[str, ...]
    """The others that these problems do not tell from it: the 95 % interval of the mean difference over
    problems reaches 0."""

    def row(self) -> dict[str, Any]:
        return {**asdict(self), "as_good": list(self.as_good), "is_clear": not self.as_good}


def choose(candidates: Sequence[MeasuredCheckpoint], k: int) -> DomainChoice:
    """Return the best of the candidates in one domain, the earlier ones first."""
    best = max(candidates, key=lambda measured: measured.value(k))  # the first of equals
    as_good = tuple(other.checkpoint for other in candidates
                    if other is not best and not _gain(best, other, k)[1][0] > 0)
    return DomainChoice(best.domain, best.checkpoint, best.value(k), as_good)


def gain(merged: MeasuredCheckpoint, expert: MeasuredCheckpoint, k: int) -> dict[str, Any]:
    """Return how much more of a domain a merged checkpoint solves than the domain's expert."""
    value, interval = _gain(merged, expert, k)
    return {"checkpoint": merged.checkpoint, "domain": merged.domain, "expert": expert.checkpoint, "k": k,
            "gain": value, "interval": list(interval)}


def _gain(one: MeasuredCheckpoint, other: MeasuredCheckpoint, k: int) -> tuple[float, tuple[float, float]]:
    """Return the mean difference of pass@k over common problems, and its 95 % interval; without a common
    problem it may be anything."""
    differences = [share - other.solved[k][problem] for problem, share in one.solved[k].items()
                   if problem in other.solved[k]]
    return (fmean(differences), difference_interval(differences)) if differences else (0.0, (-1.0, 1.0))

"""How far an engine's log-probabilities are from the trainer's, of the same tokens under the same weights.

Two programs compute one distribution with other kernels and roundings.  What they disagree by is bias in
every importance ratio that is built on the engine's numbers, so it is measured where both stand side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LARGE_NATS = 0.1
"""A difference by which a token's probability changes by a tenth: rounding alone is far below."""


@dataclass(frozen=True)
class LogprobGap:
    """Sums over tokens; gaps of several batches add up."""

    tokens: int
    """How many are compared."""
    sum_nats: float
    """Of the differences without their sign."""
    largest_nats: float
    """The largest of these."""
    large: int
    """Tokens whose difference is above the threshold."""
    sum_kl_nats: float
    """Of each token's estimate of the divergence of the trainer's distribution from the engine's."""

    def __add__(self, other: LogprobGap) -> LogprobGap:
        return LogprobGap(self.tokens + other.tokens, self.sum_nats + other.sum_nats,
                          max(self.largest_nats, other.largest_nats), self.large + other.large,
                          self.sum_kl_nats + other.sum_kl_nats)

    def meters(self) -> dict[str, tuple[float, float]]:
        """Return sum and count of each mean, by its name: what an objective's meters are."""
        return {"engine_gap_nats": (self.sum_nats, self.tokens),
                "engine_gap_large": (self.large, self.tokens),
                "engine_gap_kl_nats": (self.sum_kl_nats, self.tokens)}


@torch.no_grad()
def logprob_gap(engine: torch.Tensor, trainer: torch.Tensor, sampled: torch.Tensor | None = None,
                large_nats: float = LARGE_NATS) -> LogprobGap:
    """Compare log-probabilities of tokens that an engine drew.

    The divergence is estimated as by John Schulman, "Approximating KL Divergence" (2020), k3: for a token
    from q, ``r - 1 - log r`` with r = p / q has the expectation KL(q || p), and is never negative.  Here q is
    the engine's distribution and p the trainer's.

    Args:
        engine: log-probabilities as `Generated.logprobs` has them.
        trainer: of the same tokens, at the same temperature.
        sampled: which of them the engine drew; all unless given.
        large_nats: the threshold of `LogprobGap.large`.
    """
    if engine.shape != trainer.shape:
        raise ValueError(f"the engine's log-probabilities {list(engine.shape)} are not of the trainer's "
                         f"tokens {list(trainer.shape)}")
    log_ratio = trainer.double() - engine.double()
    if sampled is not None:
        log_ratio = log_ratio[sampled.bool()]
    apart = log_ratio.abs()
    return LogprobGap(apart.numel(), float(apart.sum()), float(apart.max()) if apart.numel() else 0.0,
                      int((apart > large_nats).sum()), float((torch.expm1(log_ratio) - log_ratio).sum()))

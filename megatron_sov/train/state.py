"""Plain values of a training run: how far it is, and what a step gave."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TrainState:
    """The loop's own counters; in every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens consumed, padding not counted."""
    wall_s: float = 0.0
    """Seconds that the run has worked, over all its restarts."""
    trained_tokens: int = 0
    """Longest samples that the weights have learned from, in tokens: here, or in the runs before."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave."""

    loss: float
    """Total loss: coefficients times normalised terms."""
    losses: dict[str, float]
    """Term -> normalised loss."""
    losses_by_source: dict[str, float]
    """Source -> mean loss of its targets in this batch."""
    grad_norm: float
    """Before clipping."""
    lr: float
    """Learning rate of the step."""
    num_tokens: int
    """Tokens of the batch."""
    phase: str
    """Phase of the curriculum."""
    padding_share: float
    """Part of the batch that was padding."""
    seq_len: int
    """Tokens of a sample."""
    seconds: float = field(default=0.0)
    """Wall time of the step."""
    meters: dict[str, float] = field(default_factory=dict)
    """Meter of the objective -> its mean over the batch."""

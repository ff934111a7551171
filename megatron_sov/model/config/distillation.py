"""Learning from a teacher: which divergence of its distribution, and what of it is kept."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sov.base.settings import AboveZero, NotNegative, NotNegativeInt, Share


@dataclass(frozen=True)
class DistillationConfig:
    """What objective `distill` makes of what a teacher says of the data."""

    beta: Share = 0.0
    """Which generalised Jensen-Shannon divergence (arXiv 2306.13649, equation 1): 0 forward KL, 1 reverse
    KL, between them a mixture of both models stands in the middle."""
    temperature: AboveZero = 1.0
    """What the logits of student and teacher are divided by."""
    top_k: NotNegativeInt = 0
    """Most probable tokens of the teacher that are kept and learned from at each position; 0: its final
    hidden states, and with them the whole vocabulary."""
    keep_remainder: bool = True
    """top_k: what each model gives to all other tokens together is one event more; false: both are
    normalised over the teacher's tokens (arXiv 2601.18129)."""
    other_tokenizer: bool = False
    """top_k: the teacher's tokens are other ones than the student's; it is heard byte by byte, and its
    probabilities become those of the student's tokens."""
    ce_coeff: NotNegative = 0.0
    """Weight of an auxiliary cross-entropy on the tokens of the data, over the same positions."""

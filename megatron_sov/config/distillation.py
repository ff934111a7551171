"""Learning from a teacher: which divergence of its distribution, and what of it is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sov.config.model import STRICT


@dataclass(frozen=True)
class DistillationConfig:
    """What objective `distill` makes of what a teacher says of the data."""

    __pydantic_config__ = STRICT
    beta: float = 0.0
    """Which generalised Jensen-Shannon divergence (arXiv 2306.13649, equation 1): 0 forward KL, 1 reverse
    KL, between them a mixture of both models stands in the middle."""
    temperature: float = 1.0
    """What the logits of student and teacher are divided by."""
    top_k: int = 0
    """Most probable tokens of the teacher that are kept and learned from at each position; 0: its final
    hidden states, and with them the whole vocabulary."""
    keep_remainder: bool = True
    """top_k: what each model gives to all other tokens together is one event more; false: both are
    normalised over the teacher's tokens (arXiv 2601.18129)."""
    other_tokenizer: bool = False
    """top_k: the teacher's tokens are other ones than the student's; it is heard byte by byte, and its
    probabilities become those of the student's tokens."""
    ce_coeff: float = 0.0
    """Weight of an auxiliary cross-entropy on the tokens of the data, over the same positions."""

    def problems(self, vocab_size: int) -> list[str]:
        """Return one sentence for every rule that these settings break.

        Args:
            vocab_size: the model's.
        """
        p = []
        if not 0 <= self.beta <= 1:
            p.append(f"distillation.beta = {self.beta} must lie in [0, 1]")
        if not 0 < self.temperature < math.inf:
            p.append(f"distillation.temperature = {self.temperature} must be a number greater than 0")
        if self.top_k and not 0 < self.top_k < vocab_size:
            p.append(f"distillation.top_k = {self.top_k} must lie in [0, model.vocab_size = {vocab_size}); "
                     "0 is the whole vocabulary")
        if not self.keep_remainder and not self.top_k:
            p.append("distillation.keep_remainder = false belongs to distillation.top_k: over the whole "
                     "vocabulary nothing remains")
        if self.other_tokenizer and not self.top_k:
            p.append("distillation.other_tokenizer = true needs distillation.top_k > 0: of a teacher of "
                     "another tokenizer its most probable tokens are kept")
        if not 0 <= self.ce_coeff < math.inf:
            p.append(f"distillation.ce_coeff = {self.ce_coeff} must be a number that is not negative")
        return p

"""Learning from preferences: which loss, and how far the model may move from its reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_sov.config.model import STRICT

PreferenceMethod = Literal["dpo", "ipo", "dpo-norm", "simper", "grouper"]
WITH_REFERENCE = ("dpo", "ipo", "dpo-norm")
"""Methods that compare the model with the one that it started from."""


@dataclass(frozen=True)
class PreferenceConfig:
    """What objective `preference` makes of responses that were judged."""

    __pydantic_config__ = STRICT
    method: PreferenceMethod = "dpo"
    """dpo: direct preference optimisation (arXiv 2305.18290); ipo: its squared form (arXiv 2310.12036);
    dpo-norm: dpo over means instead of sums of a response's log-probabilities (arXiv 2411.15124); simper:
    inverse perplexities, without a reference and without beta (arXiv 2502.00883); grouper: the same over
    groups of responses with rewards (K-EXAONE)."""
    beta: float = 0.1
    """dpo, ipo, dpo-norm: how strongly the model is held to its reference; the larger, the closer."""
    label_smoothing: float = 0.0
    """dpo, dpo-norm: share of pairs that are taken to be the wrong way round (arXiv 2305.18290, appendix)."""
    chosen_coeff: float = 0.0
    """Weight of an auxiliary cross-entropy on chosen responses, normalised over its own tokens
    (arXiv 2404.19733)."""

    def problems(self) -> list[str]:
        """Return one sentence for every rule that these settings break."""
        p = []
        if not 0 < self.beta < math.inf:
            p.append(f"preference.beta = {self.beta} must be a number greater than 0")
        if not 0 <= self.label_smoothing < 0.5:
            p.append(f"preference.label_smoothing = {self.label_smoothing} must lie in [0, 0.5)")
        if self.label_smoothing and self.method not in ("dpo", "dpo-norm"):
            p.append(f"preference.label_smoothing = {self.label_smoothing} belongs to dpo and dpo-norm, not "
                     f"to preference.method = {self.method}")
        if not 0 <= self.chosen_coeff < math.inf:
            p.append(f"preference.chosen_coeff = {self.chosen_coeff} must be a number that is not negative")
        if self.chosen_coeff and self.method == "grouper":
            p.append(f"preference.chosen_coeff = {self.chosen_coeff}: groups have no chosen response")
        return p

"""Learning from preferences: which loss, and how far the model may move from its reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Lt

from megatron_sov.base.settings import AboveZero, NotNegative

PreferenceMethod = Literal["dpo", "ipo", "dpo-norm", "simpo", "orpo", "kto", "simper", "grouper"]
WITH_REFERENCE = ("dpo", "ipo", "dpo-norm", "kto")
"""Methods that compare the model with the one that it started from."""
BETAS = {"dpo": 0.1, "ipo": 0.1, "dpo-norm": 5.0, "simpo": 2.0, "orpo": 0.1, "kto": 0.1}
"""Method -> its `beta` where the run says none: DPO's says nothing about a loss over means."""
SMOOTHED = ("dpo", "dpo-norm", "simpo")
"""Methods that may take some of the pairs to be the wrong way round."""


@dataclass(frozen=True)
class PreferenceConfig:
    """What objective `preference` makes of responses that were judged."""

    method: PreferenceMethod = "dpo"
    """dpo: direct preference optimisation (arXiv 2305.18290); ipo: its squared form (arXiv 2310.12036);
    dpo-norm: dpo over means instead of sums of a response's log-probabilities (arXiv 2411.15124); simpo: the
    same without a reference, with a margin (arXiv 2405.14734); orpo: the ratio of odds beside the
    cross-entropy on chosen responses, without a reference (arXiv 2403.07691); kto: single responses that were
    judged good or bad (arXiv 2402.01306); simper: inverse perplexities, without a reference and without beta
    (arXiv 2502.00883); grouper: the same over groups of responses with rewards (K-EXAONE)."""
    beta: AboveZero | None = None
    """dpo, ipo, dpo-norm, kto: how strongly the model is held to its reference; the larger, the closer.
    simpo: how steeply the loss falls with the difference.  orpo: weight of the odds ratio, its paper's
    lambda.  null: the method's own: 0.1, of dpo-norm 5 and of simpo 2, as their authors take."""
    simpo_gamma: NotNegative = 0.5
    """simpo: margin by which the chosen response has to lead, in units of beta times log-probability per
    token (its authors take 0.3 to 5)."""
    desirable_weight: NotNegative = 1.0
    """kto: weight of responses that were judged good; its paper has good and bad ones weigh between 1 : 1 and
    4 : 3 in all, number times weight."""
    undesirable_weight: NotNegative = 1.0
    """kto: weight of responses that were judged bad."""
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    """dpo, dpo-norm, simpo: share of pairs that are taken to be the wrong way round (arXiv 2305.18290,
    appendix)."""
    chosen_coeff: NotNegative = 0.0
    """Weight of an auxiliary cross-entropy on chosen responses, normalised over its own tokens
    (arXiv 2404.19733)."""

    @property
    def strength(self) -> float:
        """`beta`, or else the method's; 0 of a method that has none."""
        return BETAS.get(self.method, 0.0) if self.beta is None else self.beta

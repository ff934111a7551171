"""Rejection of steps whose loss or gradient norm is not finite, or far above the usual values.

The rule is OLMo-core's (`SkipStepOptimizer`): a value is rejected above mean + `sigma` standard deviations
of the last `window_steps` steps, once the window holds half of them and at least 20. As in OLMo-core,
values of rejected steps enter the window, so that a lasting change becomes usual; unlike there, low values
are accepted. Several losses above the limit in a row make the weights suspect. Large gradients at a usual
loss do not: a model that begins to learn a new skill has them.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_sov.engine.parallel import collectives
from megatron_sov.engine.parallel.values import sum_dict
from megatron_sov.model.config import GuardConfig
from megatron_sov.train.data.ledger import Ledger

MIN_STEPS = 20
"""Smallest window in which values above the limit are rejected."""


class StepGuard:
    """Decides before each update whether the step is learned, with one decision for every rank."""

    def __init__(self, settings: GuardConfig, is_main: bool) -> None:
        """Start with empty windows; `is_main`: whether this process is rank 0."""
        self._settings, self._is_main = settings, is_main
        self.compares_losses = True
        """Whether to reject a loss above the limit; a non-finite loss is always rejected."""
        self._losses: list[float] = []
        self._grad_norms: list[float] = []
        self.consecutive_rejections = 0
        """Steps rejected since the last learned step."""
        self._consecutive_suspects = 0
        self.rollbacks: list[dict[str, int]] = []
        """`{"at": step, "to": checkpoint step}` for each rollback."""
        self.rejection: StepRejection | None = None
        """Why the last step was rejected, or None if it was learned."""

    @property
    def wants_rollback(self) -> bool:
        """Whether `guards.rollback_after_skips` consecutive rejections made the weights suspect."""
        return 0 < self._settings.rollback_after_skips <= self._consecutive_suspects

    def reset_rejections(self) -> None:
        """Count rejections from 0, after a learned step or a rollback."""
        self.consecutive_rejections, self._consecutive_suspects, self.rejection = 0, 0, None

    def begin_step(self, step: int, ledger: Ledger) -> None:
        """Clear the windows if sample length or blend change at `step` (from 0)."""
        if step and _get_data_kind(ledger, step - 1) != _get_data_kind(ledger, step):
            # the usual loss changes with length and blend: the first steps would look like outliers
            self._losses, self._grad_norms = [], []

    def accept_step(self, loss: float, grad_norm: float) -> bool:
        """Return whether the step may be learned; called before the update. Collective.

        A non-finite value on any rank rejects the step. The windows contain values of rank 0, which
        checkpoints store.
        """
        is_rejected = self._find_rejection(loss, grad_norm) is not None
        # ranks above 0 send zeros, so that the sums are the values of rank 0
        sums = sum_dict({"rejections": float(is_rejected), "loss": loss if self._is_main else 0.0,
                         "grad_norm": grad_norm if self._is_main else 0.0}, collectives.all_reduce_world)
        main_loss, main_grad_norm = sums["loss"], sums["grad_norm"]
        if not sums["rejections"]:
            self._add_to_windows(main_loss, main_grad_norm)
            self.reset_rejections()
            return True
        self.rejection = self._find_rejection(main_loss, main_grad_norm)
        if self.rejection is None:
            # rank 0 has usual values, so NaN was computed on another rank
            self.rejection = StepRejection("another process has a number that is not finite", main_loss,
                                           main_grad_norm, finite=False, weights_suspect=True)
        self.consecutive_rejections += 1
        if self.rejection.weights_suspect:
            self._consecutive_suspects += 1
        # NaN would make every mean NaN
        if self.rejection.finite:
            self._add_to_windows(main_loss, main_grad_norm)
        return False

    def _add_to_windows(self, loss: float, grad_norm: float) -> None:
        for window, value in ((self._losses, loss), (self._grad_norms, grad_norm)):
            window.append(value)
            del window[:-self._settings.window_steps]

    def _find_rejection(self, loss: float, grad_norm: float) -> "StepRejection | None":
        figures = [("loss", loss, self._losses), ("gradient norm", grad_norm, self._grad_norms)]
        for name, value, _ in figures:
            if not math.isfinite(value):
                return StepRejection(f"the {name} is {value:g}", loss, grad_norm, finite=False,
                                     weights_suspect=True)
        if not (self._settings.skip and self._settings.sigma):
            return None
        if not self.compares_losses:
            del figures[0]
        # the standard deviation of a few steps is noise: until then every finite value is accepted
        min_steps = max(MIN_STEPS, self._settings.window_steps // 2)
        for name, value, window in figures:
            if len(window) < min_steps:
                continue
            mean, sigma = float(np.mean(window)), float(np.std(window, ddof=1))
            # one-sided: an unusually low loss or norm does no harm
            if value > mean + self._settings.sigma * sigma:
                distance = (value - mean) / sigma if sigma else math.inf
                reason = (f"the {name} is {value:g}, {distance:.1f} "
                          f"standard deviations above the mean {mean:g} of the last {len(window)} steps")
                return StepRejection(reason, loss, grad_norm, finite=True, weights_suspect=name == "loss")
        return None

    def state(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "grad_norms": list(self._grad_norms),
                "in_a_row": self.consecutive_rejections, "suspect_in_a_row": self._consecutive_suspects,
                "rollbacks": list(self.rollbacks)}

    def restore(self, state: dict[str, Any]) -> None:
        self._losses, self._grad_norms = list(state["losses"]), list(state["grad_norms"])
        self.consecutive_rejections = state["in_a_row"]
        self._consecutive_suspects = state["suspect_in_a_row"]
        self.rollbacks = list(state["rollbacks"])


@dataclass(frozen=True)
class StepRejection:
    """Reason for rejecting a step, with rank 0's loss and gradient norm."""

    reason: str
    """Sentence for the user, without a period."""
    loss: float
    """Total loss on rank 0."""
    grad_norm: float
    """Gradient norm on rank 0, before clipping."""
    finite: bool
    """Whether loss and gradient norm are finite on every rank."""
    weights_suspect: bool
    """Whether bad weights may be the cause; a high gradient norm alone can come from the data."""


def _get_data_kind(ledger: Ledger, step: int) -> tuple[Any, ...]:
    entry = ledger.get_entry(step)
    return entry.seq_len, entry.weights

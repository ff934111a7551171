"""Steps that must not be learned: a loss or gradient norm that is no finite number,
or far above what is usual.

The rule is OLMo-core's (`SkipStepOptimizer`): more than `sigma` standard deviations above the mean of the
last `window_steps` steps, once there are half as many, at least 20.  As there the values of refused steps
enter the window, so that what lasts becomes usual.  Unlike there only values above the mean count.  Weights
whose losses are too high for several batches in a row are at fault themselves; large gradients at a usual
loss are not a reason to give weights up, for a model that begins to learn something new has them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_sov.engine.parallel import collectives
from megatron_sov.engine.parallel.values import sum_dict
from megatron_sov.model.config import GuardConfig
from megatron_sov.train.data.ledger import Ledger

MIN_STEPS = 20
"""Steps that say what is usual, at least."""


@dataclass(frozen=True)
class StepRejection:
    """Why a step was refused."""

    reason: str
    """In words."""
    loss: float
    """Its loss, as rank 0 has it."""
    grad_norm: float
    """Its gradient norm, as rank 0 has it."""
    finite: bool
    """Whether both are numbers, on every process."""
    weights_suspect: bool
    """Whether it was more than a large gradient."""


class StepGuard:
    """Says before each update whether it may be done; the same on every process."""

    def __init__(self, settings: GuardConfig, is_main: bool) -> None:
        """Begin without a step.

        Args:
            settings: what is refused.
            is_main: whether this is rank 0.
        """
        self._settings, self._is_main = settings, is_main
        self.compares_losses = True
        """Whether a loss far above the others is a reason; a loss that is not finite always is."""
        self._losses: list[float] = []
        self._grad_norms: list[float] = []
        self._usual_then: tuple[list[float], list[float]] = [], []
        self.consecutive_rejections = 0
        """Steps refused since the last one that was learned."""
        self._suspect_in_a_row = 0
        self.rollbacks: list[dict[str, int]] = []
        """``{"at": step, "to": step of the checkpoint}`` of each time that weights were taken back."""
        self.rejection: StepRejection | None = None
        """Why the last step was refused, if it was."""

    @property
    def wants_rollback(self) -> bool:
        """Whether so many steps were refused in a row, for more than their gradients,
        that the weights must be at fault."""
        return 0 < self._settings.rollback_after_skips <= self._suspect_in_a_row

    def reset_rejections(self) -> None:
        """Count anew: a step was learned, or other weights are judged from now on."""
        self.consecutive_rejections, self._suspect_in_a_row, self.rejection = 0, 0, None

    def enter(self, step: int, ledger: Ledger) -> None:
        """Begin a step (0-based): what was usual no longer is, where the data change."""
        if step and _kind_of_data(ledger, step - 1) != _kind_of_data(ledger, step):
            # another length or blend has another usual loss: its first steps would all look like outliers
            self._losses, self._grad_norms = [], []

    def accept_step(self, loss: float, grad_norm: float) -> bool:
        """Return whether the step with these figures may be learned; called by all processes together,
        before the update.

        One process that sees a bad number is enough.  What is usual is judged by rank 0's figures, which go
        into the checkpoint.
        """
        objects = self._objection(loss, grad_norm) is not None
        # of all but rank 0 zeros, so that the sums are rank 0's figures
        told = sum_dict({"objections": float(objects), "loss": loss if self._is_main else 0.0,
                         "grad_norm": grad_norm if self._is_main else 0.0}, collectives.all_reduce_world)
        main_loss, main_grad_norm = told["loss"], told["grad_norm"]
        if not told["objections"]:
            self._remember(main_loss, main_grad_norm)
            self.reset_rejections()
            return True
        # what was usual is kept as it was: `loop.attribute` asks later whether other figures would have been
        # refused then
        self._usual_then = list(self._losses), list(self._grad_norms)
        # rank 0's figures may be sound where another process has NaN: then the reason is that one
        self.rejection = self._objection(main_loss, main_grad_norm) or StepRejection(
            "another process has a number that is not finite", main_loss, main_grad_norm, finite=False,
            weights_suspect=True)
        self.consecutive_rejections += 1
        if self.rejection.weights_suspect:
            self._suspect_in_a_row += 1
        # NaN would make every mean NaN; finite outliers enter, so that what lasts becomes usual
        if self.rejection.finite:
            self._remember(main_loss, main_grad_norm)
        return False

    def would_have_rejected(self, loss: float, grad_norm: float) -> bool:
        """Return whether the guard would have objected to these figures in the place of the step that it
        refused last."""
        now = self._losses, self._grad_norms
        self._losses, self._grad_norms = self._usual_then
        try:
            return self._objection(loss, grad_norm) is not None
        finally:
            self._losses, self._grad_norms = now

    def _remember(self, loss: float, grad_norm: float) -> None:
        for values, value in ((self._losses, loss), (self._grad_norms, grad_norm)):
            values.append(value)
            del values[:-self._settings.window_steps]

    def _objection(self, loss: float, grad_norm: float) -> StepRejection | None:
        figures = (("loss", loss, self._losses), ("gradient norm", grad_norm, self._grad_norms))
        for name, value, _ in figures:
            if not math.isfinite(value):
                return StepRejection(f"the {name} is {value:g}", loss, grad_norm, finite=False,
                               weights_suspect=True)
        if not (self._settings.skip and self._settings.sigma):
            return None
        # with few steps a standard deviation says nothing; then every finite number is accepted
        for name, value, usual in figures[0 if self.compares_losses else 1:]:
            if len(usual) >= max(MIN_STEPS, self._settings.window_steps // 2):
                mean, sigma = float(np.mean(usual)), float(np.std(usual, ddof=1))
                # one-sided: a loss or norm far below the others does no harm
                if value > mean + self._settings.sigma * sigma:
                    reason = (f"the {name} is {value:g}, {(value - mean) / sigma if sigma else math.inf:.1f} "
                              f"standard deviations above the mean {mean:g} of the last {len(usual)} steps")
                    return StepRejection(reason, loss, grad_norm, finite=True, weights_suspect=name == "loss")
        return None

    def state(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "grad_norms": list(self._grad_norms),
                "in_a_row": self.consecutive_rejections,
                "suspect_in_a_row": self._suspect_in_a_row, "rollbacks": list(self.rollbacks)}

    def restore(self, state: dict[str, Any]) -> None:
        self._losses, self._grad_norms = list(state["losses"]), list(state["grad_norms"])
        self.consecutive_rejections, self._suspect_in_a_row = state["in_a_row"], state["suspect_in_a_row"]
        self.rollbacks = list(state["rollbacks"])


def _kind_of_data(ledger: Ledger, step: int) -> tuple[Any, ...]:
    entry = ledger.at(step)
    return entry.seq_len, entry.weights

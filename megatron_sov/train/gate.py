"""What may end a stage before its last step: a gate that the loop asks after every step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from megatron_sov.train.trainer import Trainer


class Gate(Protocol):
    """Judges the model while it trains; a stage with a gate is complete when it has passed, and not before."""

    passed: bool
    """Whether the stage may end."""

    def begin(self, trainer: Trainer) -> None:
        """Judge the model before the first step of a new run; called by all processes together."""
        ...

    def check(self, trainer: Trainer) -> None:
        """Judge the model if a check is due after this step; called by all processes together."""
        ...

    def failure(self) -> str:
        """Return what did not pass, in one sentence and lines below it."""
        ...

    def state(self) -> dict[str, Any]:
        """Return plain values for the checkpoint."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        ...

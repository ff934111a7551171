"""What brings data that come while the run goes on: the loop asks it before every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from megatron_sov.train.checkpointer import Checkpointer
from megatron_sov.train.guards.gate import GateView
from megatron_sov.train.objectives.data_batches import DataBatches


class FeedView(GateView, Protocol):
    """What a feed sees of the run that it feeds."""

    @property
    def batches(self) -> DataBatches:
        """Those of the data order."""
        ...

    @property
    def checkpointer(self) -> Checkpointer:
        """The run's checkpoints: the data may wait for one that is still being written."""
        ...


class Feed(Protocol):
    """Makes the data of a step available."""

    def close(self) -> None:
        """End what it has at work, on each process; it is not asked again."""
        ...

    @property
    def meters(self) -> Mapping[str, float]:
        """Meter -> what the feed knows of the next step's data; on process 0 alone."""
        ...

    def conclude(self, view: FeedView, asked_to_stop: Callable[[], bool]) -> str | None:
        """Do what is left behind the last step; called as `bring` is, and again where a run is resumed that
        ended during it.

        Returns:
            None: nothing is left; else why the run has to end first.
        """
        ...

    def needs_checkpoint(self, step: int) -> bool:
        """Return whether others make its data of the checkpoint behind a step."""
        ...

    def state(self) -> dict[str, Any]:
        """As `Stateful.state`."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """As `Stateful.restore`."""
        ...

    def bring(self, view: FeedView, asked_to_stop: Callable[[], bool]) -> str | None:
        """See to it that the next step's data are there; called by all processes together, with no step
        watched and everything saved that was to be saved.

        Args:
            view: the run.
            asked_to_stop: whether this process was asked to stop.

        Returns:
            None: they are there; else why the run has to end until they are.

        Raises:
            UserError: they cannot be used.
        """
        ...

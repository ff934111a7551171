"""Protocol of a feed, which supplies data that appear during the run, such as rollouts."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from megatron_sov.train.checkpointer import Checkpointer
from megatron_sov.train.guards.gate import GateView
from megatron_sov.train.objectives.data_batches import DataBatches


class FeedView(GateView, Protocol):
    """The `Trainer` interface for feeds."""

    @property
    def batches(self) -> DataBatches:
        """Batches in the data order."""

    @property
    def checkpointer(self) -> Checkpointer:
        """The run's checkpoints: new data may depend on a checkpoint that is being written."""


class Feed(Protocol):
    """Supplies data for each step."""

    def close(self) -> None:
        """End background work on this process; called last."""

    @property
    def meters(self) -> Mapping[str, float]:
        """Meter -> value for the next step's data, on rank 0 only."""

    def prepare_data(self, view: FeedView, asked_to_stop: Callable[[], bool]) -> str | None:
        """Make the next step's data available, after due checkpoints are saved. Collective.

        Returns the reason to end the run if the data are missing, else None. Raises `UserError` if the data
        cannot be used.
        """

    def finish(self, view: FeedView, asked_to_stop: Callable[[], bool]) -> str | None:
        """Do the remaining work after the last step, also after a resume; return as `prepare_data`."""

    def needs_checkpoint(self, step: int) -> bool:
        """Return whether data will be generated from the checkpoint after `step`."""

    def state(self) -> dict[str, Any]:
        """See `Stateful.state`."""

    def restore(self, state: dict[str, Any]) -> None:
        """See `Stateful.restore`."""

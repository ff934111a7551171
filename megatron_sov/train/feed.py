"""Protocol of a feed: data that become available during the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from megatron_sov.train.checkpointer import Checkpointer
from megatron_sov.train.guards.gate import GateView
from megatron_sov.train.objectives.data_batches import DataBatches


class FeedView(GateView, Protocol):
    """Part of the trainer that a feed uses."""

    @property
    def batches(self) -> DataBatches:
        """Batches of the data order."""

    @property
    def checkpointer(self) -> Checkpointer:
        """Checkpoints of the run: data may wait for a checkpoint that is still being written."""


class Feed(Protocol):
    """Makes the data of each step available."""

    def close(self) -> None:
        """End background work on this process; no other method is called afterwards."""

    @property
    def meters(self) -> Mapping[str, float]:
        """Meter -> value for the data of the next step; on rank 0 only."""

    def bring(self, view: FeedView, asked_to_stop: Callable[[], bool]) -> str | None:
        """Make the data of the next step available. Collective; due checkpoints are saved before.

        Returns:
            None if the data are available, otherwise the reason why the run has to end first.

        Raises:
            UserError: the data cannot be used.
        """

    def conclude(self, view: FeedView, asked_to_stop: Callable[[], bool]) -> str | None:
        """Do the remaining work after the last step, also after a resume. Returns as `bring`."""

    def needs_checkpoint(self, step: int) -> bool:
        """Return whether data are generated from the checkpoint after a step."""

    def state(self) -> dict[str, Any]:
        """As `Stateful.state`."""

    def restore(self, state: dict[str, Any]) -> None:
        """As `Stateful.restore`."""

"""What an objective is made with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from megatron_sov.engine.mcore.parallel.world import ParallelWorld
from megatron_sov.model.config import RunConfig
from megatron_sov.train.objectives.data_batches import DataBatches


@dataclass(frozen=True)
class ObjectiveContext:
    """The run around an objective, on one process."""

    config: RunConfig
    """Resolved settings."""
    batches: DataBatches
    """Those of the data order."""
    world: ParallelWorld
    """This process's place."""
    folder: Path
    """The run's folder."""
    write_event: Callable[..., None]
    """`write_event(name, **fields)` adds an event to the run's; dropped on all processes but rank 0, and
    before the run has begun."""
    waiting: Callable[[], AbstractContextManager[None]]
    """`with waiting(): ...` around what may take longer than `guards.hang_timeout_s`, such as rollouts: the
    watch over the step begins anew behind it."""

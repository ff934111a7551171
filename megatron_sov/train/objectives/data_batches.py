"""Batches of the data order for objectives, and the data position for checkpoints and records."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sov.engine.parallel.world import ParallelWorld
from megatron_sov.model.config import RunConfig
from megatron_sov.train.data.ledger import LedgerEntry
from megatron_sov.train.data.order import OrderState, SampleOrder
from megatron_sov.train.data.rows import BatchStream, RankBatch
from megatron_sov.train.data.sources import Source
from megatron_sov.train.objectives.microbatch import build_micro_batch
from megatron_sov.train.objectives.objective import GlobalBatch


class DataBatches:
    """This rank's batches, one per optimizer step."""

    def __init__(self, config: RunConfig, sources: list[Source], world: ParallelWorld,
                 planned: Sequence[LedgerEntry] | None = None, columns: Iterable[str] = ()) -> None:
        """Start before the first step.

        `planned` is the result of `plan_ledger`, computed here by default. `columns` are the columns that the
        objective reads (`get_columns`)."""
        self._columns = tuple(columns)
        self._config, self._sources, self._world, self._planned = config, sources, world, planned
        self.num_sources = len(sources)
        self._start_stream(OrderState())

    def _start_stream(self, state: OrderState) -> None:
        order = SampleOrder(self._config, self._sources, state, self._planned)
        self.ledger = order.ledger
        self._step = order.state.step
        self._state: dict[str, Any] = order.state.to_dict()
        self._stream = BatchStream(self._config, order, dp_rank=self._world.dp_rank,
                                   dp_size=self._world.dp_size, num_steps=self._config.num_steps(),
                                   columns=self._columns, routes=[source.routes for source in self._sources])
        self.epochs: dict[str, float] = {}
        """Source -> passes over the source, up to the last returned batch."""

    def next(self) -> GlobalBatch:
        batch = self._take_batch()
        return GlobalBatch(tuple(build_micro_batch(row) for row in batch.rows), batch.entry.seq_len,
                           batch.num_samples, batch.entry.phase)

    def skip(self) -> None:
        self._take_batch()

    def next_entry(self) -> LedgerEntry:
        return self.ledger.get_entry(self._step)

    def state(self) -> dict[str, Any]:
        """Return the `SampleOrder` state after the last returned batch, for a checkpoint.

        The ledger's history includes steps that were skipped or rejected after their batch was prepared."""
        return {**self._state, "history": [dataclasses.asdict(e) for e in self.ledger.history(self._step)]}

    def restore(self, state: dict[str, Any]) -> None:
        self.close()
        self._start_stream(OrderState.from_dict(state))

    def consumed_tokens(self) -> dict[str, int]:
        return {name: cursor["tokens"] for name, cursor in self._state["cursors"].items()}

    def over_long(self) -> dict[str, int]:
        """Return source -> conversations or pairs read that were longer than a sample."""
        return {name: cursor["over_long"] for name, cursor in self._state["cursors"].items()
                if cursor.get("over_long")}

    def planned_tokens(self) -> dict[str, int]:
        """Return source -> tokens that the ledger plans up to the current step, with removed sources."""
        planned = dict.fromkeys((s.name for s in self._sources), 0.0)
        entries = self.ledger.entries
        ends = [*(entry.first_step for entry in entries[1:]), self._config.num_steps()]
        for entry, end in zip(entries, ends, strict=True):
            steps = max(0, min(self._step, end) - entry.first_step)
            tokens = steps * entry.global_batch_size * entry.seq_len
            for name, weight in entry.weights.items():
                planned[name] = planned.get(name, 0.0) + tokens * weight
        return {name: round(tokens) for name, tokens in planned.items()}

    def close(self) -> None:
        self._stream.close()

    def _take_batch(self) -> RankBatch:
        # the state is stored in the batch, because the order is ahead by the prepared batches
        batch = self._stream.next()
        self._step, self._state, self.epochs = self._step + 1, batch.order_state, batch.epochs
        return batch


@dataclass(frozen=True)
class ObjectiveContext:
    """Constructor inputs for objectives, on one process."""

    config: RunConfig
    """Resolved settings."""
    batches: DataBatches
    world: ParallelWorld
    """Rank and process groups."""
    folder: Path
    """Run folder."""
    write_event: Callable[..., None]
    """`write_event(name, **fields)` writes an event; does nothing except on rank 0 after the run has
    started."""
    waiting: Callable[[], AbstractContextManager[None]]
    """`with waiting(): ...` pauses the watchdog for work longer than `guards.hang_timeout_s`, such as
    rollouts."""
    teacher: Any = None
    """`post.distillation.distill.RunTeacher` for distill and gkd."""

"""The data order's batches as objectives take them, and what the loop has to know about the last one."""

from __future__ import annotations

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
from megatron_sov.train.data.token_shards import Source
from megatron_sov.train.objectives.microbatch import build_micro_batch
from megatron_sov.train.objectives.objective import GlobalBatch


class DataBatches:
    """This rank's batches, one for each optimizer step."""

    def __init__(self, config: RunConfig, sources: list[Source], world: ParallelWorld,
                 planned: Sequence[LedgerEntry] | None = None, columns: Iterable[str] = ()) -> None:
        """Begin before the first step.

        Args:
            config: the run's settings.
            sources: what is read.
            world: this rank's place.
            planned: the ledger as `data.ledger.plan` gives it; None: it is planned here.
            columns: those that the objective reads.
        """
        self._columns = tuple(columns)
        self._config, self._sources, self._world, self._planned = config, sources, world, planned
        self.num_sources = len(sources)
        self._begin(OrderState())

    def _begin(self, state: OrderState) -> None:
        """Give the batches from a state on; what was prepared ahead of another one is forgotten."""
        order = SampleOrder(self._config, self._sources, state, self._planned)
        self.ledger = order.ledger
        self._step = order.state.step
        self._state: dict[str, Any] = order.state.to_dict()
        self._stream = BatchStream(self._config, order, self._world.dp_rank, self._world.dp_size,
                                   self._config.num_steps(), self._columns,
                                   [source.routes for source in self._sources])
        self.epochs: dict[str, float] = {}
        """How often each source was gone through, up to the last batch that was given."""

    def next(self) -> GlobalBatch:
        batch = self._advance()
        return GlobalBatch(tuple(build_micro_batch(row) for row in batch.rows), batch.entry.seq_len,
                           batch.num_samples, batch.entry.phase)

    def skip(self) -> None:
        self._advance()

    def next_entry(self) -> LedgerEntry:
        return self.ledger.at(self._step)

    def state(self) -> dict[str, Any]:
        """Return the order's state behind the last batch that was given: what a checkpoint must hold.

        What became of the steps since the batch was prepared stands in the ledger.
        """
        return {**self._state, "history": [dataclasses.asdict(e) for e in self.ledger.history(self._step)]}

    def restore(self, state: dict[str, Any]) -> None:
        self.close()
        self._begin(OrderState.from_dict(state))

    def consumed_tokens(self) -> dict[str, int]:
        return {name: cursor["tokens"] for name, cursor in self._state["cursors"].items()}

    def over_long(self) -> dict[str, int]:
        """Return the conversations (or pairs) met so far of each source that were longer than a sample, where
        there were any."""
        return {name: cursor["over_long"] for name, cursor in self._state["cursors"].items()
                if cursor.get("over_long")}

    def planned_tokens(self) -> dict[str, int]:
        """Return the tokens of each source that the ledger asks for so far;
        a source that was taken away keeps its own."""
        planned = dict.fromkeys((s.name for s in self._sources), 0.0)
        entries = self.ledger.entries
        for entry, after in zip(entries, [*(e.first_step for e in entries[1:]), self._config.num_steps()],
                                strict=True):
            steps = max(0, min(self._step, after) - entry.first_step)
            for name, weight in entry.weights.items():
                planned[name] = (planned.get(name, 0.0)
                                 + steps * entry.global_batch_size * entry.seq_len * weight)
        return {name: round(tokens) for name, tokens in planned.items()}

    def close(self) -> None:
        self._stream.close()

    def _advance(self) -> RankBatch:
        # the batch carries its state: the order itself is ahead by the batches that are prepared
        batch = self._stream.next()
        self._step, self._state, self.epochs = self._step + 1, batch.order_state, batch.epochs
        return batch


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
    teacher: Any = None
    """distill and gkd: whose distributions are learned (`post.distillation.distill.RunTeacher`)."""

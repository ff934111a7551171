"""The data order's batches as objectives take them, and what the loop has to know about the last one."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_sov.config import RunConfig
from megatron_sov.data.batches import BatchStream, RankBatch
from megatron_sov.data.ledger import LedgerEntry
from megatron_sov.data.order import OrderState, SampleOrder
from megatron_sov.data.token_shards import Source
from megatron_sov.mcore.parallel.world import World
from megatron_sov.train.microbatch import from_row
from megatron_sov.train.objective import GlobalBatch


class DataBatches:
    """This rank's batches, one for each optimizer step."""

    def __init__(self, config: RunConfig, sources: list[Source], world: World, state: OrderState | None = None) -> None:
        order = SampleOrder(config, sources, state)
        self.num_sources = len(sources)
        self.ledger = order.ledger
        self._step = order.state.step
        self._state: dict[str, Any] = order.state.to_dict()
        self._stream = BatchStream(config, order, world.dp_rank, world.dp_size, config.num_steps())
        self.epochs: dict[str, float] = {}
        """How often each source was gone through, up to the last batch that was given."""

    def next(self) -> GlobalBatch:
        """Return this rank's part of the next step's batch."""
        batch = self._advance()
        return GlobalBatch(tuple(from_row(row) for row in batch.rows), batch.entry.seq_len, batch.entry.global_batch_size,
                           batch.entry.phase)

    def skip(self) -> None:
        """Pass over the next step's batch."""
        self._advance()

    def next_entry(self) -> LedgerEntry:
        """Return the ledger's entry of the next step."""
        return self.ledger.at(self._step)

    def state(self) -> dict[str, Any]:
        """Return the order's state behind the last batch that was given: what a checkpoint must hold.

        What became of the steps since the batch was prepared stands in the ledger.
        """
        return {**self._state, "history": [dataclasses.asdict(e) for e in self.ledger.history(self._step)]}

    def consumed_tokens(self) -> dict[str, int]:
        """Return the tokens given of each source so far."""
        return {name: cursor["tokens"] for name, cursor in self._state["cursors"].items()}

    def close(self) -> None:
        """Forget what was prepared ahead."""
        self._stream.close()

    def _advance(self) -> RankBatch:
        batch = self._stream.next()
        self._step, self._state, self.epochs = self._step + 1, batch.order_state, batch.epochs
        return batch

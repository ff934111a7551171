"""From the order of samples to this data-parallel rank's rows, prepared ahead of the step that needs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from megatron_sov.base.documents.shard_files import RouteShape
from megatron_sov.engine.data.ledger import LedgerEntry
from megatron_sov.engine.data.order import OrderedSample, SampleOrder
from megatron_sov.engine.data.rows import PackedRow, join_rows, sample_row
from megatron_sov.model.config import RunConfig


@dataclass(frozen=True)
class RankBatch:
    """One rank's part of a global batch."""

    entry: LedgerEntry
    """The ledger's entry that the batch follows."""
    rows: tuple[PackedRow, ...]
    """One row of `rows_per_micro_batch` samples per micro-batch; none where the entry says to skip."""
    num_samples: int
    """Samples of the global batch, those that fill it up with padding not counted."""
    order_state: dict[str, Any]
    """The order's state behind this batch: what a checkpoint after this step must hold."""
    epochs: dict[str, float]
    """How often each source was gone through."""


def rows_per_micro_batch(num_rows: int, most: int, together: int) -> int:
    """Return how many rows each micro-batch has where their number is what documents need, as in a round: of
    one size, as few as that size allows, and all in all as little padding.

    Args:
        num_rows: to be computed, padding not counted.
        most: rows of a micro-batch at most.
        together: micro-batches that there must be a multiple of.
    """
    count = -(-num_rows // (most * together)) * together
    return max(1, -(-num_rows // max(1, count)))


class BatchStream:
    """Gives this rank's batches in order, `prefetch_steps` of them prepared in a thread while
    the model computes."""

    def __init__(self, config: RunConfig, order: SampleOrder, dp_rank: int, dp_size: int,
                 num_steps: int, columns: tuple[str, ...] = (),
                 routes: Sequence[RouteShape | None] = ()) -> None:
        """Begin where the order stands.

        Args:
            config: the run's settings.
            order: of samples.
            dp_rank: this rank among those that read different data.
            dp_size: their number.
            num_steps: of the whole run.
            columns: that rows are to have.
            routes: shape of the routes of each source; (): none has any.
        """
        self.order, self._columns, self._routes = order, columns, routes
        self._micro_batch_size = config.train.micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._num_steps, self._left = num_steps, num_steps - order.state.step
        self._together = dp_size * (config.parallel.pp if config.parallel.vpp > 1 else 1)
        self._prefetch = config.data.prefetch_steps
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: deque[Future[RankBatch]] = deque()

    def next(self) -> RankBatch:
        """Return the next batch; starts the ones after it."""
        while (self._left > 0 and len(self._ahead) <= self._prefetch
               and self.order.is_ready(self._num_steps - self._left)):
            self._ahead.append(self._worker.submit(self._prepare))
            self._left -= 1
        return self._ahead.popleft().result()

    def close(self) -> None:
        """Forget the batches that were prepared ahead."""
        self._worker.shutdown(cancel_futures=True)

    def _prepare(self) -> RankBatch:
        entry, samples = self.order.next_batch()
        rows: tuple[PackedRow, ...] = ()
        if not entry.skip:
            size = rows_per_micro_batch(len(samples), self._micro_batch_size, self._together)
            filled = samples + [OrderedSample(samples[0].source,
                                              ())] * (-len(samples) % (size * self._together))
            rows = tuple(join_rows([self._row(s, entry.seq_len) for s in part])
                         for part in self._mine(filled, size))
        return RankBatch(entry, rows, len(samples), self.order.state.to_dict(), self.order.epochs())

    def _mine(self, samples: list[OrderedSample], size: int) -> list[list[OrderedSample]]:
        """Return this rank's samples, by micro-batch of `size`: rank r of n takes every n-th of them."""
        return [samples[i:i + size] for i in range(self._dp_rank * size, len(samples), size * self._dp_size)]

    def _row(self, sample: OrderedSample, seq_len: int) -> PackedRow:
        return sample_row(sample, self.order.documents(sample.source), seq_len, columns=self._columns,
                          routes=self._routes[sample.source] if self._routes else None)

"""From the order of samples to this data-parallel rank's rows, prepared ahead of the step that needs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from megatron_sov.config import RunConfig
from megatron_sov.data.ledger import LedgerEntry
from megatron_sov.data.order import Sample, SampleOrder
from megatron_sov.data.rows import Row, join_rows, sample_row
from megatron_sov.documents.routes import RouteShape


@dataclass(frozen=True)
class RankBatch:
    """One rank's part of a global batch."""

    entry: LedgerEntry
    """The ledger's entry that the batch follows."""
    rows: tuple[Row, ...]
    """One row of `micro_batch_size` samples per micro-batch; none where the entry says to skip."""
    num_samples: int
    """Samples of the global batch, those that fill it up with padding not counted."""
    order_state: dict[str, Any]
    """The order's state behind this batch: what a checkpoint after this step must hold."""
    epochs: dict[str, float]
    """How often each source was gone through."""


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
        self._unit = config.train.micro_batch_size * dp_size * (
            config.parallel.pp if config.parallel.vpp > 1 else 1)
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
        rows: tuple[Row, ...] = ()
        if not entry.skip:
            rows = tuple(join_rows([self._row(s, entry.seq_len) for s in part])
                         for part in self._mine(self._filled(samples)))
        return RankBatch(entry, rows, len(samples), self.order.state.to_dict(), self.order.epochs())

    def _filled(self, samples: list[Sample]) -> list[Sample]:
        """Return samples that every process has the same number of: a round's are as many as its documents
        need, and the rest is padding."""
        return samples + [Sample(samples[0].source, ())] * (-len(samples) % self._unit)

    def _mine(self, samples: list[Sample]) -> list[list[Sample]]:
        """Return this rank's samples, by micro-batch: rank r of n takes every n-th stretch of
        `micro_batch_size`."""
        size = self._micro_batch_size
        return [samples[i:i + size] for i in range(self._dp_rank * size, len(samples), size * self._dp_size)]

    def _row(self, sample: Sample, seq_len: int) -> Row:
        return sample_row(sample, self.order.documents(sample.source), seq_len, columns=self._columns,
                          routes=self._routes[sample.source] if self._routes else None)

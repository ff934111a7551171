"""From samples to rows of numbers (tokens, labels, document bounds, loss weights, types), and to this rank's
batches of rows, prepared ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from megatron_sov.base.documents.shard_files import RouteShape
from megatron_sov.model.config import RunConfig
from megatron_sov.model.modality import EncoderInputs, get_encoder_inputs, join_inputs
from megatron_sov.train.data.ledger import LedgerEntry
from megatron_sov.train.data.order import OrderedSample, SampleOrder
from megatron_sov.train.data.streams import PackedSegment, pack_best_fit
from megatron_sov.train.data.token_shards import Documents


class RowOrigin(NamedTuple):
    """Where the tokens of a segment of a row come from."""

    first: int
    """Index in the row of its first token."""
    source: int
    """Index of the source."""
    segment: PackedSegment
    """Which tokens of which document."""


@dataclass(frozen=True)
class PackedRow:
    """One or several samples in a row: n tokens."""

    tokens: np.ndarray
    """[n] int64."""
    labels: np.ndarray
    """[n] int64: the token that follows in the same document (0 where there is none)."""
    weights: np.ndarray
    """[n] float32: weight of each label in the loss; 0 where there is no label."""
    positions: np.ndarray
    """[n] int64 from the start of each segment."""
    types: np.ndarray
    """[n] uint8: type of the label (0 text, 1 prompt, 2 response)."""
    sources: np.ndarray
    """[n] int64: index of the source."""
    padding: np.ndarray
    """[n] bool."""
    bounds: np.ndarray
    """[segments + 1] int32: cumulative lengths of the segments (and of padding,
    which is a segment of its own)."""
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Column -> [n] float32: number of each label; 0 where there is no label."""
    origins: tuple[RowOrigin, ...] = ()
    """Where each segment comes from; padding comes from nowhere."""
    routes: np.ndarray | None = None
    """[n, layers, top_k]: where each token went when it was generated (`documents.shard_files`), marked where
    that is not known; None: of no token it is."""
    encoder_inputs: EncoderInputs | None = None
    """Pictures and sounds whose features stand over placeholders; None: there are none."""


def build_row(sample: OrderedSample, documents: Documents, seq_len: int, pad_id: int = 0,
               columns: tuple[str, ...] = (), routes: RouteShape | None = None) -> PackedRow:
    """Return one sample as a row of `seq_len` tokens.

    The last token of a segment has a label if the document goes on behind it.

    Args:
        sample: what the row holds.
        documents: those of its source.
        seq_len: its tokens.
        pad_id: fills the rest.
        columns: those that it is to have; 0 where the documents have none of that name.
        routes: shape of the documents' routes; None: they have none.
    """
    numbers = {name: np.zeros(seq_len, np.float32) for name in columns}
    tokens, labels = np.full(seq_len, pad_id, np.int64), np.zeros(seq_len, np.int64)
    weights, types = np.zeros(seq_len, np.float32), np.zeros(seq_len, np.uint8)
    positions, places = np.empty(seq_len, np.int64), _places(seq_len)
    went = None if routes is None else routes.absent(seq_len)
    bounds = [0]
    found: list[tuple[int, EncoderInputs]] = []
    for document, start, count in sample.segments:
        first, end = bounds[-1], bounds[-1] + count
        length = documents.lengths[document]
        # one token more, where there is one: the label of the segment's last token
        has_next = start + count < length
        ids = documents.tokens(document, start, count + 1 if has_next else count)
        labelled = slice(first, first + len(ids) - 1)
        tokens[first:end], labels[labelled], positions[first:end] = ids[:count], ids[1:], places[:count]
        if documents.is_plain:
            weights[labelled] = 1
        else:
            weights[labelled] = documents.loss_weights(document, start + 1, len(ids) - 1)
            types[labelled] = documents.types(document, start + 1, len(ids) - 1)
        for name in columns:
            if name in documents.columns:
                numbers[name][labelled] = documents.column(name, document, start + 1, len(ids) - 1)
        if went is not None:  # of the tokens themselves, not of their labels
            went[first:end] = documents.routes(document, start, count)
        found.append((first, get_encoder_inputs(documents, document, start, count)))
        bounds.append(end)
    for first, context in zip(bounds, sample.contexts, strict=False):
        weights[first:first + context] = 0
    filled = bounds[-1]
    if filled < seq_len:
        positions[filled:] = places[:seq_len - filled]
        bounds.append(seq_len)
    return PackedRow(tokens, labels, weights, positions, types,
                     sources=np.full(seq_len, sample.source, np.int64),
                     padding=places >= filled, bounds=np.array(bounds, np.int32), columns=numbers,
                     routes=went, encoder_inputs=join_inputs(found) or None,
                     origins=tuple(RowOrigin(first, sample.source, segment) for first, segment in zip(
                         bounds, sample.segments, strict=False)))


@lru_cache(maxsize=4)
def _places(seq_len: int) -> np.ndarray:
    return np.arange(seq_len, dtype=np.int64)


def join_rows(rows: list[PackedRow]) -> PackedRow:
    """Return several rows as one."""
    if len(rows) == 1:
        return rows[0]
    starts = np.cumsum([0] + [len(r.tokens) for r in rows[:-1]])
    bounds = np.concatenate([[0]] + [r.bounds[1:] + s
                                     for r, s in zip(rows, starts, strict=True)]).astype(np.int32)
    fields = {name: np.concatenate([getattr(r, name) for r in rows])
              for name in ("tokens", "labels", "weights", "positions", "types", "sources", "padding")}
    columns = {name: np.concatenate([r.columns[name] for r in rows]) for name in rows[0].columns}
    origins = tuple(o._replace(first=o.first + int(s)) for r, s in zip(rows, starts, strict=True)
                    for o in r.origins)
    return PackedRow(**fields, bounds=bounds, columns=columns, origins=origins, routes=_joined_routes(rows),
                     encoder_inputs=join_inputs((int(s), r.encoder_inputs)
                                                for r, s in zip(rows, starts, strict=True)) or None)


def _joined_routes(rows: list[PackedRow]) -> np.ndarray | None:
    """Return the routes of all rows' tokens, marked where a row has none; None: no row has any."""
    known = next((row.routes for row in rows if row.routes is not None), None)
    if known is None:
        return None
    mark = np.iinfo(known.dtype).max
    return np.concatenate([np.full((len(row.tokens), *known.shape[1:]), mark, known.dtype)
                           if row.routes is None else row.routes for row in rows])


def build_heldout_samples(documents: Documents, source: int, seq_len: int,
                          max_tokens: int) -> list[OrderedSample]:
    """Return samples over the first documents of a split, up to `max_tokens`; each label counts in one of
    them.

    A document that fits a sample stays whole, so that its loss depends neither on other documents nor on
    `seq_len`.  A longer one is read in windows of `seq_len` tokens that overlap by half (strided perplexity),
    so that labels behind the first window have at least half a window of context.

    Args:
        documents: of the split.
        source: their source's index.
        seq_len: tokens of a sample.
        max_tokens: tokens that are read; the last document may lose its tail.
    """
    contexts = {window: context for first in _first_documents(documents, max_tokens)
                for window, context in _windows(first, int(documents.lengths[first.document]), seq_len)}
    return [OrderedSample(source, row, tuple(contexts[window] for window in row))
            for row in pack_best_fit(contexts, seq_len)]


def _windows(part: PackedSegment, length: int, seq_len: int) -> Iterator[tuple[PackedSegment, int]]:
    """Yield windows of at most `seq_len` tokens over the first tokens (`part`) of a document of `length`
    tokens, and how many labels of each an earlier window has."""
    if part.count <= seq_len:
        yield part, 0
        return
    num_labels = min(part.count, length - 1)
    yield PackedSegment(part.document, 0, seq_len), 0
    stride, judged = max(1, seq_len // 2), seq_len
    while judged < num_labels:
        # the last window is as long as the others, for the sake of its context
        end = min(judged + stride, num_labels)
        yield PackedSegment(part.document, end - seq_len, seq_len), judged - (end - seq_len)
        judged = end


def _first_documents(documents: Documents, max_tokens: int) -> Iterator[PackedSegment]:
    left = max_tokens
    for document, length in enumerate(documents.lengths):
        if left <= 0:
            return
        count = min(int(length), left)
        yield PackedSegment(document, 0, count)
        left -= count


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


def compute_micro_batch_rows(num_rows: int, most: int, together: int) -> int:
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
        # interleaved pipeline schedules want a number of micro-batches that the pipeline's size divides
        self._together = dp_size * (config.parallel.pp if config.parallel.vpp > 1 else 1)
        self._prefetch = config.data.prefetch_steps
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: deque[Future[RankBatch]] = deque()

    def next(self) -> RankBatch:
        """Return the next batch; starts the ones after it."""
        # one batch more than the prefetch: the next one itself; a round's batch waits until its part is
        # published
        while (self._left > 0 and len(self._ahead) <= self._prefetch
               and self.order.is_ready(self._num_steps - self._left)):
            self._ahead.append(self._worker.submit(self._prepare))
            self._left -= 1
        return self._ahead.popleft().result()

    def close(self) -> None:
        self._worker.shutdown(cancel_futures=True)

    def _prepare(self) -> RankBatch:
        entry, samples = self.order.next_batch()
        rows: tuple[PackedRow, ...] = ()
        if not entry.skip:
            size = compute_micro_batch_rows(len(samples), self._micro_batch_size, self._together)
            # empty samples at the end: every rank runs the same number of micro-batches, or a collective
            # would hang
            filled = samples + [OrderedSample(samples[0].source,
                                              ())] * (-len(samples) % (size * self._together))
            rows = tuple(join_rows([self._row(s, entry.seq_len) for s in part])
                         for part in self._mine(filled, size))
        return RankBatch(entry, rows, len(samples), self.order.state.to_dict(), self.order.epochs())

    def _mine(self, samples: list[OrderedSample], size: int) -> list[list[OrderedSample]]:
        """Return this rank's samples, by micro-batch of `size`: rank r of n takes every n-th of them."""
        return [samples[i:i + size] for i in range(self._dp_rank * size, len(samples), size * self._dp_size)]

    def _row(self, sample: OrderedSample, seq_len: int) -> PackedRow:
        return build_row(sample, self.order.documents(sample.source), seq_len, columns=self._columns,
                          routes=self._routes[sample.source] if self._routes else None)

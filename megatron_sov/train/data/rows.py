"""Packed rows, and this rank's batches of them, which a thread prepares ahead.

A row has the tokens and labels of samples; a segment is a range of tokens of one document."""

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
    """Source and document of a segment in a row."""

    first: int
    """Row index of the segment's first token."""
    source: int
    """Source index."""
    segment: PackedSegment
    """Document and token range."""


@dataclass(frozen=True)
class PackedRow:
    """A row with n tokens from at least one sample."""

    tokens: np.ndarray
    """[n] int64."""
    labels: np.ndarray
    """[n] int64: next token in the document, 0 at its end."""
    weights: np.ndarray
    """[n] float32: label's loss weight, 0 without a label."""
    positions: np.ndarray
    """[n] int64, counted from the segment's start."""
    types: np.ndarray
    """[n] uint8: label type (0 text, 1 prompt, 2 response)."""
    sources: np.ndarray
    """[n] int64: source index."""
    padding: np.ndarray
    """[n] bool."""
    bounds: np.ndarray
    """[segments + 1] int32: cumulative segment lengths; padding is the last segment."""
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Column -> [n] float32: number for the label, 0 without a label."""
    origins: tuple[RowOrigin, ...] = ()
    """Each segment's origin, without padding."""
    routes: np.ndarray | None = None
    """[n, layers, top_k]: each token's experts during generation (`base.documents.shard_files`); the
    dtype's largest number marks unknown routes."""
    encoder_inputs: EncoderInputs | None = None
    """Pictures and sounds whose features replace placeholder tokens."""


def build_row(sample: OrderedSample, documents: Documents, seq_len: int, pad_id: int = 0,
              columns: tuple[str, ...] = (), routes: RouteShape | None = None) -> PackedRow:
    """Build a row with `seq_len` tokens from a sample in `documents`.

    The last token of a segment has a label if the document continues. `columns` missing from the documents
    are 0. `routes` is the shape of the documents' routes."""
    column_values = {name: np.zeros(seq_len, np.float32) for name in columns}
    tokens, labels = np.full(seq_len, pad_id, np.int64), np.zeros(seq_len, np.int64)
    weights, types = np.zeros(seq_len, np.float32), np.zeros(seq_len, np.uint8)
    positions, indices = np.empty(seq_len, np.int64), _get_positions(seq_len)
    token_routes = None if routes is None else routes.build_unrecorded(seq_len)
    bounds = [0]
    encoder_inputs: list[tuple[int, EncoderInputs]] = []
    for document, start, count in sample.segments:
        first, end = bounds[-1], bounds[-1] + count
        length = documents.lengths[document]
        # Read one more token if the document has it: the label of the segment's last token.
        has_next = start + count < length
        ids = documents.tokens(document, start, count + 1 if has_next else count)
        label_range = slice(first, first + len(ids) - 1)
        tokens[first:end], labels[label_range], positions[first:end] = ids[:count], ids[1:], indices[:count]
        if documents.is_plain:
            weights[label_range] = 1
        else:
            weights[label_range] = documents.loss_weights(document, start + 1, len(ids) - 1)
            types[label_range] = documents.types(document, start + 1, len(ids) - 1)
        for name in columns:
            if name in documents.columns:
                column_values[name][label_range] = documents.column(name, document, start + 1, len(ids) - 1)
        if token_routes is not None:  # routes belong to tokens, columns to labels
            token_routes[first:end] = documents.routes(document, start, count)
        encoder_inputs.append((first, get_encoder_inputs(documents, document, start, count)))
        bounds.append(end)
    for first, num_context in zip(bounds, sample.contexts, strict=False):
        weights[first:first + num_context] = 0  # another sample has these labels
    num_filled = bounds[-1]
    if num_filled < seq_len:
        positions[num_filled:] = indices[:seq_len - num_filled]
        bounds.append(seq_len)
    return PackedRow(tokens, labels, weights, positions, types,
                     sources=np.full(seq_len, sample.source, np.int64),
                     padding=indices >= num_filled, bounds=np.array(bounds, np.int32), columns=column_values,
                     routes=token_routes, encoder_inputs=join_inputs(encoder_inputs) or None,
                     origins=tuple(RowOrigin(first, sample.source, segment) for first, segment in zip(
                         bounds, sample.segments, strict=False)))


@lru_cache(maxsize=4)
def _get_positions(seq_len: int) -> np.ndarray:
    return np.arange(seq_len, dtype=np.int64)


def join_rows(rows: list[PackedRow]) -> PackedRow:
    if len(rows) == 1:
        return rows[0]
    starts = np.cumsum([0] + [len(row.tokens) for row in rows[:-1]]).tolist()
    bounds = [row.bounds[1:] + start for row, start in zip(rows, starts, strict=True)]
    fields = {name: np.concatenate([getattr(row, name) for row in rows])
              for name in ("tokens", "labels", "weights", "positions", "types", "sources", "padding")}
    columns = {name: np.concatenate([row.columns[name] for row in rows]) for name in rows[0].columns}
    origins: list[RowOrigin] = []
    for row, start in zip(rows, starts, strict=True):
        origins += [origin._replace(first=origin.first + start) for origin in row.origins]
    encoder_inputs = join_inputs((start, row.encoder_inputs) for row, start in zip(rows, starts, strict=True))
    return PackedRow(**fields, bounds=np.concatenate([[0], *bounds]).astype(np.int32), columns=columns,
                     origins=tuple(origins), routes=_join_routes(rows), encoder_inputs=encoder_inputs or None)


def _join_routes(rows: list[PackedRow]) -> np.ndarray | None:
    """Concatenate the rows' routes, marking missing routes as unknown; return None if no row has routes."""
    routes = next((row.routes for row in rows if row.routes is not None), None)
    if routes is None:
        return None
    unknown_expert = np.iinfo(routes.dtype).max
    return np.concatenate([np.full((len(row.tokens), *routes.shape[1:]), unknown_expert, routes.dtype)
                           if row.routes is None else row.routes for row in rows])


def build_heldout_samples(documents: Documents, source: int, seq_len: int,
                          max_tokens: int) -> list[OrderedSample]:
    """Build samples from the first `max_tokens` tokens of a split; each label counts in exactly one sample.

    A document that fits a sample stays whole, so that its loss depends neither on other documents nor on
    `seq_len`. A longer document is read in windows of `seq_len` tokens that overlap by half (strided
    perplexity), so that labels after the first window have at least half a window of context."""
    contexts: dict[PackedSegment, int] = {}
    for beginning in _iter_first_documents(documents, max_tokens):
        contexts.update(_iter_windows(beginning, int(documents.lengths[beginning.document]), seq_len))
    return [OrderedSample(source, row, tuple(contexts[window] for window in row))
            for row in pack_best_fit(contexts, seq_len)]


def _iter_windows(beginning: PackedSegment, length: int, seq_len: int) -> Iterator[tuple[PackedSegment, int]]:
    """Yield windows with at most `seq_len` tokens over `beginning`, and the number of labels in earlier
    windows.

    `beginning` starts a document of `length` tokens."""
    if beginning.count <= seq_len:
        yield beginning, 0
        return
    num_labels = min(beginning.count, length - 1)
    yield PackedSegment(beginning.document, 0, seq_len), 0
    stride, num_counted = max(1, seq_len // 2), seq_len
    while num_counted < num_labels:
        # the last window has full length, too, for the context
        end = min(num_counted + stride, num_labels)
        yield PackedSegment(beginning.document, end - seq_len, seq_len), num_counted - (end - seq_len)
        num_counted = end


def _iter_first_documents(documents: Documents, max_tokens: int) -> Iterator[PackedSegment]:
    num_tokens = 0
    for document, length in enumerate(documents.lengths):
        if num_tokens >= max_tokens:
            return
        count = min(int(length), max_tokens - num_tokens)
        yield PackedSegment(document, 0, count)
        num_tokens += count


@dataclass(frozen=True)
class RankBatch:
    """This rank's part of a global batch."""

    entry: LedgerEntry
    """Ledger entry (settings of the data order) that holds for the step."""
    rows: tuple[PackedRow, ...]
    """One joined row per micro-batch; () if `entry.skip` is set."""
    num_samples: int
    """Samples in the global batch, without padding samples."""
    order_state: dict[str, Any]
    """`SampleOrder` state after the batch, for a checkpoint after the step."""
    epochs: dict[str, float]
    """Source -> passes over the source."""


def compute_micro_batch_rows(num_rows: int, max_rows: int, multiple: int) -> int:
    """Return the number of rows per micro-batch with the fewest micro-batches, then the least padding.

    A micro-batch has at most `max_rows` rows, and the number of micro-batches is a multiple of `multiple`."""
    count = -(-num_rows // (max_rows * multiple)) * multiple
    return max(1, -(-num_rows // max(1, count)))


class BatchStream:
    """Returns this rank's batches in order; a thread prepares `data.prefetch_steps` batches ahead."""

    def __init__(self, config: RunConfig, order: SampleOrder, dp_rank: int, dp_size: int,
                 num_steps: int, columns: tuple[str, ...] = (),
                 routes: Sequence[RouteShape | None] = ()) -> None:
        """Start at the position of `order`, which the thread advances up to `num_steps` in all.

        `columns` are the columns of the rows, and `routes` has the route shape of each source."""
        self.order, self._columns, self._routes = order, columns, routes
        self._micro_batch_size = config.train.micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._num_steps, self._remaining = num_steps, num_steps - order.state.step
        # interleaved pipeline schedules need a multiple of pp micro-batches
        self._multiple = dp_size * (config.parallel.pp if config.parallel.vpp > 1 else 1)
        self._prefetch = config.data.prefetch_steps
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._futures: deque[Future[RankBatch]] = deque()

    def next(self) -> RankBatch:
        """Return the next batch, and start preparing later batches."""
        # submits the next batch and `prefetch_steps` more, unless their round is not open
        while (self._remaining > 0 and len(self._futures) <= self._prefetch
               and self.order.is_ready(self._num_steps - self._remaining)):
            self._futures.append(self._worker.submit(self._prepare_batch))
            self._remaining -= 1
        return self._futures.popleft().result()

    def close(self) -> None:
        self._worker.shutdown(cancel_futures=True)

    def _prepare_batch(self) -> RankBatch:
        entry, samples = self.order.next_batch()
        rows: tuple[PackedRow, ...] = ()
        if not entry.skip:
            size = compute_micro_batch_rows(len(samples), self._micro_batch_size, self._multiple)
            # empty samples at the end give every rank an equal number of micro-batches, or a collective
            # would hang
            num_empty = -len(samples) % (size * self._multiple)
            padded_samples = samples + [OrderedSample(samples[0].source, ())] * num_empty
            micro_batches = self._select_local(padded_samples, size)
            rows = tuple(join_rows([self._build_row(sample, entry.seq_len) for sample in micro_batch])
                         for micro_batch in micro_batches)
        return RankBatch(entry, rows, len(samples), self.order.state.to_dict(), self.order.count_epochs())

    def _select_local(self, samples: list[OrderedSample], size: int) -> list[list[OrderedSample]]:
        """Return this rank's samples in micro-batches: rank r among n takes every n-th from r on."""
        return [samples[i:i + size] for i in range(self._dp_rank * size, len(samples), size * self._dp_size)]

    def _build_row(self, sample: OrderedSample, seq_len: int) -> PackedRow:
        return build_row(sample, self.order.open_documents(sample.source), seq_len, columns=self._columns,
                         routes=self._routes[sample.source] if self._routes else None)

"""From samples to rows of numbers: tokens, labels, document bounds, loss weights, types."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_sov.data.order import Sample
from megatron_sov.data.packing import Segment, concatenate
from megatron_sov.data.shards import Documents


@dataclass(frozen=True)
class Row:
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
    """[segments + 1] int32: cumulative lengths of the segments (and of padding, which is a segment of its own)."""


def sample_row(sample: Sample, documents: Documents, seq_len: int, pad_id: int = 0) -> Row:
    """Return one sample as a row of `seq_len` tokens."""
    parts = [_segment(s, documents) for s in sample.segments]
    filled = sum(len(p[0]) for p in parts)
    lengths = [len(p[0]) for p in parts]
    if filled < seq_len:
        gap = seq_len - filled
        lengths.append(gap)
        parts.append((np.full(gap, pad_id, np.int64), np.zeros(gap, np.int64), np.zeros(gap, np.float32),
                      np.zeros(gap, np.uint8)))
    tokens, labels, weights, types = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Row(
        tokens=tokens, labels=labels, weights=weights, types=types,
        positions=np.concatenate([np.arange(n, dtype=np.int64) for n in lengths]),
        sources=np.full(seq_len, sample.source, np.int64),
        padding=np.arange(seq_len) >= filled,
        bounds=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
    )


def _segment(segment: Segment, documents: Documents) -> tuple[np.ndarray, ...]:
    """Return tokens, labels, weights and types of a segment; its last token has a label if the document goes on."""
    length = int(documents.lengths[segment.document])
    goes_on = segment.start + segment.count < length
    count = segment.count + goes_on
    ids = documents.tokens(segment.document, segment.start, count)
    weights = documents.loss_weights(segment.document, segment.start, count)
    types = documents.types(segment.document, segment.start, count)
    end = [] if goes_on else [0]
    return (ids[:segment.count],
            np.concatenate([ids[1:], np.array(end, np.int64)]),
            np.concatenate([weights[1:], np.array(end, np.float32)]),
            np.concatenate([types[1:], np.array(end, np.uint8)]))


def join_rows(rows: list[Row]) -> Row:
    """Return several rows as one."""
    if len(rows) == 1:
        return rows[0]
    starts = np.cumsum([0] + [len(r.tokens) for r in rows[:-1]])
    bounds = np.concatenate([[0]] + [r.bounds[1:] + s for r, s in zip(rows, starts, strict=True)]).astype(np.int32)
    columns = {name: np.concatenate([getattr(r, name) for r in rows])
               for name in ("tokens", "labels", "weights", "positions", "types", "sources", "padding")}
    return Row(**columns, bounds=bounds)


def heldout_samples(documents: Documents, source: int, seq_len: int, max_tokens: int) -> list[Sample]:
    """Return samples over a split in its stored order, up to `max_tokens`; documents are cut at a sample's end."""
    return [Sample(source, row) for row in concatenate(_first_documents(documents, max_tokens), seq_len)]


def _first_documents(documents: Documents, max_tokens: int) -> Iterator[Segment]:
    left = max_tokens
    for document, length in enumerate(documents.lengths):
        if left <= 0:
            return
        count = min(int(length), left)
        yield Segment(document, 0, count)
        left -= count

"""Micro-batches on the device: model inputs, with labels and weights for objectives."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_sov.engine.model.chunk import ModelInputs
from megatron_sov.engine.parallel.device import CPU, get_local_device, to_device
from megatron_sov.train.data.rows import PackedRow, RowOrigin

WIDE, NARROW = ("tokens", "labels", "positions", "sources", "weights", "bounds"), ("types", "padding")
"""`PackedRow` fields in transfer order: wide dtypes first (with `columns`), for alignment."""


@dataclass(frozen=True)
class MicroBatch:
    """A packed row with n tokens."""

    inputs: ModelInputs
    """Tokens, positions, document bounds, padding."""
    labels: torch.Tensor
    """[n] int64: next token."""
    weights: torch.Tensor
    """[n] float32: label weight, 0 without a label."""
    types: torch.Tensor
    """[n] uint8: label type (0 text, 1 prompt, 2 response)."""
    sources: torch.Tensor
    """[n] int64: source index."""
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Column -> [n] float32: number for each label, 0 without a label."""
    teacher_output: torch.Tensor | None = None
    """[n, width]: `post.distillation.distill.LiveTeacher` output for each token."""
    origins: tuple[RowOrigin, ...] = ()
    """Each segment's origin."""
    denominators: dict[str, float] = field(default_factory=dict)
    """Loss term -> divisor, counted over the global batch by `Objective.prepare`."""
    on_host: "MicroBatch | None" = None
    """Host copy; None if the micro-batch itself is on the host."""

    @property
    def host(self) -> "MicroBatch":
        """Host copy, in which `Objective.prepare` counts without waiting for the device."""
        return self if self.on_host is None else self.on_host


def build_micro_batch(row: PackedRow) -> MicroBatch:
    """Copy a row to the device in one asynchronous transfer."""
    values = [*(getattr(row, name) for name in WIDE), *row.columns.values(),
              *(getattr(row, name) for name in NARROW)]
    flat = torch.from_numpy(np.concatenate([value.view(np.uint8) for value in values]))
    on_host, device = _unpack_values(flat, row, values), get_local_device()
    if device == CPU:
        return on_host
    return dataclasses.replace(_unpack_values(to_device(flat, device), row, values), on_host=on_host)


def _unpack_values(flat: torch.Tensor, row: PackedRow, values: list[np.ndarray]) -> MicroBatch:
    """Build a micro-batch from `flat`, a uint8 tensor with the bytes of `values`."""
    slices = flat.split([value.nbytes for value in values])
    parts = [part.view(torch.from_numpy(value[:0]).dtype) for part, value in zip(slices, values, strict=True)]
    columns = dict(zip(row.columns, parts[len(WIDE):], strict=False))
    fields = dict(zip((*WIDE, *NARROW), parts[:len(WIDE)] + parts[len(WIDE) + len(columns):], strict=True))
    bounds = row.bounds
    inputs = ModelInputs(
        tokens=fields["tokens"], positions=fields["positions"], cu_seqlens=fields["bounds"],
        max_document_tokens=int(np.diff(bounds).max()), padding=fields["padding"],
        host_bounds=bounds.tolist(), routes=row.routes, encoder_inputs=row.encoder_inputs)
    return MicroBatch(inputs=inputs, labels=fields["labels"], weights=fields["weights"],
                      types=fields["types"], sources=fields["sources"], columns=columns, origins=row.origins)


def compute_segments(batch: MicroBatch) -> torch.Tensor:
    """Return [n] int64: each token's segment number; padding is a segment, too."""
    bounds = batch.inputs.cu_seqlens
    # right=True: the token at a bound begins the next segment
    return torch.searchsorted(bounds[1:].long(), torch.arange(len(batch.labels), device=bounds.device),
                              right=True)


def shift_labels(batch: MicroBatch, depth: int) -> MicroBatch:
    """Shift labels, weights, types and columns `depth` positions to the left inside each segment.

    Position t at depth d predicts token t + 1 + d; the last d positions of a segment have no label."""
    n = len(batch.labels)
    index, segment = torch.arange(n, device=batch.labels.device), compute_segments(batch)
    # clamped to a valid index; `inside` masks the clamped positions
    source = (index + depth).clamp(max=n - 1)
    inside = (index + depth < n) & (segment[source] == segment)
    return dataclasses.replace(
        batch, labels=torch.where(inside, batch.labels[source], 0), weights=batch.weights[source] * inside,
        types=torch.where(inside, batch.types[source], 0),
        columns={name: torch.where(inside, column[source], 0) for name, column in batch.columns.items()})

"""A micro-batch on the device: what the model reads, and what objectives need beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_sov.engine.model.chunk import ModelInputs
from megatron_sov.engine.parallel.device import CPU, get_local_device, to_device
from megatron_sov.train.data.rows import PackedRow, RowOrigin

WIDE, NARROW = ("tokens", "labels", "positions", "sources", "weights", "bounds"), ("types", "padding")
"""What is sent of a row: wide numbers first (columns among them), so that each begins at a multiple of
its own size."""


@dataclass(frozen=True)
class MicroBatch:
    """One row of packed documents, n tokens."""

    inputs: ModelInputs
    """Tokens, positions, document bounds, padding."""
    labels: torch.Tensor
    """[n] int64: the following token."""
    weights: torch.Tensor
    """[n] float32: weight of each label, 0 where there is none."""
    types: torch.Tensor
    """[n] uint8: type of each label: 0 text, 1 prompt, 2 response."""
    sources: torch.Tensor
    """[n] int64: index of the source."""
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Column that the objective names -> [n] float32: number of each label, 0 where there is none."""
    teacher_output: torch.Tensor | None = None
    """[n, width] what a teacher has said of each token (`post.distillation.distill.LiveTeacher`); None:
    nothing."""
    origins: tuple[RowOrigin, ...] = ()
    """Where each segment of the row comes from, on the host."""
    denominators: dict[str, float] = field(default_factory=dict)
    """Term -> what its sum is divided by: counted over the whole global batch by `Objective.prepare`."""
    on_host: MicroBatch | None = None
    """The same before it was sent to the device; None: it was not sent."""

    @property
    def host(self) -> MicroBatch:
        """What `Objective.prepare` counts in, since a number from the device is waited for."""
        return self if self.on_host is None else self.on_host


def build_micro_batch(row: PackedRow) -> MicroBatch:
    """Send a row to the device, in one piece and without waiting."""
    values = [*(getattr(row, name) for name in WIDE), *row.columns.values(),
              *(getattr(row, name) for name in NARROW)]
    flat = torch.from_numpy(np.concatenate([value.view(np.uint8) for value in values]))
    on_host, device = _record(flat, row, values), get_local_device()
    if device == CPU:
        return on_host
    return dataclasses.replace(_record(to_device(flat, device), row, values), on_host=on_host)


def _record(flat: torch.Tensor, row: PackedRow, values: list[np.ndarray]) -> MicroBatch:
    """Return the micro-batch of a row whose values lie end to end in `flat`, uint8."""
    stretches = flat.split([value.nbytes for value in values])
    parts = [part.view(torch.from_numpy(value[:0]).dtype)
             for part, value in zip(stretches, values, strict=True)]
    columns = dict(zip(row.columns, parts[len(WIDE):], strict=False))
    found = dict(zip((*WIDE, *NARROW), parts[:len(WIDE)] + parts[len(WIDE) + len(columns):], strict=True))
    bounds = row.bounds
    inputs = ModelInputs(
        tokens=found["tokens"], positions=found["positions"], cu_seqlens=found["bounds"],
        max_document_tokens=int(np.diff(bounds).max()), padding=found["padding"],
        host_bounds=bounds.tolist(), routes=row.routes, encoder_inputs=row.encoder_inputs)
    return MicroBatch(inputs=inputs, labels=found["labels"], weights=found["weights"], types=found["types"],
                      sources=found["sources"], columns=columns, origins=row.origins)


def compute_segments(batch: MicroBatch) -> torch.Tensor:
    """Return [n] int64: number of the segment, a document's or padding's, that each token belongs to."""
    bounds = batch.inputs.cu_seqlens
    # right=True: the token at a bound begins the next segment
    return torch.searchsorted(bounds[1:].long(), torch.arange(len(batch.labels), device=bounds.device),
                              right=True)


def shift_labels(batch: MicroBatch, depth: int) -> MicroBatch:
    """Return the micro-batch with the labels of the tokens `depth` places further on than the next ones,
    inside the same segment, and all that belongs to them.

    Position t of depth d predicts token t + 1 + d; the last d positions of a segment have none.
    """
    n = len(batch.labels)
    index, segment = torch.arange(n, device=batch.labels.device), compute_segments(batch)
    # clamped only to be a valid index: `inside` masks what is read there
    source = (index + depth).clamp(max=n - 1)
    inside = (index + depth < n) & (segment[source] == segment)
    return dataclasses.replace(
        batch, labels=torch.where(inside, batch.labels[source], 0), weights=batch.weights[source] * inside,
        types=torch.where(inside, batch.types[source], 0),
        columns={name: torch.where(inside, column[source], 0) for name, column in batch.columns.items()})

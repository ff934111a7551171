"""A micro-batch on the device: what the model reads, and what objectives need beside it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from megatron_sov.data.rows import Row
from megatron_sov.mcore.model.language_model import ModelInputs
from megatron_sov.mcore.parallel.device import local_device


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
    denominators: dict[str, float] = field(default_factory=dict)
    """Term -> what its sum is divided by: counted over the whole global batch by `Objective.prepare`."""


def from_row(row: Row) -> MicroBatch:
    """Copy a row to the device."""
    device = local_device()
    inputs = ModelInputs(
        tokens=torch.from_numpy(row.tokens).to(device), positions=torch.from_numpy(row.positions).to(device),
        cu_seqlens=torch.from_numpy(row.bounds).to(device),
        max_document_tokens=int((row.bounds[1:] - row.bounds[:-1]).max()),
        padding=torch.from_numpy(row.padding).to(device))
    return MicroBatch(
        inputs=inputs, labels=torch.from_numpy(row.labels).to(device),
        weights=torch.from_numpy(row.weights).to(device), types=torch.from_numpy(row.types).to(device),
        sources=torch.from_numpy(row.sources).to(device))


def shifted_targets(batch: MicroBatch, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return labels and weights [n] of the token `depth` places further on than the next one,
    inside the same segment.

    Position t of depth d predicts token t + 1 + d; the last d positions of a segment have none.
    """
    n = len(batch.labels)
    index = torch.arange(n, device=batch.labels.device)
    segment = torch.searchsorted(batch.inputs.cu_seqlens[1:].long(), index, right=True)
    source = (index + depth).clamp(max=n - 1)
    inside = (index + depth < n) & (segment[source] == segment)
    return torch.where(inside, batch.labels[source], 0), batch.weights[source] * inside

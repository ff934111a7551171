"""Responses of a row: which labels belong to which, and sums over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_sov.chat.encode import TYPE_RESPONSE
from megatron_sov.mcore.parallel.device import to_device
from megatron_sov.train.microbatch import MicroBatch


@dataclass(frozen=True)
class Responses:
    """The R responses of a micro-batch of T tokens, in order: each document's learned labels are one."""

    index: torch.Tensor
    """[T] int64: response of each label; R where it belongs to none."""
    lengths: torch.Tensor
    """[R] float64: labels of each."""

    def __len__(self) -> int:
        return len(self.lengths)

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Return [R] float64: the sum over each response of a number [T] of each label; differentiable."""
        total = torch.zeros(len(self) + 1, dtype=torch.float64, device=values.device)
        return total.index_add(0, self.index, values.double())[:-1]

    def means(self, values: torch.Tensor) -> torch.Tensor:
        """Return [R] float64: the mean over each response."""
        return self.sums(values) / self.lengths

    def of_side(self, side: int) -> torch.Tensor:
        """Return [T] bool: labels of responses 2i + side."""
        return (self.index < len(self)) & (self.index % 2 == side)


def learned(batch: MicroBatch) -> torch.Tensor:
    """Return [T] bool: labels that are learned."""
    return (batch.types == TYPE_RESPONSE) & (batch.weights > 0)


def responses_of(batch: MicroBatch) -> Responses:
    """Return a micro-batch's responses, found on the host, where nothing waits for the device."""
    host = batch.host
    counted = learned(host)
    ends = host.inputs.cu_seqlens[1:].long()
    document = torch.searchsorted(ends, torch.arange(len(counted)), right=True)
    with_labels, compact = document[counted].unique(return_inverse=True)
    index = torch.full((len(counted),), len(with_labels), dtype=torch.int64)
    index[counted] = compact
    lengths = torch.bincount(compact, minlength=len(with_labels)).double()
    device = batch.labels.device
    return Responses(to_device(index, device), to_device(lengths, device))

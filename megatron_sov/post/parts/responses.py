"""Responses of a row: which labels belong to which, and sums over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_sov.base.chat.encode import TYPE_RESPONSE
from megatron_sov.engine.mcore.parallel.device import to_device
from megatron_sov.train.objectives.microbatch import MicroBatch, segments


@dataclass(frozen=True)
class Responses:
    """The learned labels of the R documents of a micro-batch of T tokens, in order; padding is none."""

    index: torch.Tensor
    """[T] int64: document of each learned label; R of all others."""
    lengths: torch.Tensor
    """[R] float64: learned labels of each; 0 where the end of a document was cut off."""

    def __len__(self) -> int:
        return len(self.lengths)

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Return [R] float64: the sum over each response of a number [T] of each label; differentiable.

        In float64, since answers of 32,768 tokens would lose digits in float32, and one could see in which
        order a GPU adds.
        """
        total = torch.zeros(len(self) + 1, dtype=torch.float64, device=values.device)
        return total.index_add(0, self.index, values.double())[:-1]

    def means(self, values: torch.Tensor) -> torch.Tensor:
        """Return [R] float64: the mean over each response; 0 of one without labels."""
        return self.sums(values) / self.lengths.clamp(min=1)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Return [T] float64: of each learned label its response's number [R]; 0 of all others;
        differentiable."""
        return torch.cat([values.double(), torch.zeros(1, dtype=torch.float64, device=values.device)]
                         )[self.index]

    def whole_pairs(self) -> torch.Tensor:
        """Return [R / 2] float64: 1 where both documents of a pair have learned labels, else 0."""
        return (self.lengths.reshape(-1, 2) > 0).all(dim=1).double()

    def of_side(self, side: int) -> torch.Tensor:
        """Return [T] bool: learned labels of documents 2 i + side of whole pairs."""
        whole = torch.cat([self.whole_pairs().repeat_interleave(2, output_size=len(self)),
                           self.lengths.new_zeros(1)])
        return (self.index % 2 == side) & (whole[self.index] > 0)


def learned(batch: MicroBatch) -> torch.Tensor:
    """Return [T] bool: labels that are learned."""
    return (batch.types == TYPE_RESPONSE) & (batch.weights > 0)


def responses_of(batch: MicroBatch) -> Responses:
    """Return a micro-batch's responses, found on the host, where nothing waits for the device."""
    host = batch.host
    counted, bounds = learned(host), host.inputs.cu_seqlens.long()
    # samples that were joined to one row have padding of their own each
    documents = ~host.inputs.padding[bounds[:-1]]
    num_documents = int(documents.sum())
    place = documents.cumsum(0) - 1
    index = torch.where(counted, place[segments(host)], num_documents)
    lengths = torch.bincount(index, minlength=num_documents + 1)[:-1].double()
    device = batch.labels.device
    return Responses(to_device(index, device), to_device(lengths, device))

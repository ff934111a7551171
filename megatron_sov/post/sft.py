"""Supervised fine-tuning: cross-entropy on responses, with an auxiliary term on plain text normalised on its
own. What every objective needs of a row's responses is here too: their labels, and sums over them.

In the loss of responses every token, every turn or every sample counts the same.  The mean over turns of each
turn's mean loss is ``sum over tokens of (w / W) loss / number of turns``, with w a token's weight and W the
sum of its turn's: so it is a sum over tokens under other weights, of which each turn's make 1, and stays
exact however a batch is split.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_sov.chat.encode import TYPE_RESPONSE, TYPE_TEXT
from megatron_sov.engine.model.logprobs import Head
from megatron_sov.engine.parallel.device import to_device
from megatron_sov.runs.obs.meters import Meter
from megatron_sov.train.objectives.data_batches import ObjectiveContext
from megatron_sov.train.objectives.data_objective import DataObjective
from megatron_sov.train.objectives.microbatch import MicroBatch, segments
from megatron_sov.train.objectives.objective import GlobalBatch, LossSums, per_source, with_denominators


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
        # The last bin takes what is not learned, and is cut off.
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
        # The zero at the end is what index R finds: labels that are not learned are on no side.
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
    # Documents are numbered without the padding between them.
    place = documents.cumsum(0) - 1
    index = torch.where(counted, place[segments(host)], num_documents)
    lengths = torch.bincount(index, minlength=num_documents + 1)[:-1].double()
    device = batch.labels.device
    return Responses(to_device(index, device), to_device(lengths, device))


RESPONSE, TEXT = "response", "text"
TYPE_OF = {TEXT: TYPE_TEXT, RESPONSE: TYPE_RESPONSE}
"""Term -> token type (the `.type` sidecar) of the labels that it learns; prompts belong to none."""


class SupervisedFineTuning(DataObjective):
    """``CE(responses) / response tokens + text_coeff * CE(text) / text tokens`` (+ multi-token
    prediction on responses); or means over turns or samples of the responses.

    Each term is divided by its own count over the global batch, so the share of text in the data changes how
    often the auxiliary term is estimated, and never its weight.
    """

    headline = (Meter(RESPONSE, "response loss", "nats per token", "lower"),)

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        config = context.config
        self._loss_per = config.objective.loss_per
        self._dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
        self.coefficients = {RESPONSE: 1.0}
        if config.objective.text_coeff > 0:
            self.coefficients[TEXT] = config.objective.text_coeff
        self.coefficients |= self._mtp_coefficient
        self.meters = self._typed.meters

    def prepare(self, batch: GlobalBatch) -> GlobalBatch:
        """Count each term's targets over the global batch: tokens, or what `objective.loss_per` says."""
        # First the weights, then the counts: denominators are sums of the weights that `loss` sees.
        batch = self._with_types(batch)
        batch = dataclasses.replace(batch, micro_batches=tuple(map(self._weighted, batch.micro_batches)))
        hosts = [m.host for m in batch.micro_batches]
        targets = {term: sum(float(_weights(m, term).double().sum()) for m in hosts)
                   for term in TYPE_OF if term in self.coefficients}
        return with_denominators(batch, targets | self._mtp_targets(map(_responses, hosts)))

    def _weighted(self, batch: MicroBatch) -> MicroBatch:
        """Return a micro-batch with the weights of `objective.loss_per`, on the host and on the device."""
        if self._loss_per == "token":
            return batch
        found = counted_per(batch, self._loss_per, self._dtype)
        return found if batch.on_host is None else dataclasses.replace(
            found, on_host=counted_per(batch.on_host, self._loss_per, self._dtype))

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> LossSums:
        """Return the summed cross-entropy of each term."""
        weights = {term: _weights(batch, term) for term in TYPE_OF if term in self.coefficients}
        terms, losses = head.cross_entropy(hidden[0], batch.labels, weights)
        terms |= self._mtp_sum(hidden, head, _responses(batch))
        return LossSums(terms, per_source(losses, batch.weights, batch.sources, self._num_sources),
                        self._typed.measured(losses, batch))


def _weights(batch: MicroBatch, term: str) -> torch.Tensor:
    """Return [n]: the weight of each label in a term."""
    return batch.weights * (batch.types == TYPE_OF[term])


def _responses(batch: MicroBatch) -> MicroBatch:
    return dataclasses.replace(batch, weights=_weights(batch, RESPONSE))


def counted_per(batch: MicroBatch, unit: Literal["turn", "sample"], dtype: torch.dtype) -> MicroBatch:
    """Return the micro-batch with weights of responses that make 1 in each unit; those of others stay.

    Args:
        batch: on the host or the device; nothing is waited for.
        unit: turn: responses without a token between them that is not learned; sample: those of one
            conversation.
        dtype: of the weights.
    """
    counted, number = learned(batch), segments(batch)
    if unit == "turn":
        # A turn begins at a learned label whose predecessor is not learned, or belongs to another sample.
        goes_on = torch.zeros_like(counted)
        goes_on[1:] = counted[:-1] & (number[1:] == number[:-1])
        number = ((counted & ~goes_on).cumsum(0) - 1).clamp(min=0)
    weights = batch.weights.double()
    # float64, since the weights of a long turn are many small numbers.
    totals = weights.new_zeros(len(counted) + 1).index_add_(0, number, weights * counted)
    shared = torch.where(counted, weights / totals[number], weights)
    return dataclasses.replace(batch, weights=shared.to(dtype))

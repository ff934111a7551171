"""Supervised fine-tuning: cross-entropy on responses, and an auxiliary term on plain text.

`objective.loss_per` weighs every token, turn or sample of responses equally. The mean over turns of the mean
loss per turn is ``sum over tokens of (w / W) loss / number of turns``, with w the weight of a token and W the
sum of the weights in the turn: a weighted sum over tokens, exact for every split of the batch.
"""

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
from megatron_sov.train.objectives.microbatch import MicroBatch, compute_segments
from megatron_sov.train.objectives.objective import GlobalBatch, LossSums, per_source, with_denominators

RESPONSE, TEXT = "response", "text"
TERM_TYPES = {TEXT: TYPE_TEXT, RESPONSE: TYPE_RESPONSE}
"""Loss term -> token type for the learned labels, from the `.type` sidecar; no term learns prompts."""


@dataclass(frozen=True)
class ResponseSpans:
    """Learned labels in the R documents of a micro-batch with T tokens, padding excluded."""

    index: torch.Tensor
    """[T] int64: index of a learned label's document; R for labels that are not learned."""
    lengths: torch.Tensor
    """[R] float64: number of learned labels per document; 0 if the row ends before the response."""

    def __len__(self) -> int:
        return len(self.lengths)

    def sum_labels(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values` [T] over the labels per response, [R] float64; differentiable.

        In float32, responses of 32,768 tokens would lose digits and depend on the order of additions.
        """
        # The last bin collects labels that are not learned, and is cut off.
        total = torch.zeros(len(self) + 1, dtype=torch.float64, device=values.device)
        return total.index_add(0, self.index, values.double())[:-1]

    def average_labels(self, values: torch.Tensor) -> torch.Tensor:
        """Average `values` [T] over the labels per response, [R] float64; 0 for responses without labels."""
        return self.sum_labels(values) / self.lengths.clamp(min=1)

    def spread_to_labels(self, values: torch.Tensor) -> torch.Tensor:
        """Copy `values` [R] to the learned labels, [T] float64, 0 elsewhere; differentiable."""
        zero = torch.zeros(1, dtype=torch.float64, device=values.device)
        return torch.cat([values.double(), zero])[self.index]

    def select_pairs(self) -> torch.Tensor:
        """Return 1 for document pairs with learned labels in both, otherwise 0, [R / 2] float64."""
        return (self.lengths.reshape(-1, 2) > 0).all(dim=1).double()

    def select_side(self, side: int) -> torch.Tensor:
        """Return the learned labels in documents ``2 i + side`` in complete pairs, [T] bool."""
        # Index R, for labels that are not learned, reads the zero at the end.
        complete = torch.cat([self.select_pairs().repeat_interleave(2, output_size=len(self)),
                              self.lengths.new_zeros(1)])
        return (self.index % 2 == side) & (complete[self.index] > 0)


def find_learned_labels(batch: MicroBatch) -> torch.Tensor:
    """Return the learned response labels, [T] bool."""
    return (batch.types == TYPE_RESPONSE) & (batch.weights > 0)


def find_responses(batch: MicroBatch) -> ResponseSpans:
    """Find the responses in a micro-batch, on the host, without waiting for the device."""
    host = batch.host
    is_learned, bounds = find_learned_labels(host), host.inputs.cu_seqlens.long()
    # Padding between samples in a row is not counted as a document.
    is_document = ~host.inputs.padding[bounds[:-1]]
    num_documents = int(is_document.sum())
    segment_documents = is_document.cumsum(0) - 1
    index = torch.where(is_learned, segment_documents[compute_segments(host)], num_documents)
    lengths = torch.bincount(index, minlength=num_documents + 1)[:-1].double()
    device = batch.labels.device
    return ResponseSpans(to_device(index, device), to_device(lengths, device))


class SupervisedFineTuning(DataObjective):
    """Objective ``CE(responses) / response_tokens + text_coeff * CE(text) / text_tokens``, with multi-token
    prediction on responses; `objective.loss_per` may average over turns or samples instead of tokens.

    Every term has a separate denominator, counted over the global batch. Hence the share of text in the data
    does not change the weight of the auxiliary term.
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
        """Count the denominators over the global batch, in units of `objective.loss_per`."""
        # Scale the weights first: the denominators must sum the weights that `loss` uses.
        batch = self._scale_label_weights(batch)
        micro_batches = tuple(map(self._weigh_responses, batch.micro_batches))
        batch = dataclasses.replace(batch, micro_batches=micro_batches)
        hosts = [m.host for m in batch.micro_batches]
        targets = {term: sum(float(_read_weights(m, term).double().sum()) for m in hosts)
                   for term in TERM_TYPES if term in self.coefficients}
        return with_denominators(batch, targets | self._count_mtp_targets(map(_restrict_to_responses, hosts)))

    def _weigh_responses(self, batch: MicroBatch) -> MicroBatch:
        """Apply the weights of `objective.loss_per`, on the host and on the device."""
        if self._loss_per == "token":
            return batch
        weighted = weigh_per_unit(batch, self._loss_per, self._dtype)
        if batch.on_host is None:
            return weighted
        on_host = weigh_per_unit(batch.on_host, self._loss_per, self._dtype)
        return dataclasses.replace(weighted, on_host=on_host)

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> LossSums:
        """Sum the cross-entropy per term."""
        weights = {term: _read_weights(batch, term) for term in TERM_TYPES if term in self.coefficients}
        terms, losses = head.cross_entropy(hidden[0], batch.labels, weights)
        terms |= self._compute_mtp_sum(hidden, head, _restrict_to_responses(batch))
        return LossSums(terms, per_source(losses, batch.weights, batch.sources, self._num_sources),
                        self._typed.compute_meters(losses, batch))


def _read_weights(batch: MicroBatch, term: str) -> torch.Tensor:
    """Return `batch.weights` [T], 0 for labels outside `term`."""
    return batch.weights * (batch.types == TERM_TYPES[term])


def _restrict_to_responses(batch: MicroBatch) -> MicroBatch:
    return dataclasses.replace(batch, weights=_read_weights(batch, RESPONSE))


def weigh_per_unit(batch: MicroBatch, unit: Literal["turn", "sample"], dtype: torch.dtype) -> MicroBatch:
    """Scale the weights of response labels to a sum of 1 per unit: `turn` (consecutive learned labels) or
    `sample` (the responses in a conversation); leave other weights unchanged."""
    is_learned, number = find_learned_labels(batch), compute_segments(batch)
    if unit == "turn":
        # A turn begins at a learned label that follows an unlearned label or starts a sample.
        continues = torch.zeros_like(is_learned)
        continues[1:] = is_learned[:-1] & (number[1:] == number[:-1])
        number = ((is_learned & ~continues).cumsum(0) - 1).clamp(min=0)
    weights = batch.weights.double()
    # float64, because a long turn has many small weights.
    totals = weights.new_zeros(len(is_learned) + 1).index_add_(0, number, weights * is_learned)
    scaled = torch.where(is_learned, weights / totals[number], weights)
    return dataclasses.replace(batch, weights=scaled.to(dtype))

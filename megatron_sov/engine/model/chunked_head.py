"""The output head and its softmax over the vocabulary, a chunk of tokens at a time, with gradients in
the same pass.

Shapes: T tokens of a row, n of them on this process (gathered where sequence parallelism cuts them), C of a
chunk, H hidden size, V vocabulary (split over the tensor-parallel group); n x V logits never exist.

The derivative of a token's cross-entropy by its logits is ``softmax - one_hot(label)``, so with the token's
weight known a chunk's logits give everything before they are dropped.  `CrossEntropySums` does so in the
forward pass; `LabelLogprobs`, which learns the weights from the backward pass, applies the head again there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch.autograd.function import once_differentiable

from megatron_sov.engine.parallel import context

ROWS_OF_PRODUCT = 8192
"""Rows of the weight's gradient that a float32 product is held for at a time, before it is added."""


@dataclass(frozen=True)
class Chunking:
    """How the head is applied."""

    chunk_tokens: int
    """C."""
    token_rows: int
    """This process's rows of the head's weight that belong to token ids; rows that pad the vocabulary
    follow them."""
    softcap: float | None = None
    """Cap on the logits, before the temperature (`ModelConfig.logits_softcap`)."""

    def parts(self, num_tokens: int) -> list[slice]:
        """Return the chunks of so many tokens, in order; of none, one without any."""
        return [slice(i, i + self.chunk_tokens) for i in range(0, max(1, num_tokens), self.chunk_tokens)]


class CrossEntropySums(torch.autograd.Function):
    """Weighted sums of the tokens' cross-entropies, each differentiable by a factor of its own."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor,
                chunking: Chunking, differentiable: bool,
                *token_weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[n, H], [V / tp, H], [T], and [T] of each sum -> losses [T] without gradient, and the sums.

        `differentiable` is whether gradients were switched on outside: in here they never are.
        """
        gradients = Gradients.zeros(states, weight, tuple(context.local(w) for w in token_weights),
                                    differentiable and ctx.needs_input_grad[0],
                                    differentiable and ctx.needs_input_grad[1])
        # gradients are filled in the same sweep: weights are known before, so no chunk's logits are made
        # twice
        losses = context.gather(-_sweep(states, weight, context.local(labels), chunking, gradients))
        gradients.keep(ctx)
        ctx.mark_non_differentiable(losses)
        return losses, *((losses * w).sum() for w in token_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: torch.Tensor, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale what the forward pass left."""
        return *Gradients.kept(ctx, len(upstream)).scaled(upstream), *[None] * (3 + len(upstream))


class LabelLogprobs(torch.autograd.Function):
    """Log-probability of each token's label, for losses whose derivative by it is not known before."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor,
                chunking: Chunking, temperature: float) -> torch.Tensor:
        """[n, H], [V / tp, H], [n] -> [n]."""
        ctx.save_for_backward(states, weight, labels)
        ctx.chunking, ctx.temperature = chunking, temperature
        return _sweep(states, weight, labels, chunking, Gradients(), temperature)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Apply the head again."""
        states, weight, labels = ctx.saved_tensors
        gradients = Gradients.zeros(states, weight, (-upstream,), *ctx.needs_input_grad[:2])
        _sweep(states, weight, labels, ctx.chunking, gradients, ctx.temperature)
        return *gradients.scaled((upstream.new_ones(()),)), None, None, None


def project(states: torch.Tensor, weight: torch.Tensor, token_rows: int,
            temperature: float = 1.0, softcap: float | None = None) -> torch.Tensor:
    """Return logits [n, V / tp], capped and then divided by the temperature, in float32 (float64 where the
    model is), -inf behind `token_rows`."""
    logits = states @ weight.t()
    logits = cap_logits_(logits.to(torch.promote_types(logits.dtype, torch.float32)), softcap)
    if temperature != 1:
        logits /= temperature
    logits[:, token_rows:] = -torch.inf
    return logits


@dataclass(frozen=True)
class Gradients:
    """Derivatives of the tokens' losses, summed up over chunks; what nobody needs is left out."""

    token_weights: tuple[torch.Tensor, ...] = ()
    """[n] each, in the dtype of the logits."""
    of_states: torch.Tensor | None = None
    """[n, H]: of each token's loss, without a weight, by its hidden state."""
    of_weight: tuple[torch.Tensor, ...] = ()
    """[V / tp, H] each: of the sum under these token weights, by the head's weight; in float32 under bf16, in
    which running sums would lose what later chunks add."""

    @classmethod
    def zeros(cls, states: torch.Tensor, weight: torch.Tensor, token_weights: tuple[torch.Tensor, ...],
              of_states: bool, of_weight: bool) -> Gradients:
        """Begin those that are needed."""
        dtype = torch.promote_types(states.dtype, torch.float32)
        return cls(tuple(w.to(dtype) for w in token_weights), torch.empty_like(states) if of_states else None,
                   tuple(torch.zeros_like(weight, dtype=dtype) for _ in token_weights) if of_weight else ())

    @classmethod
    def kept(cls, ctx: Any, num_sums: int) -> Gradients:
        """Return what `keep` left in the forward pass of so many sums."""
        of_states, *rest = ctx.saved_tensors
        return cls(tuple(rest[:num_sums]), of_states, tuple(rest[num_sums:]))

    def keep(self, ctx: Any) -> None:
        """Leave these to the backward pass."""
        ctx.save_for_backward(self.of_states, *self.token_weights, *self.of_weight)

    @property
    def are_needed(self) -> bool:
        return self.of_states is not None or bool(self.of_weight)

    def add(self, part: slice, states: torch.Tensor, weight: torch.Tensor, by_logits: torch.Tensor,
            sums: torch.Tensor) -> None:
        """Add a chunk's.

        Args:
            part: its tokens.
            states: [C, H] their hidden states.
            weight: [V / tp, H].
            by_logits: [C, V / tp] ``sums *`` the derivative of each token's loss by its logits: dividing the
                small factors by the sums saves a pass over this large one.
            sums: [C].
        """
        by_logits = by_logits.to(weight.dtype)
        if self.of_states is not None:
            torch.mm(by_logits, weight, out=self.of_states[part])
            self.of_states[part].div_(sums[:, None])
        for token_weight, total in zip(self.token_weights, self.of_weight, strict=False):
            weighted = states * (token_weight[part] / sums)[:, None]
            _add_product(total, by_logits.t(), weighted.to(weight.dtype))

    def scaled(self, factors: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the derivatives of ``sum over k of factor k * sum k`` by hidden states and head weight,
        in the place of these.

        Factors are stretched to the dimensions of what they multiply: as numbers they would be rounded
        to its dtype before.
        """
        if self.of_states is not None:
            # a token's states belong to all sums at once: their factors times the token's weights add up
            # before the product
            of_tokens = torch.stack([f.reshape(1) * w
                                     for f, w in zip(factors, self.token_weights, strict=True)]).sum(0)
            self.of_states.mul_(of_tokens[:, None])
        for factor, total in zip(factors, self.of_weight, strict=False):
            total.mul_(factor.reshape(1, 1))
        for total in self.of_weight[1:]:
            self.of_weight[0].add_(total)
        return self.of_states, self.of_weight[0] if self.of_weight else None


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add ``a @ b`` of 16-bit matrices to a float32 total without rounding it to 16 bits first."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    for first in range(0, len(total), ROWS_OF_PRODUCT):
        rows = slice(first, first + ROWS_OF_PRODUCT)
        # only GPUs multiply 16 bits into 32
        total[rows] += (torch.mm(a[rows], b, out_dtype=total.dtype) if a.is_cuda
                        else a[rows].to(total.dtype) @ b.to(total.dtype))


def _sweep(states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunking: Chunking,
           gradients: Gradients, temperature: float = 1.0) -> torch.Tensor:
    """Return log-probabilities [n] of labels in float32 (float64 where the model is); gradients
    are added up."""
    return torch.cat([_chunk(part, states[part], weight, labels[part], chunking, gradients, temperature)
                      for part in chunking.parts(len(states))])


def _chunk(part: slice, states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunking: Chunking,
           gradients: Gradients, temperature: float) -> torch.Tensor:
    """[C, H], [V / tp, H], [C] -> [C]; the one tensor of logits turns in place into what it is needed for,
    beside the slope of a cap."""
    group = parallel_state.get_tensor_model_parallel_group()
    logits = project(states, weight, chunking.token_rows, temperature, chunking.softcap)
    steep = (softcap_slope(logits, chunking.softcap, temperature, chunking.token_rows) if gradients.are_needed
             else None)
    # the largest of the whole vocabulary: exp must not overflow, and all processes must subtract the same
    # number
    largest = logits.max(dim=-1).values
    if group.size() > 1:
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
    logits -= largest[:, None]
    place = labels - group.rank() * logits.shape[1]
    # a label belongs to one process of the group; the others add 0 to the sum below
    here = (place >= 0) & (place < logits.shape[1])
    place = place.where(here, 0)
    chosen = logits.gather(1, place[:, None])[:, 0].where(here, 0.0)
    exponentials = logits.exp_()
    # one message for both sums
    both = torch.stack([chosen, exponentials.sum(dim=-1)])
    if group.size() > 1:
        torch.distributed.all_reduce(both, group=group)
    chosen, sums = both
    if gradients.are_needed:
        # times `sums`, the derivative of -log p by the logits is exp(x) - sums at the label and exp(x)
        # elsewhere; the division comes later, on the small factors
        exponentials[torch.arange(len(place), device=place.device), place] -= sums.where(here, 0.0)
        if steep is not None:
            exponentials *= steep
        # a logit's derivative by its states has the temperature in the divisor too
        gradients.add(part, states, weight, exponentials, sums * temperature)
    return chosen - sums.log()


# Soft caps: logits of the output head kept within a cap by ``cap * tanh(x / cap)`` (arXiv 2408.00118,
# section 2).


def cap_logits_(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Return capped logits, in their place; None: as they are."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def softcap_slope(logits: torch.Tensor, cap: float | None, temperature: float,
                  token_rows: int) -> torch.Tensor | None:
    """Return the derivative of capped logits by what they were before, ``1 - (capped / cap)^2``; None: no
    cap.

    Args:
        logits: [C, V / tp], capped, then divided by the temperature.
        cap: the cap.
        temperature: see `logits`.
        token_rows: columns that belong to token ids; those behind have no derivative.
    """
    if cap is None:
        return None
    found = (logits * (temperature / cap)).square_().neg_().add_(1)
    found[:, token_rows:] = 0
    return found

"""Output head and vocabulary softmax in chunks of `train.head_chunk_tokens` tokens, with gradients in the
same pass.

Shapes: T tokens of a row, n local tokens (gathered under sequence parallelism), C tokens of a chunk, H hidden
size, V vocabulary (split over the tensor-parallel group). Logits of shape n x V never exist.

The derivative of a token's cross-entropy with respect to its logits is ``softmax - one_hot(label)``. With
token weights known in advance, `CrossEntropySums` computes loss and gradients in the forward pass and drops
each chunk's logits. `LabelLogprobs` receives the token weights in the backward pass and applies the head a
second time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch.autograd.function import once_differentiable

from megatron_sov.engine.parallel import context

PRODUCT_ROWS = 8192
"""Weight gradient rows per float32 product, which limits temporary memory."""


@dataclass(frozen=True)
class Chunking:
    """How the head splits tokens into chunks."""

    chunk_tokens: int
    """C."""
    token_rows: int
    """Local head weight rows with token ids; padding rows follow."""
    softcap: float | None = None
    """Cap on the logits, applied before the temperature (`ModelConfig.logits_softcap`)."""

    def split_tokens(self, num_tokens: int) -> list[slice]:
        """Return chunks over `num_tokens` tokens in order; with 0 tokens, an empty chunk."""
        return [slice(i, i + self.chunk_tokens) for i in range(0, max(1, num_tokens), self.chunk_tokens)]


class CrossEntropySums(torch.autograd.Function):
    """`autograd.Function` for weighted sums of token cross-entropies; each sum is differentiable."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor,
                chunking: Chunking, differentiable: bool,
                *token_weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """states [n, H], weight [V / tp, H], labels [T], weights [T] -> losses [T] without gradient, sums.

        `differentiable`: whether the caller has gradients enabled; inside `forward` they never are.
        """
        gradients = HeadGradients.allocate(states, weight,
                                           tuple(context.select_local(w) for w in token_weights),
                                           differentiable and ctx.needs_input_grad[0],
                                           differentiable and ctx.needs_input_grad[1])
        # the same sweep fills the gradients, since the token weights are known: logits are computed once
        losses = context.gather_row(-_sweep_chunks(states, weight, context.select_local(labels), chunking,
                                                   gradients))
        gradients.save(ctx)
        ctx.mark_non_differentiable(losses)
        return losses, *((losses * w).sum() for w in token_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: torch.Tensor, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale the gradients that the forward pass computed."""
        return *HeadGradients.restore(ctx, len(upstream)).scale(upstream), *[None] * (3 + len(upstream))


class LabelLogprobs(torch.autograd.Function):
    """Label log-probabilities, for losses whose derivative is known only in the backward pass."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor,
                chunking: Chunking, temperature: float) -> torch.Tensor:
        """states [n, H], weight [V / tp, H], labels [n] -> log-probabilities [n]."""
        ctx.save_for_backward(states, weight, labels)
        ctx.chunking, ctx.temperature = chunking, temperature
        return _sweep_chunks(states, weight, labels, chunking, HeadGradients(), temperature)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Apply the head again, now with the token weights `-upstream`."""
        states, weight, labels = ctx.saved_tensors
        gradients = HeadGradients.allocate(states, weight, (-upstream,), *ctx.needs_input_grad[:2])
        _sweep_chunks(states, weight, labels, ctx.chunking, gradients, ctx.temperature)
        return *gradients.scale((upstream.new_ones(()),)), None, None, None


def project_logits(states: torch.Tensor, weight: torch.Tensor, token_rows: int,
                   temperature: float = 1.0, softcap: float | None = None) -> torch.Tensor:
    """Return logits [n, V / tp] in float32 or wider: capped, divided by the temperature, -inf from column
    `token_rows` on."""
    logits = states @ weight.t()
    logits = cap_logits_(logits.to(torch.promote_types(logits.dtype, torch.float32)), softcap)
    if temperature != 1:
        logits /= temperature
    logits[:, token_rows:] = -torch.inf
    return logits


@dataclass(frozen=True)
class HeadGradients:
    """Token loss gradients, accumulated over chunks; gradients without `requires_grad` are None or empty."""

    token_weights: tuple[torch.Tensor, ...] = ()
    """[n] each, in the logits' dtype."""
    states_grad: torch.Tensor | None = None
    """[n, H]: gradient of each token's unweighted loss with respect to its hidden state."""
    weight_grads: tuple[torch.Tensor, ...] = ()
    """[V / tp, H] per sum: gradient of the weighted sum with respect to the head weight. float32 for bf16
    models: a bf16 sum would lose later chunks."""

    @classmethod
    def allocate(cls, states: torch.Tensor, weight: torch.Tensor, token_weights: tuple[torch.Tensor, ...],
                 needs_states: bool, needs_weight: bool) -> "HeadGradients":
        """Allocate gradients for a sum per entry of `token_weights`, as far as they are needed."""
        dtype = torch.promote_types(states.dtype, torch.float32)
        weight_grads = (torch.zeros_like(weight, dtype=dtype) for _ in token_weights)
        return cls(tuple(w.to(dtype) for w in token_weights),
                   torch.empty_like(states) if needs_states else None,
                   tuple(weight_grads) if needs_weight else ())

    @classmethod
    def restore(cls, ctx: Any, num_sums: int) -> "HeadGradients":
        """Restore the gradients that `save` saved for `num_sums` sums."""
        states_grad, *rest = ctx.saved_tensors
        return cls(tuple(rest[:num_sums]), states_grad, tuple(rest[num_sums:]))

    def save(self, ctx: Any) -> None:
        """Save the gradients for the backward pass."""
        ctx.save_for_backward(self.states_grad, *self.token_weights, *self.weight_grads)

    @property
    def any_needed(self) -> bool:
        return self.states_grad is not None or bool(self.weight_grads)

    def add_chunk(self, part: slice, states: torch.Tensor, weight: torch.Tensor, by_logits: torch.Tensor,
                  sums: torch.Tensor) -> None:
        """Add a chunk's gradients to `HeadGradients`.

        Args:
            part: the chunk's tokens.
            states: [C, H] hidden states.
            weight: [V / tp, H] head weight.
            by_logits: [C, V / tp] ``sums *`` the derivative of each token's loss with respect to its logits.
                Dividing the small factors by `sums` saves a pass over this large tensor.
            sums: [C] divisors.
        """
        by_logits = by_logits.to(weight.dtype)
        if self.states_grad is not None:
            torch.mm(by_logits, weight, out=self.states_grad[part])
            self.states_grad[part].div_(sums[:, None])
        for token_weight, total in zip(self.token_weights, self.weight_grads, strict=False):
            weighted = states * (token_weight[part] / sums)[:, None]
            _add_product(total, by_logits.t(), weighted.to(weight.dtype))

    def scale(self, factors: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Scale in place and return the gradients of ``sum over k of factors[k] * sum k`` with respect to
        hidden states and head weight.

        Factors are reshaped to the dimensions of the gradients: as 0-dim tensors they would be rounded to the
        gradient's dtype."""
        if self.states_grad is not None:
            # a hidden state contributes to all sums: add up factor * token weight before the product
            products = [factor.reshape(1) * weights
                        for factor, weights in zip(factors, self.token_weights, strict=True)]
            self.states_grad.mul_(torch.stack(products).sum(0)[:, None])
        for factor, total in zip(factors, self.weight_grads, strict=False):
            total.mul_(factor.reshape(1, 1))
        for total in self.weight_grads[1:]:
            self.weight_grads[0].add_(total)
        return self.states_grad, self.weight_grads[0] if self.weight_grads else None


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add ``a @ b`` of 16-bit matrices to a float32 total without rounding the product to 16 bits."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    for first in range(0, len(total), PRODUCT_ROWS):
        rows = slice(first, first + PRODUCT_ROWS)
        # only GPUs multiply 16-bit matrices into float32
        total[rows] += (torch.mm(a[rows], b, out_dtype=total.dtype) if a.is_cuda
                        else a[rows].to(total.dtype) @ b.to(total.dtype))


def _sweep_chunks(states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunking: Chunking,
                  gradients: HeadGradients, temperature: float = 1.0) -> torch.Tensor:
    """Return label log-probabilities [n] in float32 or wider, and accumulate gradients."""
    return torch.cat([_process_chunk(part, states[part], weight=weight, labels=labels[part],
                                     chunking=chunking, gradients=gradients, temperature=temperature)
                      for part in chunking.split_tokens(len(states))])


def _process_chunk(part: slice, states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor,
                   chunking: Chunking, gradients: HeadGradients, temperature: float) -> torch.Tensor:
    """Process a chunk: states [C, H], weight [V / tp, H], labels [C] -> log-probabilities [C].

    One tensor of logits is reused in place for exponentials and derivatives; a softcap needs a second."""
    group = parallel_state.get_tensor_model_parallel_group()
    logits = project_logits(states, weight, chunking.token_rows, temperature, chunking.softcap)
    slope = (compute_softcap_slope(logits, chunking.softcap, temperature, chunking.token_rows)
             if gradients.any_needed else None)
    # maximum over the whole vocabulary: exp must not overflow, and all processes subtract the same number
    largest = logits.max(dim=-1).values
    if group.size() > 1:
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
    logits -= largest[:, None]
    column = labels - group.rank() * logits.shape[1]
    # one process of the group owns the label; the others add 0 to the sum below
    is_local = (column >= 0) & (column < logits.shape[1])
    column = column.where(is_local, 0)
    chosen = logits.gather(1, column[:, None])[:, 0].where(is_local, 0.0)
    exponentials = logits.exp_()
    # reduce both sums in one message
    sums_to_reduce = torch.stack([chosen, exponentials.sum(dim=-1)])
    if group.size() > 1:
        torch.distributed.all_reduce(sums_to_reduce, group=group)
    chosen, sums = sums_to_reduce
    if gradients.any_needed:
        # sums * d(-log p)/d(logits) is exp(x) - sums at the label and exp(x) elsewhere;
        # `HeadGradients.add_chunk` divides the small factors instead of this tensor
        exponentials[torch.arange(len(column), device=column.device), column] -= sums.where(is_local, 0.0)
        if slope is not None:
            exponentials *= slope
        # logits are divided by the temperature, so their derivative by the states is too
        gradients.add_chunk(part, states, weight, exponentials, sums * temperature)
    return chosen - sums.log()


def cap_logits_(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Apply ``cap * tanh(x / cap)`` in place (arXiv 2408.00118, section 2). None: no cap."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def compute_softcap_slope(logits: torch.Tensor, cap: float | None, temperature: float,
                          token_rows: int) -> torch.Tensor | None:
    """Return the derivative of capped logits with respect to uncapped logits, ``1 - (capped / cap)^2``.

    Args:
        logits: [C, V / tp], capped, then divided by the temperature.
        cap: the cap. None: no cap, returns None.
        temperature: divisor of `logits`.
        token_rows: columns that belong to token ids; the derivative of padding columns is 0.
    """
    if cap is None:
        return None
    slope = (logits * (temperature / cap)).square_().neg_().add_(1)
    slope[:, token_rows:] = 0
    return slope

"""Log-probabilities of given tokens from hidden states: the only place where losses meet the vocabulary.

Shapes: T tokens, H hidden size, V vocabulary (split over the tensor-parallel group), C tokens of a chunk.
The output head is applied to C tokens at a time and recomputed in the backward pass,
so T x V logits never exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from megatron_sov.mcore.model.language_model import LanguageModel, gather_sequence, valid_rows
from megatron_sov.mcore.parallel import context


@dataclass(frozen=True)
class Head:
    """The output head of the last pipeline stage."""

    weight: torch.Tensor
    """[V / tp, H], this process's rows; V is padded to a multiple of tp."""
    config: Any
    """The library's TransformerConfig."""
    chunk_tokens: int
    """C."""
    vocab_size: int
    """Token ids, without padding."""

    def logprobs(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return log p(label) of each position.

        Args:
            hidden: [T / context-parallel size / sequence-parallel size, 1, H], of the local tokens.
            labels: [T] int64, of the whole row.

        Returns:
            [T] float32 (float64 under fp64) of the whole row, equal on all processes of the tensor- and
            context-parallel groups, differentiable for losses that are computed alike on all of them.
        """
        states = gather_sequence(hidden, self.config)
        parts = []
        for s, y in zip(states.split(self.chunk_tokens), context.local(labels).split(self.chunk_tokens),
                        strict=True):
            parts.append(checkpoint(_chunk_logprobs, s, self.weight, self._mask(), y, use_reentrant=False))
        return context.gather(torch.cat(parts))

    @torch.no_grad()
    def top_tokens(self, states: torch.Tensor) -> torch.Tensor:
        """Return the most probable token [n] int64 after each of some positions' hidden states [n, H]
        (already gathered)."""
        return torch.cat([_chunk_argmax(s, self.weight, self._mask())
                          for s in states.split(self.chunk_tokens)])

    @torch.no_grad()
    def top_of_row(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the most probable token [T] int64 after each position of a row, from [local tokens, 1,
        H], on every process."""
        return context.gather(self.top_tokens(gather_sequence(hidden, self.config)))

    @torch.no_grad()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return full logits [n, token ids] float32 (float64 under fp64) of a few positions' states [n, H]
        (already gathered)."""
        local = _logits(states, self.weight, None)
        return tensor_parallel.gather_from_tensor_model_parallel_region(local)[:, :self.vocab_size]

    def _mask(self) -> torch.Tensor | None:
        """Return [V / tp] with 0 for token ids and -inf for padding, or None where this
        process has no padding."""
        rows = valid_rows(self.weight, self.vocab_size)
        if rows == len(self.weight):
            return None
        mask = self.weight.new_zeros(len(self.weight))
        mask[rows:] = -torch.inf
        return mask


def head_of(model: LanguageModel, chunk_tokens: int) -> Head:
    """Return the head of a model's last pipeline stage."""
    return Head(model.head_weight, model.config, chunk_tokens, model.vocab_size)


def _chunk_logprobs(states: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | None,
                    labels: torch.Tensor) -> torch.Tensor:
    """[C, H], [V / tp, H], [V / tp], [C] -> [C] float32 (float64 under fp64)."""
    logits = _logits(states, weight, mask)
    chosen: torch.Tensor = _LabelLogprobs.apply(logits, labels,
                                                parallel_state.get_tensor_model_parallel_group())
    return chosen


def _logits(states: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[n, H], [V / tp, H], [V / tp] -> [n, V / tp] in float32, or float64 where the model is;
    without mask padding has 0."""
    logits = torch.nn.functional.linear(states, weight, mask)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _LabelLogprobs(torch.autograd.Function):
    """``log softmax(logits)[label]`` over a vocabulary that is split over the processes of a group.

    The library's `vocab_parallel_cross_entropy` does the same, but casts to float32.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: Any) -> torch.Tensor:
        """[C, V / tp], [C] -> [C] in the dtype of the logits."""
        largest = logits.max(dim=-1).values
        if group.size() > 1:
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
        exponentials = logits - largest[:, None]
        place = labels - group.rank() * logits.shape[1]
        here = (place >= 0) & (place < logits.shape[1])
        place = place.where(here, 0)
        chosen = exponentials.gather(1, place[:, None])[:, 0].where(here, 0.0)
        exponentials.exp_()
        sums = torch.stack([chosen, exponentials.sum(dim=-1)])
        if group.size() > 1:
            torch.distributed.all_reduce(sums, group=group)
        ctx.save_for_backward(exponentials.div_(sums[1][:, None]), place, here)
        return sums[0] - sums[1].log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The derivative by logit i is ``(i is the label) - softmax_i``; it takes the place of the
        softmax in memory."""
        softmax, place, here = ctx.saved_tensors
        gradient = softmax.mul_(-upstream[:, None])
        rows = torch.arange(len(place), device=place.device)
        gradient[rows, place] += upstream.where(here, 0.0)
        return gradient, None, None


def _chunk_argmax(states: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[C, H], [V / tp, H], [V / tp] -> [C] int64; of equal logits the lowest id wins, at every layout."""
    best, token = _logits(states, weight, mask).max(dim=-1)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return token
    token = token + group.rank() * weight.shape[0]
    both = [torch.empty(len(best), 2, dtype=torch.float64, device=best.device) for _ in range(group.size())]
    torch.distributed.all_gather(both, torch.stack([best.double(), token.double()], dim=1), group=group)
    stacked = torch.stack(both)
    winner = stacked[:, :, 0].argmax(dim=0)
    return stacked[winner, torch.arange(len(best), device=best.device), 1].long()

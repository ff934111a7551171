"""Log-probabilities of given tokens from hidden states: the only place where losses meet the vocabulary.

Shapes: T tokens, H hidden size, V vocabulary (split over the tensor-parallel group), C tokens of a chunk.
The output head is applied to C tokens at a time and recomputed in the backward pass, so T x V logits never exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from torch.utils.checkpoint import checkpoint

from megatron_sov.mcore.model import LanguageModel, gather_sequence


@dataclass(frozen=True)
class Head:
    """The output head of the last pipeline stage."""

    weight: torch.Tensor
    """[V / tp, H], this process's rows."""
    config: Any
    """The library's TransformerConfig."""
    chunk_tokens: int
    """C."""

    def logprobs(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return log p(label) of each position.

        Args:
            hidden: [T / sequence-parallel size, 1, H].
            labels: [T] int64.

        Returns:
            [T] float32, equal on all processes of the tensor-parallel group, differentiable.
        """
        states = gather_sequence(hidden, self.config)
        parts = []
        for s, y in zip(states.split(self.chunk_tokens), labels.split(self.chunk_tokens), strict=True):
            parts.append(checkpoint(_chunk_logprobs, s, self.weight, y, use_reentrant=False))
        return torch.cat(parts)

    @torch.no_grad()
    def top_tokens(self, states: torch.Tensor) -> torch.Tensor:
        """Return the most probable token [n] int64 after each of some positions' hidden states [n, H] (already gathered)."""
        return torch.cat([_chunk_argmax(s, self.weight) for s in states.split(self.chunk_tokens)])

    @torch.no_grad()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return full logits [n, V] float32 of a few positions' hidden states [n, H] (already gathered)."""
        local = torch.nn.functional.linear(states, self.weight).float()
        return tensor_parallel.gather_from_tensor_model_parallel_region(local)


def head_of(model: LanguageModel, chunk_tokens: int) -> Head:
    """Return the head of a model's last pipeline stage."""
    return Head(model.head_weight, model.config, chunk_tokens)


def _chunk_logprobs(states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[C, H], [V / tp, H], [C] -> [C] float32."""
    logits = torch.nn.functional.linear(states, weight).float()
    return -tensor_parallel.vocab_parallel_cross_entropy(logits[:, None], labels[:, None])[:, 0]


def _chunk_argmax(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[C, H], [V / tp, H] -> [C] int64; of equal logits the lowest id wins, at every layout."""
    best, token = torch.nn.functional.linear(states, weight).float().max(dim=-1)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return token
    token = token + group.rank() * weight.shape[0]
    both = [torch.empty(len(best), 2, dtype=torch.float64, device=best.device) for _ in range(group.size())]
    torch.distributed.all_gather(both, torch.stack([best.double(), token.double()], dim=1), group=group)
    stacked = torch.stack(both)
    winner = stacked[:, :, 0].argmax(dim=0)
    return stacked[winner, torch.arange(len(best), device=best.device), 1].long()

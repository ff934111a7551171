"""Log-probabilities of given tokens from hidden states: the only place where losses meet the vocabulary.

Shapes: T tokens, H hidden size, V vocabulary (split over the tensor-parallel group), C tokens of a chunk.
The output head is applied to C tokens at a time, so T x V logits never exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel

from megatron_sov.engine.model.chunked_head import Chunking, CrossEntropySums, LabelLogprobs, project
from megatron_sov.engine.model.divergence import Divergence, DivergenceSums, Teacher, most_probable
from megatron_sov.engine.model.language_model import LanguageModel, states_for_head, valid_rows
from megatron_sov.engine.parallel import context
from megatron_sov.engine.parallel.device import to_device


@dataclass(frozen=True)
class Divergences:
    """What was measured at each label of a row, without gradient.

    Each [T] float32 (float64 under fp64), equal on all processes of the tensor- and context-parallel groups.
    """

    divergence: torch.Tensor
    """What is learned."""
    kl: torch.Tensor
    """KL(teacher || student) in nats, over the same events at the same temperature."""
    entropy: torch.Tensor
    """The student's, in nats, at the same temperature."""


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
    logits_softcap: float | None = None
    """Cap on the logits; None: none."""

    def cross_entropy(self, hidden: torch.Tensor, labels: torch.Tensor,
                      weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return weighted sums of the positions' losses ``-log p(label)``, and these losses.

        Weights are known before the logits are, so the pass that computes losses computes gradients too
        and the head is applied once. Further terms add a product with the head's weight each, not a pass.

        Args:
            hidden: [T / context-parallel size / sequence-parallel size, 1, H], of the local tokens.
            labels: [T] int64, of the whole row.
            weights: term -> [T] weight of each label in its sum; numbers, not differentiated.

        Returns:
            Term -> its sum over the whole row, equal on all processes of the tensor- and context-parallel
            groups and differentiable for losses that are computed alike on all of them; [T] losses in
            float32 (float64 under fp64), without gradient.
        """
        losses, *sums = CrossEntropySums.apply(states_for_head(hidden, self.config), self.weight, labels,
                                               self._chunking, torch.is_grad_enabled(), *weights.values())
        return dict(zip(weights, sums, strict=True)), losses

    def divergence(self, hidden: torch.Tensor, teacher: Teacher, weights: Mapping[str, torch.Tensor],
                   divergence: Divergence) -> tuple[dict[str, torch.Tensor], Divergences]:
        """Return weighted sums of the positions' divergences from a teacher, and what was measured.

        As in `cross_entropy`, weights are known before and the head is applied once.

        Args:
            hidden: [T / context-parallel size / sequence-parallel size, 1, H], of the local tokens.
            teacher: its distribution at the local tokens, not cut for sequence parallelism.
            weights: term -> [T] weight of each position in its sum; numbers, not differentiated.
            divergence: which.

        Returns:
            Term -> its sum over the whole row, as from `cross_entropy`; and each position's figures.
        """
        of_row, *sums = DivergenceSums.apply(states_for_head(hidden, self.config), self.weight, teacher,
                                             divergence, self._chunking, torch.is_grad_enabled(),
                                             *weights.values())
        return dict(zip(weights, sums, strict=True)), Divergences(*of_row.unbind(1))

    def logprobs(self, hidden: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0,
                 wanted: torch.Tensor | None = None) -> torch.Tensor:
        """Return log p(label) of each position, for losses that are no weighted sums of them.

        What such a loss makes of them is known after the forward pass only, so the head is applied
        again in the backward pass.

        Args:
            hidden: [T / context-parallel size / sequence-parallel size, 1, H], of the local tokens.
            labels: [T] int64, of the whole row.
            temperature: what logits are divided by before the softmax: that of the policy which wrote the
                labels, where their ratio is asked for.
            wanted: [T] bool on the host: positions that are asked for; the head is not applied to the others,
                which have 0.  None: all.

        Returns:
            [T] float32 (float64 under fp64) of the whole row, equal on all processes of the tensor- and
            context-parallel groups, differentiable for losses that are computed alike on all of them.
        """
        states, own = states_for_head(hidden, self.config), context.local(labels)
        if wanted is None:
            return context.gather(LabelLogprobs.apply(states, self.weight, own, self._chunking, temperature))
        index = to_device(context.local(wanted).nonzero()[:, 0], states.device)
        found = LabelLogprobs.apply(states.index_select(0, index), self.weight, own[index], self._chunking,
                                    temperature)
        return context.gather(found.new_zeros(len(own)).index_copy(0, index, found))

    @torch.no_grad()
    def top_tokens(self, states: torch.Tensor) -> torch.Tensor:
        """Return the most probable token [n] int64 after each of some positions' hidden states [n, H]
        (already gathered)."""
        return torch.cat([_chunk_argmax(self._project(s, self._chunking.token_rows))[0]
                          for s in states.split(self.chunk_tokens)])

    @torch.no_grad()
    def best_tokens(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return these tokens, and the log-probability [n] float32 (float64 under fp64) of each."""
        found = [_chunk_best(self._project(s, self._chunking.token_rows))
                 for s in states.split(self.chunk_tokens)]
        return torch.cat([token for token, _ in found]), torch.cat([logprob for _, logprob in found])

    @torch.no_grad()
    def top_of_row(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the most probable token [T] int64 after each position of a row, from [local tokens, 1,
        H], on every process."""
        return context.gather(self.top_tokens(states_for_head(hidden, self.config)))

    @torch.no_grad()
    def most_probable(self, hidden: torch.Tensor, k: int, temperature: float = 1.0
                      ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the K most probable tokens [T, K] int64 after each position of a row, and their
        log-probabilities [T, K] float32 (float64 under fp64), from [local tokens, 1, H], on every process."""
        found = [most_probable(s, self.weight, k, self._chunking.token_rows, temperature, self.logits_softcap)
                 for s in states_for_head(hidden, self.config).split(self.chunk_tokens)]
        token, logprobs = (context.gather(torch.cat(parts)) for parts in zip(*found, strict=True))
        return token, logprobs

    @torch.no_grad()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return full logits [n, token ids] float32 (float64 under fp64) of a few positions' states [n, H]
        (already gathered)."""
        local = self._project(states, len(self.weight))
        return tensor_parallel.gather_from_tensor_model_parallel_region(local)[:, :self.vocab_size]

    @property
    def token_ids(self) -> range:
        """Token ids whose rows of the head's weight this process holds; rows that pad the vocabulary
        follow them."""
        first = parallel_state.get_tensor_model_parallel_rank() * len(self.weight)
        return range(first, first + self._chunking.token_rows)

    @property
    def _chunking(self) -> Chunking:
        return Chunking(self.chunk_tokens, valid_rows(self.weight, self.vocab_size), self.logits_softcap)

    def _project(self, states: torch.Tensor, rows: int) -> torch.Tensor:
        return project(states, self.weight, rows, softcap=self.logits_softcap)


def head_of(model: LanguageModel, chunk_tokens: int) -> Head:
    return Head(model.head_weight, model.config, chunk_tokens, model.vocab_size,
                model.architecture.logits_softcap)


def _chunk_best(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[C, V / tp] -> [C] int64, the most probable token, and [C], its log-probability; logits are spent."""
    token, largest = _chunk_argmax(logits)
    sums = logits.sub_(largest[:, None]).exp_().sum(dim=-1)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() > 1:
        torch.distributed.all_reduce(sums, group=group)
    return token, -sums.log()


def _chunk_argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[C, V / tp] -> [C] int64 and its logit [C]; of equal logits the lowest id wins, at every layout."""
    best, token = logits.max(dim=-1)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return token, best
    token = token + group.rank() * logits.shape[1]
    both = [torch.empty(len(best), 2, dtype=torch.float64, device=best.device) for _ in range(group.size())]
    torch.distributed.all_gather(both, torch.stack([best.double(), token.double()], dim=1), group=group)
    stacked = torch.stack(both)
    winner = stacked[:, :, 0].argmax(dim=0)
    largest, token_id = stacked[winner, torch.arange(len(best), device=best.device)].unbind(dim=1)
    return token_id.long(), largest.to(best.dtype)

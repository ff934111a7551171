"""The output head: losses, log-probabilities and logits from hidden states.

Shapes: T tokens of a row, H hidden size, V vocabulary (split over the tensor-parallel group), C tokens of a
chunk. The head is applied to C tokens at a time, so T x V logits never exist."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel

from megatron_sov.engine.model.chunked_head import Chunking, CrossEntropySums, LabelLogprobs, project_logits
from megatron_sov.engine.model.divergence import Divergence, DivergenceSums, Teacher, find_most_probable
from megatron_sov.engine.model.language_model import LanguageModel, count_token_rows, prepare_head_input
from megatron_sov.engine.parallel import context
from megatron_sov.engine.parallel.device import to_device


@dataclass(frozen=True)
class DivergenceStatistics:
    """Divergence statistics per label in a row, without gradient.

    Each [T] float32 (float64 under fp64), equal on all processes of the tensor- and context-parallel groups.
    """

    divergence: torch.Tensor
    """The trained divergence."""
    kl: torch.Tensor
    """KL(teacher || student) in nats, at the same temperature and over the same events."""
    entropy: torch.Tensor
    """The student's entropy in nats, at the same temperature."""


@dataclass(frozen=True)
class Head:
    """The last pipeline stage's output head."""

    weight: torch.Tensor
    """[V / tp, H] local rows; V is padded to a multiple of tp."""
    config: Any
    """Megatron-Core's `TransformerConfig`."""
    chunk_tokens: int
    """C."""
    vocab_size: int
    """Token ids, without padding."""
    logits_softcap: float | None = None
    """Cap on the logits. None: no cap."""

    def cross_entropy(self, hidden: torch.Tensor, labels: torch.Tensor,
                      weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return weighted sums over the losses ``-log p(label)``, and the losses.

        The weights are known before the logits, so one pass applies the head and computes losses and
        gradients. Each further term adds one product with the head weight.

        Args:
            hidden: [T / context-parallel size / sequence-parallel size, 1, H] of the local tokens.
            labels: [T] int64 of the whole row.
            weights: term -> [T] weights, without gradient.

        Returns:
            Term -> its sum over the whole row, equal on all processes of the tensor- and context-parallel
            groups, differentiable if every process computes the same loss from it; and the losses [T]
            float32 (float64 under fp64), without gradient.
        """
        losses, *sums = CrossEntropySums.apply(prepare_head_input(hidden, self.config), self.weight, labels,
                                               self._chunking, torch.is_grad_enabled(), *weights.values())
        return dict(zip(weights, sums, strict=True)), losses

    def divergence(self, hidden: torch.Tensor, teacher: Teacher, weights: Mapping[str, torch.Tensor],
                   divergence: Divergence) -> tuple[dict[str, torch.Tensor], DivergenceStatistics]:
        """Return weighted sums over divergences from a teacher, and per-label statistics.

        As in `cross_entropy`, the weights are known in advance and the head is applied once.

        Args:
            hidden: [T / context-parallel size / sequence-parallel size, 1, H] of the local tokens.
            teacher: distribution at the local tokens, not split for sequence parallelism.
            weights: term -> [T] weights, without gradient.
            divergence: kind and temperature.

        Returns:
            Term -> its sum over the whole row, as in `cross_entropy`; and the statistics.
        """
        row_values, *sums = DivergenceSums.apply(prepare_head_input(hidden, self.config), self.weight,
                                                 teacher, divergence, self._chunking, torch.is_grad_enabled(),
                                                 *weights.values())
        return dict(zip(weights, sums, strict=True)), DivergenceStatistics(*row_values.unbind(1))

    def logprobs(self, hidden: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0,
                 wanted: torch.Tensor | None = None) -> torch.Tensor:
        """Return log p(label) at every position, for losses other than weighted sums.

        Such a loss knows its derivative only in the backward pass, which applies the head a second time.

        Args:
            hidden: [T / context-parallel size / sequence-parallel size, 1, H] of the local tokens.
            labels: [T] int64 of the whole row.
            temperature: divisor of the logits. For importance ratios, use the temperature of the policy that
                sampled the labels.
            wanted: [T] bool on the host: positions to compute; the others get 0. None: all positions.

        Returns:
            [T] float32 (float64 under fp64) of the whole row, equal on all processes of the tensor- and
            context-parallel groups, differentiable if every process computes the same loss from it.
        """
        states, local_labels = prepare_head_input(hidden, self.config), context.select_local(labels)
        if wanted is None:
            return context.gather_row(
                LabelLogprobs.apply(states, self.weight, local_labels, self._chunking, temperature))
        index = to_device(context.select_local(wanted).nonzero()[:, 0], states.device)
        selected = LabelLogprobs.apply(states.index_select(0, index), self.weight, local_labels[index],
                                       self._chunking, temperature)
        return context.gather_row(selected.new_zeros(len(local_labels)).index_copy(0, index, selected))

    @torch.no_grad()
    def top_tokens(self, states: torch.Tensor) -> torch.Tensor:
        """Return the most probable tokens [n] int64 for gathered hidden states [n, H]."""
        return torch.cat([_find_top_tokens(self._project_logits(s, self._chunking.token_rows))[0]
                          for s in states.split(self.chunk_tokens)])

    @torch.no_grad()
    def best_tokens(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `top_tokens` and log-probabilities [n] float32 (float64 under fp64)."""
        best = [_find_best_tokens(self._project_logits(s, self._chunking.token_rows))
                for s in states.split(self.chunk_tokens)]
        return torch.cat([token for token, _ in best]), torch.cat([logprob for _, logprob in best])

    @torch.no_grad()
    def predict_row(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the most probable token [T] int64 after each position of a row, on every process, from
        hidden states [local tokens, 1, H]."""
        return context.gather_row(self.top_tokens(prepare_head_input(hidden, self.config)))

    @torch.no_grad()
    def find_most_probable(self, hidden: torch.Tensor, k: int, temperature: float = 1.0
                           ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the K most probable tokens [T, K] int64 after each position of a row and their
        log-probabilities [T, K] float32 (float64 under fp64), on every process, from [local tokens, 1, H]."""
        best = [find_most_probable(s, self.weight, k=k, token_rows=self._chunking.token_rows,
                                   temperature=temperature, softcap=self.logits_softcap)
                for s in prepare_head_input(hidden, self.config).split(self.chunk_tokens)]
        token, logprobs = (context.gather_row(torch.cat(parts)) for parts in zip(*best, strict=True))
        return token, logprobs

    @torch.no_grad()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return full logits [n, token ids] float32 (float64 under fp64) for gathered states [n, H]."""
        local = self._project_logits(states, len(self.weight))
        return tensor_parallel.gather_from_tensor_model_parallel_region(local)[:, :self.vocab_size]

    @property
    def token_ids(self) -> range:
        """Token ids of the local rows of the head weight; padding rows follow."""
        first = parallel_state.get_tensor_model_parallel_rank() * len(self.weight)
        return range(first, first + self._chunking.token_rows)

    @property
    def _chunking(self) -> Chunking:
        return Chunking(self.chunk_tokens, count_token_rows(self.weight, self.vocab_size),
                        self.logits_softcap)

    def _project_logits(self, states: torch.Tensor, rows: int) -> torch.Tensor:
        return project_logits(states, self.weight, rows, softcap=self.logits_softcap)


def build_head(model: LanguageModel, chunk_tokens: int) -> Head:
    return Head(model.head_weight, model.config, chunk_tokens, model.vocab_size,
                model.architecture.logits_softcap)


def _find_best_tokens(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the most probable token [C] int64 and its log-probability; overwrites logits [C, V / tp]."""
    token, largest = _find_top_tokens(logits)
    sums = logits.sub_(largest[:, None]).exp_().sum(dim=-1)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() > 1:
        torch.distributed.all_reduce(sums, group=group)
    return token, -sums.log()


def _find_top_tokens(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest logit's token [C] int64 and value [C] from logits [C, V / tp]; ties go to the lowest
    id at every layout."""
    best, token = logits.max(dim=-1)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return token, best
    token = token + group.rank() * logits.shape[1]
    local = torch.stack([best.double(), token.double()], dim=1)
    gathered = [torch.empty_like(local) for _ in range(group.size())]
    torch.distributed.all_gather(gathered, local, group=group)
    stacked = torch.stack(gathered)
    winner = stacked[:, :, 0].argmax(dim=0)
    largest, token_id = stacked[winner, torch.arange(len(best), device=best.device)].unbind(dim=1)
    return token_id.long(), largest.to(best.dtype)

"""Divergence between next-token distributions of student and teacher, in chunks, with gradients in the same
pass.

Shapes: T tokens of a row, n local tokens, C tokens of a chunk, V vocabulary (split over the tensor-parallel
group), H and H' hidden sizes of student and teacher, K most probable tokens. Logits of shape n x V never
exist for either model.

With the student's distribution p, the teacher's q, both at temperature t, and the mixture
``m = beta q + (1 - beta) p``, the generalized Jensen-Shannon divergence of GKD (arXiv 2306.13649, equation 1)
equals ``beta KL(q || m) + (1 - beta) KL(p || m)``; by convention beta = 0 means forward KL(q || p) and
beta = 1 reverse KL(p || q). The derivative with respect to the student's logits:

    beta = 0:  (p - q) / t      beta = 1:  p (log p/q - KL(p || q)) / t
    between:   (1 - beta) p (log p/m - KL(p || m)) / t

A chunk's logits therefore give loss and gradient before they are dropped. As in TRL, the divergence is not
multiplied by the squared temperature; the teacher receives no gradient. Megatron-Core 0.19.2 has no
divergence of next-token distributions. Test: `test_divergence.py::test_values_and_gradients_are_the_papers`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from torch.autograd.function import once_differentiable

from megatron_sov.engine.model.chunked_head import (
    Chunking, HeadGradients, compute_softcap_slope, project_logits)
from megatron_sov.engine.parallel import context

PADDING_LOGIT = -1e30
"""Logit of padding columns: probability 0; unlike -inf, the difference of two such logits is 0, not NaN."""


TokenSubset = slice | torch.Tensor
"""A subset among n local tokens: a slice, or indices [C]."""


@dataclass(frozen=True)
class Divergence:
    """Divergence kind (`beta`) and `temperature`."""

    beta: float = 0.0
    """0: forward KL; 1: reverse KL; between: generalized Jensen-Shannon."""
    temperature: float = 1.0
    """Divisor for both models' logits."""


class Teacher(Protocol):
    """The teacher's distribution at the n local tokens, complete over the tensor-parallel group."""

    def compare(self, part: TokenSubset, student: torch.Tensor, divergence: Divergence, token_rows: int
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return values [3, C] and derivative [C, V / tp] for the tokens in `part`.

        The values are the divergence, KL(teacher || student) and the student's entropy; the derivative is
        with respect to the student's logits, times the temperature.

        Args:
            part: the tokens.
            student: [C, V / tp] log-probabilities, which may be overwritten.
            divergence: kind and temperature.
            token_rows: number of local columns that belong to token ids; padding columns follow.
        """


@dataclass(frozen=True)
class TeacherStates:
    """Full teacher distribution, from final hidden states and the output head."""

    states: torch.Tensor
    """[n, H'], on any device: each chunk is copied when needed."""
    weight: torch.Tensor
    """[V / tp, H'], split and padded like the student's head."""
    softcap: float | None = None
    """Cap on the teacher's logits. None: no cap."""

    def compare(self, part: TokenSubset, student: torch.Tensor, divergence: Divergence, token_rows: int
                ) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.states[part].to(self.weight.device, self.weight.dtype)
        teacher = compute_log_softmax(states, self.weight, token_rows, divergence.temperature, self.softcap)
        return _compute_divergence(student, teacher.to(student.dtype), divergence.beta, over_group=True)


@dataclass(frozen=True)
class TeacherTopK:
    """The teacher's K most probable tokens with log-probabilities."""

    ids: torch.Tensor
    """[n, K] int64, distinct within a position."""
    logprobs: torch.Tensor
    """[n, K] at the divergence's temperature; another temperature would need the other tokens."""
    keep_remainder: bool = True
    """True: the remaining probability forms one more event (TRL's `loss_add_tail`). False: both distributions
    are normalized over the K tokens (arXiv 2601.18129), and the total probability receives no gradient."""

    def compare(self, part: TokenSubset, student: torch.Tensor, divergence: Divergence, token_rows: int
                ) -> tuple[torch.Tensor, torch.Tensor]:
        ids, teacher = self.ids[part].to(student.device), self.logprobs[part].to(student)
        # Ids cover the whole vocabulary, columns the local part. Tokens of other ranks read column 0 and are
        # zeroed, so the sum over the group counts a token once.
        column = ids - parallel_state.get_tensor_model_parallel_rank() * student.shape[1]
        is_local = (column >= 0) & (column < student.shape[1])
        column = column.where(is_local, 0)
        top_logprobs = _sum_over_group(student.gather(1, column).where(is_local, 0.0))
        probabilities = student.exp()
        entropy = -_sum_over_group((student * probabilities).sum(-1))
        if not self.keep_remainder:
            values, derivative = _compute_divergence(top_logprobs.log_softmax(-1), teacher.log_softmax(-1),
                                                     divergence.beta)
            full_derivative = student.zero_()  # no gradient for tokens outside the K
        else:
            top_probabilities = top_logprobs.exp().where(is_local, 0.0)
            remainder = probabilities.scatter_add_(1, column, -top_probabilities).clamp_(min=0)
            total = _sum_over_group(remainder.sum(-1)).clamp(min=torch.finfo(remainder.dtype).tiny)
            values, derivative = _compute_divergence(
                torch.cat([top_logprobs, total.log()[:, None]], 1),
                torch.cat([teacher, _compute_log_remainder(teacher)], 1), divergence.beta)
            # Distribute the remainder's derivative over the other tokens by their share of the remainder.
            full_derivative = remainder.mul_((derivative[:, -1] / total)[:, None])
            derivative = derivative[:, :-1]
        full_derivative.scatter_add_(1, column, derivative.where(is_local, 0.0))
        return torch.cat([values[:2], entropy[None]]), full_derivative


@dataclass(frozen=True)
class TeachersByToken:
    """A `Teacher` per token, from several teachers."""

    owners: torch.Tensor
    """[n] int64 on the CPU: teacher index per token."""
    teachers: Sequence[Teacher]

    def compare(self, part: TokenSubset, student: torch.Tensor, divergence: Divergence, token_rows: int
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """Let each teacher compare the tokens assigned to it, see `Teacher`."""
        assert isinstance(part, slice), "DivergenceSums passes chunks as slices"
        owners = self.owners[part]
        values, derivative = student.new_zeros(3, len(student)), torch.zeros_like(student)
        # all processes of the tensor-parallel group have the same tokens: equal calls in equal order
        for teacher_index in owners.unique().tolist():
            token_index = (owners == teacher_index).nonzero()[:, 0]
            columns = token_index.to(student.device)
            values[:, columns], derivative[columns] = self.teachers[teacher_index].compare(
                token_index + part.start, student[columns], divergence, token_rows)
        return values, derivative


class DivergenceSums(torch.autograd.Function):
    """`autograd.Function` for weighted sums over token divergences; each sum is differentiable."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, teacher: Teacher,
                divergence: Divergence, chunking: Chunking, differentiable: bool,
                *token_weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """states [n, H], weight [V / tp, H], weights [T] -> row values [T, 3] without gradient, and sums.

        `differentiable`: whether the caller has gradients enabled; inside `forward` they never are.
        """
        gradients = HeadGradients.allocate(states, weight,
                                           tuple(context.select_local(w) for w in token_weights),
                                           differentiable and ctx.needs_input_grad[0],
                                           differentiable and ctx.needs_input_grad[1])
        chunk_values = []
        for part in chunking.split_tokens(len(states)):
            chunk_values.append(
                _compare_chunk(part, states[part], weight, teacher, divergence, chunking, gradients))
        row_values = context.gather_row(torch.cat(chunk_values, dim=1).t().contiguous())
        gradients.save(ctx)
        ctx.mark_non_differentiable(row_values)
        return row_values, *((row_values[:, 0] * w).sum() for w in token_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: torch.Tensor, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale the gradients that the forward pass computed."""
        return *HeadGradients.restore(ctx, len(upstream)).scale(upstream), *[None] * (4 + len(upstream))


def _compare_chunk(part: slice, states: torch.Tensor, weight: torch.Tensor, teacher: Teacher,
                   divergence: Divergence, chunking: Chunking, gradients: HeadGradients) -> torch.Tensor:
    """Compare a chunk: states [C, H], weight [V / tp, H] -> [3, C]. Frees the chunk's logits on return."""
    logits = project_logits(states, weight, chunking.token_rows, divergence.temperature, chunking.softcap)
    slope = (compute_softcap_slope(logits, chunking.softcap, divergence.temperature, chunking.token_rows)
             if gradients.any_needed else None)
    student = _normalize_logits(logits, chunking.token_rows)
    del logits  # free memory: the comparison needs two chunks
    values, derivative = teacher.compare(part, student, divergence, chunking.token_rows)
    if gradients.any_needed:
        if slope is not None:
            derivative *= slope
        temperature = values.new_full((values.shape[1],), divergence.temperature)
        gradients.add_chunk(part, states, weight, derivative, temperature)
    return values


def compute_log_softmax(states: torch.Tensor, weight: torch.Tensor, token_rows: int, temperature: float,
                        softcap: float | None = None) -> torch.Tensor:
    """Return log-probabilities [C, V / tp] over the whole vocabulary from states [C, H]."""
    return _normalize_logits(project_logits(states, weight, token_rows, temperature, softcap), token_rows)


def _normalize_logits(logits: torch.Tensor, token_rows: int) -> torch.Tensor:
    """Return the log-softmax over the whole vocabulary of logits [C, V / tp]; overwrites the logits."""
    logits[:, token_rows:] = PADDING_LOGIT
    local = logits.log_softmax(-1)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() > 1:
        # log-sum-exp of the local columns, as largest logit minus its log-probability: full precision
        local_lse = logits.amax(-1) - local.amax(-1)
        largest = local_lse.clone()
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
        total = _sum_over_group((local_lse - largest).exp()).log() + largest
        local += (local_lse - total)[:, None]
    return local


def find_most_probable(states: torch.Tensor, weight: torch.Tensor, k: int, token_rows: int,
                       temperature: float, softcap: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the K most probable tokens [C, K] int64, most probable first, and their log-probabilities.

    K must be smaller than the vocabulary, so that padding rows never enter."""
    logprobs, columns = compute_log_softmax(states, weight, token_rows, temperature,
                                            softcap).topk(min(k, len(weight)))
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return columns, logprobs
    # The K best of the vocabulary are among the K best of each rank.
    candidates = []
    for local in (columns + group.rank() * len(weight), logprobs):
        by_rank = [torch.empty_like(local) for _ in range(group.size())]
        torch.distributed.all_gather(by_rank, local, group=group)
        candidates.append(torch.cat(by_rank, dim=1))
    candidate_ids, candidate_logprobs = candidates
    logprobs, indices = candidate_logprobs.topk(k)
    return candidate_ids.gather(1, indices), logprobs


def _compute_divergence(student: torch.Tensor, teacher: torch.Tensor, beta: float, over_group: bool = False
                        ) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values [3, C] and the derivative [C, events], as `Teacher.compare` does.

    Args:
        student: log p [C, events], overwritten.
        teacher: log q [C, events], overwritten.
        beta: see the module docstring.
        over_group: whether events are split over the tensor-parallel group.
    """
    p, q = student.exp(), teacher.exp()
    teacher_kl = None  # KL(q || m), needed between 0 and 1 only
    if 0 < beta < 1:
        # log m = logaddexp(log q + log beta, log p + log(1 - beta)) with log(1 - beta) factored out, which
        # needs only one more tensor
        mixture = teacher + math.log(beta / (1 - beta))
        torch.logaddexp(student, mixture, out=mixture).add_(math.log(1 - beta))
        teacher_kl = (teacher - mixture).mul_(q).sum(-1)
        log_ratio = mixture.neg_().add_(student)
    # a chunk's logits are the largest tensors of the step, so nothing is copied: `teacher` becomes
    # log q - log p, and `student` becomes scratch memory after the entropy
    difference = teacher.sub_(student)
    entropy = -student.mul_(p).sum(-1)
    scratch = student
    # KL(q || p), which is also the divergence for beta = 0
    kl = student_kl = torch.mul(difference, q, out=scratch).sum(-1)
    if beta > 0:
        # log p - log m; the mixture m is q for beta = 1
        log_ratio = log_ratio if beta < 1 else difference.neg_()
        student_kl = torch.mul(log_ratio, p, out=scratch).sum(-1)  # KL(p || m)
    sums = torch.stack([student_kl, kl if teacher_kl is None else teacher_kl, kl, entropy])
    student_kl, teacher_kl, kl, entropy = _sum_over_group(sums) if over_group else sums
    values = torch.stack([beta * teacher_kl + (1 - beta) * student_kl if 0 < beta < 1 else student_kl,
                          kl, entropy])
    if beta == 0:
        return values, p.sub_(q)
    return values, log_ratio.sub_(student_kl[:, None]).mul_(p).mul_(1 - beta if beta < 1 else 1)


def _compute_log_remainder(logprobs: torch.Tensor) -> torch.Tensor:
    """Return [C, 1] log(1 - sum of probabilities [C, K]); the remainder is at least 1e-7, as in TRL."""
    return (-torch.expm1(logprobs.logsumexp(-1, keepdim=True).clamp(max=-1e-7))).log()


def _sum_over_group(values: torch.Tensor) -> torch.Tensor:
    """Sum over the tensor-parallel group, in place."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() > 1:
        torch.distributed.all_reduce(values, group=group)
    return values


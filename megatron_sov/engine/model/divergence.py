"""Divergence between the next-token distributions of a student and of its teacher, a chunk of tokens at a
time, with gradients in the same pass.

Shapes: T tokens of a row, n of them on this process, C of a chunk, V vocabulary (split over the
tensor-parallel group), H and H' hidden sizes of student and teacher, K most probable tokens.  Neither model's
n x V logits ever exist.

With p the student's and q the teacher's distribution, both at one temperature t, and the mixture
``m = beta q + (1 - beta) p``, the generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, equation 1)
is ``beta KL(q || m) + (1 - beta) KL(p || m)``; by convention KL(q || p) for beta = 0, forward, and
KL(p || q) for beta = 1, reverse.  Its derivative by the student's logits is

    beta = 0:  (p - q) / t      beta = 1:  p (log p/q - KL(p || q)) / t
    between:   (1 - beta) p (log p/m - KL(p || m)) / t

so that a chunk's logits give everything before they are dropped.  As in TRL, the divergence is not multiplied
by the temperature's square; the teacher learns nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from torch.autograd.function import once_differentiable

from megatron_sov.engine.model.chunked_head import Chunking, Gradients, project, softcap_slope
from megatron_sov.engine.parallel import context

EXCLUDED = -1e30
"""Logit of a row that pads the vocabulary: no probability, and unlike -inf its difference to another of its
kind is a number."""


Tokens = slice | torch.Tensor
"""Some of n tokens: a slice, or their numbers [C]."""


@dataclass(frozen=True)
class Divergence:
    """Which divergence is meant."""

    beta: float = 0.0
    """0: forward KL, 1: reverse KL, between: generalised Jensen-Shannon."""
    temperature: float = 1.0
    """What the logits of both are divided by."""


class Teacher(Protocol):
    """What is known of the teacher's distribution at each of this process's n tokens (the local ones of a cut
    row, whole over the tensor-parallel group)."""

    def compare(self, part: Tokens, student: torch.Tensor, divergence: Divergence, token_rows: int
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``[3, C]``: divergence, KL(teacher || student) and the student's entropy of some tokens, and
        [C, V / tp] the divergence's derivative by the student's logits, times the temperature.

        Args:
            part: the tokens.
            student: [C, V / tp] their log-probabilities, which may be overwritten.
            divergence: which.
            token_rows: columns that belong to token ids.
        """
        ...


@dataclass(frozen=True)
class TeacherStates:
    """The whole distribution: the teacher's final hidden states and its output head."""

    states: torch.Tensor
    """[n, H'], on any device: a chunk is sent when it is its turn."""
    weight: torch.Tensor
    """[V / tp, H'], split and padded as the student's."""
    softcap: float | None = None
    """Cap on the teacher's logits; None: none."""

    def compare(self, part: Tokens, student: torch.Tensor, divergence: Divergence, token_rows: int
                ) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.states[part].to(self.weight.device, self.weight.dtype)
        teacher = log_softmax(states, self.weight, token_rows, divergence.temperature, self.softcap)
        return _compare(student, teacher.to(student.dtype), divergence.beta, over_group=True)


@dataclass(frozen=True)
class TeacherTopK:
    """The teacher's K most probable tokens."""

    ids: torch.Tensor
    """[n, K] int64, distinct at each place."""
    logprobs: torch.Tensor
    """[n, K]: at the divergence's temperature, which cannot be changed without the other tokens."""
    keep_remainder: bool = True
    """True: what either model gives to all other tokens is one event more (TRL's `loss_add_tail`).  False:
    both are normalised over the K tokens (arXiv 2601.18129), and nothing is learned of what these hold
    together."""

    def compare(self, part: Tokens, student: torch.Tensor, divergence: Divergence, token_rows: int
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Teacher`."""
        ids, teacher = self.ids[part].to(student.device), self.logprobs[part].to(student)
        # ids are of the whole vocabulary, columns this process's part: tokens of other processes read column
        # 0 and are then zeroed, so that the sum over the group has each once
        place = ids - parallel_state.get_tensor_model_parallel_rank() * student.shape[1]
        here = (place >= 0) & (place < student.shape[1])
        place = place.where(here, 0)
        chosen = _sum_over_group(student.gather(1, place).where(here, 0.0))
        probabilities = student.exp()
        entropy = -_sum_over_group((student * probabilities).sum(-1))
        if not self.keep_remainder:
            values, derivative = _compare(chosen.log_softmax(-1), teacher.log_softmax(-1), divergence.beta)
            spread = student.zero_()
        else:
            rest = probabilities.scatter_add_(1, place, -chosen.exp().where(here, 0.0)).clamp_(min=0)
            total = _sum_over_group(rest.sum(-1)).clamp(min=torch.finfo(rest.dtype).tiny)
            values, derivative = _compare(torch.cat([chosen, total.log()[:, None]], 1),
                                          torch.cat([teacher, _log_remainder(teacher)], 1), divergence.beta)
            # each other token's share of the remainder is its share of the remainder's derivative
            spread = rest.mul_((derivative[:, -1] / total)[:, None])
            derivative = derivative[:, :-1]
        spread.scatter_add_(1, place, derivative.where(here, 0.0))
        return torch.cat([values[:2], entropy[None]]), spread


@dataclass(frozen=True)
class SeveralTeachers:
    """Teachers of which each knows its own tokens."""

    owners: torch.Tensor
    """[n] int64 on the CPU: the place of the teacher of each token."""
    teachers: Sequence[Teacher]

    def compare(self, part: Tokens, student: torch.Tensor, divergence: Divergence, token_rows: int
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Teacher`: each compares its own."""
        assert isinstance(part, slice), "is asked by chunks"
        owners = self.owners[part]
        values, derivative = student.new_zeros(3, len(student)), torch.zeros_like(student)
        # the tensor-parallel group has the same tokens, and so calls the same teachers in the same order
        for place in owners.unique().tolist():
            own = (owners == place).nonzero()[:, 0]
            here = own.to(student.device)
            values[:, here], derivative[here] = self.teachers[place].compare(
                own + part.start, student[here], divergence, token_rows)
        return values, derivative


class DivergenceSums(torch.autograd.Function):
    """Weighted sums of the tokens' divergences, each differentiable by a factor of its own."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, teacher: Teacher,
                divergence: Divergence, chunking: Chunking, differentiable: bool,
                *token_weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[n, H], [V / tp, H], and [T] of each sum -> [T, 3] without gradient, and the sums.

        `differentiable` is whether gradients were switched on outside: in here they never are.
        """
        gradients = Gradients.zeros(states, weight, tuple(context.local(w) for w in token_weights),
                                    differentiable and ctx.needs_input_grad[0],
                                    differentiable and ctx.needs_input_grad[1])
        measured = []
        for part in chunking.parts(len(states)):
            measured.append(_of_chunk(part, states[part], weight, teacher, divergence, chunking, gradients))
        of_row = context.gather(torch.cat(measured, dim=1).t().contiguous())
        gradients.keep(ctx)
        ctx.mark_non_differentiable(of_row)
        return of_row, *((of_row[:, 0] * w).sum() for w in token_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: torch.Tensor, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale what the forward pass left."""
        return *Gradients.kept(ctx, len(upstream)).scaled(upstream), *[None] * (4 + len(upstream))


def _of_chunk(part: slice, states: torch.Tensor, weight: torch.Tensor, teacher: Teacher,
              divergence: Divergence, chunking: Chunking, gradients: Gradients) -> torch.Tensor:
    """[C, H], [V / tp, H] -> [3, C]; nothing of a chunk's logits is left when the next one's are made."""
    logits = project(states, weight, chunking.token_rows, divergence.temperature, chunking.softcap)
    steep = (softcap_slope(logits, chunking.softcap, divergence.temperature, chunking.token_rows)
             if gradients.are_needed else None)
    student = _normalised(logits, chunking.token_rows)
    del logits  # while both are compared there is no room for a chunk that nobody needs
    values, derivative = teacher.compare(part, student, divergence, chunking.token_rows)
    if gradients.are_needed:
        if steep is not None:
            derivative *= steep
        temperature = values.new_full((values.shape[1],), divergence.temperature)
        gradients.add(part, states, weight, derivative, temperature)
    return values


def log_softmax(states: torch.Tensor, weight: torch.Tensor, token_rows: int, temperature: float,
                softcap: float | None = None) -> torch.Tensor:
    """Return log-probabilities [C, V / tp] of the whole vocabulary's softmax, from states [C, H]."""
    return _normalised(project(states, weight, token_rows, temperature, softcap), token_rows)


def _normalised(logits: torch.Tensor, token_rows: int) -> torch.Tensor:
    """Return the log-softmax over the whole vocabulary of logits [C, V / tp], which are spent."""
    logits[:, token_rows:] = EXCLUDED
    local = logits.log_softmax(-1)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() > 1:
        # of the largest, whose difference loses nothing
        local_sum = logits.amax(-1) - local.amax(-1)
        largest = local_sum.clone()
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
        total = _sum_over_group((local_sum - largest).exp()).log() + largest
        local += (local_sum - total)[:, None]
    return local


def most_probable(states: torch.Tensor, weight: torch.Tensor, k: int, token_rows: int, temperature: float,
                  softcap: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the K most probable tokens [C, K] int64 of the whole vocabulary, the first of them first, and
    their log-probabilities, from states [C, H].

    K must be less than the vocabulary: rows that pad it then never come in.
    """
    logprobs, token = log_softmax(states, weight, token_rows, temperature, softcap).topk(min(k, len(weight)))
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return token, logprobs
    found = []
    for own in (token + group.rank() * len(weight), logprobs):
        parts = [torch.empty_like(own) for _ in range(group.size())]
        torch.distributed.all_gather(parts, own, group=group)
        found.append(torch.cat(parts, dim=1))
    logprobs, place = found[1].topk(k)
    return found[0].gather(1, place), logprobs


def _compare(student: torch.Tensor, teacher: torch.Tensor, beta: float, over_group: bool = False
             ) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``[3, C]``: divergence, KL(teacher || student) and the student's entropy, and the divergence's
    derivative by the student's logits, from log-probabilities [C, events], which are overwritten.

    Args:
        student: log p.
        teacher: log q.
        beta: see above.
        over_group: whether events are split over the tensor-parallel group.
    """
    p, q = student.exp(), teacher.exp()
    of_teacher = None
    if 0 < beta < 1:
        # log m = logaddexp(log q + log beta, log p + log(1 - beta)), with log(1 - beta) taken out: memory for
        # one more tensor is all that it needs
        mixture = teacher + math.log(beta / (1 - beta))
        torch.logaddexp(student, mixture, out=mixture).add_(math.log(1 - beta))
        of_teacher = (teacher - mixture).mul_(q).sum(-1)
        surplus = mixture.neg_().add_(student)
    # from here on `teacher` holds log q - log p, and `student` is scratch: a chunk's logits are the largest
    # tensors of the step, so nothing is copied
    difference = teacher.sub_(student)
    entropy = -student.mul_(p).sum(-1)
    scratch = student
    kl = of_student = torch.mul(difference, q, out=scratch).sum(-1)
    if beta > 0:
        surplus = surplus if beta < 1 else difference.neg_()
        of_student = torch.mul(surplus, p, out=scratch).sum(-1)
    found = torch.stack([of_student, kl if of_teacher is None else of_teacher, kl, entropy])
    of_student, of_teacher, kl, entropy = _sum_over_group(found) if over_group else found
    values = torch.stack([beta * of_teacher + (1 - beta) * of_student if 0 < beta < 1 else of_student,
                          kl, entropy])
    if beta == 0:
        return values, p.sub_(q)
    return values, surplus.sub_(of_student[:, None]).mul_(p).mul_(1 - beta if beta < 1 else 1)


def _log_remainder(logprobs: torch.Tensor) -> torch.Tensor:
    """Return [C, 1] the logarithm of what [C, K] leave of 1; at least 1e-7 is left, as in TRL."""
    return (-torch.expm1(logprobs.logsumexp(-1, keepdim=True).clamp(max=-1e-7))).log()


def _sum_over_group(values: torch.Tensor) -> torch.Tensor:
    """Return the sum over the tensor-parallel group, in the place of the values."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() > 1:
        torch.distributed.all_reduce(values, group=group)
    return values


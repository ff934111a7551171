"""Compute log-probabilities for given answers, at any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from megatron_sov.engine.decode.cached_decoder import (
    CachedDecoder, DecodeOutput, all_reduce_replicas, get_replica_rank)
from megatron_sov.engine.decode.forward_only import ForwardModel
from megatron_sov.engine.model.cache_rows import CacheSize, CacheSpan
from megatron_sov.infer.request import Batching
from megatron_sov.model.modality import EncoderInputs, slice_inputs

CHUNK_POSITIONS = 64
"""Positions whose logits fit in memory at a time."""


@dataclass(frozen=True)
class AnswerChoice:
    """A prompt with candidate answers."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    answers: Sequence[Sequence[int]]
    """Token ids per answer; no answer is empty."""
    encoder_inputs: EncoderInputs = field(default_factory=dict)
    """Inputs for the placeholders in the prompt."""


@dataclass(frozen=True)
class _Step:
    """Spans for a row: part of a prompt, or answers after their prompt."""

    spans: list[CacheSpan]
    answers: list[tuple[int, int]] = field(default_factory=list)
    """(question, answer) index per span; empty for prompt spans."""


def compute_answer_logprobs(model: ForwardModel, questions: Sequence[AnswerChoice],
                            batching: Batching | None = None,
                            advance: Callable[[int], object] | None = None) -> list[list[list[float]]]:
    """Return log p(token | preceding tokens) per question, answer and token (collective).

    Prompts are divided among processes; every process gets all results.

    Args:
        model: the model.
        questions: prompts with answers.
        batching: memory limits.
        advance: called with the number of completed questions.
    """
    bounds, (rank, size) = batching or Batching(), get_replica_rank()
    # The last token of an answer is not read.
    longest = max(len(q.prompt) + len(answer) for q in questions for answer in q.answers)
    # slot 0 holds the prompt, whose cache is copied for the answers
    slots = 1 + bounds.slots(max(len(q.answers) for q in questions), longest,
                             model.model.architecture.count_state_tokens())
    # Questions of other processes stay zero: the sum over processes is the whole table.
    logprobs = torch.zeros(len(questions), max(len(q.answers) for q in questions),
                           max(len(answer) for q in questions for answer in q.answers), dtype=torch.float64)
    with CachedDecoder(model, CacheSize(slots, longest)) as decoder:
        steps = _iter_steps(decoder, questions, range(rank, len(questions), size), slots,
                            bounds.prefill_tokens)
        last_question = -1
        while True:
            # a finished process runs empty rows until all processes finish, because rows are collective
            step = next(steps, _Step([]))
            row_tokens = decoder.agree_row_tokens(sum(len(span.tokens) for span in step.spans))
            if not row_tokens:
                break
            output = decoder.read(step.spans, row_tokens)
            if decoder.last_stage and step.answers:
                _record_logprobs(decoder, output, questions, step, logprobs)
            if advance is not None and step.answers and step.answers[-1][0] != last_question:
                last_question = step.answers[-1][0]
                advance(size)
        logprobs = decoder.agree(logprobs)
    table = all_reduce_replicas(logprobs).tolist()
    return [[row[:len(answer)] for row, answer in zip(rows, q.answers, strict=False)]
            for rows, q in zip(table, questions, strict=True)]


def _iter_steps(decoder: CachedDecoder, questions: Sequence[AnswerChoice], question_indices: range,
                slots: int, prefill_tokens: int) -> Iterator[_Step]:
    """Yield rows for this process's questions; the caller decodes a row before it requests the next."""
    for number in question_indices:
        question = questions[number]
        # each answer is read with the last prompt token, which predicts the first answer token
        past, inputs = len(question.prompt) - 1, question.encoder_inputs
        for start in range(0, past, prefill_tokens):
            piece = question.prompt[start:min(past, start + prefill_tokens)]
            yield _Step([CacheSpan(0, start, piece, slice_inputs(inputs, start, len(piece)) or None)])
        last = slice_inputs(inputs, past, 1) or None
        for first in range(0, len(question.answers), slots - 1):
            answers = range(first, min(len(question.answers), first + slots - 1))
            if past:
                # slot 0 holds the prompt; each answer continues in a separate slot
                decoder.copy(0, [1 + answer - first for answer in answers])
            yield _Step([CacheSpan(1 + answer - first, past,
                                   [question.prompt[-1], *question.answers[answer][:-1]], last)
                         for answer in answers], [(number, answer) for answer in answers])


def _record_logprobs(decoder: CachedDecoder, output: DecodeOutput, questions: Sequence[AnswerChoice],
                     step: _Step, logprobs: torch.Tensor) -> None:
    positions = [(end - len(span.tokens) + position, token, (question, answer, position))
                 for end, span,
                 (question, answer) in zip(output.row.ends, step.spans, step.answers, strict=True)
                 for position, token in enumerate(questions[question].answers[answer])]
    for start in range(0, len(positions), CHUNK_POSITIONS):
        chunk = positions[start:start + CHUNK_POSITIONS]
        logits = decoder.logits(output, [row for row, _, _ in chunk])
        for (_, token, key), row_logits in zip(chunk, logits, strict=True):
            # float64, because a trainer's log-probabilities are compared with these values
            logprobs[key] = torch.log_softmax(row_logits.double(), dim=-1)[token]

"""Log-probabilities of the tokens of given answers, at any layout."""

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

CHUNK_PLACES = 64
"""Whose logits are held at a time."""


@dataclass(frozen=True)
class Question:
    """A prompt with answers to choose from."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    answers: Sequence[Sequence[int]]
    """Token ids of each, at least one."""
    encoder_inputs: EncoderInputs = field(default_factory=dict)
    """What stands over the prompt's placeholders."""


@dataclass(frozen=True)
class _Step:
    """What a row reads: a piece of a prompt, or the answers behind it."""

    spans: list[CacheSpan]
    answers: list[tuple[int, int]] = field(default_factory=list)
    """Question and answer that each span belongs to; []: it is a piece of a prompt."""


def answer_logprobs(model: ForwardModel, questions: Sequence[Question], batching: Batching | None = None,
                    advance: Callable[[int], object] | None = None) -> list[list[list[float]]]:
    """Return log p(token | those before it) of each token of each answer of each question.

    Called by all processes together, which all get the same; the prompts are shared out.

    Args:
        model: what is asked.
        questions: prompts with their answers.
        batching: what bounds memory.
        advance: is told how many questions were done.
    """
    bounds, (rank, size) = batching or Batching(), get_replica_rank()
    # of what is read the last token of an answer is no part
    longest = max(len(q.prompt) + len(answer) for q in questions for answer in q.answers)
    # one slot holds the prompt, which answers are copied from
    slots = 1 + bounds.slots(max(len(q.answers) for q in questions), longest,
                             model.model.architecture.state_tokens())
    # Zeros where another process answers: the sum over the shares is the whole table.
    found = torch.zeros(len(questions), max(len(q.answers) for q in questions),
                        max(len(answer) for q in questions for answer in q.answers), dtype=torch.float64)
    with CachedDecoder(model, CacheSize(slots, longest)) as decoder:
        steps = _steps(decoder, questions, range(rank, len(questions), size), slots, bounds.prefill_tokens)
        done = -1
        while True:
            # A process that is done reads empty rows until all are.
            step = next(steps, _Step([]))
            row_tokens = decoder.agree_row_tokens(sum(len(span.tokens) for span in step.spans))
            if not row_tokens:
                break
            read = decoder.read(step.spans, row_tokens)
            if decoder.last_stage and step.answers:
                _tell(decoder, read, questions, step, found)
            if advance is not None and step.answers and step.answers[-1][0] != done:
                done = step.answers[-1][0]
                advance(size)
        found = decoder.agree(found)
    table = all_reduce_replicas(found).tolist()
    return [[row[:len(answer)] for row, answer in zip(of, q.answers, strict=False)]
            for of, q in zip(table, questions, strict=True)]


def _steps(decoder: CachedDecoder, questions: Sequence[Question], mine: range, slots: int,
           prefill_tokens: int) -> Iterator[_Step]:
    """Yield the rows of this process's questions; each is read before the next one is asked for."""
    for number in mine:
        question = questions[number]
        # the last token of a prompt is read with each answer, whose first token stands behind it
        past, inputs = len(question.prompt) - 1, question.encoder_inputs
        for start in range(0, past, prefill_tokens):
            piece = question.prompt[start:min(past, start + prefill_tokens)]
            yield _Step([CacheSpan(0, start, piece, slice_inputs(inputs, start, len(piece)) or None)])
        last = slice_inputs(inputs, past, 1) or None
        for first in range(0, len(question.answers), slots - 1):
            here = range(first, min(len(question.answers), first + slots - 1))
            if past:
                # Slot 0 holds the prompt; each answer goes on in a slot of its own.
                decoder.copy(0, [1 + answer - first for answer in here])
            yield _Step([CacheSpan(1 + answer - first, past,
                                   [question.prompt[-1], *question.answers[answer][:-1]], last)
                         for answer in here], [(number, answer) for answer in here])


def _tell(decoder: CachedDecoder, read: DecodeOutput, questions: Sequence[Question], step: _Step,
          found: torch.Tensor) -> None:
    places = [(end - len(span.tokens) + at, token, (question, answer, at))
              for end, span, (question, answer) in zip(read.row.ends, step.spans, step.answers, strict=True)
              for at, token in enumerate(questions[question].answers[answer])]
    for start in range(0, len(places), CHUNK_PLACES):
        chunk = places[start:start + CHUNK_PLACES]
        logits = decoder.logits(read, [row for row, _, _ in chunk])
        for (_, token, place), of_place in zip(chunk, logits, strict=True):
            # float64: log-probabilities are compared with a trainer's
            found[place] = torch.log_softmax(of_place.double(), dim=-1)[token]

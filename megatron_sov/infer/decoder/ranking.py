"""What a model holds of places in a sequence: how probable the token is that stands there, and which ones are
the most probable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_sov.infer.continuation import Continuation, RowItem
from megatron_sov.infer.decoder.sampling import probabilities
from megatron_sov.infer.request import Sampling, Written

CHUNK_PLACES = 64
"""Whose logits are held at a time."""


@dataclass(frozen=True)
class RankingPlace:
    """A row index, and what stands behind it."""

    row: int
    """Index."""
    token: int
    """The one behind it."""
    num_top: int
    """Most probable ones that are told."""
    sampling: Sampling | None
    """What the token was drawn with; None: it is the prompt's, or nothing was drawn."""


def places_of(items: Sequence[RowItem], written: Sequence[Written]) -> Iterator[tuple[Continuation,
                                                                                      RankingPlace]]:
    """Yield the places of a row that something is told of, with their sequences.

    Args:
        items: of the row, before what was written behind it is counted.
        written: tokens behind those that have places, without drafts.
    """
    new = iter(written)
    for item in items:
        sequence, tells = item.sequence, item.sequence.tells
        chosen = next(new)[0][0] if item.places else -1
        if not tells.something:
            continue
        for row in range(len(item.span.tokens)):
            behind = item.span.past + row + 1
            if behind >= sequence.prompt_tokens:
                drawn = sequence.sampling if sequence.sampling.temperature else None
                yield sequence, RankingPlace(item.start + row, chosen, tells.num_top, drawn)
            elif tells.prompt:
                yield sequence, RankingPlace(item.start + row, sequence.tokens[behind], tells.num_top, None)


def ranked(logits_of: Callable[[Sequence[int]], torch.Tensor],
           places: Sequence[RankingPlace]) -> list[Written]:
    """Return of each place its token and then the most probable ones, with their log-probabilities; tokens
    that cannot be drawn are no such.

    Args:
        logits_of: returns the logits [n, V] behind row indices.
        places: of the row.
    """
    found: list[Written] = []
    for start in range(0, len(places), CHUNK_PLACES):
        chunk = places[start:start + CHUNK_PLACES]
        logits = logits_of([place.row for place in chunk])
        for place, of_place in zip(chunk, logits, strict=True):
            if place.sampling is None:
                logprobs = torch.log_softmax(of_place.double(), dim=-1)
            else:
                logprobs = probabilities(of_place[None], place.sampling)[0].log()
            best, tokens = logprobs.topk(min(place.num_top, len(logprobs)))
            top = [(token, logprob) for token, logprob in zip(tokens.tolist(), best.tolist(), strict=True)
                   if logprob > float("-inf")]
            found.append(([place.token, *(token for token, _ in top)],
                          [float(logprobs[place.token]), *(logprob for _, logprob in top)]))
    return found

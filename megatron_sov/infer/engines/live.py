"""A model that goes on for as long as it is asked: sequences join those that are under way, and are told
token by token.

All processes of a layout run `continue_live` together.  The first one has an `Office`, which says before each
row who joins and who leaves, and is told what was written; the others do as they are told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_sov.engine.decode.cached_decoder import CachedDecoder, all_reduce_replicas, get_replica_rank
from megatron_sov.engine.decode.forward_only import ForwardModel
from megatron_sov.engine.model.cache_rows import CacheSize
from megatron_sov.engine.parallel.values import broadcast_object
from megatron_sov.infer.decoder.continuation import Continuation
from megatron_sov.infer.decoder.generator import Decoding
from megatron_sov.infer.request import LENGTH, STOP, Batching, Sampling, StopRule


@dataclass(frozen=True)
class Joining:
    """A sequence that joins."""

    number: int
    """Names it, no other one before or after."""
    prompt: Sequence[int]
    """Token ids, at least one."""
    sampling: Sampling
    """How its tokens are chosen, without drafts or routes, and how many there may be."""
    stream: int
    """Number of its stream of random numbers."""
    end_ids: tuple[int, ...]
    """Tokens that end it."""


@dataclass(frozen=True)
class Orders:
    """What is to happen before the next row."""

    joining: Sequence[Joining] = ()
    """Sequences that join, not more than there is room for."""
    leaving: Sequence[int] = ()
    """Numbers of sequences that are no longer wanted; those that have ended are passed over."""
    ends: bool = False
    """Whether all ends here."""


@dataclass(frozen=True)
class News:
    """A token that was written."""

    number: int
    """Of its sequence."""
    token: int
    """Its id."""
    logprob: float
    """Its log-probability under the distribution that it was drawn from, see `Generated.logprobs`."""
    reason: str | None
    """`STOP` or `LENGTH` where it is the last one."""


class Office(Protocol):
    """Who asks."""

    def orders(self, num_free: int, is_idle: bool) -> Orders:
        """Return what is to happen next.

        Args:
            num_free: sequences that there is room for.
            is_idle: nothing is under way: the call may wait for a while, and must come back within a
                collective's time limit, since the other processes wait for it.
        """
        ...

    def tell(self, news: Sequence[News]) -> None:
        """Take what a row has brought."""
        ...


@dataclass(frozen=True)
class _EnginePlace:
    """A sequence that is under way somewhere."""

    share: int
    """Rank among the processes with sequences of their own that has it."""
    limit: int
    """Longest continuation."""
    end_ids: tuple[int, ...]
    """Tokens that end it."""
    own: Continuation | None
    """The sequence where it is this process's."""


def continue_live(model: ForwardModel, batching: Batching, longest: int, office: Office | None) -> None:
    """Continue what the first process's office asks for, until it orders the end.

    Args:
        model: which continues.
        batching: what bounds memory.
        longest: tokens of the longest sequence, prompt and continuation.
        office: who asks; None on all other processes.
    """
    room = batching.slots(batching.batch_size, longest, model.model.architecture.state_tokens())
    cache = CacheSize(room, longest)
    with CachedDecoder(model, cache) as decoder:
        live = _Live(Decoding(decoder, cache, batching.prefill_tokens), cache.slots)
        while live.follow(office):
            if (news := live.row()) and office is not None:
                office.tell(news)


class _Live:
    """What one process knows of all sequences that are under way."""

    def __init__(self, decoding: Decoding, num_slots: int) -> None:
        self._decoding, self._num_slots = decoding, num_slots
        self._rank, self._size = get_replica_rank()
        self._places: dict[int, _EnginePlace] = {}
        self._written: dict[int, int] = {}

    def follow(self, office: Office | None) -> bool:
        """Do what is ordered; returns whether to go on."""
        orders = Orders()
        if office is not None:
            orders = office.orders(self._num_slots * self._size - len(self._places), not self._places)
        if dist.get_world_size() > 1:
            # All processes do the same in the same order: it decides the rows that they read together.
            orders = broadcast_object(orders)
        for number in orders.leaving:
            place = self._forget(number)
            if place is not None and place.own is not None:
                self._decoding.leave(place.own)
        for joining in orders.joining:
            self._join(joining)
        return not orders.ends

    def _join(self, joining: Joining) -> None:
        held = [place.share for place in self._places.values()]
        # The process with the fewest sequences; all of them count alike, so that nobody has to say which.
        share = min(range(self._size), key=held.count)
        own = None
        if share == self._rank:
            own = Continuation(joining.number, list(joining.prompt), len(joining.prompt),
                               joining.sampling.max_new_tokens, joining.sampling, StopRule(joining.end_ids),
                               joining.stream)
            self._decoding.join(own)
        self._places[joining.number] = _EnginePlace(share, joining.sampling.max_new_tokens, joining.end_ids,
                                                    own)
        self._written[joining.number] = 0

    def _forget(self, number: int) -> _EnginePlace | None:
        self._written.pop(number, None)
        return self._places.pop(number, None)

    def row(self) -> list[News]:
        """Read a row on all processes, and return the tokens that it brought on any of them."""
        if not self._places:
            return []
        self._decoding.iterate()
        # whether there is a token, its id, the bits of its log-probability in float64; a sequence is on one
        # process, and zeros on the others: the sums are its token
        table = torch.zeros(len(self._places), 3, dtype=torch.int64)
        for row, (number, place) in zip(table, self._places.items(), strict=True):
            # There are no drafts, so a row brings at most one token of a sequence.
            if place.own is not None and len(place.own.logprobs) > self._written[number]:
                bits = torch.tensor([place.own.logprobs[-1]], dtype=torch.float64).view(torch.int64)
                row[:] = torch.tensor([1, place.own.tokens[-1], int(bits[0])])
        table = all_reduce_replicas(table)
        logprobs = table[:, 2].contiguous().view(torch.float64).tolist()
        # A count of 0: the sequence waits, or its prompt is still being read.
        written = {number: (token, logprob) for number, (count, token, _), logprob in zip(
            self._places, table.tolist(), logprobs, strict=True) if count}
        return [self._news(number, token, logprob) for number, (token, logprob) in written.items()]

    def _news(self, number: int, token: int, logprob: float) -> News:
        place, reason = self._places[number], None
        self._written[number] += 1
        # Every process finds the end from the token, and forgets the sequence at the same row.
        if token in place.end_ids:
            reason = STOP
        elif self._written[number] >= place.limit:
            reason = LENGTH
        if reason is not None:
            self._forget(number)
        return News(number, token, logprob, reason)

"""Generate continuously: sequences join and leave the running batch, and each token is reported at once.

All processes of a layout run `generate_live`. The first process has a `RequestSource`, which decides before
each row which sequences join and leave, and receives the new tokens; the other processes apply its decisions.
"""

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
from megatron_sov.infer.decoder.generator import DecodingBatch
from megatron_sov.infer.request import LENGTH, STOP, Batching, Sampling, StopRule


def generate_live(model: ForwardModel, batching: Batching, longest: int,
                  source: "RequestSource | None") -> None:
    """Generate until the source ends the generation (collective).

    Args:
        model: model that generates.
        batching: memory limits.
        longest: tokens of the longest sequence, prompt and continuation.
        source: queue of requests; None on all processes except the first.
    """
    room = batching.slots(batching.batch_size, longest, model.model.architecture.count_state_tokens())
    cache = CacheSize(room, longest)
    with CachedDecoder(model, cache) as decoder:
        live = _LiveBatch(DecodingBatch(decoder, cache, batching.prefill_tokens), cache.slots)
        while live.apply_changes(source):
            if (events := live.decode_row()) and source is not None:
                source.report_tokens(events)


@dataclass(frozen=True)
class NewSequence:
    """A sequence that joins the batch."""

    number: int
    """Unique id."""
    prompt: Sequence[int]
    """Token ids, at least one."""
    sampling: Sampling
    """Sampling settings, without routes."""
    stream: int
    """Random stream, see `Engine.generate`."""
    end_ids: tuple[int, ...]
    """Stop tokens."""


@dataclass(frozen=True)
class BatchChanges:
    """Changes to the batch before the next row."""

    joining: Sequence[NewSequence] = ()
    """New sequences, limited by the free slots."""
    leaving: Sequence[int] = ()
    """`NewSequence.number` per cancelled sequence; finished sequences are ignored."""
    ends: bool = False
    """Stop generating."""


@dataclass(frozen=True)
class TokenEvent:
    """A token that `generate_live` appended to a sequence."""

    number: int
    """`NewSequence.number`."""
    token: int
    """Token id."""
    logprob: float
    """Log-probability, see `GenerationResult.logprobs`."""
    reason: str | None
    """`STOP` or `LENGTH` for the last token; None before."""


class RequestSource(Protocol):
    """Queue of requests on the first process."""

    def choose_changes(self, num_free: int, is_idle: bool) -> BatchChanges:
        """Return the changes before the next row.

        Args:
            num_free: number of free slots.
            is_idle: no sequence is in progress; the call may then wait for requests, but must return within
                the timeout of a collective, because other processes wait for it.
        """

    def report_tokens(self, events: Sequence[TokenEvent]) -> None:
        """Receive the tokens of a row."""


@dataclass(frozen=True)
class _LiveSequence:
    """A sequence in progress."""

    replica: int
    """Replica rank of the process that decodes the sequence."""
    limit: int
    """`Sampling.max_new_tokens`."""
    end_ids: tuple[int, ...]
    """Stop tokens."""
    continuation: Continuation | None
    """State of the sequence; None on the other processes."""


class _LiveBatch:
    """The running sequences, identical on each process."""

    def __init__(self, decoding: DecodingBatch, num_slots: int) -> None:
        self._decoding, self._num_slots = decoding, num_slots
        self._rank, self._size = get_replica_rank()
        self._sequences: dict[int, _LiveSequence] = {}
        self._written: dict[int, int] = {}

    def apply_changes(self, source: RequestSource | None) -> bool:
        """Apply the changes that the first process chooses; return False at the end."""
        changes = BatchChanges()
        if source is not None:
            num_free = self._num_slots * self._size - len(self._sequences)
            changes = source.choose_changes(num_free, not self._sequences)
        if dist.get_world_size() > 1:
            # all processes apply the same changes, because they run the rows together
            changes = broadcast_object(changes)
        for number in changes.leaving:
            sequence = self._remove_sequence(number)
            if sequence is not None and sequence.continuation is not None:
                self._decoding.leave(sequence.continuation)
        for joining in changes.joining:
            self._add_sequence(joining)
        return not changes.ends

    def _add_sequence(self, joining: NewSequence) -> None:
        replicas = [sequence.replica for sequence in self._sequences.values()]
        # choose the process with the fewest sequences; every process computes the same choice
        replica = min(range(self._size), key=replicas.count)
        continuation = None
        if replica == self._rank:
            continuation = Continuation(
                joining.number, list(joining.prompt), len(joining.prompt), joining.sampling.max_new_tokens,
                joining.sampling, StopRule(joining.end_ids), joining.stream)
            self._decoding.join(continuation)
        self._sequences[joining.number] = _LiveSequence(replica, joining.sampling.max_new_tokens,
                                                        joining.end_ids, continuation)
        self._written[joining.number] = 0

    def _remove_sequence(self, number: int) -> _LiveSequence | None:
        self._written.pop(number, None)
        return self._sequences.pop(number, None)

    def decode_row(self) -> list[TokenEvent]:
        """Run a row on all processes, and return every process's new tokens."""
        if not self._sequences:
            return []
        self._decoding.decode_row()
        # Columns: token count (0 or 1), token id, float64 bits of the log-probability. The other processes
        # add zeros to a sequence's row, so the sum over processes is the row of its own process.
        table = torch.zeros(len(self._sequences), 3, dtype=torch.int64)
        for row, (number, sequence) in zip(table, self._sequences.items(), strict=True):
            # a row yields at most one token per sequence
            local = sequence.continuation
            if local is not None and len(local.logprobs) > self._written[number]:
                bits = torch.tensor([local.logprobs[-1]], dtype=torch.float64).view(torch.int64)
                row[:] = torch.tensor([1, local.tokens[-1], int(bits[0])])
        table = all_reduce_replicas(table)
        logprobs = table[:, 2].contiguous().view(torch.float64).tolist()
        # count 0: the sequence waits, or its prompt is still being read
        written = {number: (token, logprob) for number, (count, token, _), logprob in zip(
            self._sequences, table.tolist(), logprobs, strict=True) if count}
        return [self._build_event(number, token, logprob) for number, (token, logprob) in written.items()]

    def _build_event(self, number: int, token: int, logprob: float) -> TokenEvent:
        sequence, reason = self._sequences[number], None
        self._written[number] += 1
        # every process detects the end from the token and removes the sequence after the same row
        if token in sequence.end_ids:
            reason = STOP
        elif self._written[number] >= sequence.limit:
            reason = LENGTH
        if reason is not None:
            self._remove_sequence(number)
        return TokenEvent(number, token, logprob, reason)

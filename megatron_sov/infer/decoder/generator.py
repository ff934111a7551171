"""Continuations from a policy at any layout, with cached keys and values: batched, in bounded memory,
with drafts if wanted.

Sequences join and leave the batch one by one: a prompt takes the slot of a sequence that has ended.  Prompts
are read in rows of a bounded number of tokens, long ones in spans; one that several sequences have, as the
samples of a group do, is read by the first of them and copied.  Where several processes have sequences of
their own, each iteration is one row on every one of them, whatever it holds, since they may share experts.

Speculative decoding: the multi-token prediction layer drafts k tokens behind every sequence (reapplied to its
own states beyond the first), and the model judges all of them in one pass over k + 1 tokens.  Greedy
continuations are those of plain decoding; sampled ones follow the same distribution,
with other random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist

from megatron_sov.base.documents.shard_files import RouteShape
from megatron_sov.engine.convert.changed_values import Changed
from megatron_sov.engine.convert.live_import import LiveImport
from megatron_sov.engine.data.requirements import shape_of
from megatron_sov.engine.mcore.decode.cached_decoder import CachedDecoder, over_shares, share_place
from megatron_sov.engine.mcore.decode.forward_only import ForwardModel, Inputs
from megatron_sov.engine.mcore.model.kv_cache import CacheSize
from megatron_sov.engine.mcore.parallel import collectives
from megatron_sov.engine.mcore.parallel.device import local_device
from megatron_sov.engine.mcore.parallel.values import pack, unpack
from megatron_sov.infer.continuation import Continuation
from megatron_sov.infer.decoder.decoding import Decoding, pieces_of, table_of
from megatron_sov.infer.decoder.held_weights import HeldWeights, NamedTensors
from megatron_sov.infer.decoder.sampling import best_words, rows_of
from megatron_sov.infer.request import Batching, Bounds, Generated, Sampling, StopRule, Tokens, Written
from megatron_sov.omni.media.placed import Media


class MegatronEngine:
    """A `ForwardModel` as an engine, at its layout and for as long as it lives;
    called by all processes together."""

    def __init__(self, model: ForwardModel, batching: Batching | None = None) -> None:
        """Take a model.

        Args:
            model: which continues prompts.
            batching: what bounds memory.
        """
        self._model, self._batching = model, batching or Batching()
        self._held = HeldWeights("megatron")

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling, *, stop: StopRule | None = None,
                 streams: Sequence[int] | None = None, bounds: Bounds | None = None,
                 media: Sequence[Media | None] | None = None) -> Generated:
        """Continue prompts, see `Engine`; samples depend neither on the layout nor on the other prompts.

        `bounds` end continuations otherwise; of the processes the first one's `should_stop` counts.  `media`
        are the pictures and sounds that stand over placeholders of each prompt, placed from its first token.
        """
        sampling.check()
        version = self._held.version
        if 0 in map(len, prompts):
            raise ValueError(f"prompt {[len(p) for p in prompts].index(0)} has no token; "
                             "every prompt needs at least one")
        if sampling.num_drafts and not self._model.model.architecture.num_mtp_layers:
            raise ValueError(f"num_drafts = {sampling.num_drafts} needs a multi-token prediction layer, "
                             "the model has none")
        shape = shape_of(self._model.model.architecture) if sampling.with_routes else None
        numbers = range(len(prompts)) if streams is None else streams
        limits = bounds.limits if bounds else [sampling.max_new_tokens] * len(prompts)
        stop = stop or StopRule()
        rank, size = share_place()
        mine = [Continuation(i, list(map(int, prompts[i])), len(prompts[i]), limits[i],
                             sampling, stop, numbers[i], media[i] if media else None)
                for i in range(rank, len(prompts), size)]
        longest = max((s.prompt_tokens + s.limit for s in mine), default=sampling.max_new_tokens)
        cache = CacheSize(self._batching.slots(len(mine), longest), longest, 1 + sampling.num_drafts)
        with CachedDecoder(self._model, cache, with_routes=sampling.with_routes) as decoder:
            run = Decoding(decoder, cache, self._batching.prefill_tokens, mine, sampling.num_drafts)
            while run.iterate() and not (bounds and collectives.broadcast_from_first(bounds.should_stop())):
                continue
        own: list[Written] = [([], []) for _ in prompts]
        for sequence in mine:
            own[sequence.index] = sequence.tokens[sequence.prompt_tokens:], sequence.logprobs
        most = over_shares(torch.tensor([max(len(tokens) for tokens, _ in own) if own else 0]),
                           dist.ReduceOp.MAX)
        # a sequence is on one process, and zeros on the others: the sums are its tokens
        told = {"written": table_of(own, int(most[0])), "drafted": torch.tensor(run.drafted),
                "accepted": torch.tensor(run.accepted)}
        total = unpack(over_shares(pack(told)), {name: tuple(value.shape) for name, value in told.items()})
        written = pieces_of(total["written"])
        lengths = [len(prompt) + len(tokens) for prompt, (tokens, _) in zip(prompts, written, strict=True)]
        return Generated.of(written, sampling, stop, version, int(total["drafted"]), int(total["accepted"]),
                            None if shape is None else _gathered_routes(mine, lengths, shape))

    def update(self, weights: NamedTensors | None, version: int) -> None:
        """Take in other weights, or count the live ones as a version, see `Engine`."""
        with self._held.replaced(version, weights):
            if weights is not None:
                self._import.whole(weights)

    def update_changed(self, changed: Iterator[Changed], version: int, since: int) -> None:
        """Take in changed values, see `PatchedEngine`."""
        with self._held.replaced(version, changed, since):
            self._import.changed(changed)

    @cached_property
    def _import(self) -> LiveImport:
        return LiveImport(self._model.model)

    def choose(self, documents: Sequence[Tokens], count: int, words: Sequence[int]) -> list[list[int]]:
        """Return the most probable words, see `ChoosingEngine`."""
        self._held.check()
        rank, size = collectives.data_place()
        rows = rows_of(documents)
        rows += [[]] * (-len(rows) % size)  # processes that share experts must run forward equally often
        found = torch.zeros(len(documents), count, dtype=torch.float64)
        for row in rows[rank::size]:
            batch = Inputs([documents[i][:-1] for i in row] or [[0]], local_device())
            positions = ((batch.ends[:, None] - torch.arange(count - 1, -1, -1)).flatten() if row
                         else batch.ends)
            logits = self._model.logits(batch, positions)
            if row:
                found[row] = best_words(logits, words).double().reshape(len(row), count)
        tokens: list[list[int]] = collectives.all_reduce_dp(found).long().tolist()
        return tokens


def _gathered_routes(mine: Sequence[Continuation], lengths: Sequence[int],
                     shape: RouteShape) -> list[np.ndarray]:
    """Return the routes of all sequences, given those of this process and the tokens of each.

    They are sent one by one: together they may be larger than a GPU's memory.
    """
    own = {sequence.index: sequence for sequence in mine}
    found = []
    for index, length in enumerate(lengths):
        # in bytes, which every backend can sum
        sent = torch.zeros(length - 1, shape.bytes_per_token, dtype=torch.uint8)
        if index in own:
            routes = own[index].all_routes(shape)
            sent = torch.from_numpy(routes.reshape(len(routes), -1).view(np.uint8))
        rows = over_shares(sent).numpy().view(shape.dtype)
        found.append(rows.reshape(length - 1, shape.layers, shape.top_k))
    return found

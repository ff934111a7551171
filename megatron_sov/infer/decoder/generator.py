"""Continuations from a policy at any layout, with cached keys and values: batched, in bounded memory, with
drafts if wanted.

Sequences join and leave the batch one by one: a prompt takes the slot of a sequence that has ended.  Each has
its own sampling, its own end and its own random numbers, so that its continuation does not depend on the
others but for rounding.  Prompts are read in rows of a bounded number of tokens, long ones in spans; one that
several sequences have, as the samples of a group do, is read by the first of them and copied.  Where several
processes have sequences of their own, each iteration is one row on every one of them, since they may share
experts.

Speculative decoding: the multi-token prediction layer drafts k tokens behind every sequence (reapplied to its
own states beyond the first), and the model judges all of them in one pass over k + 1 tokens.  Greedy
continuations are those of plain decoding; sampled ones follow the same distribution, with other random
numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate, chain

import numpy as np
import torch
import torch.distributed as dist

from megatron_sov.base.documents.shard_files import RouteShape
from megatron_sov.convert.live_import import LiveImport
from megatron_sov.engine.decode.cached_decoder import (
    CachedDecoder, DecodeOutput, all_reduce_replicas, get_replica_rank)
from megatron_sov.engine.decode.forward_only import ForwardModel
from megatron_sov.engine.model.cache_rows import CacheSize, CacheSpan
from megatron_sov.engine.parallel import collectives
from megatron_sov.engine.parallel.values import flatten_tensors, unflatten_tensors
from megatron_sov.infer.decoder.continuation import Continuation, RowItem, keep_routes
from megatron_sov.infer.decoder.sampling import accepted_by_chance, accepted_greedily, draw, probabilities
from megatron_sov.infer.request import (
    Batching, Bounds, Generated, HeldWeights, NamedTensors, Sampling, StopRule, Tokens, Written)
from megatron_sov.model.modality import EncoderInputs
from megatron_sov.train.data.requirements import shape_of


class Decoding:
    """One process's sequences on their way; `iterate` reads one row and moves all on."""

    def __init__(self, decoder: CachedDecoder, cache: CacheSize, prefill_tokens: int,
                 sequences: Iterable[Continuation] = (), num_drafts: int = 0) -> None:
        """Begin with some sequences, or with none.

        Args:
            decoder: reads rows.
            cache: its size.
            prefill_tokens: of prompts that are read at a time.
            sequences: where there are drafts, all of them are sampled alike.
            num_drafts: tokens that the prediction layer drafts behind each sequence.
        """
        self._decoder, self._num_slots = decoder, cache.slots
        self._prefill_tokens, self._num_drafts = prefill_tokens, num_drafts
        self._waiting = deque[Continuation]()
        self._slots: list[Continuation] = []
        self.drafted = self.accepted = 0
        """Tokens that were drafted and judged, and how many of them were taken."""
        for sequence in sequences:
            self.join(sequence)

    def join(self, sequence: Continuation) -> None:
        """Take in a sequence, which waits where all slots are taken."""
        if len(self._slots) < self._num_slots:
            self._slots.append(sequence)
        else:
            self._waiting.append(sequence)

    def leave(self, sequence: Continuation) -> None:
        """Let go of a sequence that has not ended."""
        slot = next((n for n, held in enumerate(self._slots) if held is sequence), None)
        if slot is not None:
            self._vacate(slot)
        else:
            self._waiting = deque(held for held in self._waiting if held is not sequence)

    def iterate(self) -> bool:
        """Read one row together with all processes; returns whether there was anything to
        read on any of them."""
        items = self._next_row()
        # A process without work takes part in the row: the others may share experts with it.
        row_tokens = self._decoder.agree_row_tokens(sum(len(i.span.tokens) for i in items))
        if not row_tokens:
            return False
        read = self._decoder.read([i.span for i in items], row_tokens)
        if read.routes is not None:
            keep_routes(items, read.routes)
        # Before `_move_on` counts prompts as read: `in_prompt` still tells which prompts end in this row.
        self._copy_prompts(items)
        # A span that ends inside of a prompt chooses nothing.
        chosen = [i for i in items if i.places]
        written = self._choose_tokens(read, chosen)
        self._move_on(items, written)
        if self._num_drafts and (items or self._decoder.mtp_is_collective):
            self._draft(read, items)
        # From the last slot down: vacating moves the last sequence, which must not have ended.
        for slot in [i.span.slot for i in reversed(chosen) if i.sequence.has_ended]:
            self._vacate(slot)
        return True

    def _next_row(self) -> list[RowItem]:
        """Return spans of prompts while there are any, then one step of every sequence."""
        items: list[RowItem] = []
        filled = 0
        being_read = set[bytes]()
        for slot, sequence in enumerate(self._slots):
            if sequence.in_prompt and not sequence.read and sequence.prompt in being_read:
                continue  # what another one reads is copied
            room = self._prefill_tokens - filled
            if sequence.in_prompt and sequence.prompt:
                being_read.add(sequence.prompt)
            if sequence.in_prompt and room > 0:
                span = sequence.span(slot, room)
                items.append(RowItem(sequence, span, filled))
                filled += len(span.tokens)
        # Steps wait until no prompt is left to read.
        if items:
            return items
        for slot, sequence in enumerate(self._slots):
            span = CacheSpan(slot, sequence.read, [sequence.tokens[-1], *sequence.drafts])
            items.append(RowItem(sequence, span, filled))
            filled += len(span.tokens)
        return items

    def _copy_prompts(self, items: list[RowItem]) -> None:
        """Give prompts that have just been read to end to those that wait for them, all but the last token,
        behind which each chooses its own."""
        waiting: dict[bytes, list[int]] = {}
        read_now = {item.span.slot for item in items}
        for slot, sequence in enumerate(self._slots):
            if sequence.in_prompt and not sequence.read and slot not in read_now:
                waiting.setdefault(sequence.prompt, []).append(slot)
        for item in items:
            source = item.sequence
            if not (source.in_prompt and item.places and source.prompt):
                continue
            # One read serves all copies; each reads the last token itself, behind which it chooses.
            if slots := waiting.pop(source.prompt, []):
                self._decoder.copy(item.span.slot, slots)
            for slot in slots:
                self._slots[slot].read = source.prompt_tokens - 1
                self._slots[slot].routes = list(source.routes)

    def _choose_tokens(self, read: DecodeOutput, items: list[RowItem]) -> list[Written]:
        """Return each item's new tokens, the same on all processes that read them:
        accepted drafts and one more."""
        if not items:
            return []
        found: list[Written] = [([], []) for _ in items]
        if self._decoder.last_stage:
            ruled = [n for n, item in enumerate(items) if item.sequence.sampling.rules]
            # Rules mask whole rows of logits, so they need more than the best token of each shard.
            free = [n for n, item in enumerate(items) if not item.sequence.sampling.rules]
            greedy = [n for n in free if items[n].sequence.sampling.temperature == 0]
            drawn = [n for n in free if items[n].sequence.sampling.temperature]
            for places, choose in ((greedy, self._best), (drawn, self._drawn), (ruled, self._ruled)):
                chosen = choose(read, [items[n] for n in places]) if places else []
                for place, piece in zip(places, chosen, strict=True):
                    found[place] = piece
        # Only the last stage has logits; one int64 table brings tokens and log-probabilities to all.
        return pieces_of(self._decoder.agree(table_of(found, 1 + self._num_drafts)))

    def _best(self, read: DecodeOutput, items: list[RowItem]) -> list[Written]:
        best, logprobs = self._decoder.best_tokens(read, [p for i in items for p in i.places])
        sizes = [len(i.places) for i in items]
        found = []
        for item, behind, of_behind in zip(items, best.split(sizes), logprobs.split(sizes), strict=True):
            count = 1 + accepted_greedily(item.sequence.drafts, behind.tolist())
            found.append((behind[:count].tolist(), of_behind[:count].tolist()))
        return found

    def _ruled(self, read: DecodeOutput, items: list[RowItem]) -> list[Written]:
        """Choose among the tokens that each sequence's rules allow; there are no drafts."""
        logits = self._decoder.logits(read, [p for i in items for p in i.places]).double()
        found: list[Written] = []
        for item, row in zip(items, logits, strict=True):
            sequence, sampling = item.sequence, item.sequence.sampling
            assert sampling.rules is not None, "only sequences with rules"
            allowed = torch.from_numpy(sampling.rules.allowed(sequence.tokens[sequence.prompt_tokens:]))
            # Forbidden tokens go before the truncation: top_k and top_p choose among the allowed ones.
            masked = row[None].masked_fill(~allowed.to(row.device)[:row.shape[0]], -torch.inf)
            if sampling.temperature:
                shares = probabilities(masked, sampling)
                (token,) = draw(shares, [sequence.random.random()])
            else:
                shares = torch.softmax(masked, dim=-1)
                token = int(masked.argmax())
            found.append(([token], [float(shares[0, token].log())]))
        return found

    def _drawn(self, read: DecodeOutput, items: list[RowItem]) -> list[Written]:
        logits = self._decoder.logits(read, [p for i in items for p in i.places])
        shares = distributions(logits, [i.sequence.sampling for i in items for _ in i.places])
        targets = shares.split([len(i.places) for i in items])
        taken, finals = [], []
        for item, target in zip(items, targets, strict=True):
            sequence = item.sequence
            if sequence.guesses is None:
                taken.append(0)
                finals.append(target[0])
                continue
            # A sequence's stream judges its drafts first, and then draws its token.
            count, final = accepted_by_chance(sequence.drafts, sequence.guesses, target,
                                              sequence.random.random(len(sequence.drafts)).tolist())
            taken.append(count)
            finals.append(final)
        # One draw for each sequence, in the place of its first refused draft or behind its last draft.
        drawn = draw(torch.stack(finals), [i.sequence.random.random() for i in items])
        tokens = [[*i.sequence.drafts[:count], token]
                  for i, count, token in zip(items, taken, drawn, strict=True)]
        # the model's own: a draft that it took follows its distribution, not the one it was drafted from
        starts = accumulate((len(i.places) for i in items[:-1]), initial=0)
        places = [start + k for start, t in zip(starts, tokens, strict=True) for k in range(len(t))]
        logprobs = iter(shares[places, list(chain.from_iterable(tokens))].log().tolist())
        return [(t, [next(logprobs) for _ in t]) for t in tokens]

    def _move_on(self, items: list[RowItem], written: list[Written]) -> None:
        """Count what has been read and write what was chosen, up to the end of a continuation."""
        new = iter(written)
        for item in items:
            sequence = item.sequence
            if not item.places:
                sequence.read += len(item.span.tokens)
                continue
            tokens, logprobs = next(new)
            # The cache is valid up to the newest token; the next row reads that over refused drafts.
            sequence.read = len(sequence.tokens) + len(tokens) - 1
            # The last of `tokens` is the model's own, all others are drafts that it took.
            self.drafted += len(sequence.drafts)
            self.accepted += len(tokens) - 1
            sequence.drafts, sequence.guesses = [], None
            for token, logprob in zip(tokens, logprobs, strict=True):
                # An accepted draft may end the continuation, and what follows it is dropped.
                if not sequence.has_ended:
                    sequence.tokens.append(token)
                    sequence.logprobs.append(logprob)

    def _draft(self, read: DecodeOutput, items: list[RowItem]) -> None:
        """Have the prediction layer read the row, which its own cache needs,
        and draft behind every sequence that goes on.

        The layer takes the trunk's state at a token t together with token t + 1, and predicts token t + 2.
        So behind a sequence of n tokens (0 to n - 1), the first draft comes from place n - 2, whose follower
        n - 1 was just chosen.
        """
        # Only these draft; the layer reads the whole row for its cache.
        going = [i for i in items if not i.sequence.in_prompt and not i.sequence.has_ended]
        drafts = torch.zeros(len(going), self._num_drafts, dtype=torch.int64)
        if self._decoder.last_stage:
            # What follows each token of the row, now that the model has chosen.  Where a draft was refused
            # nothing follows what stands behind it; those places are read again in a later row.
            ahead = torch.zeros(len(read.row.tokens), dtype=torch.int64)
            for item in items:
                follow = item.sequence.tokens[item.span.past + 1:][:len(item.span.tokens)]
                ahead[item.start:item.start + len(follow)] = torch.tensor(follow, dtype=torch.int64)
            read = self._decoder.predict(read, ahead)
            # row index of token n - 2, the last one that has a follower; the span began at token `past`
            places = [i.start + len(i.sequence.tokens) - 2 - i.span.past for i in going]
            guesses: list[torch.Tensor] = []
            together = self._decoder.mtp_is_collective and self._decoder.any_replica_has(len(going))
            for depth in range(self._num_drafts if going or together else 0):
                if depth:
                    # To look further ahead the layer reads its own states: a row of one token for each
                    # sequence, one place on, with the draft before as what follows.
                    spans = [CacheSpan(i.span.slot, len(i.sequence.tokens) - 2 + depth, [0]) for i in going]
                    read = self._decoder.pick(read, places, spans)
                    places = list(range(len(going)))
                    ahead = torch.zeros(len(read.row.tokens), dtype=torch.int64)
                    ahead[:len(going)] = drafts[:, depth - 1]
                    read = self._decoder.predict(read, ahead)
                if going:
                    drafts[:, depth] = self._guess(read, places, going, guesses)
            # what each draft was drawn from decides later whether it is taken (`accepted_by_chance`);
            # greedy ones need none
            for number, item in enumerate(going if guesses else []):
                item.sequence.guesses = torch.stack([g[number] for g in guesses])
        if going:  # stages before the last read the same drafts in the next row
            for item, row in zip(going, self._decoder.agree(drafts).tolist(), strict=True):
                item.sequence.drafts = row

    def _guess(self, read: DecodeOutput, places: list[int], going: list[RowItem],
               guesses: list[torch.Tensor]) -> torch.Tensor:
        """Return a draft [sequences] behind each place; when sampling,
        what they were drawn from joins `guesses`."""
        if going[0].sequence.sampling.temperature == 0:
            return self._decoder.top_tokens(read, places)
        guesses.append(distributions(self._decoder.logits(read, places),
                                     [i.sequence.sampling for i in going]))
        return torch.tensor(draw(guesses[-1], [i.sequence.random.random() for i in going]))

    def _vacate(self, slot: int) -> None:
        """Give a slot to the next prompt, or to the last sequence, so that those in use stay side by side."""
        if self._waiting:
            self._slots[slot] = self._waiting.popleft()
            return
        last = self._slots.pop()
        if slot < len(self._slots):
            # The cache follows the sequence: slots in use are always the first ones.
            self._decoder.copy(len(self._slots), [slot])
            self._slots[slot] = last


def distributions(logits: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """Return what tokens are drawn from [n, V] by logits [n, V], each row of which has a sampling."""
    rows: dict[tuple[float, int, float], list[int]] = {}
    for row, sampling in enumerate(samplings):
        rows.setdefault((sampling.temperature, sampling.top_k, sampling.top_p), []).append(row)
    if len(rows) == 1:
        return probabilities(logits, samplings[0])
    # Rows with one sampling go together: the truncation sorts whole rows of the vocabulary.
    shares = torch.empty(logits.shape, dtype=torch.float64, device=logits.device)
    for alike in rows.values():
        shares[alike] = probabilities(logits[alike], samplings[alike[0]])
    return shares


def table_of(pieces: Sequence[Written], width: int) -> torch.Tensor:
    """Return up to `width` tokens of each piece as one int64 tensor [pieces, 1 + 2 * width]: their number,
    the tokens, and the bits of their log-probabilities in float64."""
    table = torch.zeros(len(pieces), 1 + 2 * width, dtype=torch.int64)
    for row, (tokens, logprobs) in zip(table, pieces, strict=True):
        row[:1 + len(tokens)] = torch.tensor([len(tokens), *tokens])
        row[1 + width:1 + width + len(tokens)] = torch.tensor(logprobs, dtype=torch.float64).view(torch.int64)
    return table


def pieces_of(table: torch.Tensor) -> list[Written]:
    """Return the pieces that `table_of` laid out."""
    width = table.shape[1] // 2
    logprobs = table[:, 1 + width:].contiguous().view(torch.float64)
    return [(row[1:1 + row[0]], of_row[:row[0]])
            for row, of_row in zip(table[:, :1 + width].tolist(), logprobs.tolist(), strict=True)]


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
                 encoder_inputs: Sequence[EncoderInputs | None] | None = None) -> Generated:
        """Continue prompts, see `Engine`; samples depend neither on the layout nor on the other prompts.

        `bounds` end continuations otherwise; of the processes the first one's `should_stop` counts.
        `encoder_inputs` are what each prompt has for encoders, placed from its first token.
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
        rank, size = get_replica_rank()
        # Dealt out in turn, so that processes differ by at most one sequence.
        mine = [Continuation(i, list(map(int, prompts[i])), len(prompts[i]), limits[i],
                             sampling, stop, numbers[i], encoder_inputs[i] if encoder_inputs else None)
                for i in range(rank, len(prompts), size)]
        # The cache fits this process's own sequences; the others size theirs.
        longest = max((s.prompt_tokens + s.limit for s in mine), default=sampling.max_new_tokens)
        slots = self._batching.slots(len(mine), longest, self._model.model.architecture.state_tokens())
        cache = CacheSize(slots, longest, 1 + sampling.num_drafts)
        with CachedDecoder(self._model, cache, with_routes=sampling.with_routes) as decoder:
            run = Decoding(decoder, cache, self._batching.prefill_tokens, mine, sampling.num_drafts)
            # One process's clock decides: if each asked its own, some would leave a row that others wait in.
            while run.iterate() and not (bounds and collectives.broadcast_flag(bounds.should_stop())):
                continue
        own: list[Written] = [([], []) for _ in prompts]
        for sequence in mine:
            own[sequence.index] = sequence.tokens[sequence.prompt_tokens:], sequence.logprobs
        # Tables of one width can be summed.
        most = all_reduce_replicas(torch.tensor([max(len(tokens) for tokens, _ in own) if own else 0]),
                                   dist.ReduceOp.MAX)
        # a sequence is on one process, and zeros on the others: the sums are its tokens
        told = {"written": table_of(own, int(most[0])), "drafted": torch.tensor(run.drafted),
                "accepted": torch.tensor(run.accepted)}
        total = unflatten_tensors(all_reduce_replicas(flatten_tensors(told)),
                                  {name: tuple(value.shape) for name, value in told.items()})
        written = pieces_of(total["written"])
        lengths = [len(prompt) + len(tokens) for prompt, (tokens, _) in zip(prompts, written, strict=True)]
        return Generated.of(written, sampling, stop, version, int(total["drafted"]), int(total["accepted"]),
                            None if shape is None else _gathered_routes(mine, lengths, shape))

    def update(self, weights: NamedTensors | None, version: int) -> None:
        """Take in other weights, or count the live ones as a version, see `Engine`."""
        with self._held.replaced(version, weights):
            if weights is not None:
                self._import.whole(weights)

    @cached_property
    def _import(self) -> LiveImport:
        return LiveImport(self._model.model)


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
        rows = all_reduce_replicas(sent).numpy().view(shape.dtype)
        found.append(rows.reshape(length - 1, shape.layers, shape.top_k))
    return found

"""Generate continuations with a model at any layout: continuous batching with a KV cache.

Sequences join and leave the batch individually: a waiting prompt takes the slot of a finished sequence. Each
sequence has its own sampling settings, stop rule and random stream, so its continuation is independent of
other sequences, up to rounding. Prompts are read in rows of a limited number of tokens, long prompts in
several spans. A prompt shared by several sequences (samples of a group) is read once and its cache copied. If
several processes have sequences of their own, each iteration runs one row on all of them, because they may
share experts.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from functools import cached_property

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
from megatron_sov.infer.decoder.continuation import Continuation, RowItem, record_routes
from megatron_sov.infer.decoder.sampling import compute_probabilities, draw_tokens
from megatron_sov.infer.request import (
    Batching, GenerationBounds, GenerationResult, NamedTensors, Sampling, ScoredTokens, StopRule, Tokens,
    WeightVersion)
from megatron_sov.model.modality import EncoderInputs
from megatron_sov.train.data.requirements import build_route_shape


class DecodingBatch:
    """Running sequences on this process.

    Args:
        decoder: runs rows.
        cache: size of the cache.
        prefill_tokens: limit of prompt tokens per row.
        sequences: initial sequences.
    """

    def __init__(self, decoder: CachedDecoder, cache: CacheSize, prefill_tokens: int,
                 sequences: Iterable[Continuation] = ()) -> None:
        self._decoder, self._num_slots = decoder, cache.slots
        self._prefill_tokens = prefill_tokens
        self._waiting = deque[Continuation]()
        self._slots: list[Continuation] = []
        for sequence in sequences:
            self.join(sequence)

    def join(self, sequence: Continuation) -> None:
        """Add a sequence; it waits until a slot is free."""
        if len(self._slots) < self._num_slots:
            self._slots.append(sequence)
        else:
            self._waiting.append(sequence)

    def leave(self, sequence: Continuation) -> None:
        """Remove an unfinished sequence."""
        slot = next((n for n, other in enumerate(self._slots) if other is sequence), None)
        if slot is not None:
            self._free_slot(slot)
        else:
            self._waiting = deque(other for other in self._waiting if other is not sequence)

    def decode_row(self) -> bool:
        """Run one row on all processes (collective); return whether any process had tokens to read."""
        items = self._next_row()
        # a process without sequences takes part in the row, because other processes may need its experts
        row_tokens = self._decoder.agree_row_tokens(sum(len(i.span.tokens) for i in items))
        if not row_tokens:
            return False
        output = self._decoder.read([i.span for i in items], row_tokens)
        if output.routes is not None:
            record_routes(items, output.routes)
        # before `read` grows: `in_prompt` must be true for prompts that end in this row
        self._copy_prompts(items)
        # spans that end inside a prompt choose no token
        predicting = [i for i in items if i.predicts]
        tokens, logprobs = self._choose_tokens(output, predicting)
        for item in items:
            item.sequence.read += len(item.span.tokens)
        for item, token, logprob in zip(predicting, tokens, logprobs, strict=True):
            item.sequence.tokens.append(token)
            item.sequence.logprobs.append(logprob)
        # From the last slot down: `_free_slot` moves the last sequence, which must be unfinished.
        for slot in [i.span.slot for i in reversed(predicting) if i.sequence.has_ended]:
            self._free_slot(slot)
        return True

    def _next_row(self) -> list[RowItem]:
        """Return prompt spans, or a decoding step per sequence once all prompts are read."""
        items: list[RowItem] = []
        num_tokens = 0
        prompts_in_row = set[bytes]()
        for slot, sequence in enumerate(self._slots):
            if sequence.in_prompt and not sequence.read and sequence.prompt in prompts_in_row:
                continue  # the same prompt is read in another slot and copied
            max_tokens = self._prefill_tokens - num_tokens
            if sequence.in_prompt and sequence.prompt:
                prompts_in_row.add(sequence.prompt)
            if sequence.in_prompt and max_tokens > 0:
                span = sequence.span(slot, max_tokens)
                items.append(RowItem(sequence, span, num_tokens))
                num_tokens += len(span.tokens)
        # Decoding steps wait until all prompts are read.
        if items:
            return items
        for slot, sequence in enumerate(self._slots):
            span = CacheSpan(slot, sequence.read, [sequence.tokens[-1]])
            items.append(RowItem(sequence, span, num_tokens))
            num_tokens += len(span.tokens)
        return items

    def _copy_prompts(self, items: list[RowItem]) -> None:
        """Copy the KV cache of prompts that end in this row to waiting sequences with the same prompt.

        The last token is not copied: each sequence reads it itself to choose its next token.
        """
        waiting_slots: dict[bytes, list[int]] = {}
        read_slots = {item.span.slot for item in items}
        for slot, sequence in enumerate(self._slots):
            if sequence.in_prompt and not sequence.read and slot not in read_slots:
                waiting_slots.setdefault(sequence.prompt, []).append(slot)
        for item in items:
            source = item.sequence
            if not (source.in_prompt and item.predicts and source.prompt):
                continue
            if slots := waiting_slots.pop(source.prompt, []):
                self._decoder.copy(item.span.slot, slots)
            for slot in slots:
                self._slots[slot].read = source.prompt_tokens - 1
                self._slots[slot].routes = list(source.routes)

    def _choose_tokens(self, output: DecodeOutput, items: list[RowItem]) -> ScoredTokens:
        """Return a token and its log-probability per item, equal on all processes of the row."""
        if not items:
            return [], []
        tokens = torch.zeros(len(items), dtype=torch.int64)
        logprobs = torch.zeros(len(items), dtype=torch.float64)
        if self._decoder.last_stage:
            with_rules = [n for n, item in enumerate(items) if item.sequence.sampling.rules]
            # Rules mask whole rows of logits; greedy choice needs the best token of each vocabulary shard
            # only.
            without_rules = [n for n, item in enumerate(items) if not item.sequence.sampling.rules]
            greedy = [n for n in without_rules if items[n].sequence.sampling.temperature == 0]
            sampled = [n for n in without_rules if items[n].sequence.sampling.temperature]
            for indices, choose in ((greedy, self._choose_greedy), (sampled, self._choose_sampled),
                                   (with_rules, self._choose_with_rules)):
                if indices:
                    tokens[indices], logprobs[indices] = choose(output, [items[n] for n in indices])
        # only the last stage has logits; an int64 table sends tokens and log-probabilities to all stages
        table = self._decoder.agree(torch.stack([tokens, logprobs.view(torch.int64)]))
        return table[0].tolist(), table[1].contiguous().view(torch.float64).tolist()

    def _choose_greedy(self, output: DecodeOutput, items: list[RowItem]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, logprobs = self._decoder.best_tokens(output, [i.last_index for i in items])
        return tokens, logprobs.double()

    def _choose_with_rules(self, output: DecodeOutput, items: list[RowItem]
                           ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose tokens that each sequence's rules allow."""
        logits = self._decoder.logits(output, [i.last_index for i in items]).double()
        tokens: list[int] = []
        logprobs: list[float] = []
        for item, row in zip(items, logits, strict=True):
            sequence, sampling = item.sequence, item.sequence.sampling
            assert sampling.rules is not None, "only sequences with rules"
            allowed = torch.from_numpy(sampling.rules.allowed(sequence.tokens[sequence.prompt_tokens:]))
            # Mask before truncation: top_k and top_p select among allowed tokens.
            masked = row[None].masked_fill(~allowed.to(row.device)[:row.shape[0]], -torch.inf)
            if sampling.temperature:
                shares = compute_probabilities(masked, sampling)
                (token,) = draw_tokens(shares, [sequence.random.random()])
            else:
                shares = torch.softmax(masked, dim=-1)
                token = int(masked.argmax())
            tokens.append(token)
            logprobs.append(float(shares[0, token].log()))
        return torch.tensor(tokens), torch.tensor(logprobs, dtype=torch.float64)

    def _choose_sampled(self, output: DecodeOutput, items: list[RowItem]
                        ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self._decoder.logits(output, [i.last_index for i in items])
        shares = compute_distributions(logits, [i.sequence.sampling for i in items])
        tokens = torch.tensor(draw_tokens(shares, [i.sequence.random.random() for i in items]))
        logprobs = shares.gather(1, tokens[:, None].to(shares.device))[:, 0].log()
        return tokens, logprobs.cpu()

    def _free_slot(self, slot: int) -> None:
        """Give the slot to a waiting sequence, or to that in the last slot: used slots stay contiguous."""
        if self._waiting:
            self._slots[slot] = self._waiting.popleft()
            return
        last = self._slots.pop()
        if slot < len(self._slots):
            # Copy the cache to the new slot: used slots are always the first slots.
            self._decoder.copy(len(self._slots), [slot])
            self._slots[slot] = last


def compute_distributions(logits: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """Return the sampling distributions [n, V] for logits [n, V]; each row has its own `Sampling`."""
    rows: dict[tuple[float, int, float], list[int]] = {}
    for row, sampling in enumerate(samplings):
        rows.setdefault((sampling.temperature, sampling.top_k, sampling.top_p), []).append(row)
    if len(rows) == 1:
        return compute_probabilities(logits, samplings[0])
    # Group rows with equal settings: truncation sorts whole rows of the vocabulary.
    shares = torch.empty(logits.shape, dtype=torch.float64, device=logits.device)
    for row_indices in rows.values():
        shares[row_indices] = compute_probabilities(logits[row_indices], samplings[row_indices[0]])
    return shares


def pack_tokens(pieces: Sequence[ScoredTokens], width: int) -> torch.Tensor:
    """Pack up to `width` tokens per piece into int64 [pieces, 1 + 2 * width]: count, tokens, float64 bits of
    the log-probabilities."""
    table = torch.zeros(len(pieces), 1 + 2 * width, dtype=torch.int64)
    for row, (tokens, logprobs) in zip(table, pieces, strict=True):
        row[:1 + len(tokens)] = torch.tensor([len(tokens), *tokens])
        row[1 + width:1 + width + len(tokens)] = torch.tensor(logprobs, dtype=torch.float64).view(torch.int64)
    return table


def unpack_tokens(table: torch.Tensor) -> list[ScoredTokens]:
    """Unpack the table of `pack_tokens`."""
    width = table.shape[1] // 2
    logprobs = table[:, 1 + width:].contiguous().view(torch.float64)
    return [(row[1:1 + row[0]], row_logprobs[:row[0]])
            for row, row_logprobs in zip(table[:, :1 + width].tolist(), logprobs.tolist(), strict=True)]


class MegatronEngine:
    """Inference engine for a `ForwardModel` (collective).

    Args:
        model: model that generates.
        batching: memory limits.
    """

    def __init__(self, model: ForwardModel, batching: Batching | None = None) -> None:
        self.forward_model, self._batching = model, batching or Batching()
        self._weight_version = WeightVersion("megatron")

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling, *, stop: StopRule | None = None,
                 streams: Sequence[int] | None = None, bounds: GenerationBounds | None = None,
                 encoder_inputs: Sequence[EncoderInputs | None] | None = None) -> GenerationResult:
        """Continue prompts, see `Engine.generate`; samples depend neither on the layout nor on the other
        prompts.

        Args:
            bounds: per-prompt limits and an external stop; `should_stop` of the first process counts.
            encoder_inputs: image and audio inputs of each prompt.
        """
        sampling.check()
        version = self._weight_version.version
        if 0 in map(len, prompts):
            raise ValueError(f"prompt {[len(p) for p in prompts].index(0)} has no token; "
                             "every prompt needs at least one")
        shape = build_route_shape(self.forward_model.model.architecture) if sampling.with_routes else None
        numbers = range(len(prompts)) if streams is None else streams
        limits = bounds.limits if bounds else [sampling.max_new_tokens] * len(prompts)
        stop = stop or StopRule()
        rank, size = get_replica_rank()
        # round-robin: the numbers of sequences per process differ by at most 1
        sequences = [Continuation(i, list(map(int, prompts[i])), len(prompts[i]), limits[i],
                                  sampling, stop, numbers[i], encoder_inputs[i] if encoder_inputs else None)
                     for i in range(rank, len(prompts), size)]
        # size the KV cache for this process's sequences
        longest = max((s.prompt_tokens + s.limit for s in sequences), default=sampling.max_new_tokens)
        state_tokens = self.forward_model.model.architecture.count_state_tokens()
        slots = self._batching.slots(len(sequences), longest, state_tokens)
        cache = CacheSize(slots, longest)
        with CachedDecoder(self.forward_model, cache, with_routes=sampling.with_routes) as decoder:
            run = DecodingBatch(decoder, cache, self._batching.prefill_tokens, sequences)
            # the first process decides when to stop: other processes could not leave a row on their own
            while run.decode_row() and not (bounds and collectives.broadcast_flag(bounds.should_stop())):
                continue
        local_written: list[ScoredTokens] = [([], []) for _ in prompts]
        for sequence in sequences:
            local_written[sequence.index] = sequence.tokens[sequence.prompt_tokens:], sequence.logprobs
        # the sum over processes needs equal table widths
        num_local_tokens = max((len(tokens) for tokens, _ in local_written), default=0)
        width = int(all_reduce_replicas(torch.tensor([num_local_tokens]), dist.ReduceOp.MAX)[0])
        # the other processes add zeros to a sequence's row, so the sum is the row of its own process
        written = unpack_tokens(all_reduce_replicas(pack_tokens(local_written, width)))
        lengths = [len(prompt) + len(tokens) for prompt, (tokens, _) in zip(prompts, written, strict=True)]
        routes = None if shape is None else _gather_routes(sequences, lengths, shape)
        return GenerationResult.of(written, sampling, stop, version, routes)

    def update(self, weights: NamedTensors | None, version: int) -> None:
        """Import weights, or count the live weights as a new version, see `Engine.update`."""
        with self._weight_version.replace_weights(version, weights):
            if weights is not None:
                self._importer.import_all(weights)

    @cached_property
    def _importer(self) -> LiveImport:
        return LiveImport(self.forward_model.model)


def _gather_routes(sequences: Sequence[Continuation], lengths: Sequence[int],
                   shape: RouteShape) -> list[np.ndarray]:
    """Gather the expert routes of all sequences on every process.

    Sequences are summed one at a time: all routes together may exceed GPU memory.
    """
    by_index = {sequence.index: sequence for sequence in sequences}
    all_routes = []
    for index, length in enumerate(lengths):
        # as bytes: every backend can sum uint8
        route_bytes = torch.zeros(length - 1, shape.bytes_per_token, dtype=torch.uint8)
        if index in by_index:
            routes = by_index[index].join_routes(shape)
            route_bytes = torch.from_numpy(routes.reshape(len(routes), -1).view(np.uint8))
        rows = all_reduce_replicas(route_bytes).numpy().view(shape.dtype)
        all_routes.append(rows.reshape(length - 1, shape.layers, shape.top_k))
    return all_routes

"""Pack the new tokens of several cached sequences into one row for the model.

A span holds one sequence's new tokens; a row holds spans side by side. A cache has a slot per sequence."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_sov.engine.parallel import context
from megatron_sov.model.modality import EncoderInputs, join_inputs

StepEntries = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Slots and ring indices to write, each [sequences, 1] int64; mask of the visible entries,
[sequences, 1, 1, entries] bool."""


@dataclass(frozen=True)
class CacheSize:
    """KV cache size, for `CachedDecoder`."""

    slots: int
    """Cached sequences."""
    max_tokens: int
    """Longest sequence in tokens."""


@dataclass(frozen=True)
class CacheSpan:
    """A sequence's new tokens in a `SpanRow`."""

    slot: int
    """The sequence's slot."""
    past: int
    """Cached tokens of the sequence."""
    tokens: Sequence[int]
    """New tokens, at least one."""
    encoder_inputs: EncoderInputs | None = None
    """Images and audio for the span, with positions relative to the first token. None: no media."""


@dataclass
class CacheGroup:
    """Adjacent spans with equal lengths in adjacent slots."""

    start: int
    """First token's row index."""
    slot: int
    """First span's slot."""
    length: int
    """Tokens per span."""
    past: list[int]
    """Cached tokens per sequence."""
    step_entries: dict[int, StepEntries] = field(default_factory=dict, compare=False)
    """Cache capacity -> entries, computed by the first layer with that capacity."""

    def find_step_entries(self, capacity: int, device: torch.device) -> StepEntries:
        """Return the entries that a new token per sequence writes and sees in caches of `capacity`."""
        if capacity not in self.step_entries:
            past = torch.tensor(self.past, device=device)[:, None]
            slots = torch.arange(self.slot, self.slot + len(past), device=device)[:, None]
            # ring entry p holds the newest position equal to p modulo the capacity, always within the window;
            # `distance` counts positions back from the new token: beyond `past`, the entry is still empty
            filled = min(capacity, max(self.past) + 1)
            distance = (past - torch.arange(filled, device=device)) % capacity
            self.step_entries[capacity] = (slots, past % capacity, (distance <= past)[:, None, None])
        return self.step_entries[capacity]


@dataclass
class PackedSpans(PackedSeqParams):
    """`PackedSeqParams` for a row of spans; Megatron-Core sees the row as a single sequence."""

    groups: list[CacheGroup] = field(default_factory=list)
    """Groups in row order."""


@dataclass(frozen=True)
class SpanRow:
    """Spans side by side, padded to a length that the layout can split; every process has the whole row."""

    tokens: torch.Tensor
    """[tokens] int64."""
    positions: torch.Tensor
    """[tokens] int64 position in the sequence."""
    ends: list[int]
    """Row index after the last token, per span."""
    packed: PackedSpans
    """`PackedSpans` for attention."""
    encoder_inputs: EncoderInputs | None = None
    """Images and audio in the row. None: no media."""

    def padding(self, sequence_parallel: bool) -> torch.Tensor:
        """Return the mask [tokens] bool of padding; with sequence parallelism, this process's part of it."""
        padding_mask = torch.arange(len(self.tokens), device=self.tokens.device) >= (
            self.ends[-1] if self.ends else 0)
        if sequence_parallel:
            padding_mask = padding_mask.chunk(parallel_state.get_tensor_model_parallel_world_size())[
                parallel_state.get_tensor_model_parallel_rank()]
        return padding_mask


def pack_spans(spans: Sequence[CacheSpan], row_tokens: int, device: torch.device) -> SpanRow:
    """Pack spans into a row with `row_tokens` tokens, a length that the layout can split."""
    groups: list[CacheGroup] = []
    ends: list[int] = []
    tokens: list[int] = []
    positions: list[torch.Tensor] = [torch.zeros(0, dtype=torch.int64)]
    for span in spans:
        last = groups[-1] if groups else None
        if last is not None and (span.slot, len(span.tokens)) == (last.slot + len(last.past), last.length):
            last.past.append(span.past)
        else:
            groups.append(CacheGroup(len(tokens), span.slot, len(span.tokens), [span.past]))
        tokens += span.tokens
        positions.append(torch.arange(span.past, span.past + len(span.tokens)))
        ends.append(len(tokens))
    num_padding = row_tokens - len(tokens)
    row_positions = torch.cat([*positions, torch.zeros(num_padding, dtype=torch.int64)])
    # Megatron-Core caches rotary tables by length: powers of two keep their number small
    max_positions = 1 << int(row_positions.max()).bit_length()
    # on the CPU, where Megatron-Core reads the bounds; it divides them by the context-parallel size
    row_bounds = torch.tensor([0, row_tokens * context.get_cp_size()], dtype=torch.int32)
    packed = PackedSpans(qkv_format="thd", cu_seqlens_q=row_bounds, cu_seqlens_kv=row_bounds,
                         max_seqlen_q=max_positions, max_seqlen_kv=max_positions, groups=groups)
    inputs = join_inputs((end - len(span.tokens), span.encoder_inputs)
                         for end, span in zip(ends, spans, strict=True))
    token_ids = torch.tensor(tokens + [0] * num_padding)
    return SpanRow(token_ids.to(device), row_positions.to(device), ends, packed, inputs)

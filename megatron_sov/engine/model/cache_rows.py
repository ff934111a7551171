"""What is read at a time of sequences that layers keep something of: spans of tokens, side by side in a row.

A cache has slots, one for each sequence that is being read.  To take tokens back is to read the next ones at
their positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_sov.engine.parallel import context
from megatron_sov.model.modality import EncoderInputs, join_inputs


@dataclass(frozen=True)
class CacheSize:
    """How much a cache can hold."""

    slots: int
    """Sequences."""
    max_tokens: int
    """Longest sequence, in tokens, drafts included."""
    step_tokens: int = 1
    """Most tokens of a span that may be taken back; longer spans stay."""


@dataclass(frozen=True)
class CacheSpan:
    """New tokens of one sequence."""

    slot: int
    """Place of the sequence in the cache."""
    past: int
    """How many of its tokens the cache holds; what it holds beyond is taken back."""
    tokens: Sequence[int]
    """What is read now, at least one token."""
    encoder_inputs: EncoderInputs | None = None
    """Pictures and sounds that these tokens stand for, placed from the first of them; None: nothing."""


@dataclass
class CacheGroup:
    """Pieces of equal length that stand side by side in a row, of sequences in neighbouring slots."""

    start: int
    """Row index of the first token."""
    slot: int
    """Slot of the first span."""
    length: int
    """Tokens of each span."""
    past: list[int]
    """Tokens that the cache holds of each sequence."""


@dataclass
class PackedSpans(PackedSeqParams):
    """What attention needs to know about a row of spans; to the library the row is one sequence."""

    groups: list[CacheGroup] = field(default_factory=list)
    """In the order of the row."""


@dataclass(frozen=True)
class ReadRow:
    """Pieces side by side, padded to a length that the layout can split;
    whole on every process that reads them."""

    tokens: torch.Tensor
    """[tokens] int64."""
    positions: torch.Tensor
    """[tokens] int64, counted from the start of each sequence."""
    ends: list[int]
    """Row index after each span."""
    packed: PackedSpans
    """The spans."""
    encoder_inputs: EncoderInputs | None = None
    """Pictures and sounds that its tokens stand for; None: nothing."""

    def padding(self, sequence_parallel: bool) -> torch.Tensor:
        """Return [tokens] bool, True where a token is padding;
        under sequence parallelism this process's part."""
        mask = torch.arange(len(self.tokens), device=self.tokens.device) >= (
            self.ends[-1] if self.ends else 0)
        if sequence_parallel:
            mask = mask.chunk(parallel_state.get_tensor_model_parallel_world_size())[
                parallel_state.get_tensor_model_parallel_rank()]
        return mask


def read_row(spans: Sequence[CacheSpan], row_tokens: int, device: torch.device) -> ReadRow:
    """Put spans into a row of `row_tokens`, which the layout must be able to split."""
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
    gap = row_tokens - len(tokens)
    place = torch.cat([*positions, torch.zeros(gap, dtype=torch.int64)])
    # rotations are tabled by length: powers of two make few tables
    longest = 1 << int(place.max()).bit_length()
    # on the CPU, where the library reads it
    whole = torch.tensor([0, row_tokens * context.size()], dtype=torch.int32)
    packed = PackedSpans(qkv_format="thd", cu_seqlens_q=whole, cu_seqlens_kv=whole, max_seqlen_q=longest,
                         max_seqlen_kv=longest, groups=groups)
    inputs = join_inputs((end - len(span.tokens), span.encoder_inputs)
                         for end, span in zip(ends, spans, strict=True))
    return ReadRow(torch.tensor(tokens + [0] * gap).to(device), place.to(device), ends, packed, inputs)

"""Cached attention against a dense softmax over whole sequences, with spans of any length."""

import random

import pytest
import torch

from megatron_sov.engine.model import attention
from megatron_sov.engine.model.cache_rows import CacheGroup, CacheSize, PackedSpans
from megatron_sov.engine.model.kv_cache import CachedAttention

HEADS, KV_HEADS, DIM, SLOTS, MAX_TOKENS = 4, 2, 8, 3, 60


class WholeSequence:
    """Random queries, keys and values of a whole sequence, and its dense attention output."""

    def __init__(self, generator: torch.Generator) -> None:
        self.q, self.k, self.v = (torch.randn(MAX_TOKENS + 9, n, DIM, generator=generator,
                                              dtype=torch.float64)
                                  for n in (HEADS, KV_HEADS, KV_HEADS))

    def attend(self, window: int) -> torch.Tensor:
        positions = torch.arange(len(self.q))
        distance = positions[:, None] - positions
        visible = (distance >= 0) & ((distance < window) if window else True)
        keys, values = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (self.k, self.v))
        scores = torch.einsum("qhd,khd->hqk", self.q, keys) * DIM ** -0.5
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1),
                            values).flatten(1)


@pytest.mark.each("window", [0, 1, 5, 16, 100])
def test_cached_spans_equal_whole_sequences(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUERY_BLOCK", 7)
    generator, lengths_random = torch.Generator().manual_seed(window), random.Random(window)
    layer = CachedAttention(CacheSize(SLOTS, MAX_TOKENS), DIM ** -0.5, window)
    assert layer.capacity == (min(MAX_TOKENS, window) if window else MAX_TOKENS)
    sequences = [WholeSequence(generator) for _ in range(SLOTS)]
    num_read = [0] * SLOTS
    for turn in range(40):
        single_tokens = turn % 2 == 1
        lengths = [1] * SLOTS if single_tokens else [lengths_random.choice((1, 2, 3, 6, 11))
                                                     for _ in range(SLOTS)]
        if any(d + n > MAX_TOKENS for d, n in zip(num_read, lengths, strict=True)):
            longest = num_read.index(max(num_read))
            # The longest sequence ends; another one is copied to its slot, and both slots continue.
            other = (longest + 1) % SLOTS
            layer.copy(other, [longest])
            sequences[longest], num_read[longest] = sequences[other], num_read[other]
            continue
        groups = [CacheGroup(0, 0, 1, list(num_read))] if single_tokens else [
            CacheGroup(sum(lengths[:i]), i, lengths[i], [num_read[i]]) for i in range(SLOTS)]
        qkv = []
        for name in "qkv":
            new = [getattr(s, name)[d:d + n]
                   for s, d, n in zip(sequences, num_read, lengths, strict=True)]
            padding = torch.full((2, HEADS if name == "q" else KV_HEADS, DIM), torch.nan).double()
            qkv.append(torch.cat([*new, padding]))
        result = layer(*qkv, None, packed_seq_params=PackedSpans(groups=groups))
        expected = torch.cat([s.attend(window)[d:d + n]
                              for s, d, n in zip(sequences, num_read, lengths, strict=True)])
        assert torch.allclose(result[:-2], expected, atol=1e-12), turn
        assert not result[-2:].any(), "padding"
        num_read = [d + n for d, n in zip(num_read, lengths, strict=True)]
    assert max(num_read) > 20

"""Cached attention against a dense softmax over whole sequences, with spans of any length."""

import random

import pytest
import torch

from megatron_sov.engine.model import attention
from megatron_sov.engine.model.cache_rows import CacheGroup, CacheSize, PackedSpans
from megatron_sov.engine.model.kv_cache import CachedAttention

HEADS, KV_HEADS, DIM, SLOTS, LONGEST = 4, 2, 8, 3, 60


class Whole:
    """Random queries, keys and values of a whole sequence, and its dense attention output."""

    def __init__(self, generator: torch.Generator) -> None:
        self.q, self.k, self.v = (torch.randn(LONGEST + 9, n, DIM, generator=generator, dtype=torch.float64)
                                  for n in (HEADS, KV_HEADS, KV_HEADS))

    def dense(self, window: int) -> torch.Tensor:
        place = torch.arange(len(self.q))
        distance = place[:, None] - place
        visible = (distance >= 0) & ((distance < window) if window else True)
        keys, values = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (self.k, self.v))
        scores = torch.einsum("qhd,khd->hqk", self.q, keys) * DIM ** -0.5
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1),
                            values).flatten(1)


@pytest.mark.each("window", [0, 1, 5, 16, 100])
def test_cached_spans_equal_whole_sequences(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUERY_BLOCK", 7)
    generator, choose = torch.Generator().manual_seed(window), random.Random(window)
    layer = CachedAttention(CacheSize(SLOTS, LONGEST), DIM ** -0.5, window)
    assert layer.capacity == (min(LONGEST, window) if window else LONGEST)
    sequences = [Whole(generator) for _ in range(SLOTS)]
    done = [0] * SLOTS
    for turn in range(40):
        together = turn % 2 == 1
        lengths = [1] * SLOTS if together else [choose.choice((1, 2, 3, 6, 11)) for _ in range(SLOTS)]
        if any(d + n > LONGEST for d, n in zip(done, lengths, strict=True)):
            full = done.index(max(done))
            layer.copy((full + 1) % SLOTS, [full])  # another sequence takes the slot, and both continue
            sequences[full], done[full] = sequences[(full + 1) % SLOTS], done[(full + 1) % SLOTS]
            continue
        groups = [CacheGroup(0, 0, 1, list(done))] if together else [
            CacheGroup(sum(lengths[:i]), i, lengths[i], [done[i]]) for i in range(SLOTS)]
        row = [torch.cat([getattr(s, name)[d:d + n] for s, d, n in zip(sequences, done, lengths, strict=True)]
                         + [torch.full((2, HEADS if name == "q" else KV_HEADS, DIM), torch.nan).double()])
               for name in "qkv"]
        result = layer(*row, None, packed_seq_params=PackedSpans(groups=groups))
        expected = torch.cat([s.dense(window)[d:d + n]
                              for s, d, n in zip(sequences, done, lengths, strict=True)])
        assert torch.allclose(result[:-2], expected, atol=1e-12), turn
        assert not result[-2:].any(), "padding"
        done = [d + n for d, n in zip(done, lengths, strict=True)]
    assert max(done) > 20

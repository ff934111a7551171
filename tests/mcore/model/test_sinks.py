"""Attention with sinks over packed documents, whole or cut over processes, against a dense softmax with one
column more, in double precision."""

from __future__ import annotations

from typing import Any

import pytest

ROWS = [(lengths, window, block) for lengths in ([1, 7, 40, 16], [64], [32, 32])
        for window, block in ((0, 1024), (0, 5), (5, 8), (1, 16), (17, 1024))]
"""Documents of a row of 64 tokens, window, queries attended at a time."""
HEADS, KV_HEADS, DIM, SCALE = 4, 2, 8, 0.3


def attend(cp: int) -> list[list[float]]:
    """Return for each row the largest errors of output, of gradients of queries, keys and values, and of the
    sinks' gradient."""
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig

    from megatron_sov.config import ParallelConfig
    from megatron_sov.mcore.model import attention
    from megatron_sov.mcore.model.sinks import SinkAttention
    from megatron_sov.mcore.parallel import context, world

    world.join(ParallelConfig(cp=cp))
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * DIM, num_attention_heads=HEADS,
                               params_dtype=torch.float64)
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    found = []
    for lengths, window, attention.QUERY_BLOCK in ROWS:
        layer = SinkAttention(config, 1, None, "self", softmax_scale=SCALE, window_tokens=window,
                              pg_collection=groups)
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        row = [drawn(64, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        sinks, upstream = 2 * drawn(HEADS), drawn(64, HEADS * DIM)
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        layer.softmax_offset.data = sinks.clone()

        q, k, v, offset = exact = [t.clone().requires_grad_() for t in (*row, sinks)]
        place, document = torch.arange(64), torch.repeat_interleave(bounds.diff())
        distance = place[:, None] - place
        visible = (document[:, None] == document) & (distance >= 0) & (distance < (window or 64))
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * SCALE
        scores = scores.masked_fill(~visible, -torch.inf)
        shares = torch.cat([scores, offset[:, None, None].expand(-1, 64, 1)], -1).softmax(-1)[..., :-1]
        expected = torch.einsum("hqk,khd->qhd", shares, v).flatten(1)
        expected.backward(upstream)

        inputs = [context.local(t).clone().requires_grad_() for t in row]
        packed = attention.pack(bounds.to(torch.int32), max(lengths), 64)
        out = layer(*inputs, None, packed_seq_params=packed)
        out.backward(context.local(upstream))
        gradient = layer.softmax_offset.grad
        torch.distributed.all_reduce(gradient)  # as that of any weight, over all parts of a row
        found.append([float((out - context.local(expected)).abs().max()),
                      max(float((a.grad - context.local(b.grad)).abs().max())
                          for a, b in zip(inputs, exact[:3], strict=True)),
                      float((gradient - offset.grad).abs().max())])
    world.leave()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("cp", [1, 2])
def test_sinks_take_their_share_of_every_document(ranks: Any, job: Any, cp: int) -> None:
    (per_rank,) = ranks(job(__file__, "attend", cp, {"cp": cp}))
    for errors in per_rank:
        for row, found in zip(ROWS, errors, strict=True):
            assert max(found) < 1e-13, (row, found)

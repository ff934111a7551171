"""Attention over packed documents against a dense softmax in double precision."""

from __future__ import annotations

from typing import Any

import pytest

LENGTHS = [1, 7, 40, 33]
HEADS, KV_HEADS, DIM = 4, 2, 8


def attend(window: int, query_block: int) -> dict[str, Any]:
    """Return the largest errors of output and gradients, and what changing the first and third document moves elsewhere."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer import TransformerConfig

    from megatron_sov.mcore import attention

    attention.QUERY_BLOCK = query_block
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * DIM, num_attention_heads=HEADS)
    layer = attention.DocumentAttention(config, 1, None, "self", window_tokens=window)
    total = sum(LENGTHS)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(total, heads, DIM, generator=generator).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS)]
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)

    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place = torch.arange(total)
    visible = (document[:, None] == document) & (place[:, None] >= place)
    if window:
        visible &= place[:, None] - place < window
    q, k, v = (t.detach().double().requires_grad_() for t in inputs)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(HEADS // KV_HEADS, dim=1)) * DIM ** -0.5
    expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v.repeat_interleave(2, dim=1))
    expected = expected.reshape(total, -1)

    out = layer(*inputs, None, packed_seq_params=packed)
    upstream = torch.randn(out.shape, generator=generator)
    out.backward(upstream)
    expected.backward(upstream.double())
    gradients = [float((a.grad - b.grad).abs().max()) for a, b in zip(inputs, (q, k, v), strict=True)]

    changed = [t.detach().clone() for t in inputs]
    others = (document == 1) | (document == 3)
    for t in changed:
        t[~others] = torch.randn(t[~others].shape, generator=generator) * 5
    moved = layer(*changed, None, packed_seq_params=packed)
    return {"output": float((out - expected).abs().max()), "gradients": gradients,
            "leak": float((moved[others] - out[others]).abs().max()), "moved": float((moved[~others] - out[~others]).abs().max())}


@pytest.mark.distributed
def test_each_document_attends_to_itself_alone(ranks, job) -> None:
    cases = [{"window": w, "query_block": b} for w, b in ((0, 1024), (5, 1024), (5, 8), (1, 16), (33, 7), (64, 16))]
    for case, (result,) in zip(cases, ranks(*(job(__file__, "attend", 1, c) for c in cases)), strict=True):
        assert result["output"] < 2e-6, case
        assert max(result["gradients"]) < 1e-5, case
        assert result["leak"] == 0.0, case
        assert result["moved"] > 0.1, case  # the change itself was seen

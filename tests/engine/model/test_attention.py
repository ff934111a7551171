"""Attention over packed documents, with and without context parallelism, against a dense float64 softmax."""

from typing import Any

import pytest
import torch

from megatron_sov.engine.model import attention
from megatron_sov.engine.model.attention import attend_document as attend_one
from megatron_sov.engine.parallel import context, world
from megatron_sov.model.config import ParallelConfig

LENGTHS = {"few": [1, 7, 40, 16], "one": [64], "many": [3, 1, 1, 8, 2, 17, 5, 11, 16], "half": [32, 32]}
"""Documents in rows of 64 tokens; with four processes a piece has 8 tokens."""
HEADS, KV_HEADS, DIM = 4, 2, 8
WATCHED = slice(1, None, 2)
"""Every second document."""


def _dense(inputs: list[Any], document: Any, window: int) -> Any:
    """Return [tokens, heads * dim] of a softmax over the whole row with one mask for documents, causality and
    window."""
    q, k, v = inputs
    place = torch.arange(len(q))
    visible = (document[:, None] == document) & (place[:, None] >= place)
    if window:
        visible &= place[:, None] - place < window
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(HEADS // KV_HEADS, dim=1)) * DIM ** -0.5
    out = torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1),
                       v.repeat_interleave(HEADS // KV_HEADS, dim=1))
    return out.reshape(len(q), -1)


def attend(cp: int, rows: list[tuple[str, int, int]]) -> list[dict[str, Any]]:
    """For each (documents, window, query block) return this process's largest errors of output and gradients,
    and leaks.

    A leak is a nonzero gradient of the watched documents' output with respect to another document's inputs.
    """
    from megatron.core.transformer import TransformerConfig

    world.join_world(ParallelConfig(cp=cp))
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * DIM, num_attention_heads=HEADS)
    results = []
    for lengths, window, attention.QUERY_BLOCK in rows:
        layer = attention.DocumentAttention(config, 1, None, "self", window_tokens=window)
        documents = torch.tensor(LENGTHS[lengths])
        total = int(documents.sum())
        generator = torch.Generator().manual_seed(0)
        row = [torch.randn(total, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        upstream = torch.randn(total, HEADS * DIM, generator=generator)
        packed = attention.pack_documents(torch.cat([torch.zeros(1), documents.cumsum(0)]).to(torch.int32),
                                          int(documents.max()), total)

        document = torch.repeat_interleave(torch.arange(len(documents)), documents)
        exact = [t.double().requires_grad_() for t in row]
        expected = _dense(exact, document, window)
        expected.backward(upstream.double())

        inputs = [context.select_local(t).clone().requires_grad_() for t in row]
        out = layer(*inputs, None, packed_seq_params=packed)
        watched = context.select_local(torch.isin(document, torch.arange(len(documents))[WATCHED]))
        leaks = torch.autograd.grad(out, inputs, context.select_local(upstream) * watched[:, None],
                                    retain_graph=True)
        out.backward(context.select_local(upstream))
        results.append({
            "output": float((out - context.select_local(expected)).abs().max()),
            "gradients": max(float((a.grad - context.select_local(b.grad)).abs().max())
                             for a, b in zip(inputs, exact, strict=True)),
            "leak": max(float((g.abs() * ~watched[:, None, None]).max()) for g in leaks),
            "watched": max(float(g.abs().max()) for g in leaks)})
    world.leave_world()
    return results


CASES = [(documents, window, block) for documents in LENGTHS
         for window, block in ((0, 1024), (0, 5), (5, 1024), (5, 8), (1, 16), (17, 7), (64, 16))]


@pytest.mark.distributed
@pytest.mark.parametrize("cp", [1, 2, 4])
def test_each_document_attends_to_itself_alone(ranks, job, cp: int) -> None:
    (per_rank,) = ranks(job(__file__, "attend", cp, {"cp": cp, "rows": CASES}))
    for rank, results in enumerate(per_rank):
        for case, result in zip(CASES, results, strict=True):
            assert result["output"] < 2e-6, (rank, case)
            assert result["gradients"] < 1e-5, (rank, case)
            assert result["leak"] == 0.0, (rank, case)
    for number, case in enumerate(CASES):
        # the test can detect leaks
        assert case[0] == "one" or max(r[number]["watched"] for r in per_rank) > 0.1, case


def kept_bytes() -> list[int]:
    """Return the bytes that autograd saves for attention from the second half of a document, for two
    lengths."""
    found = []
    for length in (2048, 8192):
        q, k, v = (torch.randn(n, 1, DIM, requires_grad=True) for n in (length // 2, length, length))
        storages: dict[int, int] = {}

        def keep(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = attend_one(q, k, v, 0.3, 0)
        found.append(sum(storages.values()))
        out.sum().backward()
    return found


def test_memory_grows_with_the_length_and_not_with_its_square(ranks, job) -> None:
    """On CPUs a split row is attended in blocks with masks; autograd must save none of the masks."""
    (((short, long),),) = ranks(job(__file__, "kept_bytes", 1, {}))
    assert 0 < long <= 4.5 * short


@pytest.mark.each(("longest", "tabled"), [(1, 1), (5, 8), (64, 64), (65, 100)])
def test_library_attention_sees_few_distinct_lengths(longest: int, tabled: int) -> None:
    packed = attention.pack_documents(torch.tensor([0, longest, 100]), longest, 100, own=False)
    assert packed.max_seqlen_q == packed.max_seqlen_kv == tabled

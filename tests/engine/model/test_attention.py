"""Attention over packed documents, with and without context parallelism, against a dense float64 softmax."""

from typing import Any

import pytest
import torch

from megatron_sov.engine.model import attention
from megatron_sov.engine.model.attention import attend_document
from megatron_sov.engine.parallel import context, world
from megatron_sov.model.config import ParallelConfig

LENGTHS = {"few": [1, 7, 40, 16], "one": [64], "many": [3, 1, 1, 8, 2, 17, 5, 11, 16], "half": [32, 32]}
"""Lengths of documents in rows of 64 tokens. At context parallelism 4 a rank computes two chunks of 8."""
HEADS, KV_HEADS, DIM = 4, 2, 8
WATCHED = slice(1, None, 2)
"""Every second document: the inputs of other documents must get no gradient from its output."""


def attend_with_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, document: torch.Tensor,
                     window: int) -> torch.Tensor:
    """Attend by a softmax over the whole row with one mask for documents, causality and window.

    Args:
        q, k, v: shape [tokens, heads, dim].
        document: index of each token's document, shape [tokens].
        window: tokens that a query sees, with its own; 0: all.

    Returns:
        Shape [tokens, heads * dim].
    """
    position = torch.arange(len(q))
    visible = (document[:, None] == document) & (position[:, None] >= position)
    if window:
        visible &= position[:, None] - position < window
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(HEADS // KV_HEADS, dim=1)) * DIM ** -0.5
    out = torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1),
                       v.repeat_interleave(HEADS // KV_HEADS, dim=1))
    return out.reshape(len(q), -1)


def compare_attention(cp: int, cases: list[tuple[str, int, int]]) -> list[dict[str, Any]]:
    """Compare our attention with `attend_with_mask`.

    Args:
        cp: context parallelism.
        cases: (key of `LENGTHS`, window, query block).

    Returns:
        For each case, this rank's largest errors of "output" and "gradients"; "leak": the largest gradient
        of the watched documents' output with respect to other documents' inputs; and "watched": the
        largest one with respect to all inputs.
    """
    from megatron.core.transformer import TransformerConfig

    world.join_world(ParallelConfig(cp=cp))
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * DIM, num_attention_heads=HEADS)
    results = []
    for lengths, window, attention.QUERY_BLOCK in cases:
        layer = attention.DocumentAttention(config, 1, None, "self", window_tokens=window)
        documents = torch.tensor(LENGTHS[lengths])
        total = int(documents.sum())
        generator = torch.Generator().manual_seed(0)
        row = [torch.randn(total, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        output_gradient = torch.randn(total, HEADS * DIM, generator=generator)
        packed = attention.pack_documents(torch.cat([torch.zeros(1), documents.cumsum(0)]).to(torch.int32),
                                          int(documents.max()), total)

        document = torch.repeat_interleave(torch.arange(len(documents)), documents)
        expected_inputs = [t.double().requires_grad_() for t in row]
        expected = attend_with_mask(*expected_inputs, document, window)
        expected.backward(output_gradient.double())

        inputs = [context.select_local(t).clone().requires_grad_() for t in row]
        out = layer(*inputs, None, packed_seq_params=packed)
        is_watched = context.select_local(torch.isin(document, torch.arange(len(documents))[WATCHED]))
        watched_gradients = torch.autograd.grad(
            out, inputs, context.select_local(output_gradient) * is_watched[:, None], retain_graph=True)
        out.backward(context.select_local(output_gradient))
        results.append({
            "output": float((out - context.select_local(expected)).abs().max()),
            "gradients": max(float((a.grad - context.select_local(b.grad)).abs().max())
                             for a, b in zip(inputs, expected_inputs, strict=True)),
            "leak": max(float((g.abs() * ~is_watched[:, None, None]).max()) for g in watched_gradients),
            "watched": max(float(g.abs().max()) for g in watched_gradients)})
    return results


CASES = [(documents, window, block) for documents in LENGTHS
         for window, block in ((0, 1024), (0, 5), (5, 1024), (5, 8), (1, 16), (17, 7), (64, 16))]


@pytest.mark.distributed
@pytest.mark.parametrize("cp", [1, 2, 4])
def test_each_document_attends_to_itself_alone(ranks, job, cp: int) -> None:
    (results_by_rank,) = ranks(job(__file__, "compare_attention", cp, {"cp": cp, "cases": CASES}))
    for rank, results in enumerate(results_by_rank):
        for case, result in zip(CASES, results, strict=True):
            assert result["output"] < 2e-6, (rank, case)
            assert result["gradients"] < 1e-5, (rank, case)
            assert result["leak"] == 0.0, (rank, case)
    for i, case in enumerate(CASES):
        # The inputs of watched documents do get gradients; in a row with one document, none is watched.
        assert case[0] == "one" or max(results[i]["watched"] for results in results_by_rank) > 0.1, case


def measure_saved_bytes() -> list[int]:
    """Return the bytes that autograd saves for attention from a document's second half, for two lengths."""
    saved_bytes = []
    for length in (2048, 8192):
        q, k, v = (torch.randn(n, 1, DIM, requires_grad=True) for n in (length // 2, length, length))
        storages: dict[int, int] = {}

        def save(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            out = attend_document(q, k, v, 0.3, 0)
        saved_bytes.append(sum(storages.values()))
        out.sum().backward()
    return saved_bytes


def test_memory_grows_with_the_length_and_not_with_its_square(ranks, job) -> None:
    """On CPUs a split row is attended in blocks with masks; autograd must save none of the masks."""
    (((short, long),),) = ranks(job(__file__, "measure_saved_bytes", 1, {}))
    assert 0 < long <= 4.5 * short


@pytest.mark.each(("longest", "rounded"), [(1, 1), (5, 8), (64, 64), (65, 100)])
def test_megatron_attention_sees_few_distinct_lengths(longest: int, rounded: int) -> None:
    """Lengths are rounded up to powers of two, up to the 100 tokens of the row."""
    packed = attention.pack_documents(torch.tensor([0, longest, 100]), longest, 100, own=False)
    assert packed.max_seqlen_q == packed.max_seqlen_kv == rounded

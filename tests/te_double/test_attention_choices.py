"""The attention backend that the Transformer Engine double selects for rows of documents."""

import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sov.engine.model.attention import PackedDocuments, pack_documents
from megatron_sov.engine.model.attention_kernels import cache_attention_decisions


@pytest.fixture(scope="module")
def te() -> Iterator[Any]:
    """Import the double for this file only: other tests check whether Transformer Engine is installed."""
    sys.path.insert(0, str(Path(__file__).parent))
    import transformer_engine
    from transformer_engine.pytorch import placement
    from transformer_engine.pytorch.attention import backends

    yield SimpleNamespace(pytorch=transformer_engine.pytorch, machine=placement, backends=backends)
    sys.path.remove(str(Path(__file__).parent))
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        del sys.modules[name]


def draw_states() -> torch.Tensor:
    """Return normal values [16 tokens, 4 heads, 8 channels]."""
    return torch.randn(16, 4, 8, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("caches_all", "decisions"), [(False, 7), (True, 3)])
def test_attention_decisions_are_cached_per_window_and_length(te: Any, monkeypatch: pytest.MonkeyPatch,
                                                              caches_all: bool, decisions: int) -> None:
    """Transformer Engine caches one decision and queries cuDNN again when documents, window or length change,
    as between layers with different attention. `cache_attention_decisions` caches all decisions; a change of
    the environment variables needs a new one."""
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    monkeypatch.setattr(utils, "get_attention_backend",
                        lambda call: te.backends.choose_backend(call, te.machine.CHIP))
    if caches_all:
        cache_attention_decisions(utils)
        cache_attention_decisions(utils)  # every model calls it, so a second call must not matter
    q, bound = draw_states(), torch.tensor([0, 5, 6, 15, 16], dtype=torch.int32)
    attention = te.pytorch.DotProductAttention(4, 8, attn_mask_type="padding_causal", qkv_format="thd")
    te.backends.SELECTIONS.clear()
    # the longest document and the window change 6 times after the first call; there are 3 distinct pairs
    for longest, left in ((9, -1), (9, -1), (16, -1), (9, 3), (9, -1), (9, 3), (9, -1), (16, -1)):
        attention(q, q, q, cu_seqlens_q=bound, cu_seqlens_kv=bound, max_seqlen_q=longest,
                  window_size=(left, 0))
    assert dict(te.backends.SELECTIONS) == {te.backends.FUSED: decisions}
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    attention(q, q, q, cu_seqlens_q=bound, cu_seqlens_kv=bound, max_seqlen_q=9)
    assert te.backends.SELECTIONS[te.backends.UNFUSED] == 1


def test_one_decision_about_attention_serves_rows_of_many_documents(te: Any) -> None:
    """`pack_documents` appends empty documents, so that rows with 5 to 8 documents share a decision."""
    q = draw_states()
    attention = te.pytorch.DotProductAttention(4, 8, attn_mask_type="padding_causal", qkv_format="thd")
    te.backends.SELECTIONS.clear()
    for lengths in ((4, 4, 4, 3, 1), (4, 4, 4, 2, 1, 1), (4, 3, 3, 2, 2, 1, 1), (3, 3, 2, 2, 2, 2, 1, 1)):
        bound = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        packed = pack_documents(bound, max(lengths), 16, own=False)
        out = attention(q, q, q, cu_seqlens_q=packed.cu_seqlens_q, cu_seqlens_kv=packed.cu_seqlens_kv,
                        max_seqlen_q=packed.max_seqlen_q)
        whole = [torch.nn.functional.scaled_dot_product_attention(*[x.transpose(0, 1).float()] * 3,
                                                                  is_causal=True).transpose(0, 1)
                 for x in q.split(lengths)]
        torch.testing.assert_close(out.view(16, 4, 8).float(), torch.cat(whole), atol=0.02, rtol=0.02)
        assert packed.bounds.equal(bound), "multi-token prediction needs the bounds without empty documents"
    assert te.backends.SELECTIONS == {te.backends.FUSED: 1}


def test_the_unfused_attention_gets_no_more_than_a_row_has(te: Any) -> None:
    """Unfused attention allocates scores of documents x longest x longest, so an empty document costs as much
    as the longest. Only with `bucketed`, number of documents and length are rounded up: (3, 5) to (4, 8)."""
    bound = torch.tensor([0, 5, 10, 15], dtype=torch.int32)
    sizes = []
    for bucketed in (True, False):
        packed = pack_documents(bound, 5, 15, own=False, bucketed=bucketed)
        sizes.append((len(packed.cu_seqlens_q) - 1, packed.max_seqlen_q))
        unsplit = PackedDocuments(bounds=bound, longest_tokens=5, row_tokens=15, bucketed=bucketed).unsplit
        assert (len(unsplit.cu_seqlens_q) - 1, unsplit.max_seqlen_q) == sizes[-1]
    assert sizes == [(4, 8), (3, 5)]

"""Attention through torch's `varlen_attn`, with a double in plain torch, against a dense float64 softmax.

Tests every split of a row, and the signatures of the installed torch and of torch 2.11.
"""

import inspect
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen as kernel

from megatron_sov.engine.model import attention
from tests.engine.model import test_attention

INSTALLED_VARLEN = kernel.varlen_attn


def torch_2_11(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor,
               cu_seq_k: torch.Tensor, max_q: int, max_k: int, *, return_aux: Any = None,
               scale: float | None = None, window_size: tuple[int, int] = (-1, -1)) -> torch.Tensor:
    """Double of torch 2.11.0's varlen_attn, which requires as many key heads as query heads."""
    assert query.shape[1] == key.shape[1]
    return compute_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def torch_here(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Double of the installed torch's varlen_attn."""
    call = inspect.signature(INSTALLED_VARLEN).bind(*args, **kwargs)
    call.apply_defaults()
    a = call.arguments
    assert a["enable_gqa"] == (a["query"].shape[1] != a["key"].shape[1])
    key, value = (a[n].repeat_interleave(a["query"].shape[1] // a[n].shape[1], 1) for n in ("key", "value"))
    return compute_varlen(a["query"], key, value, a["cu_seq_q"], a["cu_seq_k"], a["max_q"], a["max_k"],
                          a["scale"], a["window_size"])


torch_here.__signature__ = inspect.signature(INSTALLED_VARLEN)  # type: ignore[attr-defined]


def compute_varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor,
                   cu_seq_k: torch.Tensor, max_q: int, max_k: int, scale: float | None,
                   window_size: tuple[int, int]) -> torch.Tensor:
    """Compute flash attention over concatenated sequences in plain torch.

    The last query of a sequence is aligned with its last key. `window_size` is (left, right), without the
    current token; -1 is unbounded.
    """
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and len(cu_seq_q) == len(cu_seq_k)
    assert int(cu_seq_q[0]) == int(cu_seq_k[0]) == 0
    assert (int(cu_seq_q[-1]), int(cu_seq_k[-1])) == (len(query), len(key)), "tokens of no document"
    assert (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max())) == (max_q, max_k)
    left, right = window_size
    assert right == 0
    outputs = []
    query_lengths, key_lengths = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    for q, k, v in zip(query.split(query_lengths), key.split(key_lengths), value.split(key_lengths),
                       strict=True):
        distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        mask = (distance >= 0) & ((distance <= left) if left >= 0 else True)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


CASES = [(documents, window, 1024) for documents in ("few", "one", "many", "half")
         for window in (0, 1, 5, 17)]


def attend_with_double(cp: int, signature: str) -> list[dict[str, Any]]:
    """Inside ranks: run `test_attention.compare_attention` with a counted double of `varlen_attn`."""
    calls = 0

    def count_and_compute(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return globals()[signature](*args, **kwargs)

    count_and_compute.__signature__ = inspect.signature(globals()[signature])  # type: ignore[attr-defined]
    attention.supports_varlen = lambda query: True
    kernel.varlen_attn = count_and_compute
    return [*test_attention.compare_attention(cp, CASES), {"calls": calls}]


@pytest.mark.tier1_cases(1)
@pytest.mark.distributed
@pytest.mark.parametrize(("cp", "signature"), [(1, "torch_here"), (2, "torch_here"), (4, "torch_2_11")])
def test_one_call_for_each_piece_is_a_dense_softmax(ranks: Any, job: Any, cp: int, signature: str) -> None:
    (results_by_rank,) = ranks(job(__file__, "attend_with_double", cp, {"cp": cp, "signature": signature}))
    for *results, calls in results_by_rank:
        # one call, or two with context parallelism (early and late piece), not one per document
        assert calls == {"calls": len(CASES) * (1 if cp == 1 else 2)}
        for case, result in zip(CASES, results, strict=True):
            assert result["output"] < 2e-6 and result["gradients"] < 1e-5, case
            assert result["leak"] == 0.0, case


def test_bounds_are_sent_once_for_a_row_and_window(monkeypatch: pytest.MonkeyPatch) -> None:
    sent_values = []
    monkeypatch.setattr(attention, "to_device", lambda values, device: sent_values.append(values) or values)
    # Rank 2 of 4 has tokens 16 to 24 and 40 to 48 of a row with documents of 20 and 44 tokens.
    packed = attention.PackedDocuments(bounds=torch.tensor([0, 20, 64]),
                                       spans=[[(0, 16, 20), (20, 20, 24)], [(20, 40, 48)]])
    full_bounds, sliding_bounds = packed.get_piece_bounds(0), packed.get_piece_bounds(5)
    assert packed.get_piece_bounds(0) is full_bounds and packed.get_piece_bounds(5) is sliding_bounds
    assert len(sent_values) == 2
    # a window of 5: the first piece's first document sees 4 earlier tokens, the second piece's too
    assert [(b.queries.tolist(), b.keys.tolist(), b.max_queries, b.max_keys) for b in full_bounds] == [
        ([0, 4, 8], [0, 20, 24], 4, 20), ([0, 8], [0, 28], 8, 28)]
    assert [(b.queries.tolist(), b.keys.tolist(), b.max_queries, b.max_keys) for b in sliding_bounds] == [
        ([0, 4, 8], [0, 8, 12], 4, 8), ([0, 8], [0, 12], 8, 12)]


def test_varlen_is_used_only_for_16_bits_on_a_gpu() -> None:
    def build_heads(device: str, dtype: torch.dtype, size: int) -> Any:
        from types import SimpleNamespace
        return SimpleNamespace(is_cuda=device == "cuda", dtype=dtype, shape=(7, 2, size))

    assert attention.supports_varlen(build_heads("cuda", torch.bfloat16, 128))
    for unsupported in (("cpu", torch.bfloat16, 128), ("cuda", torch.float32, 128),
                        ("cuda", torch.bfloat16, 12),
                        ("cuda", torch.bfloat16, 264)):
        assert not attention.supports_varlen(build_heads(*unsupported)), unsupported

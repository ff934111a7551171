"""The double's own arithmetic, against torch and formulas written out; agreement with the library's local
modules is test_agreement.py's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

LENGTHS = [5, 1, 9, 1]
"""Lengths of a row's documents."""


@pytest.fixture(scope="module")
def te() -> Iterator[Any]:
    """Give the double to this file alone: others ask whether Transformer Engine is installed."""
    sys.path.insert(0, str(Path(__file__).parent))
    import transformer_engine
    import transformer_engine.pytorch.cpp_extensions
    import transformer_engine.pytorch.router
    from transformer_engine.pytorch.gemm import COUNTS

    yield SimpleNamespace(te=transformer_engine, pytorch=transformer_engine.pytorch, counts=COUNTS,
                          recipe=transformer_engine.common.recipe,
                          cpp=transformer_engine.pytorch.cpp_extensions)
    sys.path.remove(str(Path(__file__).parent))
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        del sys.modules[name]


def bounds() -> torch.Tensor:
    """Return the documents' cumulative lengths."""
    return torch.tensor([0, *LENGTHS]).cumsum(0).int()


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return normal numbers, the same ones for the same number of axes."""
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(len(shape)))


def test_every_product_of_a_layer_follows_the_recipe_of_its_forward_pass(te: Any) -> None:
    layer = te.pytorch.Linear(4, 6, bias=False, device="cpu", params_dtype=torch.float64,
                              init_method=torch.nn.init.normal_)
    x = random(3, 2, 4).requires_grad_()
    te.counts.clear()
    with te.pytorch.fp8_autocast(enabled=True, fp8_recipe=te.recipe.Float8BlockScaling()):
        out = layer(x)
    out.square().sum().backward()
    assert te.counts == {(kind, "Float8BlockScaling"): 1 for kind in ("fprop", "dgrad", "wgrad")}
    torch.testing.assert_close(out, x @ layer.weight.T)
    torch.testing.assert_close(layer.weight.grad, torch.einsum("abo,abi->oi", 2 * out, x))


def test_state_is_kept_for_a_recipe_with_a_history_only(te: Any) -> None:
    for recipe, has_state in ((te.recipe.DelayedScaling(), True), (te.recipe.Float8CurrentScaling(), False),
                              (te.recipe.MXFP8BlockScaling(), False)):
        layer = te.pytorch.Linear(4, 6, bias=False, device="cpu", init_method=torch.nn.init.normal_)
        assert layer.state_dict()["_extra_state"].numel() == 0
        with te.pytorch.fp8_autocast(enabled=True, fp8_recipe=recipe):
            layer(random(2, 4, dtype=torch.float32))
        assert (layer.state_dict()["_extra_state"].numel() > 0) == has_state
    with pytest.raises(RuntimeError, match="Refusing to load pickled"):
        layer.set_extra_state(torch.ones(8, dtype=torch.uint8))


def test_a_fused_weight_gradient_overwrites_in_the_first_micro_batch(te: Any) -> None:
    layer = te.pytorch.Linear(4, 6, bias=False, device="cpu", fuse_wgrad_accumulation=True,
                              init_method=torch.nn.init.normal_)
    layer.weight.main_grad, layer.weight.grad_added_to_main_grad = torch.full((6, 4), 7.0), False
    x = random(5, 4, dtype=torch.float32)
    for first in (True, False):
        layer(x, is_first_microbatch=first).sum().backward()
    torch.testing.assert_close(layer.weight.main_grad, 2 * x.sum(0).expand(6, 4))
    assert layer.weight.grad_added_to_main_grad


def test_delayed_weight_gradients_come_with_backward_dw(te: Any) -> None:
    layer = te.pytorch.GroupedLinear(2, 4, 6, bias=False, device="cpu", delay_wgrad_compute=True,
                                     init_method=torch.nn.init.normal_)
    x = random(5, 4, dtype=torch.float32).requires_grad_()
    layer(x, [2, 3]).sum().backward()
    assert layer.weight0.grad is None and x.grad is not None
    layer.backward_dw()
    torch.testing.assert_close(layer.weight1.grad, x[2:].sum(0).expand(6, 4))


@pytest.mark.parametrize("window", [None, (2, 0)])
def test_attention_is_torchs_in_each_document(te: Any, window: tuple[int, int] | None) -> None:
    attention = te.pytorch.DotProductAttention(4, 8, num_gqa_groups=2, attn_mask_type="padding_causal",
                                               qkv_format="thd", window_size=window)
    q, k, v = random(16, 4, 8), random(16, 2, 8).flip(0), random(16, 2, 8)
    out = attention(q, k, v, cu_seqlens_q=bounds(), cu_seqlens_kv=bounds(), max_seqlen_q=9)
    for a, b in pairwise(bounds().tolist()):
        place = torch.arange(b - a)
        seen = place[:, None] >= place
        if window:
            seen &= place[:, None] - place <= window[0]
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(x[a:b].transpose(0, 1) for x in (q, k, v)), attn_mask=seen, enable_gqa=True)
        torch.testing.assert_close(out[a:b], expected.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("cp_size", [1, 2])
def test_rotation_begins_anew_with_every_document(te: Any, cp_size: int) -> None:
    """A rotated pair of channels is a complex number times e^(i angle); under context parallelism each of
    two processes has the first and last, or the two inner quarters of a document."""
    lengths = [8, 4]
    angles = torch.arange(8, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
    freqs = torch.cat([angles, angles], dim=1)[:, None, None]
    x = random(12, 3, 6)  # two pairs turn, two channels do not
    places = torch.cat([torch.arange(n) for n in lengths])
    turn = torch.polar(torch.ones((), dtype=torch.float64), angles[places])
    turned = torch.complex(x[..., :2], x[..., 2:4]) * turn[:, None]
    expected = torch.cat([turned.real, turned.imag, x[..., 4:]], dim=-1)
    cu_seqlens = torch.tensor([0, 8, 12], dtype=torch.int32)
    for rank in range(cp_size):
        mine = torch.arange(12) if cp_size == 1 else torch.cat(
            [start + n // 4 * quarter + torch.arange(n // 4) for start, n in ((0, 8), (8, 4))
             for quarter in ((0, 3), (1, 2))[rank]])
        found = te.pytorch.attention.rope.apply_rotary_pos_emb(
            x[mine], freqs, tensor_format="thd", fused=True, cu_seqlens=cu_seqlens, cp_size=cp_size,
            cp_rank=rank)
        torch.testing.assert_close(found, expected[mine])


def test_tokens_go_to_their_experts_and_back(te: Any) -> None:
    chosen = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 0]])
    x, weights = random(3, 4), random(3, 3) * chosen
    rows, probs, back = te.pytorch.moe_permute_with_probs(x, weights, chosen, num_out_tokens=5)
    torch.testing.assert_close(rows, x[[0, 2, 1, 2, 0]])
    torch.testing.assert_close(probs, weights[[0, 2, 1, 2, 0], [0, 0, 1, 1, 2]])
    torch.testing.assert_close(te.pytorch.moe_unpermute(rows, back, restore_shape=x.shape),
                               x * chosen.sum(1, keepdim=True))
    torch.testing.assert_close(te.pytorch.moe_unpermute(rows, back, weights, x.shape),
                               x * weights.sum(1, keepdim=True))


def test_no_rows_are_refused_by_the_permutation_and_given_back_by_its_inverse(te: Any) -> None:
    """Transformer Engine asserts that experts have a token, and of no rows makes no rows."""
    nobody, x = torch.zeros(3, 2, dtype=torch.int32), random(3, 4)
    for permute in (lambda n: te.pytorch.moe_permute(x, nobody, n),
                    lambda n: te.pytorch.moe_permute_with_probs(x, random(3, 2), nobody, n)):
        with pytest.raises(AssertionError, match="requires num_out_tokens > 0, got 0"):
            permute(nobody.sum())
    back = te.pytorch.moe_unpermute(x[:0], torch.full((3, 5), -1, dtype=torch.int32), restore_shape=x.shape)
    assert back.shape == (0, 4)
    rows, where = te.pytorch.moe_permute(x[:0], nobody[:0], 0)
    assert rows.shape == (0, 4) and where.shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_general_product_has_the_librarys_layouts(te: Any, dtype: torch.dtype) -> None:
    """What `RouterGatingLinearFunction` of megatron-core asks for: y = x W^T + b, dx = dy W, dW = dy^T x."""
    weight, x = random(6, 4, dtype=dtype), random(5, 4, dtype=dtype).flip(0)
    bias, d_out = random(6, dtype=torch.float32), random(5, 6, dtype=torch.float32)
    product = te.cpp.general_gemm
    te.counts.clear()
    torch.testing.assert_close(product(weight, x, torch.float32, layout="TN", bias=bias)[0],
                               x.float() @ weight.float().T + bias)
    d_x, d_bias, *_ = product(weight.float(), d_out, torch.float32, layout="NN", grad=True, bias=bias)
    torch.testing.assert_close(d_x, d_out @ weight.float())
    torch.testing.assert_close(d_bias, d_out.sum(0))
    total = torch.ones(6, 4)
    product(x.float(), d_out, torch.float32, layout="NT", grad=True, out=total, accumulate=True)
    torch.testing.assert_close(total, 1 + d_out.T @ x.float())
    assert te.counts == {("general", layout): 1 for layout in ("TN", "NN", "NT")}


def test_the_general_product_refuses_what_cublas_has_not(te: Any) -> None:
    weight, x = random(6, 4, dtype=torch.bfloat16), random(5, 4, dtype=torch.bfloat16)
    for operands, wanted, error, words in (
            ((weight.double(), x.double()), torch.float64, KeyError, "float64"),
            ((weight, x.float()), torch.float32, RuntimeError, "torch.bfloat16 x torch.float32"),
            ((weight.float(), x.float()), torch.bfloat16, RuntimeError, "not supported"),
            ((weight, x[:, :3]), torch.float32, RuntimeError, "incompatible dimensions")):
        with pytest.raises(error, match=words):
            te.cpp.general_gemm(*operands, wanted)
    with pytest.raises(RuntimeError, match="reads its bytes as the product's type"):
        te.cpp.general_gemm(weight, x, torch.float32, bias=random(6, dtype=torch.bfloat16))


def test_the_library_finds_no_workspace_and_a_product(te: Any) -> None:
    """Transformer Engine 2.20.2 has lost `get_workspace`, which megatron-core 0.16.1 imports with
    `general_gemm`, and without both its router multiplies with torch."""
    assert not hasattr(te.pytorch.module.base, "get_workspace")
    assert te.pytorch.cpp_extensions.general_gemm is te.cpp.general_gemm


@pytest.mark.parametrize(("score", "before"), [("sigmoid", False), ("softmax", True), ("softmax", False)])
def test_the_router_weighs_as_its_kernel_says(te: Any, score: str, before: bool) -> None:
    logits = random(6, 5)
    bias = torch.linspace(0.4, -0.4, 5).double() if score == "sigmoid" else None
    weights, chosen = te.pytorch.router.fused_topk_with_score_function(
        logits, 2, before, None, None, 2.5, score, bias)
    for row, found, choice in zip(logits, weights, chosen, strict=True):
        scores = row.sigmoid() if score == "sigmoid" else row.softmax(0)
        order = scores if bias is None else scores + bias
        best = sorted(range(5), key=lambda i: -float(order[i]))[:2]
        total = float(scores[best].sum()) if not (score == "softmax" and before) else 1.0
        expected = [2.5 * float(scores[i]) / total if i in best else 0.0 for i in range(5)]
        assert found.tolist() == pytest.approx(expected)
        assert choice.nonzero().flatten().tolist() == sorted(best)


def test_adam_is_torchs(te: Any) -> None:
    start = random(7, 3, dtype=torch.float32)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = te.pytorch.optimizers.FusedAdam([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for step in range(5):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = start.roll(step, 0) + step
            optimizer.step()
    torch.testing.assert_close(ours, theirs)
    assert optimizers[0].param_groups[0]["step"] == 5


def test_master_weights_are_whole_in_bf16_and_remainders(te: Any) -> None:
    """Two kinds of keeping fp32 masters of bf16 weights give the same weights, bit for bit."""
    found = []
    for remainders in (False, True):
        parameter = torch.nn.Parameter(random(9, 3, dtype=torch.float32).bfloat16())
        adam = te.pytorch.optimizers.FusedAdam(
            [parameter], lr=1e-3, master_weights=True, store_param_remainders=remainders,
            use_decoupled_grad=True, exp_avg_dtype=torch.bfloat16, exp_avg_sq_dtype=torch.float16)
        for step in range(6):
            parameter.decoupled_grad = random(9, 3, dtype=torch.float32).roll(step, 0)
            adam.step()
        master = adam.state[parameter]["master_param"]
        assert master.dtype == (torch.int16 if remainders else torch.float32)
        found.append(parameter if remainders else master.bfloat16())
    # a remainder says how bf16 was rounded, so half-way cases alone may differ by a bit: there are none here
    assert torch.equal(*found)


def test_padding_for_quantised_products_comes_and_goes(te: Any) -> None:
    x = random(7, 4)
    with te.pytorch.fp8_autocast(enabled=True, fp8_recipe=te.recipe.MXFP8BlockScaling()):
        padded, rows = te.pytorch.Fp8Padding(3)(x, [3, 0, 4])
        back = te.pytorch.Fp8Unpadding(3)(padded, [3, 0, 4])
    assert rows == [32, 0, 32] and len(padded) == 64
    assert torch.equal(back, x)


def test_recomputation_runs_under_the_recipe_of_the_forward_pass(te: Any) -> None:
    layer = te.pytorch.Linear(4, 4, bias=False, device="cpu", init_method=torch.nn.init.normal_)
    x = random(2, 4, dtype=torch.float32).requires_grad_()
    te.counts.clear()
    with te.pytorch.fp8_autocast(enabled=True, fp8_recipe=te.recipe.MXFP8BlockScaling()):
        out = te.pytorch.checkpoint(layer, x)
    out.sum().backward()
    assert te.counts == {("fprop", "MXFP8BlockScaling"): 2, ("dgrad", "MXFP8BlockScaling"): 1,
                         ("wgrad", "MXFP8BlockScaling"): 1}

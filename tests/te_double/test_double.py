"""The double's own arithmetic, against torch and formulas written out; agreement with the library's local
modules is test_agreement.py's."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from megatron_sov.engine.model.attention import PackedDocuments, pack
from megatron_sov.engine.model.attention_kernels import keep_attention_decisions
from megatron_sov.engine.model.gpu_settings import Here, own_attention_serves
from megatron_sov.model import recipes
from megatron_sov.model.config import apply_settings
from megatron_sov.plan.search.recommended import RECOMMENDED

LENGTHS = [5, 1, 9, 1]
"""Lengths of a row's documents."""


@pytest.fixture(scope="module")
def te() -> Iterator[Any]:
    """Give the double to this file alone: others ask whether Transformer Engine is installed."""
    sys.path.insert(0, str(Path(__file__).parent))
    import transformer_engine
    import transformer_engine.pytorch.cpp_extensions
    import transformer_engine.pytorch.router
    from transformer_engine.pytorch import gemm, placement
    from transformer_engine.pytorch.attention import backends

    yield SimpleNamespace(te=transformer_engine, pytorch=transformer_engine.pytorch, counts=gemm.COUNTS,
                          gemm=gemm, machine=placement, backends=backends,
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
    layer = te.pytorch.Linear(16, 32, bias=False, device="cpu", params_dtype=torch.float64,
                              init_method=torch.nn.init.normal_)
    x = random(8, 2, 16).requires_grad_()
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
        layer = te.pytorch.Linear(32, 32, bias=False, device="cpu", init_method=torch.nn.init.normal_)
        assert layer.state_dict()["_extra_state"].numel() == 0
        with te.pytorch.fp8_autocast(enabled=True, fp8_recipe=recipe):
            layer(random(32, 32, dtype=torch.float32))
        assert (layer.state_dict()["_extra_state"].numel() > 0) == has_state


def test_a_pickled_state_is_refused_left_alone_or_trusted(te: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of recipes that keep nothing it is left alone, as is what names nothing that could run; of delayed
    scaling it is refused unless the environment trusts it."""
    layer = te.pytorch.Linear(32, 32, bias=False, device="cpu", init_method=torch.nn.init.normal_)
    with te.pytorch.fp8_autocast(enabled=True, fp8_recipe=te.recipe.DelayedScaling(amax_history_len=4)):
        layer(random(32, 32, dtype=torch.float32))
    layer.fp8_meta["scaling_fwd"].scale[0] = 7
    state, loads = layer.get_extra_state(), te.pytorch.Linear(32, 32, bias=False, device="cpu")

    def pickled(content: Any) -> torch.Tensor:
        return torch.frombuffer(bytearray(pickle.dumps(content)), dtype=torch.uint8)

    for harmless in (None, torch.empty(0), pickled({}), pickled({"recipe": te.recipe.MXFP8BlockScaling()})):
        loads.set_extra_state(harmless)
    for harmful in (state, pickled({"recipe": print}), pickled(te.recipe.MXFP8BlockScaling()),
                    torch.ones(8, dtype=torch.uint8)):
        with pytest.raises(RuntimeError, match="Refusing to load pickled"):
            loads.set_extra_state(harmful)
    with pytest.raises(RuntimeError, match="Unsupported checkpoint format"):
        loads.set_extra_state({"recipe": None})
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    loads.set_extra_state(state)
    assert loads.fp8_meta["scaling_fwd"].scale[0] == 7


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
    weight, x = (values.bfloat16().to(dtype) for values in (random(6, 4), random(5, 4).flip(0)))
    bias, d_out = random(6, dtype=torch.float32), random(5, 6).bfloat16().float()
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
    one, little = torch.ones(1, 1), torch.tensor([[1 + 2.0 ** -10 + 2.0 ** -12]])
    assert product(little, one, torch.float32)[0] == 1 + 2.0 ** -10, "TF32, the products of float32"


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
    logits = random(6, 5, dtype=torch.float32)
    bias = torch.linspace(0.4, -0.4, 5) if score == "sigmoid" else None
    weights, chosen = te.pytorch.router.fused_topk_with_score_function(
        logits, 2, before, None, None, 2.5, score, bias)
    for row, found, choice in zip(logits, weights, chosen, strict=True):
        scores = row.sigmoid() if score == "sigmoid" else row.softmax(0)
        order = scores if bias is None else scores + bias
        best = sorted(range(5), key=lambda i: -float(order[i]))[:2]
        total = float(scores[best].sum()) if not (score == "softmax" and before) else 1.0
        expected = [2.5 * float(scores[i]) / total if i in best else 0.0 for i in range(5)]
        assert found.tolist() == pytest.approx(expected, rel=1e-5)
        assert choice.nonzero().flatten().tolist() == sorted(best)


def test_the_router_keeps_to_the_groups_with_the_best_scores(te: Any) -> None:
    """Of 4 groups of 3 experts the 2 whose best 2 add up to most, and of those the best 4."""
    logits, bias = random(7, 12, dtype=torch.float32), torch.linspace(0.3, -0.3, 12)
    weights, chosen = te.pytorch.router.fused_topk_with_score_function(
        logits, 4, False, 4, 2, 1.0, "sigmoid", bias)
    for row, found, choice in zip(logits, weights, chosen, strict=True):
        scores = row.sigmoid()
        order = scores + bias
        sums = [float(order[3 * g:3 * g + 3].sort().values[-2:].sum()) for g in range(4)]
        kept = sorted(range(4), key=lambda g: -sums[g])[:2]
        best = sorted((e for g in kept for e in range(3 * g, 3 * g + 3)), key=lambda e: -float(order[e]))[:4]
        assert choice.nonzero().flatten().tolist() == sorted(best)
        assert float(found.sum()) == pytest.approx(1) and float(found[best[0]]) == pytest.approx(
            float(scores[best[0]] / scores[best].sum()), rel=1e-5)


def test_the_router_refuses_what_its_kernel_does(te: Any) -> None:
    logits, bias = random(6, 5, dtype=torch.float32), torch.zeros(5)
    route = te.pytorch.router.fused_topk_with_score_function
    for given, score, with_bias, error, words in (
            (logits.double(), "sigmoid", bias, ValueError, "float64"),
            (logits[:0], "sigmoid", bias, RuntimeError, "must be greater than 0"),
            (logits.t(), "sigmoid", None, RuntimeError, "contiguous"),
            (logits, "softmax", bias, RuntimeError, "when expert_bias is not None"),
            (logits, "sigmoid", bias.bfloat16(), RuntimeError, "must be a float32 tensor")):
        with pytest.raises(error, match=words):
            route(given, 2, False, None, None, 1.0, score, with_bias)


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


def test_adam_counts_steps_of_groups_that_have_nothing(te: Any) -> None:
    """A group may be empty on one rank and not on another that reads the same checkpoint."""
    parameter = torch.nn.Parameter(torch.ones(2))
    adam = te.pytorch.optimizers.FusedAdam([{"params": [parameter]}, {"params": []}], lr=0.1)
    adam.step()
    adam.step()
    assert [group["step"] for group in adam.param_groups] == [2, 2]


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
    layer = te.pytorch.Linear(32, 32, bias=False, device="cpu", init_method=torch.nn.init.normal_)
    x = random(32, 32, dtype=torch.float32).requires_grad_()
    te.counts.clear()
    with te.pytorch.fp8_autocast(enabled=True, fp8_recipe=te.recipe.MXFP8BlockScaling()):
        out = te.pytorch.checkpoint(layer, x)
    out.sum().backward()
    assert te.counts == {("fprop", "MXFP8BlockScaling"): 2, ("dgrad", "MXFP8BlockScaling"): 1,
                         ("wgrad", "MXFP8BlockScaling"): 1}


ALIGNED, RECIPES = {"tokens": 32, "inputs": 32, "outputs": 32}, (
    "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("odd", [{"tokens": 40}, {"inputs": 24}, {"outputs": 40}, {}])
def test_quantised_products_refuse_shapes_without_kernels(te: Any, recipe: str, odd: dict[str, int]) -> None:
    """40 tokens pass forward and fail in the weight's gradient, whose summed axis they are; the real library
    fails there, too."""
    tokens, inputs, outputs = (ALIGNED | odd).values()
    layer = te.pytorch.Linear(inputs, outputs, bias=False, device="cpu", init_method=torch.nn.init.normal_)
    x = random(tokens, inputs, dtype=torch.float32).requires_grad_()

    def step() -> None:
        with te.pytorch.fp8_autocast(enabled=True, fp8_recipe=getattr(te.recipe, recipe)()):
            out = layer(x)
        out.sum().backward()

    if odd:
        with pytest.raises((RuntimeError, ValueError), match=r"requires|requirement"):
            step()
    else:
        step()
    grouped = te.pytorch.GroupedLinear(2, inputs, outputs, bias=False, device="cpu",
                                       init_method=torch.nn.init.normal_)
    with te.pytorch.fp8_autocast(enabled=True, fp8_recipe=getattr(te.recipe, recipe)()):
        grouped(x[:0], [0, 0]).sum().backward()  # of nothing, nothing is multiplied


def test_hoppers_fast_sums_lose_bits_forward_alone(te: Any) -> None:
    """Sums of many small products beside a large one: as many as 1 in 2^14 of the sum vanish at a time."""
    a, b = torch.full((2, 4096), 2.0 ** -3), torch.full((4096, 2), 2.0 ** -3)
    a[0, 0], b[0] = 128, 128
    fast, exact = te.gemm.fast_product(a, b), a.double() @ b.double()
    apart = ((fast - exact) / exact).abs()
    assert 0 < float(apart.max()) < 127 * 2.0 ** -13
    torch.testing.assert_close(te.gemm.fast_product(a[:, 1:33], b[1:33]), a[:, 1:33] @ b[1:33])
    for recipe, fast_kinds in (
            (te.recipe.Float8CurrentScaling(), ["fprop"]), (te.recipe.DelayedScaling(), ["fprop"]),
            (te.recipe.Float8BlockScaling(), []), (te.recipe.MXFP8BlockScaling(), []), (None, [])):
        assert [k for k in ("fprop", "dgrad", "wgrad") if te.gemm.accumulates_fast(k, recipe)] == fast_kinds


def test_grouped_layers_take_splits_as_the_real_ones_do(te: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list becomes a tensor of the host, which the path of one product for all groups refuses."""
    x = random(32, 32, dtype=torch.bfloat16)
    make = partial(te.pytorch.GroupedLinear, 2, 32, 32, device="cpu", params_dtype=torch.bfloat16,
                   init_method=torch.nn.init.normal_)
    layer = make(bias=False)
    assert torch.equal(layer(x, [16, 16]), layer(x, torch.tensor([16, 16], dtype=torch.int32)))
    with pytest.raises(ValueError, match=r"splits tensor \(\(3,\)\) does not match number of GEMMs \(2\)"):
        layer(x, [16, 8, 8])
    with pytest.raises(ValueError, match="not compatible with weight"):
        layer(x[:, :16], [16, 16])
    monkeypatch.setenv("NVTE_GROUPED_LINEAR_USE_FUSED_GROUPED_GEMM", "1")
    with pytest.raises(ValueError, match="requires CUDA m_splits"):
        make(bias=False)(x, [16, 16])
    assert torch.equal(make(bias=False)(x, torch.tensor([16, 16])).isfinite(), torch.ones(32, 32).bool())
    monkeypatch.setattr(te.machine, "CHIP", te.machine.BLACKWELL)
    with (pytest.raises(RuntimeError, match="native grouped FP8 block-scaling path is Hopper-only"),
          te.pytorch.fp8_autocast(enabled=True, fp8_recipe=te.recipe.Float8BlockScaling())):
        make(bias=False)(x, torch.tensor([16, 16]))


def test_grouped_layers_refuse_what_needs_traffic(te: Any) -> None:
    two = SimpleNamespace(size=lambda: 2)
    make = partial(te.pytorch.GroupedLinear, 2, 32, 64, device="cpu", tp_group=two, parallel_mode="column",
                   init_method=torch.nn.init.normal_)
    with pytest.raises(ValueError, match="doesn't support bias when TP > 1"):
        make(bias=True)
    with (pytest.raises(ValueError, match="TP > 1 with Float8 current scaling"),
          te.pytorch.fp8_autocast(enabled=True, fp8_recipe=te.recipe.Float8CurrentScaling())):
        make(bias=False)(random(32, 32, dtype=torch.float32), [16, 16])


ATTENTION_REFUSED = [
    # chip, what differs from packed documents of 4,096 tokens in bf16 with 64 heads of 128, why not
    ("HOPPER", {}, ""), ("BLACKWELL", {}, ""),
    ("HOPPER", {"deterministic": True}, "deterministic F16/BF16 THD backward workspace"),
    ("HOPPER", {"deterministic": True, "longest_tokens": 2048}, ""),
    ("HOPPER", {"deterministic": True, "longest_tokens": 2048, "documents": 4}, "workspace limitation"),
    ("BLACKWELL", {"deterministic": True}, ""),
    ("HOPPER", {"head_dims": (256, 256)}, ""), ("BLACKWELL", {"head_dims": (256, 256)}, "head dimensions"),
    ("BLACKWELL", {"head_dims": (192, 128)}, ""), ("HOPPER", {"head_dims": (192, 128)}, ""),
    ("HOPPER", {"softcap": 30.0}, "softcap"), ("HOPPER", {"dtype": torch.float32}, "qkv_dtype"),
]


@pytest.mark.parametrize(("chip", "other", "why"), ATTENTION_REFUSED)
def test_attention_backends_say_no_as_the_real_ones_do(te: Any, monkeypatch: pytest.MonkeyPatch, chip: str,
                                                       other: dict[str, Any], why: str) -> None:
    backends = te.backends
    call = backends.AttentionCall(**({"dtype": torch.bfloat16, "heads": 64, "head_dims": (128, 128),
                                      "documents": 1, "longest_tokens": 4096} | other))
    found = backends.refusals(call, getattr(te.machine, chip))
    assert bool(found) == bool(why) and why in found.get(backends.FUSED, "")
    assert backends.choose(call, getattr(te.machine, chip)) == (backends.UNFUSED if why else backends.FUSED)
    monkeypatch.setenv("NVTE_UNFUSED_ATTN", "0")
    if why:
        with pytest.raises(ValueError, match="No dot product attention backend is available"):
            backends.choose(call, getattr(te.machine, chip))


@pytest.mark.parametrize(("keeps", "decisions"), [(False, 7), (True, 3)])
def test_decisions_about_attention_are_kept_for_each_window_and_length(
        te: Any, monkeypatch: pytest.MonkeyPatch, keeps: bool, decisions: int) -> None:
    """The real library keeps one, and asks cuDNN again when documents, window or length change, as they do
    at each layer of a model with both kinds of attention; other variables are another question."""
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    monkeypatch.setattr(utils, "get_attention_backend",
                        lambda call: te.backends.choose(call, te.machine.CHIP))
    if keeps:
        keep_attention_decisions(utils)
        keep_attention_decisions(utils)  # by each model that is built
    q, bound = random(16, 4, 8, dtype=torch.bfloat16), bounds()
    attention = te.pytorch.DotProductAttention(4, 8, attn_mask_type="padding_causal", qkv_format="thd")
    te.backends.CHOSEN.clear()
    for longest, left in ((9, -1), (9, -1), (16, -1), (9, 3), (9, -1), (9, 3), (9, -1), (16, -1)):
        attention(q, q, q, cu_seqlens_q=bound, cu_seqlens_kv=bound, max_seqlen_q=longest,
                  window_size=(left, 0))
    assert dict(te.backends.CHOSEN) == {te.backends.FUSED: decisions}
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    attention(q, q, q, cu_seqlens_q=bound, cu_seqlens_kv=bound, max_seqlen_q=9)
    assert te.backends.CHOSEN[te.backends.UNFUSED] == 1


def test_one_decision_about_attention_serves_rows_of_many_documents(te: Any) -> None:
    """Documents without tokens at the end of a row change nothing but what the decision is made by."""
    q = random(16, 4, 8, dtype=torch.bfloat16)
    attention = te.pytorch.DotProductAttention(4, 8, attn_mask_type="padding_causal", qkv_format="thd")
    te.backends.CHOSEN.clear()
    for lengths in ((4, 4, 4, 3, 1), (4, 4, 4, 2, 1, 1), (4, 3, 3, 2, 2, 1, 1), (3, 3, 2, 2, 2, 2, 1, 1)):
        bound = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        packed = pack(bound, max(lengths), 16, own=False)
        out = attention(q, q, q, cu_seqlens_q=packed.cu_seqlens_q, cu_seqlens_kv=packed.cu_seqlens_kv,
                        max_seqlen_q=packed.max_seqlen_q)
        whole = [torch.nn.functional.scaled_dot_product_attention(*[x.transpose(0, 1).float()] * 3,
                                                                  is_causal=True).transpose(0, 1)
                 for x in q.split(lengths)]
        torch.testing.assert_close(out.view(16, 4, 8).float(), torch.cat(whole), atol=0.02, rtol=0.02)
        assert packed.bounds.equal(bound), "multi-token prediction asks where documents end"
    assert te.backends.CHOSEN == {te.backends.FUSED: 1}


def test_the_unfused_attention_gets_no_more_than_a_row_has(te: Any) -> None:
    """It makes scores of documents x longest x longest: an empty document costs as much as the longest."""
    bound = torch.tensor([0, 5, 10, 15], dtype=torch.int32)
    sizes = []
    for bucketed in (True, False):
        packed = pack(bound, 5, 15, own=False, bucketed=bucketed)
        sizes.append((len(packed.cu_seqlens_q) - 1, packed.max_seqlen_q))
        again = PackedDocuments(bounds=bound, longest_tokens=5, row_tokens=15, bucketed=bucketed).whole
        assert (len(again.cu_seqlens_q) - 1, again.max_seqlen_q) == sizes[-1]
    assert sizes == [(4, 8), (3, 5)]


def recommended_attention() -> dict[str, tuple[Any, str]]:
    """Return what each recommended layout that leaves attention to the library asks of it, and of which
    chip."""
    found = {}
    for name, by_gpu in RECOMMENDED.items():
        for gpu, layout in {(gpu, layout) for gpu, layouts in by_gpu.items() for layout in layouts}:
            run = apply_settings(recipes.get(name), list(layout))
            model, parallel = run.model, run.parallel
            if not own_attention_serves(Here(True, model, parallel), run.gpu.attention,
                                        run.train.deterministic):
                longest = max(phase.seq_len for phase in run.data.phases)
                call = {"dtype": torch.bfloat16, "heads": model.num_heads // parallel.tp,
                        "head_dims": (model.head_dim, model.head_dim), "longest_tokens": longest,
                        "documents": run.train.micro_batch_size,
                        "deterministic": run.train.deterministic}
                found[f"{name} {gpu} {' '.join(layout)}"] = (
                    call, "BLACKWELL" if gpu == "b200" else "HOPPER")
    return found


def test_the_fast_attention_serves_every_recommended_layout(te: Any) -> None:
    asked = recommended_attention()
    refused = {name: te.backends.refusals(te.backends.AttentionCall(**call), getattr(te.machine, chip))
               for name, (call, chip) in asked.items()}
    assert len(asked) > 50 and not {name: why for name, why in refused.items() if why}


def test_tensors_of_the_host_are_refused_by_kernels(te: Any) -> None:
    """`cu_seqlens` that was never moved, a row on the CPU, scales, splits: a kernel would read the CPU's
    memory."""
    x, host = random(16, 4, 8, dtype=torch.bfloat16), te.machine.mark_host
    attention = te.pytorch.DotProductAttention(4, 8, attn_mask_type="padding_causal", qkv_format="thd")
    with pytest.raises(ValueError, match="cu_seqlens_q must be a CUDA tensor"):
        attention(x, x, x, cu_seqlens_q=host(bounds()), cu_seqlens_kv=bounds(), max_seqlen_q=9)
    layer = te.pytorch.Linear(4, 6, bias=False, device="cpu", init_method=torch.nn.init.normal_)
    with pytest.raises(RuntimeError, match="TransformerEngine needs CUDA"):
        layer(host(random(2, 4, dtype=torch.float32)))
    logits = random(6, 5, dtype=torch.float32)
    with pytest.raises(ValueError, match="expert_bias must be a CUDA tensor"):
        te.pytorch.router.fused_topk_with_score_function(logits, 2, False, None, None, 1.0, "sigmoid",
                                                         host(torch.zeros(5)))
    with pytest.raises(ValueError, match="sorted_index must be a CUDA tensor"):
        te.pytorch.moe_sort_chunks_by_index(logits, torch.tensor([2, 4]), host(torch.tensor([1, 0])))
    for name in ("routing_map", "probs"):
        given = {"inp": logits, "probs": logits, "routing_map": (logits > 0).int()}
        given[name] = host(given[name].clone())
        with pytest.raises(ValueError, match=f"{name} must be a CUDA tensor"):
            te.pytorch.moe_permute_with_probs(**given, num_out_tokens=3)


def test_marks_of_the_host_follow_what_is_computed(te: Any) -> None:
    gpu, on_host = te.machine.GPU, te.machine.on_host
    with te.machine.HostTensors():
        made = {"by default": torch.zeros(3), "of numbers": torch.tensor([1.0]),
                "computed": torch.zeros(3) + 1, "read": torch.from_numpy(numpy.zeros(3)),
                "back": torch.zeros(3, device=gpu).cpu()}
        sent = {"there": torch.zeros(3, device=gpu), "sent": torch.zeros(3).to(gpu),
                "alike": torch.zeros_like(torch.zeros(3, device=gpu)),
                "with a number": torch.zeros(3, device=gpu) + torch.tensor(2.0),
                "chosen": torch.zeros(3, device=gpu)[torch.tensor([0, 2])]}
        assert sent["sent"].to(gpu) is sent["sent"] is sent["sent"].to(sent["there"]), "what is there stays"
        sent["where another is"] = torch.zeros(3, device=sent["sent"].device)
        for mixed in (lambda: sent["there"] + made["read"], lambda: torch.cat([made["read"], sent["sent"]]),
                      lambda: torch.nn.functional.linear(sent["there"], made["computed"][None])):
            with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
                mixed()
    assert {name: on_host(t) for name, t in (made | sent).items()} == {
        name: name in made for name in (made | sent)}

"""Documents of a row do not attend to each other at any layout, and positions restart at each document."""

from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from layout_proof.cpu_shims import prepare_without_gpu
from megatron_sov import recipes
from megatron_sov.engine import router
from megatron_sov.engine.model import chunk, language_model, specs
from megatron_sov.engine.model.language_model import check_device
from megatron_sov.engine.parallel import world
from megatron_sov.model.config import ParallelConfig, apply_settings

# Every weight must be on its process's device; the meta device reveals weights created on other devices.

def group_by_device(recipe: str, precision: str) -> dict[str, list[str]]:
    """Build as on a GPU, but on the meta device; return device -> names of weights and "rotations"."""
    from unittest import mock

    meta = torch.device("meta")
    config = apply_settings(recipes.get(recipe), [f"train.precision={precision}"])
    world.join_world(ParallelConfig())
    with (mock.patch.object(torch.cuda, "current_device", lambda: meta),
          mock.patch.object(specs, "on_gpu", lambda: True),
          mock.patch.object(specs, "uses_transformer_engine", lambda dtype: False),
          mock.patch.object(language_model, "uses_transformer_engine", lambda dtype: False),
          mock.patch.object(chunk, "uses_transformer_engine", lambda dtype: False),
          mock.patch.object(language_model, "on_gpu", lambda: True),
          mock.patch.object(language_model, "get_local_device", lambda: meta),
          mock.patch.object(router, "get_local_device", lambda: meta)):
        model = language_model.build_model(config.model, ParallelConfig(), config.train)
    names: dict[str, list[str]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        names.setdefault(str(tensor.device), []).append(name)
    names.setdefault(str(model.chunks[0].rotary_pos_emb.inv_freq.device), []).append("rotations")
    return names


@pytest.mark.distributed
def test_no_tensor_stays_on_the_cpu(ranks: Any, job: Any) -> None:
    results = ranks(*(job(__file__, "group_by_device", 1, {"recipe": recipe, "precision": precision})
                      for recipe in ("tiny-solar-open", "tiny-k-exaone") for precision in ("fp32", "bf16")))
    for (names,) in results:
        assert set(names) == {"meta"}, names
        assert any("router" in name for name in names["meta"]) and len(names["meta"]) > 20


def test_a_weight_elsewhere_is_named() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    with pytest.raises(RuntimeError, match=r"^1\.weight is on meta"):
        check_device(module, torch.device("cpu"))


# SwiGLU against Megatron-Core's formula, with equal bits.

@pytest.mark.each("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.each("weighted", [False, True])
def test_values_and_gradients_are_autograds(dtype: torch.dtype, weighted: bool) -> None:
    prepare_without_gpu()
    from megatron_sov.engine.model.language_model import _apply_swiglu, _apply_weighted_swiglu

    generator = torch.Generator().manual_seed(3)
    values, bias = (torch.randn(shape, generator=generator).to(dtype).requires_grad_()
                    for shape in ((21, 38), (38,)))
    weights = torch.rand(21, 1, generator=generator).requires_grad_()
    upstream = torch.randn(21, 19, generator=generator).to(dtype)
    inputs = (values, bias, weights) if weighted else (values, bias)

    gate, up = (values + bias).chunk(2, dim=-1)
    expected = silu(gate) * (up + 0.0)
    found = _apply_weighted_swiglu(values, bias, weights) if weighted else _apply_swiglu(values, bias)
    if weighted:
        expected = (expected * weights).to(dtype)
    assert torch.equal(found, expected) and found.dtype == dtype
    for ours, autograds in zip(torch.autograd.grad(found, inputs, upstream),
                               torch.autograd.grad(expected, inputs, upstream), strict=True):
        assert torch.equal(ours, autograds)

"""Rotary embeddings: angles and YaRN's factor against transformers, rotations against Megatron-Core."""

import inspect
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from layout_proof.cpu_shims import prepare_without_gpu
from megatron_sov import recipes
from megatron_sov.engine.model import kv_cache, specs
from megatron_sov.engine.model.cache_rows import CacheSize
from megatron_sov.engine.model.language_model import build_model
from megatron_sov.engine.model.rotary import compute_frequencies, patch_packed_rotation
from megatron_sov.engine.parallel import world
from megatron_sov.model.config import ParallelConfig, apply_settings

YARN = 'model.yarn={"factor": 4.0, "original_max_position_tokens": 512}'


def compute_table(recipe: str, *settings: str) -> torch.Tensor:
    """Return a model's table of rotary angles for a row of 4,096 tokens."""
    config = apply_settings(recipes.get(recipe), list(settings))
    world.join_world(ParallelConfig())
    table = build_model(config.model, ParallelConfig(), config.train).chunks[0].rotary_pos_emb(4096)
    return table[0] if isinstance(table, tuple) else table


def compute_angles(precision: str, changes: list[str]) -> list[list[float]]:
    """Return angles [4 positions, channels] of Megatron-Core's embedding in a model of this precision."""
    angles = compute_table("tiny-solar-open", *changes, f"train.precision={precision}", "model.num_layers=1")
    return angles[[0, 1, 7, 4095], 0, 0].tolist()


@pytest.mark.distributed
def test_float64_models_rotate_by_float64_angles(ranks: Any, job: Any) -> None:
    results = ranks(*(job(__file__, "compute_angles", 1, {"precision": p, "changes": c}) for c in ([], [YARN])
                      for p in ("fp64", "fp32")))
    for changes, (fp64,), (fp32,) in (([], *results[:2]), ([YARN], *results[2:])):
        exact = compute_frequencies(apply_settings(recipes.get("tiny-solar-open"), changes).model)
        expected = torch.tensor([0.0, 1.0, 7.0, 4095.0], dtype=torch.float64)[:, None] * exact.repeat(2)
        assert torch.allclose(torch.tensor(fp64, dtype=torch.float64), expected, rtol=1e-14, atol=0)
        assert torch.allclose(torch.tensor(fp32, dtype=torch.float64), expected, rtol=1e-6, atol=0)
        assert not torch.allclose(torch.tensor(fp32, dtype=torch.float64), expected, rtol=1e-10, atol=0)


def get_table_shape(recipe: str) -> list[int]:
    """Return the shape of a model's table of rotary angles."""
    return list(compute_table(recipe, "train.precision=fp64").shape)


@pytest.mark.distributed
def test_a_model_without_rotary_layers_has_no_table_of_angles(ranks: Any, job: Any) -> None:
    """Long-context training would need 1M rows; tests/plan/footprint/test_memory.py tests `plan`."""
    expected = {"tiny-solar-open2": 0, "tiny-k-exaone": 32, "tiny-deepseek-v3": 16}
    results = ranks(*(job(__file__, "get_table_shape", 1, {"recipe": recipe}) for recipe in expected))
    for (recipe, channels), (shape,) in zip(expected.items(), results, strict=True):
        assert shape == [4096, 1, 1, channels], recipe


@pytest.mark.parametrize("yarn", [None, {"rope_type": "yarn", "factor": 4.0,
                                         "original_max_position_embeddings": 512}])
def test_frequencies_equal_transformers(yarn: dict[str, Any] | None) -> None:
    from transformers import SolarOpenConfig
    from transformers.models.solar_open.modeling_solar_open import SolarOpenRotaryEmbedding

    model = apply_settings(recipes.get("tiny-solar-open"), [YARN] if yarn else []).model
    rope = {"rope_theta": model.rope_theta, **(yarn or {"rope_type": "default"})}
    reference = SolarOpenRotaryEmbedding(SolarOpenConfig(
        head_dim=model.head_dim, hidden_size=model.hidden_size, num_attention_heads=model.num_heads,
        rope_parameters=rope, max_position_embeddings=4096))
    assert torch.allclose(reference.inv_freq.double(), compute_frequencies(model), rtol=1e-6, atol=0)


def get_yarn_scales(recipe: str) -> dict[str, Any]:
    """Return the effect of YaRN on a model.

    "layers" and "cached": each layer's softmax scale in training and with a KV cache. "fused", "softmax
    scale of all layers" and "on cosine and sine": settings if Transformer Engine is installed.
    """
    from megatron.core.models.common.embeddings import rope_utils, yarn_rotary_pos_embedding
    from megatron.core.transformer.moe import moe_utils

    config = apply_settings(recipes.get(recipe), [YARN, "model.num_layers=4"])
    world.join_world(ParallelConfig())
    model = build_model(config.model, ParallelConfig(), config.train)
    layers = [m.core_attention for m in model.modules() if hasattr(m, "core_attention")]
    with kv_cache.use_kv_cache(model, CacheSize(1, 8)) as caching_layers:
        softmax_scales = [layer.softmax_scale for layer in caching_layers]
    specs.uses_transformer_engine = lambda dtype: True
    # Megatron-Core looks for these functions of Transformer Engine, and raises an error without them.
    for module, names in ((rope_utils, ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd")),
                          (moe_utils, ("fused_permute", "fused_permute_with_probs", "fused_unpermute",
                                       "fused_sort_chunks_by_index",
                                       "fused_sort_chunks_by_index_with_probs"))):
        for name in names:
            setattr(module, name, print)
    fused = specs.build_transformer_config(config.model, ParallelConfig(), config.train)
    return {"layers": [layer.softmax_scale for layer in layers], "cached": softmax_scales,
            "fused": fused.apply_rope_fusion, "softmax scale of all layers": fused.softmax_scale,
            "on cosine and sine": yarn_rotary_pos_embedding._yarn_get_concentration_factor_from_config(fused)}


def test_yarn_factor_is_applied_in_the_softmax_scale(ranks: Any, job: Any) -> None:
    from transformers import SolarOpenConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    (solar,), (exaone,) = ranks(*(job(__file__, "get_yarn_scales", 1, {"recipe": recipe})
                                  for recipe in ("tiny-solar-open", "tiny-k-exaone")))
    head_dim = recipes.get("tiny-solar-open").model.head_dim
    _, factor = ROPE_INIT_FUNCTIONS["yarn"](SolarOpenConfig(
        head_dim=head_dim, max_position_embeddings=2048,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
                         "original_max_position_embeddings": 512}), "cpu")
    plain, scaled = head_dim ** -0.5, head_dim ** -0.5 * factor ** 2
    assert math.isclose(factor, 1.1386294361119891)
    # K-EXAONE: three local layers rotate; the global layer and the global MTP layer do not.
    for result, expected in ((solar, [scaled] * 4), (exaone, [scaled] * 3 + [plain] * 2)):
        assert result["layers"] == pytest.approx(expected, rel=1e-12)
        assert result["cached"] == result["layers"], "a cache would apply another factor"
        assert result["softmax scale of all layers"] == pytest.approx(scaled, rel=1e-12)
        assert result["fused"] and result["on cosine and sine"] == 1.0


def compare_rotations() -> dict[str, Any]:
    """Compare our rotation of a packed row with Megatron-Core's loop over documents."""
    from megatron.core.models.common.embeddings import rope_utils

    one_process = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    megatron_rotation = rope_utils._apply_rotary_pos_emb_thd
    patch_packed_rotation()
    our_rotation = rope_utils._apply_rotary_pos_emb_thd
    states = torch.randn(12, 3, 8, generator=torch.Generator().manual_seed(0))
    angles_by_position = torch.arange(7.0)[:, None, None, None] * compute_frequencies(
        recipes.get("tiny-solar-open").model).float()[:4].repeat(2)
    positions = torch.cat([torch.arange(n) for n in (5, 7)])
    expected = megatron_rotation(states, torch.tensor([0, 5, 12]), angles_by_position, cp_group=one_process)
    # Our rotation must not read the lengths, which would wait for the GPU: here they are a meta tensor.
    result = our_rotation(states, torch.empty(3, device="meta"), angles_by_position[positions],
                          cp_group=one_process)
    return {"same": torch.equal(result, expected), "is_rotated": not torch.equal(result, states),
            "signatures": [list(inspect.signature(f).parameters) for f in (megatron_rotation, our_rotation)]}


def test_a_row_is_rotated_without_reading_document_lengths(ranks: Any, job: Any) -> None:
    (result,) = ranks(job(__file__, "compare_rotations", 1))[0]
    assert result["same"] and result["is_rotated"]
    megatron_parameters, our_parameters = map(set, result["signatures"])
    # The name of the parameter differs between versions of Megatron-Core.
    assert megatron_parameters - our_parameters <= {"multi_latent_attention", "mla_rotary_interleaved"}
    assert our_parameters - megatron_parameters == {"paired"}


@pytest.mark.each(("head_dim", "dtype"), [(16, torch.float32), (24, torch.float32), (16, torch.bfloat16)])
def test_a_rotation_has_the_bits_of_megatron_core(head_dim: int, dtype: torch.dtype) -> None:
    prepare_without_gpu()
    from megatron.core.models.common.embeddings import rope_utils

    from megatron_sov.engine.model.rotary import _rotate_rows

    generator = torch.Generator().manual_seed(5)
    angles = torch.rand(9, 1, 1, 16, generator=generator) * 40
    bounds = torch.tensor([0, 9], dtype=torch.int32)
    for _ in range(2):  # the second rotation takes cosine and sine from the cache
        values, upstream = (torch.randn(9, 3, head_dim, generator=generator).to(dtype) for _ in range(2))
        values.requires_grad_()
        expected = rope_utils._apply_rotary_pos_emb_bshd(values[:, None], angles)[:, 0]
        result = _rotate_rows(values, bounds, angles)
        assert torch.equal(result, expected)
        gradient, = torch.autograd.grad(result, values, upstream)
        expected_gradient, = torch.autograd.grad(expected, values, upstream)
        assert torch.equal(gradient, expected_gradient)

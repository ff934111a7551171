"""Float64 angles and YaRN's factor against transformers, rotations against Megatron-Core."""

import math
from typing import Any

import pytest
import torch

from megatron_sov import recipes
from megatron_sov.engine.model import kv_cache, specs
from megatron_sov.engine.model.cache_rows import CacheSize
from megatron_sov.engine.model.language_model import build_model
from megatron_sov.engine.model.rotary import compute_frequencies, patch_packed_rotation
from megatron_sov.engine.parallel import world
from megatron_sov.engine.parallel.cpu_shims import prepare_without_gpu
from megatron_sov.model.config import ParallelConfig, apply_settings

YARN = 'model.yarn={"factor": 4.0, "original_max_position_tokens": 512}'


def angles(precision: str, changes: list[str]) -> list[list[float]]:
    """Return [positions, channels] of the library's embedding in a model of this precision."""
    config = apply_settings(recipes.get("tiny-solar-open"),
                            [*changes, f"train.precision={precision}", "model.num_layers=1"])
    world.join_world(ParallelConfig())
    embedding = build_model(config.model, ParallelConfig(), config.train).chunks[0].rotary_pos_emb
    found = embedding(4096)
    found = found[0] if isinstance(found, tuple) else found
    return found[[0, 1, 7, 4095], 0, 0].tolist()


@pytest.mark.distributed
def test_float64_models_rotate_by_float64_angles(ranks: Any, job: Any) -> None:
    results = ranks(*(job(__file__, "angles", 1, {"precision": p, "changes": c}) for c in ([], [YARN])
                      for p in ("fp64", "fp32")))
    for changes, (fp64,), (fp32,) in (([], *results[:2]), ([YARN], *results[2:])):
        exact = compute_frequencies(apply_settings(recipes.get("tiny-solar-open"), changes).model)
        expected = torch.tensor([0.0, 1.0, 7.0, 4095.0], dtype=torch.float64)[:, None] * exact.repeat(2)
        assert torch.allclose(torch.tensor(fp64, dtype=torch.float64), expected, rtol=1e-14, atol=0)
        assert torch.allclose(torch.tensor(fp32, dtype=torch.float64), expected, rtol=1e-6, atol=0)
        assert not torch.allclose(torch.tensor(fp32, dtype=torch.float64), expected, rtol=1e-10, atol=0)


def shapes(recipe: str) -> list[int]:
    """Return the shape of a model's rotary table for a row of 4,096 tokens."""
    config = apply_settings(recipes.get(recipe), ["train.precision=fp64"])
    world.join_world(ParallelConfig())
    result = build_model(config.model, ParallelConfig(), config.train).chunks[0].rotary_pos_emb(4096)
    return list((result[0] if isinstance(result, tuple) else result).shape)


@pytest.mark.distributed
def test_where_no_layer_rotates_a_row_has_no_angles(ranks: Any, job: Any) -> None:
    """An extension to 1M tokens then stores no table, and `plan` counts none
    (tests/plan/footprint/test_memory.py).
    """
    expected = {"tiny-solar-open2": 0, "tiny-k-exaone": 32, "tiny-deepseek-v3": 16}
    result = ranks(*(job(__file__, "shapes", 1, {"recipe": recipe}) for recipe in expected))
    for (recipe, channels), (shape,) in zip(expected.items(), result, strict=True):
        assert shape == [4096, 1, 1, channels], recipe


@pytest.mark.parametrize("yarn", [None, {"rope_type": "yarn", "factor": 4.0,
                                         "original_max_position_embeddings": 512}])
def test_the_formula_is_the_one_of_transformers(yarn: dict[str, Any] | None) -> None:
    from transformers import SolarOpenConfig
    from transformers.models.solar_open.modeling_solar_open import SolarOpenRotaryEmbedding

    model = apply_settings(recipes.get("tiny-solar-open"), [YARN] if yarn else []).model
    rope = {"rope_theta": model.rope_theta, **(yarn or {"rope_type": "default"})}
    theirs = SolarOpenRotaryEmbedding(SolarOpenConfig(
        head_dim=model.head_dim, hidden_size=model.hidden_size, num_attention_heads=model.num_heads,
        rope_parameters=rope, max_position_embeddings=4096))
    assert torch.allclose(theirs.inv_freq.double(), compute_frequencies(model), rtol=1e-6, atol=0)


def scales(recipe: str) -> dict[str, Any]:
    """Return YaRN's effect on a model: library settings with Transformer Engine, and each layer's softmax
    scale in training and with a KV cache."""
    from megatron.core.models.common.embeddings import rope_utils, yarn_rotary_pos_embedding
    from megatron.core.transformer.moe import moe_utils

    config = apply_settings(recipes.get(recipe), [YARN, "model.num_layers=4"])
    world.join_world(ParallelConfig())
    model = build_model(config.model, ParallelConfig(), config.train)
    layers = [m.core_attention for m in model.modules() if hasattr(m, "core_attention")]
    with kv_cache.use_kv_cache(model, CacheSize(1, 8)) as keeping:
        softmax_scales = [layer.softmax_scale for layer in keeping]
    specs.uses_transformer_engine = lambda dtype: True
    # the library checks for the attribute
    for module, names in ((rope_utils, ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd")),
                          (moe_utils, ("fused_permute", "fused_permute_with_probs", "fused_unpermute",
                                       "fused_sort_chunks_by_index",
                                       "fused_sort_chunks_by_index_with_probs"))):
        for name in names:
            setattr(module, name, print)
    fused = specs.build_transformer_config(config.model, ParallelConfig(), config.train)
    return {"layers": [layer.softmax_scale for layer in layers], "kept": softmax_scales,
            "fused": fused.apply_rope_fusion, "given to all": fused.softmax_scale,
            "on cosine and sine": yarn_rotary_pos_embedding._yarn_get_concentration_factor_from_config(fused)}


def test_yarn_factor_is_applied_in_the_softmax_scale(ranks: Any, job: Any) -> None:
    from transformers import SolarOpenConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    (solar,), (exaone,) = ranks(*(job(__file__, "scales", 1, {"recipe": recipe})
                                  for recipe in ("tiny-solar-open", "tiny-k-exaone")))
    head_dim = recipes.get("tiny-solar-open").model.head_dim
    _, factor = ROPE_INIT_FUNCTIONS["yarn"](SolarOpenConfig(
        head_dim=head_dim, max_position_embeddings=2048,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
                         "original_max_position_embeddings": 512}), "cpu")
    plain, stretched = head_dim ** -0.5, head_dim ** -0.5 * factor ** 2
    assert math.isclose(factor, 1.1386294361119891)
    # LLLG and a global MTP layer, which do not rotate
    for found, expected in ((solar, [stretched] * 4), (exaone, [stretched] * 3 + [plain] * 2)):
        assert found["layers"] == pytest.approx(expected, rel=1e-12)
        assert found["kept"] == found["layers"], "a cache would apply another factor"
        assert found["given to all"] == pytest.approx(stretched, rel=1e-12)
        assert found["fused"] and found["on cosine and sine"] == 1.0


def rotations() -> dict[str, Any]:
    """Return the difference between our rotation of a packed row and the library's loop over documents."""
    import inspect

    from megatron.core.models.common.embeddings import rope_utils

    class Alone:
        """A process group of one."""

        size = staticmethod(lambda: 1)
        rank = staticmethod(lambda: 0)

    theirs = rope_utils._apply_rotary_pos_emb_thd
    patch_packed_rotation()
    ours = rope_utils._apply_rotary_pos_emb_thd
    states = torch.randn(12, 3, 8, generator=torch.Generator().manual_seed(0))
    angles_by_position = torch.arange(7.0)[:, None, None, None] * compute_frequencies(
        recipes.get("tiny-solar-open").model).float()[:4].repeat(2)
    positions = torch.cat([torch.arange(n) for n in (5, 7)])
    expected = theirs(states, torch.tensor([0, 5, 12]), angles_by_position, cp_group=Alone)
    # the lengths are not read
    result = ours(states, torch.empty(3, device="meta"), angles_by_position[positions], cp_group=Alone)
    return {"same": torch.equal(result, expected), "moved": not torch.equal(result, states),
            "signatures": [list(inspect.signature(f).parameters) for f in (theirs, ours)]}


def test_a_row_is_rotated_without_a_look_at_its_documents(ranks: Any, job: Any) -> None:
    (found,) = ranks(job(__file__, "rotations", 1))[0]
    assert found["same"] and found["moved"]
    theirs, ours = map(set, found["signatures"])
    # the name differs between versions
    assert theirs - ours <= {"multi_latent_attention", "mla_rotary_interleaved"}
    assert ours - theirs == {"paired"}


@pytest.mark.each(("head_dim", "dtype"), [(16, torch.float32), (24, torch.float32), (16, torch.bfloat16)])
def test_a_rotation_has_the_librarys_bits(head_dim: int, dtype: torch.dtype) -> None:
    prepare_without_gpu()
    from megatron.core.models.common.embeddings import rope_utils

    from megatron_sov.engine.model.rotary import _rotate_rows

    generator = torch.Generator().manual_seed(5)
    angles = torch.rand(9, 1, 1, 16, generator=generator) * 40
    bounds = torch.tensor([0, 9], dtype=torch.int32)
    for _ in range(2):  # the second time from the cache
        values, upstream = (torch.randn(9, 3, head_dim, generator=generator).to(dtype) for _ in range(2))
        values.requires_grad_()
        expected = rope_utils._apply_rotary_pos_emb_bshd(values[:, None], angles)[:, 0]
        result = _rotate_rows(values, bounds, angles)
        assert torch.equal(result, expected)
        ours, = torch.autograd.grad(result, values, upstream)
        theirs, = torch.autograd.grad(expected, values, upstream)
        assert torch.equal(ours, theirs)

"""Float64 angles against transformers' own float32 ones and against the library's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_sov import recipes
from megatron_sov.config import apply_settings
from megatron_sov.mcore.model.rotary import frequencies

YARN = 'model.yarn={"factor": 4.0, "original_max_position_tokens": 512}'


def angles(precision: str, changes: list[str]) -> list[list[float]]:
    """Return [positions, channels] of the library's embedding in a model of this precision."""
    from megatron_sov.config import ParallelConfig
    from megatron_sov.mcore.model.language_model import build
    from megatron_sov.mcore.parallel import world

    config = apply_settings(recipes.get("tiny-solar-open"),
                            [*changes, f"train.precision={precision}", "model.num_layers=1"])
    world.join(ParallelConfig())
    embedding = build(config.model, ParallelConfig(), config.train).chunks[0].rotary_pos_emb
    found = embedding(4096)
    found = found[0] if isinstance(found, tuple) else found
    return found[[0, 1, 7, 4095], 0, 0].tolist()


@pytest.mark.distributed
def test_float64_models_rotate_by_float64_angles(ranks: Any, job: Any) -> None:
    results = ranks(*(job(__file__, "angles", 1, {"precision": p, "changes": c}) for c in ([], [YARN])
                      for p in ("fp64", "fp32")))
    for changes, (fp64,), (fp32,) in (([], *results[:2]), ([YARN], *results[2:])):
        exact = frequencies(apply_settings(recipes.get("tiny-solar-open"), changes).model)
        expected = torch.tensor([0.0, 1.0, 7.0, 4095.0], dtype=torch.float64)[:, None] * exact.repeat(2)
        assert torch.allclose(torch.tensor(fp64, dtype=torch.float64), expected, rtol=1e-14, atol=0)
        assert torch.allclose(torch.tensor(fp32, dtype=torch.float64), expected, rtol=1e-6, atol=0)
        assert not torch.allclose(torch.tensor(fp32, dtype=torch.float64), expected, rtol=1e-10, atol=0)


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
    assert torch.allclose(theirs.inv_freq.double(), frequencies(model), rtol=1e-6, atol=0)

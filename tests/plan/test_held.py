"""Parameters one by one, against those of the library's modules in their order, and names against the weight
map."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sov import models, recipes
from megatron_sov.config import RunConfig, apply_settings
from megatron_sov.plan.held import held

LORA = ["lora.rank=4", "lora.targets=[\"all-linear\", \"lm_head\", \"embed_tokens\"]"]
RUNS = (("tiny-k-exaone", ["parallel.pp=2", "parallel.ep=2", "parallel.tp=2", "parallel.sp=true"], 8, 7),
        ("tiny-qwen2", ["parallel.pp=2", "parallel.vpp=2"], 4, 2), ("tiny-solar-open", LORA, 1, 0),
        ("tiny-qwen3", ["lora.rank=2", "lora.dora=true", "parallel.tp=2"], 2, 1),
        ("tiny-exaone4", ["parallel.pp=2"], 2, 1), ("tiny-hyperclovax", ["parallel.tp=2"], 2, 0),
        ("tiny-gemma3", [], 1, 0), ("tiny-gemma2", [], 1, 0),
        ("tiny-gpt-oss", ["parallel.ep=2"], 2, 1),
        ("tiny-glm4-moe", ["parallel.pp=2", "parallel.ep=2"], 4, 3),
        ("tiny-deepseek-v3", ["parallel.tp=2", "parallel.sp=true"], 2, 1),
        ("tiny-deepseek-v3", ["model.latent_attention.q_lora_rank=null"], 1, 0))
"""Recipe, settings, processes, rank."""


def config_of(recipe: str, settings: list[str], precision: str) -> RunConfig:
    return apply_settings(recipes.get(recipe), [f"train.precision={precision}", *settings])


def shapes_of_modules(precision: str) -> list[Any]:
    """Return [pipeline stage, shapes of every chunk's parameters] of each run."""
    from megatron_sov.mcore.optimizer.meta import built

    found = []
    for recipe, settings, num_ranks, rank in RUNS:
        made = built(config_of(recipe, settings, precision), num_ranks, rank)
        found.append([made.stage, made.shapes])
    return found


def test_parameters_are_the_modules_in_their_order(ranks: Any, te_ranks: Any, job: Any) -> None:
    """With Transformer Engine norms and experts stand elsewhere than without."""
    for run, precision in ((ranks, "fp32"), (te_ranks, "bf16")):
        ((found,),) = run(job(__file__, "shapes_of_modules", 1, {"precision": precision}))
        for (recipe, settings, _, _), (stage, shapes) in zip(RUNS, found, strict=True):
            said = [[list(part.shape) for _, parts in runs for part in parts for _ in range(part.count)]
                    for runs in held(config_of(recipe, settings, precision), stage)]
            assert said == shapes, (recipe, precision)


@pytest.mark.parametrize("recipe", ["tiny-k-exaone", "tiny-solar-open", "tiny-qwen2", "tiny-qwen3-moe",
                                    "tiny-exaone4", "tiny-hyperclovax", "tiny-glm4-moe",
                                    "tiny-gemma3", "tiny-gemma2", "tiny-gpt-oss", "tiny-deepseek-v3"])
def test_names_are_those_of_checkpoints(recipe: str) -> None:
    config = config_of(recipe, [], "bf16")
    named = {part.key.replace("{l}", str(layer)) for runs in held(config, 0) for layer, parts in runs
             for part in parts}
    # a router's selection bias is a buffer
    assert named == {link.key for link in models.get(config.model.family).links(config.model)
                     if not link.key.endswith("expert_bias")}

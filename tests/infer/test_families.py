"""Cached generation equals full forward passes for every kind of layer."""

from typing import Any

import pytest

PROMPTS = [[5, 9, 2, 70], list(range(20, 60)), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]]
NEW = 6
SETTINGS = ["model.vocab_size=96", "model.hidden_size=32", "model.head_dim=8", "model.init_std=0.3",
            "model.dense_ffn_dim=24", "train.precision=fp64"]
RECIPES = {"tiny-deepseek-v3": ["model.num_experts=4", "model.expert_ffn_dim=16", "model.head_dim=20",
                                "model.num_expert_groups=2", "model.num_groups_per_token=1",
                                'model.latent_attention={"kv_lora_rank": 12, "q_lora_rank": 20, '
                                '"qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}',
                                'model.yarn={"factor": 4.0, "original_max_position_tokens": 16}'],
           "tiny-k-exaone2": ["model.num_experts=4", "model.expert_ffn_dim=16",
                              "model.sliding_window_tokens=8", "model.layer_windows=[0, 12, 8, 5, 8, 0]",
                              "model.swiglu_limits=[0, 0.3, 0, 0, 0.2, 0.1]"],
           "tiny-gemma3": ["model.sliding_window_tokens=8", "model.attention_pattern=LG",
                           "model.linear_rope_factor=4",
                           "model.embedding_multiplier=5.656854249492381"],
           "tiny-exaone4": ["model.sliding_window_tokens=8"], "tiny-exaone4-1.2b": [],
           "tiny-hyperclovax": ["model.residual_multiplier=0.4", "model.logits_multiplier=0.3"]}
RECIPES["tiny-kimi-k2"] = [
    "lora.rank=3", "lora.alpha=3",  # a latent cache needs the adapter of its up-projection
    "model.num_experts=4", "model.expert_ffn_dim=16", "model.head_dim=20",
    'model.latent_attention={"kv_lora_rank": 12, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, '
    '"v_head_dim": 10}']
RECIPES["tiny-solar-open2"] = ["model.num_experts=4", "model.expert_ffn_dim=16", "model.dense_ffn_dim=24",
                               'model.linear_attention={"num_key_heads": 4, "num_value_heads": 4, '
                               '"key_head_dim": 6, "value_head_dim": 6, "gate_rank": 6, '
                               '"negative_eigenvalues": true}']
FURTHER = ("tiny-kimi-k2", "tiny-exaone4-1.2b", "tiny-exaone4", "tiny-hyperclovax", "tiny-gemma3")
"""Families for `make deep` only: their caches have the same contents as another family's."""
CUT_IN_ITS_OWN_WAY = ("tiny-deepseek-v3",)
"""Families with tensors that two processes split in a way no other family has (latent attention, prediction
layers). test_gradients.py compares all families with transformers."""


def written_twice(layout: dict[str, Any], names: list[str]) -> list[Any]:
    """Return per recipe: greedy continuations with a cache, the same by full forward passes, and whether a
    parameter has a gradient."""
    import torch

    from megatron_sov import recipes
    from megatron_sov.checkpoint import initial_weights
    from megatron_sov.engine.decode.forward_only import DocumentBatch, ForwardModel
    from megatron_sov.engine.model.adapters import AdapterFactors
    from megatron_sov.engine.model.language_model import build_model
    from megatron_sov.engine.parallel import world
    from megatron_sov.infer.decoder.generator import MegatronEngine
    from megatron_sov.infer.request import Batching, Sampling
    from megatron_sov.model.config import ParallelConfig, apply_settings

    parallel, found = ParallelConfig(**layout), []
    world.join_world(parallel)
    for recipe in names:
        config = apply_settings(recipes.get(recipe), [*SETTINGS, *RECIPES[recipe]])
        model = build_model(config.model, parallel, config.train, lora=config.lora)
        initial_weights.initialize_weights(model, config.model, 1)
        with torch.no_grad():
            for factors in (m for m in model.modules() if isinstance(m, AdapterFactors)):
                factors.B.normal_(generator=torch.Generator().manual_seed(1))
        policy = ForwardModel(model, 50)
        engine = MegatronEngine(policy, Batching(2, 5))
        written = engine.generate(PROMPTS, Sampling(NEW)).continuations
        full = [policy.logits(DocumentBatch([[*p, *c]], torch.device("cpu")),
                              torch.arange(len(p) - 1, len(p) + NEW - 1)).argmax(-1).tolist()
                for p, c in zip(PROMPTS, written, strict=True)]
        has_gradients = any(p.grad is not None for p in model.parameters())
        found.append([written, full, has_gradients])
    world.leave_world()
    return found


@pytest.mark.distributed
@pytest.mark.essential
@pytest.mark.parametrize(("further", "cut"), [
    ((), ()), pytest.param(FURTHER, (*CUT_IN_ITS_OWN_WAY, "tiny-k-exaone2"), marks=pytest.mark.deep)],
    ids=["caches of their own", "further"])
def test_cached_generation_equals_full_forward_passes(ranks: Any, job: Any, further: tuple[str, ...],
                                                      cut: tuple[str, ...]) -> None:
    names = [*dict.fromkeys([*further, *cut, "tiny-deepseek-v3"])] if further else [
        name for name in RECIPES if name not in FURTHER]
    experts_of = ["tiny-deepseek-v3"]
    alone, split, experts = ranks(
        job(__file__, "written_twice", 1, {"layout": {}, "names": names}),
        job(__file__, "written_twice", 2, {"layout": {"tp": 2, "sp": True}, "names": cut}),
        # the processes have two prompts and one: they reach the experts together
        job(__file__, "written_twice", 2, {"layout": {"ep": 2}, "names": experts_of}))
    of_one = dict(zip(names, alone[0], strict=True))
    for recipes, found in ((names, alone[0]), (cut, split[0]), (experts_of, experts[0])):
        for recipe, (written, full, has_gradients) in zip(recipes, found, strict=True):
            assert [written, full, has_gradients] == of_one[recipe], recipe
            assert written == full and not has_gradients, recipe
            assert len({token for row in written for token in row}) > 3, recipe

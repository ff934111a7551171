"""Cached generation equals full forward passes for every kind of layer."""

from typing import Any

import pytest

PROMPTS = [[5, 9, 2, 70], list(range(20, 60)), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]]
MAX_TOKENS = 6
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
DEEP_RECIPES = ("tiny-kimi-k2", "tiny-exaone4-1.2b", "tiny-exaone4", "tiny-hyperclovax", "tiny-gemma3")
"""Recipes whose caches hold the same kinds of tensors as the cache of another recipe in `RECIPES`."""
TENSOR_PARALLEL_RECIPES = ("tiny-deepseek-v3", "tiny-k-exaone2")
"""Recipes to repeat with tp = 2: tp splits latent attention and prediction layers as no other layers.
test_gradients.py compares all families with transformers."""
EXPERT_PARALLEL_RECIPES = ("tiny-deepseek-v3",)


def generate_and_recompute(layout: dict[str, Any], names: list[str]) -> list[list[Any]]:
    """Decode the prompts greedily with each recipe's model.

    Returns, for each recipe: the continuations that the cached decoder generates, the greedy tokens of full
    forward passes over the same sequences, and whether a parameter has a gradient.
    """
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

    parallel, results = ParallelConfig(**layout), []
    world.join_world(parallel)
    for recipe in names:
        config = apply_settings(recipes.get(recipe), [*SETTINGS, *RECIPES[recipe]])
        model = build_model(config.model, parallel, config.train, lora=config.lora)
        initial_weights.initialize_weights(model, config.model, 1)
        for module in model.modules():
            if isinstance(module, AdapterFactors):  # B is initialized to 0, and the adapter would add nothing
                torch.nn.init.normal_(module.B, generator=torch.Generator().manual_seed(1))
        policy = ForwardModel(model, 50)
        engine = MegatronEngine(policy, Batching(2, 5))
        continuations = engine.generate(PROMPTS, Sampling(MAX_TOKENS)).continuations
        recomputed = []
        for prompt, continuation in zip(PROMPTS, continuations, strict=True):
            positions = torch.arange(len(prompt) - 1, len(prompt) + MAX_TOKENS - 1)
            document = DocumentBatch([[*prompt, *continuation]], torch.device("cpu"))
            recomputed.append(policy.logits(document, positions).argmax(-1).tolist())
        has_gradient = any(parameter.grad is not None for parameter in model.parameters())
        results.append([continuations, recomputed, has_gradient])
    return results


@pytest.mark.distributed
@pytest.mark.essential
@pytest.mark.parametrize(("recipes", "tp_recipes"), [
    ([name for name in RECIPES if name not in DEEP_RECIPES], []),
    pytest.param([*DEEP_RECIPES, *TENSOR_PARALLEL_RECIPES], TENSOR_PARALLEL_RECIPES, marks=pytest.mark.deep)],
    ids=["one recipe per kind of cache", "other recipes and tp"])
def test_cached_generation_equals_full_forward_passes(ranks: Any, job: Any, recipes: list[str],
                                                      tp_recipes: list[str]) -> None:
    one_rank, tp_ranks, ep_ranks = ranks(
        job(__file__, "generate_and_recompute", 1, {"layout": {}, "names": recipes}),
        job(__file__, "generate_and_recompute", 2, {"layout": {"tp": 2, "sp": True}, "names": tp_recipes}),
        # One rank has two of the three prompts, the other has one: both must call the experts equally often.
        job(__file__, "generate_and_recompute", 2, {
            "layout": {"ep": 2}, "names": EXPERT_PARALLEL_RECIPES}))
    results = dict(zip(recipes, one_rank[0], strict=True))
    for recipe, (continuations, recomputed, has_gradient) in results.items():
        assert continuations == recomputed and not has_gradient, recipe
        assert len({token for continuation in continuations for token in continuation}) > 3, recipe
    for names, split_results in ((tp_recipes, tp_ranks[0]), (EXPERT_PARALLEL_RECIPES, ep_ranks[0])):
        assert split_results == [results[name] for name in names]

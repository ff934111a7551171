"""Recipes: functions that return a `RunConfig`, each with a table of sources for its values.

`get(name)` returns a recipe's config, `names()` lists built-in recipes, `sources(name)` returns the table.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from megatron_sov.base.errors import UserError
from megatron_sov.base.hints.table import load_package_table
from megatron_sov.base.plugins.loading import LoadedPlugin, call_plugin
from megatron_sov.base.plugins.registry import Registry, accepts_arguments
from megatron_sov.model.config import (
    ExtendConfig, ExtendStageConfig, GpuConfig, NeedleConfig, ParallelConfig, PhaseConfig, RunConfig,
    from_dict)
from megatron_sov.model.config.model import IdBlock, LinearAttentionConfig, ModelConfig
from megatron_sov.model.recipes import k_exaone, open_models, policies, solar_open
from megatron_sov.model.recipes.sources import UNCOMPARED, Sources, derive_sources, label_changes, ours


@dataclass(frozen=True)
class Recipe:
    """A recipe's function and sources."""

    build: Callable[[], RunConfig]
    """Function that returns the config, with `recipe` set to the recipe's name."""
    sources: Sources = field(default_factory=dict)
    """Sources for values; {} for a user's recipe."""


RECIPES: dict[str, Recipe] = {
    "solar-open-102b": Recipe(solar_open.solar_open_102b, solar_open.SOURCES),
    "solar-open-102b-mid": Recipe(solar_open.solar_open_102b_mid, solar_open.MID_SOURCES),
    "solar-open-102b-extend": Recipe(solar_open.solar_open_102b_extend, solar_open.EXTEND_SOURCES),
    "solar-open-102b-sft": Recipe(solar_open.solar_open_102b_sft, solar_open.SFT_SOURCES),
    "solar-open-102b-dpo": Recipe(solar_open.solar_open_102b_dpo, solar_open.DPO_SOURCES),
    "solar-open-102b-dpo-rounds": Recipe(policies.solar_open_102b_dpo_rounds, policies.DPO_ROUNDS_SOURCES),
    "solar-open-102b-rl": Recipe(policies.solar_open_102b_rl, policies.SNAPPO_SOURCES),
    "solar-open2-250b": Recipe(solar_open.solar_open2_250b, solar_open.SOURCES_2),
    "solar-open2-250b-extend": Recipe(solar_open.solar_open2_250b_extend, solar_open.EXTEND_SOURCES_2),
    "k-exaone-236b": Recipe(k_exaone.k_exaone_236b, k_exaone.SOURCES),
    "k-exaone-236b-extend": Recipe(k_exaone.k_exaone_236b_extend, k_exaone.EXTEND_SOURCES),
    "k-exaone-236b-sft": Recipe(k_exaone.k_exaone_236b_sft, k_exaone.SFT_SOURCES),
    "k-exaone-236b-grouper": Recipe(k_exaone.k_exaone_236b_grouper, k_exaone.GROUPER_SOURCES),
    "k-exaone-236b-rl": Recipe(policies.k_exaone_236b_rl, policies.AGAPO_SOURCES),
    "k-exaone2-750b": Recipe(k_exaone.k_exaone2_750b, k_exaone.SOURCES_2),
    "k-exaone2-750b-extend": Recipe(k_exaone.k_exaone2_750b_extend, k_exaone.EXTEND_SOURCES_2),
    "hyperclova-omni-8b": Recipe(open_models.hyperclova_omni_8b, open_models.HYPERCLOVA_SOURCES),
    "hyperclova-omni-8b-continuous": Recipe(open_models.hyperclova_omni_8b_continuous,
                                            open_models.HYPERCLOVA_CONTINUOUS_SOURCES),
    "hyperclova-omni-8b-sft": Recipe(open_models.hyperclova_omni_8b_sft, open_models.HYPERCLOVA_SFT_SOURCES),
    "typhoon-s-8b": Recipe(open_models.typhoon_s_8b, open_models.TYPHOON_SOURCES),
    "typhoon-s-8b-opd": Recipe(policies.typhoon_s_8b_opd, policies.OPD_SOURCES),
    "typhoon-s-4b-legal": Recipe(policies.typhoon_s_4b_legal, policies.LEGAL_SOURCES),
    "typhoon-s-4b-legal-agent": Recipe(policies.typhoon_s_4b_legal_agent, policies.LEGAL_AGENT_SOURCES),
    "vibethinker-1.5b": Recipe(open_models.vibethinker_1_5b, open_models.VIBETHINKER_SOURCES),
    "vibethinker-1.5b-math-16k": Recipe(policies.vibethinker_1_5b_math_16k, policies.MATH_16K_SOURCES),
    "vibethinker-1.5b-math-32k": Recipe(policies.vibethinker_1_5b_math_32k, policies.MATH_32K_SOURCES),
    "vibethinker-1.5b-code": Recipe(policies.vibethinker_1_5b_code, policies.CODE_SOURCES),
    "qwen2-1.5b": Recipe(open_models.qwen2_1_5b, open_models.dense_sources("Qwen/Qwen2.5-Math-1.5B")),
    "qwen3-4b": Recipe(open_models.qwen3_4b, open_models.dense_sources("Qwen/Qwen3-4B")),
    "qwen3-4b-2507": Recipe(open_models.qwen3_4b_2507,
                            open_models.dense_sources("Qwen/Qwen3-4B-Instruct-2507")),
    "qwen3-8b": Recipe(open_models.qwen3_8b, open_models.dense_sources("Qwen/Qwen3-8B")),
    "qwen3-moe-30b": Recipe(open_models.qwen3_moe_30b, open_models.moe_sources("Qwen/Qwen3-30B-A3B")),
    "qwen3-30b-a3b-2507": Recipe(open_models.qwen3_30b_a3b_2507,
                                 open_models.moe_sources("Qwen/Qwen3-30B-A3B-Instruct-2507")),
    "llama-3.1-8b": Recipe(open_models.llama_3_1_8b, open_models.dense_sources("meta-llama/Llama-3.1-8B")),
    "deepseek-v3": Recipe(open_models.deepseek_v3, open_models.DEEPSEEK_SOURCES),
    "kimi-k2": Recipe(open_models.kimi_k2, open_models.KIMI_SOURCES),
    "gemma-3-1b": Recipe(open_models.gemma_3_1b, open_models.dense_sources(
        "google/gemma-3-1b-it, compared with NeMo's Gemma3Config1B")),
    "gemma3-27b": Recipe(open_models.gemma3_27b, open_models.dense_sources(
        "google/gemma-3-27b-it, compared with NeMo's Gemma3Config27B")),
    "exaone-4.0-32b": Recipe(open_models.exaone_4_32b, open_models.dense_sources(
        f"LGAI-EXAONE/EXAONE-4.0-32B, {UNCOMPARED}")),
    "exaone-4.0-1.2b": Recipe(open_models.exaone_4_1_2b, open_models.dense_sources(
        "LGAI-EXAONE/EXAONE-4.0-1.2B, compared with Megatron-Bridge's test_exaone4_provider.py")),
    "hyperclovax-14b": Recipe(open_models.hyperclovax_14b, open_models.dense_sources(
        f"naver-hyperclovax/HyperCLOVAX-SEED-Think-14B, {UNCOMPARED}"))}
TINY: dict[str, str] = load_package_table(Path(__file__).with_name("tiny.yaml"))
"""Tiny recipe -> full-size recipe with the same structure."""


SEQ_LEN, WIDTH, HEAD_DIM = 256, 128, 32
TINY_LAYERS = 6
"""Layers of tiny models without a repeating layer pattern."""
TINY_SOURCE = ours("a size for two CPU cores, and what goes with it")
"""Source for all values that `shrink_recipe` changes; other values keep the full-size recipe's source."""


def shrink_recipe(name: str, run: RunConfig) -> RunConfig:
    """Return recipe `name`: `run` at a size for two CPU cores, with the same routing, attention, norms and
    prediction layers.

    The optimizer is AdamW, which is faster at this size; `--set optim.name=muon` works with the same learning
    rate.
    """
    model = run.model
    rope = model.llama3_rope and replace(model.llama3_rope, original_max_position_tokens=SEQ_LEN)
    by_width = model.embedding_multiplier == model.hidden_size ** 0.5
    scale = model.attention_multiplier and model.attention_multiplier * model.head_dim / HEAD_DIM
    if scale and by_width and model.attention_multiplier:  # Gemma: 1 / sqrt of an integer
        scale = (round(model.attention_multiplier ** -2) * HEAD_DIM / model.head_dim) ** -0.5
    pattern = model.attention_pattern
    if len(pattern) == model.num_layers:  # no repeating pattern; the first layers have all kinds
        pattern = pattern[:4]
    layers = TINY_LAYERS if model.layer_windows else max(4, len(pattern))
    single = {"attention_pattern": pattern} | model.fields_for_depth(layers)
    if model.layer_windows:
        single["layer_windows"] = tuple(window and (32 if window == model.sliding_window_tokens else 64)
                                        for window in single["layer_windows"])
    small = replace(
        model, **single,
        vocab_size=2048, hidden_size=WIDTH, num_heads=4,
        num_kv_heads=2, head_dim=HEAD_DIM,
        embedding_multiplier=WIDTH ** 0.5 if by_width else model.embedding_multiplier,
        attention_multiplier=scale,  # muP's goes with 1 / head_dim
        dense_ffn_dim=384 if model.dense_ffn_dim else 0,
        sliding_window_tokens=32 if model.sliding_window_tokens else 0,
        yarn=None, llama3_rope=rope, max_position_tokens=4096, init_std=0.04,
    )
    small = _shrink_attention(small)
    if model.num_experts:
        small = replace(small, num_experts=8, num_experts_per_token=2, expert_ffn_dim=128)
    if model.num_expert_groups > 1:
        small = replace(small, num_expert_groups=4, num_groups_per_token=2)
    if model.audio_tokens and model.image_tokens:
        small = _shrink_media(small)
    extend = _shrink_extension(run.extend)
    lengths = {stage.name: stage.seq_len for stage in extend.stages}
    lr = 4e-4 if run.objective.name == "preference" else 4e-3
    tiny = replace(
        run, recipe=name, model=small, parallel=ParallelConfig(),
        data=replace(run.data, heldout_tokens=16384,
                     phases=tuple(_shrink_phase(p, lengths.get(p.name, SEQ_LEN)) for p in run.data.phases)),
        optim=replace(run.optim, name="adamw", lr=lr, min_lr=lr / 20, warmup_steps=20),
        train=replace(run.train, steps=200, tokens=0, global_batch_size=16, micro_batch_size=8,
                      precision="fp32", fp8="none", recompute=False, checkpoint_every_steps=50,
                      eval_every_steps=100),
        gpu=GpuConfig(), needle=NeedleConfig(lengths_tokens=(256, 512), depths=(0.0, 0.5, 0.95), samples=20),
        extend=extend)
    return _shrink_rounds(tiny) if run.objective.name == "policy" else tiny


def _shrink_attention(model: ModelConfig) -> ModelConfig:
    """Return `model` with small latent and linear attention."""
    if model.latent_attention is not None:
        latent = replace(model.latent_attention, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
                         v_head_dim=24, q_lora_rank=48 if model.has_query_latent else None)
        model = replace(model, num_kv_heads=model.num_heads, latent_attention=latent)
    if model.linear_attention is not None:
        turns = model.linear_attention.negative_eigenvalues
        model = replace(model, linear_attention=LinearAttentionConfig(4, 4, 16, 16, 16,
                                                                      negative_eigenvalues=turns))
    return model


def _shrink_media(model: ModelConfig) -> ModelConfig:
    """Return `model` with media tokens in a vocabulary of 2,048, and encoders for 16 x 16 pixels and 2
    seconds."""
    audio, image = IdBlock(1280, 512), IdBlock(1792, 256)
    small = replace(model, audio_tokens=audio, image_tokens=image)
    if model.vision and model.audio:
        moved = model.audio_tokens.first - audio.first if model.audio_tokens else 0
        small = replace(
            small,
            vision=replace(
                model.vision, placeholder_ids=tuple(i - moved for i in model.vision.placeholder_ids),
                image_size=16, patch_size=4, hidden_size=32, num_layers=2, num_heads=2, ffn_dim=64,
                window_size=16, full_attention_layers=(1,), out_hidden_size=64),
            audio=replace(
                model.audio, placeholder_ids=tuple(i - moved for i in model.audio.placeholder_ids),
                num_mels=16, num_frames=200, hidden_size=32, num_layers=2, num_heads=2, ffn_dim=64,
                compressor_size=32, compressor_head_dim=16, compressor_state_size=8))
    return small


def _shrink_rounds(run: RunConfig) -> RunConfig:
    """Return two short rounds with the recipe's method and a constant learning rate."""
    policy, rollout = run.policy, run.rollout
    lr = 4e-4 if policy.learns_preferences else 2e-3
    return replace(
        run, optim=replace(run.optim, lr=lr, min_lr=lr, warmup_steps=0),
        train=replace(run.train, steps=2 * rollout.steps_per_round),
        rollout=replace(rollout, rounds=2, prompts_per_round=8, max_prompt_tokens=64, max_new_tokens=64,
                        samples_per_prompt=min(4, rollout.samples_per_prompt)),
        policy=replace(policy, overlong_buffer_tokens=policy.overlong_buffer_tokens and 16,
                       knowledge_batch_size=4 if policy.knowledge_batch_size else None))


def _shrink_extension(extend: ExtendConfig) -> ExtendConfig:
    """Return an extension with the same number of stages, each twice as long as the previous.

    The gate counts needles but decides by the loss: a model trained for minutes finds no needle.
    """
    if not extend.stages:
        return extend
    stages = tuple(_shrink_stage(stage, SEQ_LEN << i) for i, stage in enumerate(extend.stages, 1))
    gate = replace(extend.gate, every_steps=20, min_accuracy=0.0, loss_tolerance_nats=0.5)
    return replace(extend, stages=stages, gate=gate)


def _shrink_stage(stage: ExtendStageConfig, seq_len: int) -> ExtendStageConfig:
    """Return `stage` at length `seq_len` with its parts, without source names."""
    return replace(
        stage, seq_len=seq_len, steps=20, max_steps=40, tokens=0, global_batch_size=0, blend={},
        yarn_original_tokens=seq_len // 2 if stage.yarn_original_tokens else 0,
        parts=tuple(replace(part, blend={}) for part in stage.parts))


def _shrink_phase(phase: PhaseConfig, seq_len: int) -> PhaseConfig:
    """Return `phase` with its share of the run, without source names."""
    return replace(phase, tokens=0, share=phase.tokens or phase.share, blend={}, seq_len=seq_len,
                   global_batch_size=0, lr=0.0, min_lr=0.0, rewarm_steps=0)


def _build_tiny(name: str, big: Recipe) -> RunConfig:
    return shrink_recipe(name, big.build())


RECIPES |= {name: Recipe(partial(_build_tiny, name, RECIPES[big])) for name, big in TINY.items()}


def names() -> list[str]:
    return sorted(RECIPES)


def find_family_recipes(family: str) -> list[str]:
    return [name for name in names() if RECIPES[name].build().model.family == family]


def get(name: str) -> RunConfig:
    """Return the config for recipe `name`: built-in, from an installed package, or from the command line.

    Tiny recipes also have long names, such as `tiny-solar-open-102b`. Raises `UserError`: unknown recipe (the
    message names the nearest and lists all), or a plug-in that returns no config.
    """
    return _find_recipe(name).build()


def sources(name: str) -> Sources:
    """Return the sources for a recipe's values; {} if its author gave none. Raises `UserError`: unknown
    recipe; the message names the nearest and lists all."""
    recipe = _find_recipe(name)
    if big := TINY.get(recipe.build().recipe if name.startswith("tiny-") else ""):
        return derive_sources(RECIPES[big].sources,
                              label_changes(RECIPES[big].build(), recipe.build(), TINY_SOURCE))
    return recipe.sources


def _find_recipe(name: str) -> Recipe:
    full_name = next((tiny for tiny, big in TINY.items() if name == f"tiny-{big}"), name)
    if full_name in RECIPES:
        return RECIPES[full_name]
    return Recipe(partial(_build_plugin, name, RECIPE_PLUGINS.get(name)))


def _check_recipe(loaded: LoadedPlugin) -> None:
    if not callable(loaded.value) or not accepts_arguments(loaded.value, ()):
        raise UserError(f"{loaded.reference}: is {loaded.value!r}; a recipe is a function without arguments "
                        "that returns a RunConfig")


RECIPE_PLUGINS: Registry[Callable[[], RunConfig]] = Registry("recipe", RECIPES, _check_recipe)
"""Recipes from plug-ins."""


def _build_plugin(name: str, recipe: Callable[[], RunConfig]) -> RunConfig:
    """Return a plug-in recipe's config, with values checked against the types of settings."""
    code = RECIPE_PLUGINS.code(name)
    assert code is not None, name
    config = call_plugin(code.reference, recipe)
    if not isinstance(config, RunConfig):
        raise UserError(f"{code.reference}: returns a {type(config).__name__}; a recipe returns a RunConfig")
    try:
        return from_dict(config.to_dict())
    except (UserError, TypeError, ValueError) as e:
        raise UserError(f"{code.reference}: {e}") from None

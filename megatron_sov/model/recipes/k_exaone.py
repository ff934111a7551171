"""Recipes for K-EXAONE 236B-A23B and K-EXAONE 2.0 750B-A37B.

Architecture, tokens, kind of optimizer, peak learning rate, context lengths and post-training stages of
K-EXAONE are published; other values are our choice, marked as such. The recipe for reinforcement learning is
in `policies`. Pretraining uses FP8, as published.
"""

from dataclasses import replace
from functools import partial

from megatron_sov.model.config import (
    DataConfig, GpuConfig, ModelConfig, ObjectiveConfig, OptimConfig, ParallelConfig, PhaseConfig,
    PreferenceConfig, RunConfig, TrainConfig)
from megatron_sov.model.recipes.extension import extend_run, mix_stage
from megatron_sov.model.recipes.sources import Sources, derive_sources, ours, published, read_sources

REPORT = "arXiv 2601.01739"
TOKENS = 11_000_000_000_000
OTHER_LANGUAGES = ("spanish", "german", "japanese", "vietnamese")
"""Four of the six published languages: `korean` is a source of its own, English the rest of the web text."""


def _others(share: float) -> dict[str, float]:
    """Divide a share of the blend equally among `OTHER_LANGUAGES`."""
    return dict.fromkeys(OTHER_LANGUAGES, share / len(OTHER_LANGUAGES))


PHASES = (
    PhaseConfig("foundation", tokens=round(0.7 * TOKENS), seq_len=8192,
                blend={"web": 70.0, "korean": 10.0, **_others(10.0), "code": 10.0}),
    PhaseConfig("expert-knowledge", tokens=round(0.2 * TOKENS), seq_len=8192,
                blend={"web-high": 45.0, "korean": 10.0, **_others(5.0), "code": 15.0, "stem": 25.0}),
    PhaseConfig("reasoning", tokens=round(0.1 * TOKENS), seq_len=8192, blend={
        "web-high": 30.0, "korean": 10.0, "code": 15.0, "stem": 15.0, "reasoning-trajectories": 30.0}))
_stage = partial(mix_stage, "reasoning-trajectories", {
    "web-high/8192": 70.0, "korean/8192": 20.0, "needle/8192": 10.0})
STAGES = (_stage("32k", 32768, 1024, 0.4, 0.3), _stage("256k", 262144, 128, 0.6, 0.2))


def model() -> ModelConfig:
    """Return the architecture: a dense first layer, sliding and NoPE layers 3:1, QK-norm, one MTP layer."""
    return ModelConfig(
        family="exaone_moe", vocab_size=153600, hidden_size=6144, num_layers=48, num_heads=64, num_kv_heads=8,
        head_dim=128, num_dense_layers=1, dense_ffn_dim=18432, num_experts=128, num_experts_per_token=8,
        num_shared_experts=1, expert_ffn_dim=2048, routed_scaling_factor=2.5, router_bias_update_rate=1e-4,
        seq_aux_loss_coeff=1e-4, attention_pattern="LLLG", sliding_window_tokens=128, rope_on_global=False,
        rope_theta=1e6, qk_norm=True, norm_eps=1e-5, num_mtp_layers=1, mtp_attention="G", mtp_loss_coeff=0.05,
        max_position_tokens=262144)


def k_exaone_236b() -> RunConfig:
    """Return the pretraining recipe: 11 T tokens in three phases at 8K, Muon, WSD schedule with peak 3e-4."""
    return RunConfig(
        recipe="k-exaone-236b", model=model(),
        parallel=ParallelConfig(ep=16, zero1=True, overlap_grad_reduce=True, overlap_param_gather=True),
        data=DataConfig(phases=PHASES),
        optim=OptimConfig(name="muon", lr=3e-4, min_lr=3e-5, schedule="wsd", warmup_steps=2000,
                          decay_share=0.1, weight_decay=0.1),
        train=TrainConfig(global_batch_size=4096, micro_batch_size=1, recompute=True, fp8="blockwise"),
        gpu=GpuConfig(gc_every_steps=100))


def k_exaone_236b_extend() -> RunConfig:
    """Return the gated extension 8K -> 32K -> 256K for the pretrained model, for `extend`."""
    run = k_exaone_236b()
    optim = OptimConfig(name="muon", lr=3e-5, min_lr=3e-6, schedule="cosine", warmup_steps=100,
                        weight_decay=0.1)
    return extend_run(run, "k-exaone-236b-extend", STAGES, optim,
                      replace(run.parallel, tp=8, sp=True, cp=8, ep=64))


def k_exaone_236b_sft() -> RunConfig:
    """Return fine-tuning after the extension, for `sft`: conversations, and tasks with simulated tools."""
    run = k_exaone_236b()
    return replace(
        run, recipe="k-exaone-236b-sft", parallel=replace(run.parallel, pp=4, cp=4, ep=8),
        data=DataConfig(phases=(PhaseConfig("sft", tokens=20_000_000_000, seq_len=32768, blend={
            "conversations": 70.0, "tools": 30.0}),)),
        optim=OptimConfig(name="muon", lr=1e-5, min_lr=1e-6, warmup_steps=50, weight_decay=0.1),
        train=replace(run.train, global_batch_size=512, fp8="none"), objective=ObjectiveConfig(name="sft"))


def k_exaone_236b_grouper() -> RunConfig:
    """Return the last stage, GrouPER, for `prefer`: groups of responses with summed rewards from rules and
    rubrics."""
    run = k_exaone_236b_sft()
    return replace(
        run, recipe="k-exaone-236b-grouper", parallel=replace(run.parallel, ep=16),
        data=DataConfig(phases=(PhaseConfig("groups", tokens=128 * 32768 * 500, seq_len=32768),)),
        optim=OptimConfig(name="adamw", lr=5e-7, min_lr=0.0, warmup_steps=25, weight_decay=0.1),
        train=replace(run.train, global_batch_size=128),
        objective=ObjectiveConfig(name="preference"), preference=PreferenceConfig(method="grouper"))


SOURCES: Sources = read_sources("k-exaone-236b")
EXTEND_SOURCES = derive_sources(SOURCES, read_sources("k-exaone-236b-extend"))
SFT_SOURCES = derive_sources(SOURCES, read_sources("k-exaone-236b-sft"))
_GROUPER = published(f"{REPORT}, post-training: preference learning by GrouPER")
GROUPER_SOURCES = derive_sources(SFT_SOURCES, {
    "optim.name": ours("not published"), "objective.name": _GROUPER, "preference.method": _GROUPER})


# K-EXAONE 2.0 750B-A37B (arXiv 2608.04505), grown from K-EXAONE 236B in depth and experts.
# Report and config.json were not available. Sizes come from programs that read the config: Megatron-Bridge
# (a recipe, and a verification card with 59,396 tensors and 1,498,715,008,512 bytes, exactly as in this
# architecture), TensorRT-LLM's pull request 17067 (clamps from layer 62, a window of 4096 in layer 1) and
# vLLM's `exaone_moe`. Tokens, learning rates and blends are our choice.

BRIDGE = "Megatron-Bridge, recipe exaone_moe_2_0_750b_a37_pretrain_512gpu_h100_bf16"
LAYERS = "GL" + 19 * "LLLG"
"""A letter per layer: G for global attention, L for a sliding window."""
FIRST_BOUNDED, NUM_LAYERS = 62, 78
"""First layer (from 0) with a clamped SwiGLU, and the number of layers."""
TOKENS_2 = 2_000_000_000_000


def model_2() -> ModelConfig:
    """Return the architecture: two dense layers (the second with a 4,096-token window), then blocks of three
    layers with 128-token windows and a global layer without positions; SwiGLU clamped in the last 16 layers;
    an MTP layer with a sliding window, applied four times."""
    return replace(
        model(), num_layers=NUM_LAYERS, num_dense_layers=2, num_experts=256,
        attention_pattern=LAYERS[:-1],  # the pattern repeats, so the last layer gets its first letter, G
        layer_windows=(0, 4096, *(128 if kind == "L" else 0 for kind in LAYERS[2:])),
        swiglu_limits=tuple(7.0 if i >= FIRST_BOUNDED else 0.0 for i in range(NUM_LAYERS)),
        mtp_attention="L", mtp_depths=4)


def k_exaone2_750b() -> RunConfig:
    """Return pretraining after the growth: 2 T tokens at 8K, with data of K-EXAONE's stages 2 and 3."""
    base = k_exaone_236b()
    phases = tuple(PhaseConfig(phase.name, tokens=round(share * TOKENS_2), seq_len=8192, blend=phase.blend)
                   for phase, share in zip(PHASES[1:], (0.7, 0.3), strict=True))
    return replace(
        base, recipe="k-exaone2-750b", model=model_2(), data=DataConfig(phases=phases),
        parallel=ParallelConfig(tp=4, sp=True, pp=16, ep=32, zero1=True,
                                pipeline_layout=(6, *[5] * 14, 2), overlap_grad_reduce=True,
                                overlap_param_gather=True),
        optim=replace(base.optim, lr=1e-4, min_lr=1e-5, warmup_steps=500),
        train=replace(base.train, fp8="none"))


def k_exaone2_750b_extend() -> RunConfig:
    """Return the extension 8K -> 32K -> 256K, with K-EXAONE's stages and gates."""
    run = k_exaone2_750b()
    optim = OptimConfig(name="muon", lr=1e-5, min_lr=1e-6, schedule="cosine", warmup_steps=100,
                        weight_decay=0.1)
    return extend_run(run, "k-exaone2-750b-extend", STAGES, optim, replace(run.parallel, tp=8, cp=8, ep=64))


SOURCES_2: Sources = derive_sources(SOURCES, read_sources("k-exaone2-750b"))
EXTEND_SOURCES_2 = derive_sources(derive_sources(EXTEND_SOURCES, SOURCES_2),
                                  read_sources("k-exaone2-750b-extend"))

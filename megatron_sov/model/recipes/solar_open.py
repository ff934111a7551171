"""Recipes for Solar Open 102B-A12B (arXiv 2601.07022) and Solar Open 2 250B-A15B.

Architecture, curriculum and optimizer of Solar Open are published. The shape of the learning rate decay,
learning rates after pretraining and layouts are our choice, marked as such. Pretraining uses FP8, as
published; later stages use bf16, because their precision is not published.
"""

from dataclasses import replace
from functools import partial

from megatron_sov.model.config import (
    DataConfig, GpuConfig, ModelConfig, ObjectiveConfig, OptimConfig, ParallelConfig, PhaseConfig,
    PreferenceConfig, RunConfig, TrainConfig, YarnConfig)
from megatron_sov.model.config.model import LinearAttentionConfig
from megatron_sov.model.recipes.extension import extend_run, mix_stage
from megatron_sov.model.recipes.sources import Sources, derive_sources, read_sources

REPORT, RELEASED = "arXiv 2601.07022", "upstage/Solar-Open-100B"
TRILLION = 1_000_000_000_000


def _phase(name: str, tokens_t: float, filter_level: str, korean_pct: float,
           synthetic_pct: float) -> PhaseConfig:
    """Return a pretraining phase at 4K with Korean, synthetic and `web-LEVEL` text, which fills the rest.

    The report gives the two percentages and the quality filter of each phase; we assume that Korean and
    synthetic text do not overlap.
    """
    blend = {f"web-{filter_level}": 100 - korean_pct - synthetic_pct, "korean": korean_pct,
             "synthetic": synthetic_pct}
    return PhaseConfig(name, tokens=round(tokens_t * TRILLION), blend=blend, seq_len=4096)


PHASES = (
    _phase("1", 10.8, "basic", 3.3, 10.2), _phase("2.A", 5.3, "l1", 3.2, 32.0),
    _phase("2.B", 2.7, "l2", 16.4, 36.1), _phase("2.C", 1.2, "l3", 13.6, 64.5))
"""Quality levels: basic filter, L1, L2 (about the top half by educational score), L3 (about the top 35 %)."""
MID_TRAINING = (
    PhaseConfig("mid-training", tokens=round(1.155 * TRILLION), seq_len=32768, global_batch_size=1440,
                blend={"reasoning-trajectories": 850.0, "long@8192": 135.0, "phase-2c": 170.0}),
)
"""Trajectory documents (a query with 2 to 5 solutions), long documents, and a part of phase 2.C's data."""


_stage = partial(mix_stage, "reasoning-trajectories", {
    "web-l3/4096": 20.0, "korean/4096": 12.0, "synthetic/4096": 58.0, "needle/4096": 10.0})
STAGES = (_stage("32k", 32768, 1440, 0.4, 0.3, yarn_factor=1),
          _stage("100k", 102400, 480, 0.6, 0.2, yarn_factor=2, yarn_original_tokens=65536))
"""The first stage uses RoPE without scaling; the second uses the released RoPE."""


def model() -> ModelConfig:
    """Return the architecture before pretraining: 48 mixture-of-experts layers, global attention, RoPE
    without scaling."""
    return ModelConfig(
        family="solar_open", vocab_size=196608, hidden_size=4096, num_layers=48, num_heads=64, num_kv_heads=8,
        head_dim=128, num_experts=128, num_experts_per_token=8, num_shared_experts=1, expert_ffn_dim=1280,
        routed_scaling_factor=1.0, router_bias_update_rate=1e-3, seq_aux_loss_coeff=1e-4, rope_theta=1e6,
        norm_eps=1e-5, max_position_tokens=131072)


def released_model() -> ModelConfig:
    """Return the released architecture, with the RoPE of the last stage: 128K by YaRN over 64K."""
    return replace(model(), yarn=YarnConfig(factor=2.0, original_max_position_tokens=65536))


def solar_open_102b() -> RunConfig:
    """Return pretraining: 20 T tokens in four phases at 4K, AdamW, cosine from 2.5e-4 to 3e-6."""
    return RunConfig(
        recipe="solar-open-102b", model=model(),
        parallel=ParallelConfig(ep=8, zero1=True, overlap_grad_reduce=True, overlap_param_gather=True),
        data=DataConfig(phases=PHASES),
        optim=OptimConfig(lr=2.5e-4, min_lr=3e-6, schedule="cosine", warmup_steps=2000, weight_decay=0.1,
                          beta2=0.95),
        train=TrainConfig(global_batch_size=13440, micro_batch_size=1, recompute=True, fp8="blockwise"),
        gpu=GpuConfig(gc_every_steps=100))


def solar_open_102b_mid() -> RunConfig:
    """Return mid-training at 32K, run with --from the pretrained model: the learning rate warms up again and
    decays linearly."""
    run = solar_open_102b()
    return replace(
        run, recipe="solar-open-102b-mid", data=replace(run.data, phases=MID_TRAINING),
        train=replace(run.train, fp8="none"),
        optim=replace(run.optim, lr=5e-5, schedule="linear", warmup_steps=500))


def solar_open_102b_extend() -> RunConfig:
    """Return the gated extension 4K -> 32K -> 100K for the pretrained model, for `extend`."""
    run = solar_open_102b()
    optim = replace(run.optim, lr=5e-5, schedule="linear", warmup_steps=100)
    return extend_run(replace(run, model=released_model()), "solar-open-102b-extend", STAGES, optim,
                      replace(run.parallel, tp=4, sp=True, cp=8, ep=32))


def solar_open_102b_sft() -> RunConfig:
    """Return fine-tuning after the extension, for `sft`: reasoning with medium difficulty, simulated agents,
    Korean knowledge, safety."""
    run = solar_open_102b()
    return replace(
        run, recipe="solar-open-102b-sft", model=released_model(), parallel=replace(run.parallel, cp=2),
        data=DataConfig(phases=(PhaseConfig("sft", tokens=20_000_000_000, seq_len=32768, blend={
            "reasoning": 50.0, "agents": 30.0, "korean": 15.0, "safety": 5.0}),)),
        optim=replace(run.optim, lr=1e-5, min_lr=1e-6, warmup_steps=50),
        train=replace(run.train, global_batch_size=480, fp8="none"), objective=ObjectiveConfig(name="sft"))


def solar_open_102b_dpo() -> RunConfig:
    """Return the first round of iterative DPO (SnapPO's phase B), for `prefer`: preference, safety and
    degeneration pairs, mixed with reasoning."""
    run = solar_open_102b()
    return replace(
        run, recipe="solar-open-102b-dpo", model=released_model(), parallel=replace(run.parallel, pp=4, cp=4),
        data=DataConfig(phases=(PhaseConfig("pairs", tokens=128 * 32768 * 500, seq_len=32768, blend={
            "preference": 30.0, "safety": 20.0, "degeneration": 20.0, "reasoning": 30.0}),)),
        optim=replace(run.optim, lr=5e-7, min_lr=0.0, warmup_steps=25),
        train=replace(run.train, global_batch_size=128, fp8="none"),
        objective=ObjectiveConfig(name="preference"), preference=PreferenceConfig(method="dpo", beta=0.1))


SOURCES: Sources = read_sources("solar-open-102b")
MID_SOURCES = derive_sources(SOURCES, read_sources("solar-open-102b-mid"))
EXTEND_SOURCES = derive_sources(SOURCES, read_sources("solar-open-102b-extend"))
SFT_SOURCES = derive_sources(SOURCES, read_sources("solar-open-102b-sft"))
DPO_SOURCES = derive_sources(SOURCES, read_sources("solar-open-102b-dpo"))


# Solar Open 2 250B-A15B (arXiv 2607.20062): the released architecture, published tokens and languages.
# Only the report's abstract and the model card were available. They give the start (5.69 billion parameters
# of Solar Open 102B, which no command here copies), 10 T tokens of a mixture, about 12 T in all, and the
# distillation of twelve specialists. Phases, blends, learning rates, batch sizes, stage lengths and layouts
# are our choice, marked as such.

PHASES_2 = (
    PhaseConfig("mixture", tokens=10 * TRILLION, seq_len=8192, blend={
        "web": 40.0, "korean": 10.0, "japanese": 5.0, "code": 15.0, "stem": 10.0, "synthetic": 20.0}),
    PhaseConfig("agents", tokens=2 * TRILLION, seq_len=8192, blend={
        "web": 20.0, "korean": 10.0, "japanese": 5.0, "code": 20.0, "stem": 15.0,
        "agent-trajectories": 30.0}))
_stage_2 = partial(mix_stage, "agent-trajectories", {
    "web/8192": 60.0, "korean/8192": 20.0, "japanese/8192": 10.0, "needle/8192": 10.0})
STAGES_2 = (_stage_2("64k", 65536, 512, 0.4, 0.3), _stage_2("256k", 262144, 128, 0.5, 0.2),
            _stage_2("1m", 1048576, 32, 0.6, 0.2))


def model_2() -> ModelConfig:
    """Return the architecture: blocks with one layer with gated softmax attention and three with Kimi Delta
    Attention, no positions, 8 of 320 experts in every layer."""
    return ModelConfig(
        family="solar_open2", vocab_size=196608, hidden_size=4096, num_layers=48, num_heads=64,
        num_kv_heads=8, head_dim=128, dense_ffn_dim=10240, num_experts=320, num_experts_per_token=8,
        num_shared_experts=1, expert_ffn_dim=1280, routed_scaling_factor=1.0, attention_pattern="GDDD",
        linear_attention=LinearAttentionConfig(64, 64, 128, 128, 128, negative_eigenvalues=True),
        attention_output_gate=True, rope_on_global=False, rope_theta=10_000.0, norm_eps=1e-5,
        max_position_tokens=1048576)


def solar_open2_250b() -> RunConfig:
    """Return pretraining: 12 T tokens in two phases at 8K, AdamW, cosine from 2.5e-4 to 3e-6."""
    return RunConfig(
        recipe="solar-open2-250b", model=model_2(),
        parallel=ParallelConfig(pp=4, ep=8, zero1=True, overlap_grad_reduce=True, overlap_param_gather=True),
        data=DataConfig(phases=PHASES_2),
        optim=OptimConfig(lr=2.5e-4, min_lr=3e-6, schedule="cosine", warmup_steps=2000, weight_decay=0.1,
                          beta2=0.95),
        train=TrainConfig(global_batch_size=4096, micro_batch_size=1, recompute=True),
        gpu=GpuConfig(gc_every_steps=100))


def solar_open2_250b_extend() -> RunConfig:
    """Return the gated extension 8K -> 64K -> 256K -> 1M, for `extend`. The model has no RoPE to scale."""
    run = solar_open2_250b()
    optim = replace(run.optim, lr=3e-5, warmup_steps=100)
    return extend_run(run, "solar-open2-250b-extend", STAGES_2, optim,
                      replace(run.parallel, tp=8, sp=True, cp=8))


SOURCES_2: Sources = read_sources("solar-open2-250b")
EXTEND_SOURCES_2 = derive_sources(SOURCES_2, read_sources("solar-open2-250b-extend"))

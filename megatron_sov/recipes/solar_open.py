"""Solar Open 102B-A12B (arXiv 2601.07022): architecture, curriculum and optimizer as published."""

from __future__ import annotations

from dataclasses import replace

from megatron_sov.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PhaseConfig,
    RunConfig,
    TrainConfig,
    YarnConfig,
)

TRILLION = 1_000_000_000_000


def _phase(name: str, tokens_t: float, filter_level: str, korean_pct: float, synthetic_pct: float) -> PhaseConfig:
    """Return a pretraining phase at 4K: `web-LEVEL` is the rest beside Korean and synthetic text.

    The report gives the two percentages and the quality filter of each phase; that they do not overlap is our reading.
    """
    blend = {f"web-{filter_level}": 100 - korean_pct - synthetic_pct, "korean": korean_pct, "synthetic": synthetic_pct}
    return PhaseConfig(name, tokens=round(tokens_t * TRILLION), blend=blend, seq_len=4096)


PHASES = (
    _phase("1", 10.8, "basic", 3.3, 10.2),
    _phase("2.A", 5.3, "l1", 3.2, 32.0),
    _phase("2.B", 2.7, "l2", 16.4, 36.1),
    _phase("2.C", 1.2, "l3", 13.6, 64.5),
)
"""Quality levels: basic filter, L1, L2 (about the top half by educational score), L3 (about the top 35 %)."""
MID_TRAINING = (
    PhaseConfig("mid-training", tokens=round(1.155 * TRILLION), seq_len=32768, global_batch_size=1440,
                blend={"reasoning-trajectories": 850.0, "long@8192": 135.0, "phase-2c": 170.0}),
)
"""Trajectory documents (a query and 2 to 5 solutions), long documents, and a part of phase 2.C's data again."""


def model() -> ModelConfig:
    """Return the architecture: 48 mixture-of-experts layers, all global attention, released at 128K with YaRN."""
    return ModelConfig(
        family="solar_open", vocab_size=196608, hidden_size=4096, num_layers=48, num_heads=64, num_kv_heads=8, head_dim=128,
        num_experts=128, num_experts_per_token=8, num_shared_experts=1, expert_ffn_dim=1280, routed_scaling_factor=1.0,
        router_bias_update_rate=1e-3, seq_aux_loss_coeff=1e-4, rope_theta=1e6, norm_eps=1e-5,
        yarn=YarnConfig(factor=2.0, original_max_position_tokens=65536), max_position_tokens=131072,
    )


def solar_open_102b() -> RunConfig:
    """Return the pretraining run: 20 T tokens in four phases at 4K, AdamW, cosine from 2.5e-4 to 3e-6."""
    return RunConfig(
        recipe="solar-open-102b",
        model=model(),
        parallel=ParallelConfig(ep=8, zero1=True),
        data=DataConfig(phases=PHASES),
        optim=OptimConfig(lr=2.5e-4, min_lr=3e-6, schedule="cosine", warmup_steps=2000, weight_decay=0.1, beta2=0.95),
        train=TrainConfig(global_batch_size=13440, micro_batch_size=1, recompute=True),
    )


def solar_open_102b_mid() -> RunConfig:
    """Return mid-training at 32K, to be run --from the pretrained model: the rate is warmed up again and decays linearly."""
    run = solar_open_102b()
    return replace(
        run, recipe="solar-open-102b-mid", data=replace(run.data, phases=MID_TRAINING),
        optim=replace(run.optim, lr=5e-5, schedule="wsd", warmup_steps=500, decay_share=1.0))

"""K-EXAONE 236B-A23B: architecture, curriculum and optimizer as published."""

from __future__ import annotations

from megatron_sov.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PhaseConfig,
    RunConfig,
    TrainConfig,
)

TOKENS = 11_000_000_000_000
PHASES = (
    PhaseConfig("foundation", tokens=round(0.7 * TOKENS), seq_len=8192,
                blend={"web": 70.0, "korean": 10.0, "multilingual": 10.0, "code": 10.0}),
    PhaseConfig("expert-knowledge", tokens=round(0.2 * TOKENS), seq_len=8192,
                blend={"web-high": 45.0, "korean": 10.0, "multilingual": 5.0, "code": 15.0, "stem": 25.0}),
    PhaseConfig("reasoning", tokens=round(0.1 * TOKENS), seq_len=8192,
                blend={"web-high": 30.0, "korean": 10.0, "code": 15.0, "stem": 15.0, "reasoning-trajectories": 30.0}),
)
"""The report gives the three stages and 11 T tokens in all; each stage's part and blend are our choice."""


def model() -> ModelConfig:
    """Return the architecture: a dense first layer, sliding and NoPE global layers 3:1, QK-norm, one MTP layer."""
    return ModelConfig(
        family="exaone_moe", vocab_size=153600, hidden_size=6144, num_layers=48, num_heads=64, num_kv_heads=8, head_dim=128,
        num_dense_layers=1, dense_ffn_dim=18432, num_experts=128, num_experts_per_token=8, num_shared_experts=1,
        expert_ffn_dim=2048, routed_scaling_factor=2.5, router_bias_update_rate=1e-4, seq_aux_loss_coeff=1e-4,
        attention_pattern="LLLG", sliding_window_tokens=128, rope_on_global=False, rope_theta=1e6, qk_norm=True,
        norm_eps=1e-5, num_mtp_layers=1, mtp_loss_coeff=0.05, max_position_tokens=262144,
    )


def k_exaone_236b() -> RunConfig:
    """Return the pretraining run: 11 T tokens in three stages at 8K, Muon, WSD schedule with peak 3e-4."""
    return RunConfig(
        recipe="k-exaone-236b",
        model=model(),
        parallel=ParallelConfig(ep=16, zero1=True),
        data=DataConfig(phases=PHASES),
        optim=OptimConfig(name="muon", lr=3e-4, min_lr=3e-5, schedule="wsd", warmup_steps=2000, decay_share=0.1,
                          weight_decay=0.1),
        train=TrainConfig(global_batch_size=4096, micro_batch_size=1, recompute=True),
    )

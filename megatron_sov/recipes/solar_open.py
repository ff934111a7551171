"""Solar Open 102B-A12B (arXiv 2601.07022): architecture, curriculum and optimizer as published."""

from __future__ import annotations

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

PHASES = (
    PhaseConfig("1", share=10.8, seq_len=4096),
    PhaseConfig("2.A", share=5.3, seq_len=4096),
    PhaseConfig("2.B", share=2.7, seq_len=4096),
    PhaseConfig("2.C", share=1.2, seq_len=4096),
)


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
        parallel=ParallelConfig(ep=8),
        data=DataConfig(phases=PHASES),
        optim=OptimConfig(lr=2.5e-4, min_lr=3e-6, schedule="cosine", warmup_steps=2000, weight_decay=0.1, beta2=0.95),
        train=TrainConfig(tokens=20_000_000_000_000, global_batch_size=13440, micro_batch_size=1, recompute=True),
    )

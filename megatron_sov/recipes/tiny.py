"""Tiny recipes: the big models' structure at a size for two CPU cores, derived from the big recipes."""

from __future__ import annotations

from dataclasses import replace

from megatron_sov.config import NeedleConfig, ParallelConfig, PhaseConfig, RunConfig

SEQ_LEN = 256


def shrink(run: RunConfig) -> RunConfig:
    """Return `run` with every size reduced and every structural choice (routing, attention, norms, MTP) kept.

    The optimizer is AdamW, which is quicker at this size; `--set optim.name=muon` takes the same rates.
    """
    model = run.model
    small = replace(
        model,
        vocab_size=2048, hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32,
        dense_ffn_dim=384 if model.dense_ffn_dim else 0,
        sliding_window_tokens=32 if model.sliding_window_tokens else 0,
        yarn=None, max_position_tokens=4096, init_std=0.04,
    )
    if model.num_experts:
        small = replace(small, num_experts=8, num_experts_per_token=2, expert_ffn_dim=128)
    return replace(
        run,
        recipe="tiny-" + run.recipe.rpartition("-")[0],
        model=small,
        parallel=ParallelConfig(),
        data=replace(run.data, phases=tuple(_small(p) for p in run.data.phases), heldout_tokens=16384),
        optim=replace(run.optim, name="adamw", lr=4e-3, min_lr=2e-4, warmup_steps=20),
        train=replace(run.train, steps=200, tokens=0, global_batch_size=16, micro_batch_size=8, precision="fp32", recompute=False,
                      checkpoint_every_steps=50, eval_every_steps=100),
        needle=NeedleConfig(lengths_tokens=(256, 512), depths=(0.0, 0.5, 0.95), samples=20),
    )


def _small(phase: PhaseConfig) -> PhaseConfig:
    """Return a phase with its part of the run kept, over whatever sources the data has."""
    return replace(phase, tokens=0, share=phase.tokens or phase.share, blend={}, seq_len=SEQ_LEN, global_batch_size=0)

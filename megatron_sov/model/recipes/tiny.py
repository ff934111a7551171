"""Tiny recipes: the big models' structure at a size for two CPU cores, derived from the big recipes."""

from __future__ import annotations

from dataclasses import replace

from megatron_sov.model.config import (
    ExtendConfig, ExtendStageConfig, GpuConfig, NeedleConfig, ParallelConfig, PhaseConfig, RunConfig)
from megatron_sov.model.config.model import IdBlock, ModelConfig
from megatron_sov.model.recipes.sources import ours

SEQ_LEN, WIDTH, HEAD_DIM = 256, 128, 32
SHRUNK = ours("a size for two CPU cores, and what goes with it")
"""Where every value comes from that shrinking changes; the others come from where the big recipe has them."""


def shrink(name: str, run: RunConfig) -> RunConfig:
    """Return `run` as recipe `name`, with every size reduced and every structural choice kept.

    Routing, attention, norms and multi-token prediction are such choices.  The optimizer is AdamW, which is
    quicker at this size; `--set optim.name=muon` takes the same rates.
    """
    model = run.model
    rope = model.llama3_rope and replace(model.llama3_rope, original_max_position_tokens=SEQ_LEN)
    by_width = model.embedding_multiplier == model.hidden_size ** 0.5
    scale = model.attention_multiplier and model.attention_multiplier * model.head_dim / HEAD_DIM
    if scale and by_width and model.attention_multiplier:  # Gemma's, which goes with 1 / the root of it
        scale = (round(model.attention_multiplier ** -2) * HEAD_DIM / model.head_dim) ** -0.5
    small = replace(
        model,
        vocab_size=2048, hidden_size=WIDTH, num_layers=max(4, len(model.attention_pattern)), num_heads=4,
        num_kv_heads=2, head_dim=HEAD_DIM,
        embedding_multiplier=WIDTH ** 0.5 if by_width else model.embedding_multiplier,
        attention_multiplier=scale,  # muP's goes with 1 / head_dim
        dense_ffn_dim=384 if model.dense_ffn_dim else 0,
        sliding_window_tokens=32 if model.sliding_window_tokens else 0,
        yarn=None, llama3_rope=rope, max_position_tokens=4096, init_std=0.04,
    )
    if model.latent_attention is not None:
        latent = replace(model.latent_attention, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
                         v_head_dim=24, q_lora_rank=48 if model.has_query_latent else None)
        small = replace(small, num_kv_heads=small.num_heads, latent_attention=latent)
    if model.num_experts:
        small = replace(small, num_experts=8, num_experts_per_token=2, expert_ffn_dim=128)
    if model.num_expert_groups > 1:
        small = replace(small, num_expert_groups=4, num_groups_per_token=2)
    if model.audio_tokens and model.image_tokens:
        small = _small_media(small)
    extend = _small_extension(run.extend)
    lengths = {stage.name: stage.seq_len for stage in extend.stages}
    tiny = replace(
        run,
        recipe=name,
        model=small,
        parallel=ParallelConfig(),
        data=replace(run.data, heldout_tokens=16384,
                     phases=tuple(_small(p, lengths.get(p.name, SEQ_LEN)) for p in run.data.phases)),
        optim=replace(run.optim, name="adamw", lr=4e-3, min_lr=2e-4, warmup_steps=20),
        train=replace(run.train, steps=200, tokens=0, global_batch_size=16, micro_batch_size=8,
                      precision="fp32", recompute=False, checkpoint_every_steps=50, eval_every_steps=100),
        gpu=GpuConfig(),
        needle=NeedleConfig(lengths_tokens=(256, 512), depths=(0.0, 0.5, 0.95), samples=20),
        extend=extend,
    )
    return _small_rounds(tiny) if run.objective.name == "policy" else tiny


def _small_media(model: ModelConfig) -> ModelConfig:
    """Return a model whose codebooks end a vocabulary of 2,048, with encoders of 16 x 16 pixels and 2 s."""
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


def _small_rounds(run: RunConfig) -> RunConfig:
    """Return two short rounds of a method that is kept, at a steady rate that is lower than pretraining's."""
    policy, rollout = run.policy, run.rollout
    return replace(
        run,
        optim=replace(run.optim, lr=2e-3, min_lr=2e-3, warmup_steps=0),
        train=replace(run.train, steps=2 * rollout.steps_per_round),
        rollout=replace(rollout, rounds=2, prompts_per_round=8, samples_per_prompt=4, max_prompt_tokens=64,
                        max_new_tokens=64),
        policy=replace(policy, overlong_buffer_tokens=16 if policy.overlong_buffer_tokens else 0,
                       knowledge_batch_size=4 if policy.knowledge_batch_size else None))


def _small_extension(extend: ExtendConfig) -> ExtendConfig:
    """Return an extension of as many stages, each twice as long as what was trained before.

    Its gate counts needles and judges the loss alone: a model of this size, trained for minutes, finds none.
    """
    if not extend.stages:
        return extend
    stages = tuple(_small_stage(stage, SEQ_LEN << i) for i, stage in enumerate(extend.stages, 1))
    gate = replace(extend.gate, every_steps=20, min_accuracy=0.0, loss_tolerance_nats=0.5)
    return replace(extend, stages=stages, gate=gate)


def _small_stage(stage: ExtendStageConfig, seq_len: int) -> ExtendStageConfig:
    """Return a stage of that length with its parts, over whatever sources the data has."""
    return replace(
        stage, seq_len=seq_len, steps=20, max_steps=40, tokens=0, global_batch_size=0, blend={},
        yarn_original_tokens=seq_len // 2 if stage.yarn_original_tokens else 0,
        parts=tuple(replace(part, blend={}) for part in stage.parts))


def _small(phase: PhaseConfig, seq_len: int) -> PhaseConfig:
    """Return a phase with its part of the run kept, over whatever sources the data has."""
    return replace(phase, tokens=0, share=phase.tokens or phase.share, blend={}, seq_len=seq_len,
                   global_batch_size=0, lr=0.0, min_lr=0.0, rewarm_steps=0)

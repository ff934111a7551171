"""Changes in model, curriculum and batch size for a longer context."""

import dataclasses
import json
from dataclasses import replace
from typing import Any

from megatron_sov.base.artifacts import format_json
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import (
    DataConfig, ExtendConfig, ExtendStageConfig, GateConfig, ModelConfig, NeedleConfig, OptimConfig,
    ParallelConfig, PartConfig, PhaseConfig, RunConfig, YarnConfig)

PHASE = "extend"


def stage_phases(stages: tuple[ExtendStageConfig, ...], optim: OptimConfig) -> tuple[PhaseConfig, ...]:
    """Return the stages of an extension as phases at full length, each with a separate schedule.

    `extend` trains the stages themselves; `plan` and other readers of a curriculum see these phases.
    """
    return tuple(PhaseConfig(
        s.name, tokens=s.tokens or max(s.steps, s.max_steps) * s.global_batch_size * s.seq_len,
        seq_len=s.seq_len, global_batch_size=s.global_batch_size, lr=s.lr or optim.lr,
        rewarm_steps=optim.warmup_steps) for s in stages)


def mix_stage(rest: str, rehearsal: dict[str, float], name: str, seq_len: int, batch_size: int,
              long_share: float, rehearsal_share: float, **yarn: Any) -> ExtendStageConfig:
    """Return an extension stage: long documents, rehearsal of a blend, and the source `rest` as the rest."""
    return ExtendStageConfig(
        name, seq_len=seq_len, steps=1000, max_steps=2000, global_batch_size=batch_size, blend={rest: 1.0},
        parts=(PartConfig("long", long_share), PartConfig("rehearsal", rehearsal_share, rehearsal)), **yarn)


def extend_run(run: RunConfig, recipe: str, stages: tuple[ExtendStageConfig, ...], optim: OptimConfig,
               parallel: ParallelConfig) -> RunConfig:
    """Return the gated extension of a pretraining run in bf16, with needles at each length."""
    return replace(
        run, recipe=recipe, parallel=parallel, data=DataConfig(phases=stage_phases(stages, optim)),
        optim=optim, train=replace(run.train, global_batch_size=stages[0].global_batch_size, fp8="none"),
        needle=NeedleConfig(lengths_tokens=(run.data.max_seq_len(), *(stage.seq_len for stage in stages))),
        extend=ExtendConfig(stages=stages, gate=GateConfig(every_steps=250, min_accuracy=0.98)))


def extend_model(model: ModelConfig, trained_tokens: int, new_tokens: int, rope_theta: float = 0.0,
                 yarn_factor: float = 0.0, yarn_original_tokens: int = 0) -> ModelConfig:
    """Return `model` with settings for a longer context.

    If all layers are global, YaRN scales RoPE by new / original length (arXiv 2309.00071); the original
    length is the length before all extensions, unless the stage sets it. Models with sliding layers, or
    without RoPE in global layers, only get a larger `max_position_tokens`.

    Args:
        model: trained architecture.
        trained_tokens: longest trained context, in tokens.
        new_tokens: new context, in tokens.
        rope_theta: new RoPE base, used instead of YaRN; 0: unchanged.
        yarn_factor: YaRN's factor; 1: no YaRN; 0: new / original length.
        yarn_original_tokens: YaRN's original context; 0: the length before all extensions.

    Raises:
        UserError: RoPE settings for a model with sliding layers or without RoPE.
    """
    if not model.rotates() and (rope_theta or yarn_factor or yarn_original_tokens):
        raise UserError(f"rope_theta = {rope_theta:g}, yarn_factor = {yarn_factor:g}, yarn_original_tokens = "
                        f"{yarn_original_tokens}: no layer of the model rotates (model.rope_on_global); "
                        "leave them out")
    if "L" in model.attention_pattern and (rope_theta or yarn_factor or yarn_original_tokens):
        raise UserError(f"rope_theta = {rope_theta:g}, yarn_factor = {yarn_factor:g}, yarn_original_tokens = "
                        f"{yarn_original_tokens}: the model has sliding layers, whose rotations reach as far "
                        "as their window at any length; leave them out")
    longest = max(model.max_position_tokens, new_tokens)
    before = model.yarn.original_max_position_tokens if model.yarn else trained_tokens
    original = yarn_original_tokens or before
    reached = original * model.yarn.factor if model.yarn else original
    if rope_theta:
        model = replace(model, rope_theta=rope_theta)
    if yarn_factor == 1 or (rope_theta and not yarn_factor):
        return replace(model, yarn=None, max_position_tokens=longest)
    if not yarn_factor and ("L" in model.attention_pattern or not model.rotates() or new_tokens <= reached):
        return replace(model, max_position_tokens=longest)
    factor = yarn_factor or new_tokens / original
    yarn = replace(model.yarn or YarnConfig(), factor=factor, original_max_position_tokens=original)
    # The limit of the scaled RoPE, and the value that transformers expects.
    return replace(model, yarn=yarn, max_position_tokens=max(new_tokens, round(factor * original)))


def phase_setting(seq_len: int, name: str = PHASE, blend: dict[str, float] | None = None) -> str:
    return "data.phases=" + json.dumps(
        [dataclasses.asdict(PhaseConfig(name, seq_len=seq_len, blend=blend or {}))])


def length_settings(recipe: RunConfig, longer: ModelConfig, trained_tokens: int, new_tokens: int,
                    per_rank: int) -> tuple[str, ...]:
    """Return the settings that follow from a new context length.

    Args:
        recipe: unchanged recipe.
        longer: checkpoint's architecture, with settings for the new context.
        trained_tokens: longest trained context, in tokens.
        new_tokens: new context, in tokens.
        per_rank: samples of the global batch per data-parallel rank.
    """
    limit_tokens = recipe.train.micro_batch_size * recipe.data.max_seq_len()
    return (
        f"model.max_position_tokens={longer.max_position_tokens}", f"model.yarn={format_json(longer.yarn)}",
        f"model.rope_theta={longer.rope_theta}",
        f"train.micro_batch_size={find_micro_batch_size(limit_tokens, new_tokens, per_rank)}",
        f"needle.lengths_tokens={sorted({trained_tokens, new_tokens})}")


def find_micro_batch_size(limit_tokens: int, seq_len: int, per_rank: int) -> int:
    """Return the largest micro-batch size up to `limit_tokens` tokens that divides `per_rank`; at least 1."""
    return max((m for m in range(1, limit_tokens // seq_len + 1) if per_rank % m == 0), default=1)

"""A recipe at a longer context: what changes in the model, the curriculum and the batch."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

from megatron_sov.base.artifacts import format_json
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import (
    ExtendStageConfig, ModelConfig, OptimConfig, PhaseConfig, RunConfig, YarnConfig)
from megatron_sov.model.recipes.sources import Sources, ours

PHASE = "extend"
PHASE_SOURCES: Sources = dict.fromkeys(
    (f"data.phases.*.{name}"
     for name in ("name", "tokens", "seq_len", "global_batch_size", "rewarm_steps", "lr")),
    ours("the stage's with all its steps, so that `plan` shows it"))
"""Where the values of `stage_phases` come from."""
SET_IN_A_STAGE = tuple(
    f"extend.stages.*.{name}" for name in ("name", "steps", "max_steps", "global_batch_size"))
"""What a recipe with stages has to choose where only their lengths and parts are published."""


def stage_phases(stages: tuple[ExtendStageConfig, ...], optim: OptimConfig) -> tuple[PhaseConfig, ...]:
    """Return an extension's stages as phases that take all their steps, each with a schedule of its own.

    `extend` trains by the stages; these phases are for what looks at a recipe as a curriculum.
    """
    return tuple(PhaseConfig(
        s.name, tokens=s.tokens or max(s.steps, s.max_steps) * s.global_batch_size * s.seq_len,
        seq_len=s.seq_len, global_batch_size=s.global_batch_size, lr=s.lr or optim.lr,
        rewarm_steps=optim.warmup_steps) for s in stages)


def extended(model: ModelConfig, trained_tokens: int, new_tokens: int, rope_theta: float = 0.0,
             yarn_factor: float = 0.0, yarn_original_tokens: int = 0) -> ModelConfig:
    """Return `model` ready for a longer context.

    Where all layers are global, YaRN stretches the rotations by new / original length (arXiv 2309.00071); the
    original length is the one before any earlier extension, unless the stage names it.  Sliding layers see no
    farther than before and NoPE layers have no rotations, so hybrids of the two stay as they are.

    Args:
        model: the architecture as trained.
        trained_tokens: longest context it was trained on.
        new_tokens: context that it is to be trained on.
        rope_theta: new base of the rotations, which then stretches them in YaRN's stead; 0: as it was.
        yarn_factor: YaRN's factor; 1: none, 0: by the lengths.
        yarn_original_tokens: length that YaRN stretches; 0: the one before any earlier extension.

    Raises:
        UserError: rotations are to be changed where sliding layers keep theirs, or no layer has any.
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
    # the stretched rotations reach so far and no farther; transformers expects the same figure
    return replace(model, yarn=yarn, max_position_tokens=max(new_tokens, round(factor * original)))


def phase_setting(seq_len: int, name: str = PHASE, blend: dict[str, float] | None = None) -> str:
    return "data.phases=" + json.dumps(
        [dataclasses.asdict(PhaseConfig(name, seq_len=seq_len, blend=blend or {}))])


def length_settings(recipe: RunConfig, longer: ModelConfig, trained_tokens: int, new_tokens: int,
                    per_rank: int) -> tuple[str, ...]:
    """Return the settings that follow from a new context length.

    Args:
        recipe: the recipe as it stands in the list.
        longer: the checkpoint's architecture, made ready for it.
        trained_tokens: longest context that it was trained on.
        new_tokens: context that it is to be trained on.
        per_rank: samples of the global batch that each data-parallel rank takes.
    """
    limit_tokens = recipe.train.micro_batch_size * recipe.data.max_seq_len()
    return (
        f"model.max_position_tokens={longer.max_position_tokens}",
        f"model.yarn={format_json(longer.yarn)}",
        f"model.rope_theta={longer.rope_theta}",
        f"train.micro_batch_size={micro_batch_size(limit_tokens, new_tokens, per_rank)}",
        f"needle.lengths_tokens={sorted({trained_tokens, new_tokens})}",
    )


def micro_batch_size(limit_tokens: int, seq_len: int, per_rank: int) -> int:
    """Return the largest number of samples of `seq_len` within `limit_tokens` that divides
    `per_rank`; at least 1."""
    return max((m for m in range(1, limit_tokens // seq_len + 1) if per_rank % m == 0), default=1)

"""The stages of an extension: each one's settings and folder, resolved before the first of them starts."""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from megatron_sov import recipes
from megatron_sov.config import ExtendStageConfig, ModelConfig, RunConfig
from megatron_sov.data.token_shards import Source, open_sources
from megatron_sov.errors import UserError
from megatron_sov.extend.blends import stage_blend
from megatron_sov.recipes.extension import PHASE, extended, length_settings, phase_setting
from megatron_sov.runs.folder import STAGES, RunFolder
from megatron_sov.runs.launch_environment import num_ranks
from megatron_sov.train.stage_config import stage_config


@dataclass(frozen=True)
class PlannedStage:
    """One run of an extension."""

    config: RunConfig
    """Resolved settings."""
    folder: RunFolder
    """RUN for the last stage, RUN/stages/<number>-<name> for those before."""
    min_steps: int
    """Optimizer steps before the gate may end it."""


def planned_stages(args: argparse.Namespace, start: Path) -> list[PlannedStage]:
    """Return the stages that the settings ask for, in order.

    Each stage's model follows from the one before, so that all mistakes show before any stage is trained.

    Raises:
        UserError: settings, data or a folder do not allow it.
    """
    from megatron_sov.generate.target import Target

    made = Target(start, False)
    trained_tokens = made.trained_tokens if made.config is not None else made.model.max_position_tokens
    wanted = stage_config(args, start, defaults=(phase_setting(2 * trained_tokens),))
    if not wanted.extend.stages:
        return [_as_set(args, start, made.model, trained_tokens, wanted)]
    sources = open_sources(wanted.data.paths, wanted.model.vocab_size)
    planned: list[PlannedStage] = []
    model, before_tokens = made.model, trained_tokens
    for number, stage in enumerate(wanted.extend.stages, 1):
        try:
            model = extended(model, before_tokens, stage.seq_len, stage.rope_theta, stage.yarn_factor,
                             stage.yarn_original_tokens)
        except UserError as e:
            raise UserError(f"extend.stages.{number - 1} ({stage.name}): {e}") from None
        last = number == len(wanted.extend.stages)
        folder = RunFolder(args.run if last else args.run / STAGES / f"{number}-{stage.name}")
        config, min_steps = _resolved(args, start, stage, model, before_tokens, trained_tokens, sources,
                                      wanted.needle.train_share)
        planned.append(PlannedStage(config, folder, min_steps))
        before_tokens = stage.seq_len
    return planned


def _as_set(args: argparse.Namespace, start: Path, model: ModelConfig, trained_tokens: int, wanted: RunConfig) -> PlannedStage:
    """Return the one stage of a run whose phases and steps stand in `data` and `train`."""
    new_tokens = max(p.seq_len for p in wanted.data.phases)
    longer = length_settings(recipes.get(args.recipe), extended(model, trained_tokens, new_tokens), trained_tokens, new_tokens,
                             _per_rank(args, wanted))
    config = stage_config(args, start, defaults=(phase_setting(2 * trained_tokens), *longer))
    return PlannedStage(config, RunFolder(args.run), 0)


def _resolved(args: argparse.Namespace, start: Path, stage: ExtendStageConfig, model: ModelConfig, before_tokens: int,
              trained_tokens: int, sources: list[Source], needle_share: float) -> tuple[RunConfig, int]:
    """Return a stage's settings, and its steps before the gate may end it; what the stage itself says wins over --set."""
    phase = phase_setting(stage.seq_len, stage.name or PHASE, stage_blend(stage, sources, before_tokens, needle_share))
    own = [phase]
    if stage.global_batch_size:
        own.append(f"train.global_batch_size={stage.global_batch_size}")
    if stage.lr:
        own += [f"optim.lr={stage.lr}"]
    arguments = argparse.Namespace(**{**vars(args), "settings": [*args.settings, *own]})
    first = stage_config(arguments, start)
    longer = length_settings(recipes.get(args.recipe), model, trained_tokens, stage.seq_len, _per_rank(args, first))
    config = stage_config(arguments, start, defaults=longer)
    size = config.train.global_batch_size
    min_steps = stage.steps or math.ceil(stage.tokens / (size * stage.seq_len)) or config.num_steps()
    steps = max(stage.max_steps, min_steps)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps)), min_steps


def _per_rank(args: argparse.Namespace, config: RunConfig) -> int:
    """Return the samples of a global batch that each data-parallel rank takes."""
    replicas = num_ranks(args.nproc) // max(1, config.parallel.ranks_per_replica)
    return max(1, config.train.global_batch_size // max(1, replicas))

"""Stages of a context extension: settings and data blends, resolved before the first stage starts."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_sov.base.errors import UserError
from megatron_sov.eval.needle.documents import SOURCE_NAME
from megatron_sov.infer.engines.target import Target, find_target
from megatron_sov.model.config import ExtendStageConfig, ModelConfig, PartConfig, RunConfig
from megatron_sov.model.recipes.extension import PHASE, extend_model, length_settings, phase_setting
from megatron_sov.model.recipes.requested import RecipeRequest
from megatron_sov.runs import checkpoints
from megatron_sov.runs.folder import STAGES, RunFolder
from megatron_sov.runs.launch_environment import num_ranks
from megatron_sov.train.data.sources import TEXTS, Source, open_sources
from megatron_sov.train.data.views import LONG_MARK, PIECES_MARK, LongDocuments


@dataclass(frozen=True)
class PlannedStage:
    """A run within an extension."""

    config: RunConfig
    folder: RunFolder
    """RUN for the last stage, RUN/stages/<number>-<name> for earlier stages."""
    min_steps: int
    """Optimizer steps before the gate may end the stage."""


def plan_stages(request: RecipeRequest, start_from: Path, run: Path, nproc: int | None,
                formats: Callable[[RunConfig], tuple[str, ...]] = lambda config: TEXTS) -> list[PlannedStage]:
    """Resolve the settings for all stages in `extend.stages`, so that mistakes show before training.

    Args:
        request: the requested settings; the base has the architecture of `start_from`.
        start_from: checkpoint, run or Hugging Face folder, the start of the first stage.
        run: folder of the run.
        nproc: local processes.
        formats: settings -> data formats of the objective.

    Raises:
        UserError: a stage is shorter than the start, or the data have no source for a part of a stage.
    """
    start, model = find_target(start_from), request.base.model
    # The trained length includes all earlier runs: fine-tuning on short chats does not shorten it.
    trained_tokens = model.max_position_tokens if start.is_hf else checkpoints.read_trained_tokens(start.path)
    requested = request.config([] if request.from_file else [phase_setting(2 * trained_tokens)])
    if not requested.extend.stages:
        _check_longer("data.phases", requested.data.max_seq_len(), start, trained_tokens)
        config = _resolve_single_stage(request, trained_tokens, requested, nproc)
        return [PlannedStage(config, RunFolder(run), 0)]
    sources = open_sources(requested.data.paths, requested.model.vocab_size, formats(requested))
    planned: list[PlannedStage] = []
    previous_tokens = trained_tokens
    for number, stage in enumerate(requested.extend.stages, 1):
        if stage.kind == "extension":
            _check_longer(f"extend.stages.{number - 1} ({stage.name})", stage.seq_len, start, trained_tokens)
        try:
            # The rotary embedding extends the rotary embedding of the previous stage.
            model = extend_model(
                model, previous_tokens, stage.seq_len, rope_theta=stage.rope_theta,
                yarn_factor=stage.yarn_factor, yarn_original_tokens=stage.yarn_original_tokens)
        except UserError as e:
            raise UserError(f"extend.stages.{number - 1} ({stage.name}): {e}") from None
        last = number == len(requested.extend.stages)
        folder = RunFolder(run if last else run / STAGES / f"{number}-{stage.name}")
        blend = build_stage_blend(stage, sources, previous_tokens, requested.needle.train_share)
        config, min_steps = _resolve_stage(request, stage, model, trained_tokens, blend=blend, nproc=nproc)
        planned.append(PlannedStage(config, folder, min_steps))
        previous_tokens = stage.seq_len
    return planned


def _check_longer(where: str, new_tokens: int, start: Target, trained_tokens: int) -> None:
    """Raise `UserError` if an extension is shorter than the trained length, if `start` records one."""
    start_tokens = min(start.trained_tokens, trained_tokens)
    if start.config is not None and new_tokens < start_tokens:
        raise UserError(f"{where}: seq_len = {new_tokens} is shorter than the {start_tokens} tokens "
                        f"that {start.path} was trained on; extend to at least that length, or continue at "
                        "that length with `megatron-sov pretrain --from`")


def _resolve_single_stage(request: RecipeRequest, trained_tokens: int, requested: RunConfig, nproc: int | None
                          ) -> RunConfig:
    """Resolve the settings for a run with a single stage, defined by `data.phases` and `train.steps`."""
    new_tokens = requested.data.max_seq_len()
    longer = length_settings(request.base, extend_model(request.base.model, trained_tokens, new_tokens),
                             trained_tokens, new_tokens, _count_samples_per_rank(requested, nproc))
    # Settings in a file of an earlier run are resolved, except for the architecture of the checkpoint.
    if request.from_file:
        return request.config([s for s in longer if s.startswith("model.")])
    return request.config([phase_setting(2 * trained_tokens), *longer])


def _resolve_stage(request: RecipeRequest, stage: ExtendStageConfig, model: ModelConfig,
                   trained_tokens: int, *, blend: dict[str, float], nproc: int | None
                   ) -> tuple[RunConfig, int]:
    """Resolve a stage's settings, which override --set, and `PlannedStage.min_steps`."""
    phases = [phase_setting(stage.seq_len, stage.name or PHASE, blend)]
    if stage.global_batch_size:
        phases.append(f"train.global_batch_size={stage.global_batch_size}")
    if stage.lr:
        phases += [f"optim.lr={stage.lr}"]
    first = request.config(own=phases)
    longer = length_settings(request.base, model, trained_tokens, stage.seq_len,
                             _count_samples_per_rank(first, nproc))
    config = request.config(longer, phases)
    size = config.train.global_batch_size
    # First choice: steps of the stage; then tokens of the stage; then steps of the run.
    min_steps = stage.steps or math.ceil(stage.tokens / (size * stage.seq_len)) or config.num_steps()
    steps = max(stage.max_steps, min_steps)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps)), min_steps


def _count_samples_per_rank(config: RunConfig, nproc: int | None) -> int:
    replicas = num_ranks(nproc) // max(1, config.parallel.ranks_per_replica)
    return max(1, config.train.global_batch_size // max(1, replicas))


def build_stage_blend(stage: ExtendStageConfig, sources: list[Source], trained_tokens: int,
                      needle_share: float) -> dict[str, float]:
    """Return source name -> sample share, with sum 1; {} if the stage names no parts and no blend.

    Args:
        stage: parts and blend.
        sources: the packed data.
        trained_tokens: sample length before the stage: part `long` takes longer documents, part `rehearsal`
            documents cut to `trained_tokens`.
        needle_share: share of needle documents in a phase and in the part `rehearsal`.
    """
    if not stage.parts:
        return dict(stage.blend)
    blends = [(part.share, part.blend or _default_blend(part, stage, sources, trained_tokens, needle_share))
              for part in stage.parts]
    rest = 1 - sum(part.share for part in stage.parts)
    # The float sum of decimal shares may miss 1 by rounding.
    if rest > 1e-9:
        blends.append((rest, stage.blend or {s.name: s.share for s in sources if s.num_tokens["train"]}))
    shares: dict[str, float] = {}
    for share, blend in blends:
        total = sum(blend.values())
        if total <= 0:
            raise UserError(f"extend stage {stage.name}: blend {blend} has no weight above 0; "
                            "give at least one source a weight")
        for name, weight in blend.items():
            # Several parts may share a source.
            shares[name] = shares.get(name, 0.0) + share * weight / total
    return shares


def _default_blend(part: PartConfig, stage: ExtendStageConfig, sources: list[Source], trained_tokens: int,
                   needle_share: float) -> dict[str, float]:
    """Return a part's default blend: matching sources by share. `rehearsal` includes short needle
    documents, to retain retrieval at the earlier length."""
    available = [s for s in sources if s.num_tokens["train"]]
    if part.name == "trajectories":
        blend = {s.name: s.share for s in available if s.is_chat}
        kind = "source of chats (sov-data pack --format chat)"
    elif part.name == "long":
        minimum = trained_tokens + 1
        blend = {f"{s.name}{LONG_MARK}{minimum}": s.share for s in available
                 if not s.is_chat and len(LongDocuments(s.open_split("train"), minimum).index)}
        kind = f"text source with documents of {minimum} tokens or more"
    else:
        blend = {f"{s.name}{PIECES_MARK}{trained_tokens}": s.share for s in available if not s.is_chat}
        kind = "text source"
    if not blend:
        raise UserError(f"extend stage {stage.name}: its part {part.name} names no source, and the data has "
                        f"no {kind}; give the part a blend, or add such data")
    if part.name == "rehearsal" and needle_share:
        weight = sum(blend.values()) * needle_share / (1 - needle_share)
        blend[f"{SOURCE_NAME}{PIECES_MARK}{trained_tokens}"] = weight
    return blend

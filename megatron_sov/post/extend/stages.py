"""The stages of an extension: each one's settings, blend of sources and folder, resolved before the first of
them starts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.base.documents.overlap import window_hashes
from megatron_sov.base.errors import UserError
from megatron_sov.eval.needle.documents import SOURCE_NAME
from megatron_sov.infer.engines.target import Target, find_target
from megatron_sov.model.config import ExtendStageConfig, ModelConfig, PartConfig, RunConfig
from megatron_sov.model.recipes.extension import PHASE, extend_model, length_settings, phase_setting
from megatron_sov.model.recipes.requested import RecipeRequest
from megatron_sov.runs import checkpoints
from megatron_sov.runs.folder import STAGES, RunFolder
from megatron_sov.runs.launch_environment import num_ranks
from megatron_sov.train.data.token_shards import TEXTS, Documents, Source, open_sources
from megatron_sov.train.data.views import LONG, SHORT, LongDocuments

# The proof that what the gate asks, and where it hides it, does not occur in what the stage trains on.
#
# Training documents are searched for every question of the test (all pairs of words kept for tests, not
# only
# those of this test) and for windows of the held-out text.  A window is known by the hash by which runs of
# words are known (`documents.overlap`): among 10^8 places and 10^6 windows a chance hit has a probability
# of
# 5e-6.

WINDOW_TOKENS = 32
"""Tokens of a window; one begins at every `WINDOW_TOKENS`-th token of a held-out document, so that every
stretch of twice the length that training text shares with it is found."""
PIECE_TOKENS = 1 << 20
MADE_DOCUMENTS = 256
"""Documents made on the fly that are searched."""


@dataclass(frozen=True)
class Decontamination:
    """What the search found."""

    scanned_tokens: dict[str, int]
    """Source -> training tokens that were searched."""
    train_tokens: dict[str, int]
    """Source -> training tokens that it has."""
    questions: int
    """Different questions that the test may ask."""
    questions_found: int
    """Places in the training text with one of them."""
    windows: int
    """Windows of the held-out text that were looked for."""
    windows_found: int
    """Those that occur in the training text."""
    window_tokens: int = WINDOW_TOKENS
    """Tokens of a window."""

    @property
    def overlap(self) -> float:
        return self.windows_found / self.windows if self.windows else 0.0

    def fields(self) -> dict[str, Any]:
        return {**asdict(self), "overlap": self.overlap}


def search(questions: list[list[int]], sources: list[Source], scan_tokens: int) -> Decontamination:
    """Search the training documents of all sources, in their stored order,
    up to `scan_tokens` tokens of each.

    Args:
        questions: token ids of every question that the test may ask.
        sources: packed ones, with their held-out split, and those made on the fly.
        scan_tokens: bound for each source and split.
    """
    asked: dict[int, np.ndarray] = {}
    # By length: a window of text can only equal a question of its own length.
    for length in {len(q) for q in questions}:
        asked[length] = np.unique(np.concatenate([window_hashes(np.array(q), length)
                                                  for q in questions if len(q) == length]))
    held = [np.zeros(0, np.uint64)]
    for source in sources:
        if source.made is None and not source.is_chat and source.num_tokens.get("heldout", 0):
            # Held-out windows side by side, training windows at every place: any shift is found.
            held += [window_hashes(text, WINDOW_TOKENS)[::WINDOW_TOKENS]
                     for text in _texts(source.shard("heldout"), scan_tokens)]
    windows = np.unique(np.concatenate(held))
    met = np.zeros(len(windows), bool)
    hits, scanned = 0, {}
    for source in sources:
        scanned[source.name] = 0
        limit = scan_tokens if source.made is None else min(scan_tokens,
                                                            MADE_DOCUMENTS * int(source.made.lengths[0]))
        for text in _texts(source.shard("train"), limit):
            scanned[source.name] += int((text >= 0).sum())
            hits += sum(int(np.isin(window_hashes(text, length), known).sum())
                        for length, known in asked.items())
            # what is made hides its needles in training text, which is searched where it lies
            if source.made is None:
                met |= np.isin(windows, window_hashes(text, WINDOW_TOKENS))
    return Decontamination(scanned, {s.name: s.num_tokens["train"] for s in sources}, len(questions), hits,
                           len(windows), int(met.sum()))


def _texts(documents: Documents, limit_tokens: int) -> Iterator[np.ndarray]:
    """Yield documents in pieces, joined by a token that no text has, so that many short ones cost no
    more than a long one."""
    left, parts, size = limit_tokens, [], 0
    # So no window runs from one document into the next.
    between = np.array([-2])
    for document, length in enumerate(documents.lengths):
        if left <= 0:
            break
        count = min(int(length), left)
        left -= count
        parts += [documents.tokens(document, 0, count), between]
        size += count + 1
        if size >= PIECE_TOKENS:
            yield np.concatenate(parts)
            parts, size = [], 0
    if parts:
        yield np.concatenate(parts)


def refuse_contaminated(found: Decontamination, max_overlap: float) -> None:
    """Raise `UserError` where the gate would measure memory."""
    if found.questions_found:
        raise UserError(f"--data: {found.questions_found} questions of the needle test stand in the training "
                        "text; take those documents out, or train a tokenizer whose rare words "
                        "make other needles")
    if found.overlap > max_overlap:
        raise UserError(f"--data: {found.overlap:.1%} of the held-out text stands in the training text as "
                        f"well, more than extend.gate.max_overlap = {max_overlap:g}; "
                        "remove duplicates before packing, or raise the limit")


@dataclass(frozen=True)
class PlannedStage:
    """One run of an extension."""

    config: RunConfig
    """Resolved settings."""
    folder: RunFolder
    """RUN for the last stage, RUN/stages/<number>-<name> for those before."""
    min_steps: int
    """Optimizer steps before the gate may end it."""


def planned_stages(request: RecipeRequest, start_from: Path, run: Path, nproc: int | None,
                   formats: Callable[[RunConfig], tuple[str, ...]] = lambda config: TEXTS,
                   ) -> list[PlannedStage]:
    """Return the stages that the settings ask for, in order.

    Each stage's model follows from the one before, so that all mistakes show before any stage is trained.

    Args:
        request: what was asked for; its base has the architecture of `start_from`.
        start_from: checkpoint, run or Hugging Face folder that the first stage starts from.
        run: folder of the run.
        nproc: local processes.
        formats: those of data that the objective of a run learns from.

    Raises:
        UserError: settings, data or a folder do not allow it.
    """
    start, model = find_target(start_from), request.base.model
    # not the run's own samples: after a fine-tuning on short chats the weights are good for what they were
    trained_tokens = model.max_position_tokens if start.is_hf else checkpoints.read_trained_tokens(start.path)
    wanted = request.config([] if request.from_file else [phase_setting(2 * trained_tokens)])
    if not wanted.extend.stages:
        _refuse_shorter("data.phases", wanted.data.max_seq_len(), start, trained_tokens)
        return [PlannedStage(_as_set(request, trained_tokens, wanted, nproc), RunFolder(run), 0)]
    sources = open_sources(wanted.data.paths, wanted.model.vocab_size, formats(wanted))
    planned: list[PlannedStage] = []
    before_tokens = trained_tokens
    for number, stage in enumerate(wanted.extend.stages, 1):
        if stage.kind == "extension":
            _refuse_shorter(f"extend.stages.{number - 1} ({stage.name})", stage.seq_len, start,
                            trained_tokens)
        try:
            # Each stage's rotations follow from those of the one before.
            model = extend_model(model, before_tokens, stage.seq_len, stage.rope_theta, stage.yarn_factor,
                             stage.yarn_original_tokens)
        except UserError as e:
            raise UserError(f"extend.stages.{number - 1} ({stage.name}): {e}") from None
        last = number == len(wanted.extend.stages)
        folder = RunFolder(run if last else run / STAGES / f"{number}-{stage.name}")
        blend = stage_blend(stage, sources, before_tokens, wanted.needle.train_share)
        config, min_steps = _resolve_stage(request, stage, model, trained_tokens, blend, nproc)
        planned.append(PlannedStage(config, folder, min_steps))
        before_tokens = stage.seq_len
    return planned


def _refuse_shorter(where: str, new_tokens: int, start: Target, trained_tokens: int) -> None:
    """Raise `UserError` where an extension is shorter than what the start was trained on, which an imported
    model does not tell."""
    own_tokens = min(start.trained_tokens, trained_tokens)
    if start.config is not None and new_tokens < own_tokens:
        raise UserError(f"{where}: seq_len = {new_tokens} is shorter than the {own_tokens} tokens "
                        f"that {start.path} was trained on; extend to at least those, or train on at that "
                        "length with `megatron-sov pretrain --from`")


def _as_set(request: RecipeRequest, trained_tokens: int, wanted: RunConfig, nproc: int | None) -> RunConfig:
    """Return the settings of a run of one stage, whose phases and steps stand in `data` and `train`."""
    new_tokens = wanted.data.max_seq_len()
    longer = length_settings(request.base, extend_model(request.base.model, trained_tokens, new_tokens),
                             trained_tokens, new_tokens, _per_rank(wanted, nproc))
    # a run's own settings have been through this, all but the checkpoint's architecture
    if request.from_file:
        return request.config([s for s in longer if s.startswith("model.")])
    return request.config([phase_setting(2 * trained_tokens), *longer])


def _resolve_stage(request: RecipeRequest, stage: ExtendStageConfig, model: ModelConfig, trained_tokens: int,
                   blend: dict[str, float], nproc: int | None) -> tuple[RunConfig, int]:
    """Return a stage's settings, and its steps before the gate may end it;
    what the stage itself says wins over --set."""
    own = [phase_setting(stage.seq_len, stage.name or PHASE, blend)]
    if stage.global_batch_size:
        own.append(f"train.global_batch_size={stage.global_batch_size}")
    if stage.lr:
        own += [f"optim.lr={stage.lr}"]
    first = request.config(own=own)
    longer = length_settings(request.base, model, trained_tokens, stage.seq_len, _per_rank(first, nproc))
    config = request.config(longer, own)
    size = config.train.global_batch_size
    # Steps, else tokens, else what the run's own settings say.
    min_steps = stage.steps or math.ceil(stage.tokens / (size * stage.seq_len)) or config.num_steps()
    steps = max(stage.max_steps, min_steps)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps)), min_steps


def _per_rank(config: RunConfig, nproc: int | None) -> int:
    replicas = num_ranks(nproc) // max(1, config.parallel.ranks_per_replica)
    return max(1, config.train.global_batch_size // max(1, replicas))


def stage_blend(stage: ExtendStageConfig, sources: list[Source], trained_tokens: int,
                needle_share: float) -> dict[str, float]:
    """Return source name -> share of the samples, summing to 1; empty where the stage asks for
    nothing in particular.

    Args:
        stage: its parts and blend.
        sources: the packed data.
        trained_tokens: length of the samples before the stage: what is longer is long,
            what is cut to it is short.
        needle_share: part of a phase's samples that are needle documents; of what is rehearsed too.

    Raises:
        UserError: a part has no source of its kind in the data.
    """
    if not stage.parts:
        return dict(stage.blend)
    blends = [(part.share, part.blend or _default(part, stage, sources, trained_tokens, needle_share))
              for part in stage.parts]
    rest = 1 - sum(part.share for part in stage.parts)
    # Shares are decimal fractions, whose float sum may miss 1 by rounding.
    if rest > 1e-9:
        blends.append((rest, stage.blend or {s.name: s.share for s in sources if s.num_tokens["train"]}))
    found: dict[str, float] = {}
    for share, blend in blends:
        total = sum(blend.values())
        if total <= 0:
            raise UserError(f"extend stage {stage.name}: blend {blend} has no weight above 0; "
                            "give at least one source a weight")
        for name, weight in blend.items():
            # A source may be in several parts.
            found[name] = found.get(name, 0.0) + share * weight / total
    return found


def _default(part: PartConfig, stage: ExtendStageConfig, sources: list[Source], trained_tokens: int,
             needle_share: float) -> dict[str, float]:
    """Return the blend of a part that names no source: every source of its kind by its own share.

    What is rehearsed has short needle documents in it, so that retrieval at the old length is not
    lost over the new one.
    """
    held = [s for s in sources if s.num_tokens["train"]]
    if part.name == "trajectories":
        blend, kind = ({s.name: s.share for s in held if s.is_chat},
                       "source of chats (sov-data pack --format chat)")
    elif part.name == "long":
        minimum = trained_tokens + 1
        blend = {f"{s.name}{LONG}{minimum}": s.share for s in held
                 if not s.is_chat and len(LongDocuments(s.shard("train"), minimum).index)}
        kind = f"text source with documents of {minimum} tokens or more"
    else:
        blend = {f"{s.name}{SHORT}{trained_tokens}": s.share for s in held if not s.is_chat}
        kind = "text source"
    if not blend:
        raise UserError(f"extend stage {stage.name}: its part {part.name} names no source, and the data has "
                        f"no {kind}; give the part a blend, or add such data")
    if part.name == "rehearsal" and needle_share:
        blend[f"{SOURCE_NAME}{SHORT}{trained_tokens}"] = sum(blend.values()) * needle_share / (
            1 - needle_share)
    return blend

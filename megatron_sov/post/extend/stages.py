"""Stages of a context extension: settings, blend of sources and folder of each stage, resolved before the
first starts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.base.documents.overlap import hash_windows
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
from megatron_sov.train.data.views import LONG_MARK, PIECES_MARK, LongDocuments

WINDOW_TOKENS = 32
"""Tokens of a window. Windows start at every `WINDOW_TOKENS`-th token of a held-out document, so that every
shared range of twice the length is found. The hash (`documents.overlap`) makes a chance hit among 10^8 places
and 10^6 windows 5e-6 likely."""
PIECE_TOKENS = 1 << 20
MADE_DOCUMENTS = 256
"""Limit of the searched documents that are made on the fly."""


@dataclass(frozen=True)
class Decontamination:
    """Occurrences of the gate's questions and of held-out text in the training documents."""

    scanned_tokens: dict[str, int]
    """Source -> searched training tokens."""
    train_tokens: dict[str, int]
    """Source -> training tokens."""
    questions: int
    """Distinct questions of the needle test."""
    questions_found: int
    """Places in the training text with a question."""
    windows: int
    """Windows of the held-out text."""
    windows_found: int
    """Windows that occur in the training text."""
    window_tokens: int = WINDOW_TOKENS
    """Tokens of a window."""

    @property
    def overlap(self) -> float:
        return self.windows_found / self.windows if self.windows else 0.0

    def fields(self) -> dict[str, Any]:
        return {**asdict(self), "overlap": self.overlap}


def search_contamination(questions: list[list[int]], sources: list[Source], scan_tokens: int
                         ) -> Decontamination:
    """Search the training documents of all sources for questions of the needle test and windows of held-out
    text.

    Args:
        questions: token ids of all possible questions: all pairs of test words, not only those of this test.
        sources: packed sources with their held-out split, and sources made on the fly.
        scan_tokens: limit of the searched tokens of each source and split.
    """
    question_hashes: dict[int, np.ndarray] = {}
    # By length: a window of text can only equal a question of its own length.
    for length in {len(q) for q in questions}:
        question_hashes[length] = np.unique(np.concatenate([
            hash_windows(np.array(q), length) for q in questions if len(q) == length]))
    windows = _hash_heldout_windows(sources, scan_tokens)
    is_contaminated = np.zeros(len(windows), bool)
    questions_found, scanned = 0, {}
    for source in sources:
        scanned[source.name] = 0
        limit = scan_tokens
        if source.train_documents is not None:
            limit = min(scan_tokens, MADE_DOCUMENTS * int(source.train_documents.lengths[0]))
        for text in _iter_texts(source.open_split("train"), limit):
            scanned[source.name] += int((text >= 0).sum())
            for length, hashes in question_hashes.items():
                questions_found += int(np.isin(hash_windows(text, length), hashes).sum())
            # Documents made on the fly consist of training text, which is searched in its own source.
            if source.train_documents is None:
                is_contaminated |= np.isin(windows, hash_windows(text, WINDOW_TOKENS))
    return Decontamination(
        scanned_tokens=scanned, train_tokens={s.name: s.num_tokens["train"] for s in sources},
        questions=len(questions), questions_found=questions_found, windows=len(windows),
        windows_found=int(is_contaminated.sum()))


def _hash_heldout_windows(sources: list[Source], scan_tokens: int) -> np.ndarray:
    hashes = [np.zeros(0, np.uint64)]
    for source in sources:
        if source.train_documents is None and not source.is_chat and source.num_tokens.get("heldout", 0):
            # Adjacent held-out windows against training windows at every place find any shift.
            hashes += [hash_windows(text, WINDOW_TOKENS)[::WINDOW_TOKENS]
                       for text in _iter_texts(source.open_split("heldout"), scan_tokens)]
    return np.unique(np.concatenate(hashes))


def _iter_texts(documents: Documents, limit_tokens: int) -> Iterator[np.ndarray]:
    """Yield documents joined to pieces of about `PIECE_TOKENS`, so that many short documents are as fast as
    one."""
    remaining, parts, size = limit_tokens, [], 0
    # A token that no text contains, so that no window crosses a document boundary.
    separator = np.array([-2])
    for document, length in enumerate(documents.lengths):
        if remaining <= 0:
            break
        count = min(int(length), remaining)
        remaining -= count
        parts += [documents.tokens(document, 0, count), separator]
        size += count + 1
        if size >= PIECE_TOKENS:
            yield np.concatenate(parts)
            parts, size = [], 0
    if parts:
        yield np.concatenate(parts)


def refuse_contaminated(found: Decontamination, max_overlap: float) -> None:
    """Raise `UserError` if the gate would measure memorisation."""
    if found.questions_found:
        raise UserError(f"--data: {found.questions_found} questions of the needle test occur in the training "
                        "text; take those documents out, or train a tokenizer whose rare words "
                        "make other needles")
    if found.overlap > max_overlap:
        raise UserError(f"--data: {found.overlap:.1%} of the held-out text occurs in the training text "
                        f"too, more than extend.gate.max_overlap = {max_overlap:g}; "
                        "remove duplicates before packing, or raise the limit")


@dataclass(frozen=True)
class PlannedStage:
    """One run of an extension."""

    config: RunConfig
    folder: RunFolder
    """RUN for the last stage, RUN/stages/<number>-<name> for those before."""
    min_steps: int
    """Optimizer steps before the gate may end the stage."""


def plan_stages(request: RecipeRequest, start_from: Path, run: Path, nproc: int | None,
                   formats: Callable[[RunConfig], tuple[str, ...]] = lambda config: TEXTS,
                   ) -> list[PlannedStage]:
    """Return the stages of the settings in order, all resolved, so that mistakes show before any training.

    Args:
        request: the requested settings; the base has the architecture of `start_from`.
        start_from: checkpoint, run or Hugging Face folder that the first stage starts from.
        run: folder of the run.
        nproc: local processes.
        formats: settings -> data formats of the objective.
    """
    start, model = find_target(start_from), request.base.model
    # The trained length of all earlier runs: fine-tuning on short chats does not shorten it.
    trained_tokens = model.max_position_tokens if start.is_hf else checkpoints.read_trained_tokens(start.path)
    wanted = request.config([] if request.from_file else [phase_setting(2 * trained_tokens)])
    if not wanted.extend.stages:
        _refuse_shorter("data.phases", wanted.data.max_seq_len(), start, trained_tokens)
        config = _resolve_single_stage(request, trained_tokens, wanted, nproc)
        return [PlannedStage(config, RunFolder(run), 0)]
    sources = open_sources(wanted.data.paths, wanted.model.vocab_size, formats(wanted))
    planned: list[PlannedStage] = []
    previous_tokens = trained_tokens
    for number, stage in enumerate(wanted.extend.stages, 1):
        if stage.kind == "extension":
            _refuse_shorter(f"extend.stages.{number - 1} ({stage.name})", stage.seq_len, start,
                            trained_tokens)
        try:
            # The rotary embedding of a stage extends that of the previous stage.
            model = extend_model(model, previous_tokens, stage.seq_len, rope_theta=stage.rope_theta,
                             yarn_factor=stage.yarn_factor, yarn_original_tokens=stage.yarn_original_tokens)
        except UserError as e:
            raise UserError(f"extend.stages.{number - 1} ({stage.name}): {e}") from None
        last = number == len(wanted.extend.stages)
        folder = RunFolder(run if last else run / STAGES / f"{number}-{stage.name}")
        blend = build_stage_blend(stage, sources, previous_tokens, wanted.needle.train_share)
        config, min_steps = _resolve_stage(request, stage, model, trained_tokens, blend=blend, nproc=nproc)
        planned.append(PlannedStage(config, folder, min_steps))
        previous_tokens = stage.seq_len
    return planned


def _refuse_shorter(where: str, new_tokens: int, start: Target, trained_tokens: int) -> None:
    """Raise `UserError` if an extension is shorter than the trained length of the start; imported models do
    not record it."""
    start_tokens = min(start.trained_tokens, trained_tokens)
    if start.config is not None and new_tokens < start_tokens:
        raise UserError(f"{where}: seq_len = {new_tokens} is shorter than the {start_tokens} tokens "
                        f"that {start.path} was trained on; extend to at least that length, or continue at "
                        "that length with `megatron-sov pretrain --from`")


def _resolve_single_stage(request: RecipeRequest, trained_tokens: int, wanted: RunConfig, nproc: int | None
                          ) -> RunConfig:
    """Return the settings of a run with one stage, defined by `data.phases` and `train.steps`."""
    new_tokens = wanted.data.max_seq_len()
    longer = length_settings(request.base, extend_model(request.base.model, trained_tokens, new_tokens),
                             trained_tokens, new_tokens, _samples_per_rank(wanted, nproc))
    # Settings of an earlier run are resolved already, except for the architecture of the checkpoint.
    if request.from_file:
        return request.config([s for s in longer if s.startswith("model.")])
    return request.config([phase_setting(2 * trained_tokens), *longer])


def _resolve_stage(request: RecipeRequest, stage: ExtendStageConfig, model: ModelConfig,
                   trained_tokens: int, *, blend: dict[str, float], nproc: int | None
                   ) -> tuple[RunConfig, int]:
    """Return the settings of a stage, and its steps before the gate may end it. Settings of the stage win
    over --set."""
    phases = [phase_setting(stage.seq_len, stage.name or PHASE, blend)]
    if stage.global_batch_size:
        phases.append(f"train.global_batch_size={stage.global_batch_size}")
    if stage.lr:
        phases += [f"optim.lr={stage.lr}"]
    first = request.config(own=phases)
    longer = length_settings(request.base, model, trained_tokens, stage.seq_len,
                             _samples_per_rank(first, nproc))
    config = request.config(longer, phases)
    size = config.train.global_batch_size
    # In this order: steps of the stage, its tokens, steps of the run.
    min_steps = stage.steps or math.ceil(stage.tokens / (size * stage.seq_len)) or config.num_steps()
    steps = max(stage.max_steps, min_steps)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps)), min_steps


def _samples_per_rank(config: RunConfig, nproc: int | None) -> int:
    replicas = num_ranks(nproc) // max(1, config.parallel.ranks_per_replica)
    return max(1, config.train.global_batch_size // max(1, replicas))


def build_stage_blend(stage: ExtendStageConfig, sources: list[Source], trained_tokens: int,
                needle_share: float) -> dict[str, float]:
    """Return source name -> share of the samples, with sum 1; empty if the stage names no parts and no blend.

    Args:
        stage: its parts and blend.
        sources: the packed data.
        trained_tokens: sample length before the stage: longer documents are long, documents cut to it are
            short.
        needle_share: share of needle documents in a phase, and in its rehearsal part.
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
            # A source may belong to several parts.
            shares[name] = shares.get(name, 0.0) + share * weight / total
    return shares


def _default_blend(part: PartConfig, stage: ExtendStageConfig, sources: list[Source], trained_tokens: int,
                   needle_share: float) -> dict[str, float]:
    """Return the blend of a part without one: all sources of its kind by their shares. Rehearsal includes
    short needle documents, so that retrieval at the old length is not forgotten."""
    available = [s for s in sources if s.num_tokens["train"]]
    if part.name == "trajectories":
        blend, kind = ({s.name: s.share for s in available if s.is_chat},
                       "source of chats (sov-data pack --format chat)")
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
        blend[f"{SOURCE_NAME}{PIECES_MARK}{trained_tokens}"] = sum(blend.values()) * needle_share / (
            1 - needle_share)
    return blend

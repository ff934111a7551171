"""Refuses runs that their data, the machine or the hours of a run do not allow, before anything is opened or
started: vocabulary, epochs, memory, time.  Numpy, and no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence

from megatron_sov.base.errors import Fix, UserError
from megatron_sov.base.figures import format_count, format_value
from megatron_sov.commands.train.setup.data_defaults import epoch_samples, open_all_sources, said_settings
from megatron_sov.model import recipes
from megatron_sov.model.config import RunConfig
from megatron_sov.model.families.count import compute_train_flops_per_token, count_params
from megatron_sov.model.recipes.requested import RecipeRequest
from megatron_sov.model.recipes.stage_defaults import MAX_DEFAULT_EPOCHS, Stage, refuse_pretraining_rate
from megatron_sov.plan.calibration.fitting import refuse_on_this_machine
from megatron_sov.runs.gpu_driver import list_visible_gpus
from megatron_sov.runs.launch_environment import has_launcher, num_ranks
from megatron_sov.train.data.token_shards import Source
from megatron_sov.work.clusters.chips import find_device_chip
from megatron_sov.work.clusters.units import SECONDS_PER_HOUR

CONSENTS = ("train.steps", "train.epochs")
"""Settings by which a user agrees to many epochs; a budget of tokens is none, since it names no data."""
LEAST_VOCABULARY_SHARE = 0.5
"""Share of `model.vocab_size` that the tokenizer of the data fills at least.  In the recipes padding and
reserved ids take some percent; a smaller vocabulary is that of another tokenizer."""
CPU_FLOPS_PER_S, GPU_SHARE = 2e10, 0.5
"""What a core, and which share of a GPU's peak a run reaches at best: a bound, not a prediction."""


def refuse_unfit(asked: RecipeRequest, config: RunConfig, stage: Stage | None, nproc: int | None, *,
                 is_initial: bool, dry_run: bool, num_prompts: int = 0) -> None:
    """Refuse a training command that does not fit its data or this machine.

    Args:
        asked: the command line.
        config: its settings, completed.
        stage: of post-training; None: pretraining or a context extension.
        nproc: local processes.
        is_initial: whether the run starts from initial weights, so that the vocabulary can be set.
        dry_run: whether the time of this machine does not matter.
        num_prompts: prompts of reinforcement learning.

    Raises:
        UserError: the learning rate of a pretraining recipe in post-training, another vocabulary, too many
            epochs, too little memory, or days of work; the message names the setting that allows it.
    """
    is_recipe = not asked.from_file and not asked.is_model_only and not asked.base.code
    if stage is not None and is_recipe and "optim.lr" not in said_settings(asked) and (
            recipes.get(config.recipe).objective.name == "lm"):
        refuse_pretraining_rate(config, stage, count_params(config.model).total)
    if config.rollout.rounds and num_prompts and is_recipe:
        _refuse_many_passes(config, num_prompts, said_settings(asked))
    if config.data.paths:
        refuse_unfit_data(asked, config, open_all_sources(config), is_initial=is_initial)
    refuse_on_this_machine(config, nproc)
    if stage not in (None, "policy") and not has_launcher() and not dry_run:
        _refuse_days(config, num_ranks(nproc))


def refuse_unfit_data(asked: RecipeRequest, config: RunConfig, sources: Sequence[Source], *,
                      is_initial: bool) -> None:
    """Refuse data of another tokenizer than the recipe's, or so few that they are read very often.

    A setting of the user is consent: `model.vocab_size` for the tokenizer; for epochs those in `CONSENTS`,
    `data.phases`, `extend.stages` and `data.max_epochs`.

    Args:
        asked: the command line.
        config: its settings.
        sources: the data.
        is_initial: whether the run starts from initial weights, so that the vocabulary can be set.

    Raises:
        UserError: the vocabulary is too small, or the epochs are too many.
    """
    said = said_settings(asked)
    is_recipe = not asked.from_file and not asked.is_model_only and not asked.base.code
    if is_initial and is_recipe and "model.vocab_size" not in said:
        _refuse_small_vocabulary(config, sources)
    if config.rollout.rounds:  # prompts are drawn, not read in epochs
        return
    is_length_set = any(key in (*CONSENTS, "data.phases") or key.startswith("extend.stages") for key in said)
    if (is_recipe and not is_length_set) or (asked.is_model_only and "train.epochs" not in said):
        lengths = [one for one in asked.settings if one.startswith(("train.steps=", "train.tokens="))]
        _refuse_many_epochs(config, sources, lengths)


def _refuse_small_vocabulary(config: RunConfig, sources: Sequence[Source]) -> None:
    size = max(source.vocab_size for source in sources)
    rows = config.model.vocab_size
    if size < LEAST_VOCABULARY_SHARE * rows:
        folder = next(source.artifact for source in sources if source.vocab_size == size)
        raise UserError(f"{folder}: its tokenizer has {size:,} ids, model.vocab_size = {rows:,}: recipe "
                        f"{config.recipe} is for another tokenizer; pack the data with that one, or pass "
                        f"--set model.vocab_size={size} to train from scratch with this one",
                        Fix(options=("--set", f"model.vocab_size={size}")))


def count_tokens(config: RunConfig) -> float:
    """Return the tokens of all steps of a run."""
    return sum(_tokens_by_length(config).values())


def count_epochs(config: RunConfig, sources: Sequence[Source]) -> float:
    """Return how often a run reads its data on average, padding of conversations counted in."""
    return count_tokens(config) / (epoch_samples(config, sources) * config.data.phases[0].seq_len)


def _refuse_many_epochs(config: RunConfig, sources: Sequence[Source], lengths: Sequence[str]) -> None:
    """Raise `UserError` for data that would be read very often; `lengths`: settings that say how long the run
    is."""
    limit = max(MAX_DEFAULT_EPOCHS, config.data.max_epochs)
    if not config.data.max_epochs or (epochs := count_epochs(config, sources)) <= limit:
        return
    tokens = sum(source.num_tokens.get("train", 0) for source in sources)
    raise UserError(f"train.steps = {config.num_steps():,}: reads the {format_count(tokens)} tokens of the "
                    f"data in {epochs:,.0f} epochs, and the limit is {limit:g}; set train.epochs to what you "
                    "want, add data, or allow the epochs by --set "
                    f"data.max_epochs={math.ceil(epochs)}",
                    Fix(options=("--set", "train.epochs=1"),
                        left_out=tuple(f"--set {setting}" for setting in lengths)))


def _refuse_many_passes(config: RunConfig, num_prompts: int, said: Collection[str]) -> None:
    """Refuse rounds that a recipe brings if they draw each of few prompts very often."""
    rollout, limit = config.rollout, max(MAX_DEFAULT_EPOCHS, config.data.max_epochs)
    passes = rollout.rounds * rollout.prompts_per_round / num_prompts
    if config.data.max_epochs and passes > limit and not {"rollout.rounds", "train.epochs"} & set(said):
        raise UserError(f"rollout.rounds = {rollout.rounds:,}: draw each of {num_prompts:,} prompts "
                        f"{passes:,.0f} times, and the limit is {limit:g}; add prompts, or set "
                        "rollout.rounds or train.epochs to what you want",
                        Fix(options=("--set", "train.epochs=1")))


def _refuse_days(config: RunConfig, count: int) -> None:
    hours = least_hours(config, count)
    if config.train.max_hours and hours > config.train.max_hours:
        raise UserError(f"train.steps = {config.num_steps():,}: take at least {format_value(hours / 24, 3)} "
                        f"days on this machine, and train.max_hours = {config.train.max_hours:g}; make the "
                        f"run shorter, or allow it by --set train.max_hours={math.ceil(hours)}",
                        Fix(options=("--set", f"train.max_hours={math.ceil(hours)}")))


def least_hours(config: RunConfig, count: int) -> float:
    """Return the hours that a run's arithmetic takes at least on `count` processes of this machine."""
    gpus = list_visible_gpus()
    chip = find_device_chip(gpus[0].name) if gpus else None
    if gpus and chip is None:
        return 0.0
    speed = (count * GPU_SHARE * chip.bf16_flops_per_s if chip
             else len(os.sched_getaffinity(0)) * CPU_FLOPS_PER_S)
    flops = sum(compute_train_flops_per_token(config.model, seq_len) * tokens
                for seq_len, tokens in _tokens_by_length(config).items())
    return flops / speed / SECONDS_PER_HOUR


def _tokens_by_length(config: RunConfig) -> Mapping[int, float]:
    """Return length of samples -> tokens of the run."""
    found: dict[int, float] = {}
    for seq_len, tokens in _tokens(config):
        found[seq_len] = found.get(seq_len, 0.0) + tokens
    return found


def _tokens(config: RunConfig) -> Iterator[tuple[int, int]]:
    ends = [*config.phase_starts()[1:], config.num_steps()]
    for phase, start, end in zip(config.data.phases, config.phase_starts(), ends, strict=True):
        size = phase.global_batch_size or config.train.global_batch_size
        yield phase.seq_len, (end - start) * size * phase.seq_len

"""Checks data, memory and hours of a run before torch is imported."""

import math
import os
from collections.abc import Collection, Mapping, Sequence

from megatron_sov.base.errors import Fix, UserError
from megatron_sov.base.figures import format_count, format_value
from megatron_sov.commands.train.setup.data_defaults import (
    count_epoch_samples, list_requested_settings, open_all_sources)
from megatron_sov.model import recipes
from megatron_sov.model.config import RunConfig
from megatron_sov.model.families.count import compute_train_flops_per_token, count_params
from megatron_sov.model.recipes.requested import BuiltIn, RecipeRequest
from megatron_sov.model.recipes.stage_defaults import MAX_DEFAULT_EPOCHS, Stage, refuse_pretraining_rate
from megatron_sov.plan.footprint.gpu_capacity import refuse_on_this_machine
from megatron_sov.runs.gpu_driver import list_visible_gpus
from megatron_sov.runs.launch_environment import has_launcher, num_ranks
from megatron_sov.train.data.sources import Source
from megatron_sov.work.clusters.chips import find_device_chip
from megatron_sov.work.clusters.units import SECONDS_PER_HOUR

MAX_TYPED_EPOCHS = 200.0
"""Largest number of epochs by `train.steps` or `train.tokens` of the user, which ignore the data's size."""
MIN_VOCABULARY_SHARE = 0.5
"""Minimum share of `model.vocab_size` that the data's tokenizer fills. Padding and reserved ids in the
recipes take some percent; a smaller vocabulary belongs to another tokenizer."""
CPU_FLOPS_PER_S, GPU_SHARE = 2e10, 0.5
"""Upper bounds for a core's speed, and for a run's share of the GPU peak; not predictions."""


def refuse_unfit(request: RecipeRequest, config: RunConfig, stage: Stage | None, nproc: int | None, *,
                 is_initial: bool, dry_run: bool, num_prompts: int = 0) -> None:
    """Refuse a training command that does not fit its data or this machine. `stage`: of post-training, or
    None; `is_initial`: the vocabulary can be set; `dry_run`: do not limit the hours of work. Raises
    `UserError`: names the setting that allows the vocabulary, epochs, memory or days of work."""
    refuse_even_routing(config)
    if config.rollout.rounds and num_prompts and _is_recipe(request):
        _refuse_many_passes(config, num_prompts, list_requested_settings(request))
    if config.data.paths:
        refuse_unfit_data(request, config, open_all_sources(config), is_initial=is_initial)
    refuse_on_this_machine(config, nproc)
    if stage not in (None, "policy") and not has_launcher() and not dry_run:
        _refuse_days(config, num_ranks(nproc))


def refuse_even_routing(config: RunConfig) -> None:
    """Refuse training with a benchmark's routes. Raises `UserError`."""
    if config.gpu.force_even_routing == "on":
        raise UserError("gpu.force_even_routing = on: experts get random tokens, so the model learns no "
                        "routes; leave it out of training",
                        Fix(left_out=("--set gpu.force_even_routing=on",)))


def refuse_recipe_rate(request: RecipeRequest, config: RunConfig, stage: BuiltIn) -> None:
    """Refuse the learning rate of a pretraining recipe in a post-training `stage`. Raises `UserError`."""
    requested = list_requested_settings(request)
    if stage != "lm" and _is_recipe(request) and "optim.lr" not in requested and (
            recipes.get(config.recipe).objective.name == "lm"):
        refuse_pretraining_rate(config, stage, count_params(config.model).total, requested)


def _is_recipe(request: RecipeRequest) -> bool:
    """Return whether the settings are those of a packaged recipe."""
    return not request.from_file and not request.is_model_only and not request.base.code


def refuse_unfit_data(request: RecipeRequest, config: RunConfig, sources: Sequence[Source], *,
                      is_initial: bool) -> None:
    """Refuse data from another tokenizer, or data that would be read in very many epochs.

    A setting of the user is consent: `model.vocab_size` for the tokenizer; `train.epochs`, `data.phases`,
    `extend.stages` and `data.max_epochs` for epochs. `is_initial` as in `refuse_unfit`.
    """
    requested = list_requested_settings(request)
    is_recipe = _is_recipe(request)
    if is_initial and is_recipe and "model.vocab_size" not in requested:
        _refuse_small_vocabulary(config, sources)
    if config.rollout.rounds:  # prompts are drawn, not read in epochs
        return
    # `extend` takes the new context length by seq_len
    context_key = "data.phases.0.seq_len" if request.command == "extend" else ""
    is_length_set = any(key.startswith(("train.epochs", "data.phases", "extend.stages"))
                        for key in request.requested_keys if key != context_key)
    if (is_recipe and not is_length_set) or (request.is_model_only and "train.epochs" not in requested):
        lengths = [setting for setting in request.settings
                   if setting.startswith(("train.steps=", "train.tokens="))]
        _refuse_many_epochs(config, sources, lengths, request.command)


def _refuse_small_vocabulary(config: RunConfig, sources: Sequence[Source]) -> None:
    size = max(source.vocab_size for source in sources)
    rows = config.model.vocab_size
    if size < MIN_VOCABULARY_SHARE * rows:
        folder = next(source.artifact for source in sources if source.vocab_size == size)
        raise UserError(f"{folder}: its tokenizer has {size:,} ids, model.vocab_size = {rows:,}: recipe "
                        f"{config.recipe} is for a different tokenizer; pack the data with the recipe's "
                        f"tokenizer, or pass --set model.vocab_size={size} to train from scratch with this "
                        "tokenizer", Fix(options=("--set", f"model.vocab_size={size}")))


def count_tokens(config: RunConfig) -> float:
    return sum(_tokens_by_length(config).values())


def count_epochs(config: RunConfig, sources: Sequence[Source]) -> float:
    """Return the mean number of epochs in a run, including padding of conversations."""
    return count_tokens(config) / (count_epoch_samples(config, sources) * config.data.phases[0].seq_len)


def _refuse_many_epochs(config: RunConfig, sources: Sequence[Source], lengths: Sequence[str],
                        command: str) -> None:
    """Raise `UserError` for data read very often; `lengths`: settings that determine the run's length."""
    limit = max(MAX_TYPED_EPOCHS if lengths else MAX_DEFAULT_EPOCHS, config.data.max_epochs)
    if not config.data.max_epochs or (epochs := count_epochs(config, sources)) <= limit:
        return
    tokens = sum(source.num_tokens.get("train", 0) for source in sources)
    shorter = "train.epochs=1"
    if command == "extend":  # takes no epochs
        shorter = f"train.steps={max(1, int(config.num_steps() * limit / epochs))}"
    raise UserError(f"train.steps = {config.num_steps():,}: reads the {format_count(tokens)} tokens of the "
                    f"data in {epochs:,.0f} epochs, and the limit is {limit:g}; set "
                    f"{shorter.partition('=')[0]}, add data, or allow the epochs by "
                    f"--set data.max_epochs={math.ceil(epochs)}", Fix(options=(
                        "--set", f"data.max_epochs={math.ceil(epochs)}" if lengths else shorter)))


def _refuse_many_passes(config: RunConfig, num_prompts: int, requested: Collection[str]) -> None:
    """Refuse a recipe's rounds if they draw the prompts very often."""
    rollout, limit = config.rollout, max(MAX_DEFAULT_EPOCHS, config.data.max_epochs)
    passes = rollout.rounds * rollout.prompts_per_round / num_prompts
    if config.data.max_epochs and passes > limit and not {"rollout.rounds", "train.epochs"} & set(requested):
        raise UserError(f"rollout.rounds = {rollout.rounds:,}: draw each of {num_prompts:,} prompts "
                        f"{passes:,.0f} times, and the limit is {limit:g}; add prompts, or set "
                        "rollout.rounds or train.epochs", Fix(options=("--set", "train.epochs=1")))


def _refuse_days(config: RunConfig, count: int) -> None:
    hours = least_hours(config, count)
    if config.train.max_hours and hours > config.train.max_hours:
        raise UserError(f"train.steps = {config.num_steps():,}: take at least {format_value(hours / 24, 3)} "
                        f"days on this machine, and train.max_hours = {config.train.max_hours:g}; make the "
                        f"run shorter, or allow it by --set train.max_hours={math.ceil(hours)}",
                        Fix(options=("--set", f"train.max_hours={math.ceil(hours)}")))


def least_hours(config: RunConfig, count: int) -> float:
    """Return a lower bound on a run's hours with `count` processes on this machine."""
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
    """Return sample length -> tokens in the run."""
    tokens: dict[int, float] = {}
    ends = [*config.phase_starts()[1:], config.num_steps()]
    for phase, start, end in zip(config.data.phases, config.phase_starts(), ends, strict=True):
        batch_size = phase.global_batch_size or config.train.global_batch_size
        tokens.setdefault(phase.seq_len, 0.0)
        tokens[phase.seq_len] += (end - start) * batch_size * phase.seq_len
    return tokens

"""The arguments that all training commands share, and how they become a stage.  No torch
until --from is read."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from megatron_sov.base.errors import DryRun, Fix, UserError
from megatron_sov.base.hints.lines import is_check
from megatron_sov.base.settings import AtLeastOne, Flag, SettingsError
from megatron_sov.commands.train.setup.packed_files import (
    DataFile, FilePacking, find_files, fix_by_packing, list_packable_formats, warn_of_changed_files)
from megatron_sov.model import recipes
from megatron_sov.model.config import (
    ModelConfig, RunConfig, apply_settings, parse_data_paths, split_weight)
from megatron_sov.model.config.data import split_source_name
from megatron_sov.model.families.count import count_params
from megatron_sov.model.pretrained import find_hub_name, is_hf_folder
from megatron_sov.model.recipes.requested import (
    BuiltIn, RecipeOptions, RecipeRequest, TrainingOptions, request_recipe, request_training)
from megatron_sov.model.recipes.stage_defaults import Stage, build_base_config
from megatron_sov.runs.checkpoints import (
    IMPORTED_RECIPE, check_model_path, find_checkpoint, find_tokenizer_folder, read_checkpoint_settings)
from megatron_sov.runs.folder import RunFolder, read_started_settings
from megatron_sov.runs.gpu_driver import list_visible_gpus
from megatron_sov.runs.launch_environment import num_ranks
from megatron_sov.train.guards.fault_injection import FAULT_STATES, Fault, parse_faults
from megatron_sov.train.stages.shared_copies import convert_start, find_copy

if TYPE_CHECKING:
    from megatron_sov.train.data.token_shards import Source

INJECT = f"Do this to the run, once, to see what it does ({', '.join(FAULT_STATES)})."


@dataclass(frozen=True)
class ParsedStage:
    """A training command's arguments, checked."""

    config: RunConfig
    """Resolved settings."""
    start: Path | None
    """Checkpoint, or Hugging Face folder, to start from; None: initial weights."""
    faults: tuple[Fault, ...]
    """What is to come on purpose."""
    notes: tuple[str, ...] = ()
    """Defaults that were taken, and why."""

    def with_checkpoint(self, run: Path) -> ParsedStage:
        """Return it with a checkpoint to start from, see `convert_start`."""
        return dataclasses.replace(self, start=self.start and convert_start(self.start, run))


@dataclass(frozen=True, kw_only=True)
class StageOptions(TrainingOptions):
    """What all training commands take."""

    run: Annotated[Path, Flag(value="DIR")]
    """Folder of this run."""
    start_from: Annotated[Path | None, Flag("--from", "CHECKPOINT|RUN|HF_DIR")] = None
    """Start from these weights (and their architecture)."""
    nproc: int | None = None
    """Local processes to start (under Slurm, or torchrun ... -m -- megatron_sov, the environment decides)."""
    inject: Annotated[tuple[str, ...], Flag(value="FAULT@step=N[,rank=R]", help=INJECT)] = ()
    resume: bool = False
    """Continue the run that is in --run."""
    until: Annotated[AtLeastOne | None, Flag(value="STEP")] = None
    """End behind this step as if asked to stop: everything is saved, and schedules stay those of the whole
    run."""
    dry_run: bool = False
    """Check all that can be checked without processes, print what would be read, run and written, and do
    nothing."""

    def model_settings(self, objective: BuiltIn | None, has_gpus: bool | None = None
                       ) -> Callable[[], RunConfig] | None:
        """Return what gives the settings where no recipe is named: the model of --from; None: one has to be.

        Args:
            objective: what is learned; None: the stage needs a recipe's own settings.
            has_gpus: whether the run has GPUs; None: those of this machine decide.
        """
        if self.start_from is None or objective is None or objective == "lm":
            return None
        return partial(_settings_of_model, self.start_from, objective, has_gpus)


@dataclass(frozen=True, kw_only=True)
class TunedStageOptions(StageOptions):
    """What commands take that go on from a model."""

    start_from: Annotated[Path, Flag("--from", "CHECKPOINT|RUN|HF_DIR")] = dataclasses.field()
    """Start from these weights (and their architecture)."""


def parse_stage(args: StageOptions, objective: BuiltIn, *, needs_data: bool = True, num_prompts: int = 0,
                completed: Callable[[RunConfig], RunConfig] = lambda config: config) -> ParsedStage:
    """Return what a training command is to do; nothing is written.

    Args:
        args: what was typed.
        objective: what the command trains by.
        needs_data: whether --data must be given.
        num_prompts: prompts of reinforcement learning.
        completed: settings as they are asked for -> with those that follow from them.

    Raises:
        UserError: a mistake in the arguments, settings or layout, missing data, another family or objective
            than the command's, or nothing to start from.
    """
    # numpy, which --help does without
    from megatron_sov.commands.train.setup.data_defaults import complete_stage
    from megatron_sov.commands.train.setup.feasibility import refuse_unfit
    from megatron_sov.train.data.views import apply_data_phases

    asked = stage_request(args, objective, needs_data=needs_data)
    stage: Stage | None = None if objective == "lm" else objective
    mixed = apply_data_phases(asked.config(), asked.base)
    decides = {"validation": args.validation} if hasattr(args, "validation") else {}
    if formats := _refuse_data(args, mixed):
        decides["data"] = formats
    asked.refuse_inert(mixed, **decides)
    if is_check() and args.data and not mixed.data.paths:
        if "train.global_batch_size" not in asked.said:  # it would follow from the data
            size = mixed.train.micro_batch_size * num_ranks(args.nproc)
            mixed = apply_settings(mixed, [f"train.global_batch_size={size}"])
        mixed.check(num_ranks(args.nproc))
        raise DryRun
    found = complete_stage(asked, mixed, stage, args.nproc, num_prompts)
    config = completed(found.config)
    config.check(num_ranks(args.nproc))
    refuse_unfit(asked, config, stage, args.nproc, is_initial=args.start_from is None, dry_run=args.dry_run,
                 num_prompts=num_prompts)
    faults = parse_faults(args.inject, num_ranks(args.nproc))
    start = args.start_from and find_start(args.start_from)
    if start is not None:
        refuse_many_converters(start, args.run)
    if is_check():  # the rest of a dry run imports torch
        RunFolder(args.run).check_available(args.resume)
        raise DryRun
    return ParsedStage(config, start, faults, found.notes)


def _refuse_data(args: StageOptions, config: RunConfig) -> list[str]:
    """Refuse data that the manifests of token shards show to be unfit, before torch, which takes seconds, and
    return the formats of the sources.

    Raises:
        UserError: they do not fit together or the model, or supervised fine-tuning has no conversations.
    """
    from megatron_sov.train.data.token_shards import open_sources

    if not config.data.paths:
        return []
    sources = open_sources(config.data.paths, config.model.vocab_size, None, warns=False,
                           is_fixed=args.start_from is not None)
    if config.objective.name == "sft":
        check_chats(config, sources)
    return sorted({source.format for source in sources})


def check_chats(config: RunConfig, sources: list[Source]) -> None:
    """Refuse data of supervised fine-tuning that leave a term without targets, or text that nothing learns.

    Raises:
        UserError: no conversations; text without a weight; a weight without text.
    """
    chats = [s.name for s in sources if s.is_chat]
    texts = [s.name for s in sources if not s.is_chat]
    if not chats:
        raise UserError(f"--data: none of the sources ({', '.join(texts)}) holds conversations; "
                        "pack some with `sov-data pack --format chat`")
    if texts and config.objective.text_coeff <= 0:
        raise UserError(f"objective.text_coeff = {config.objective.text_coeff}, but --data holds text "
                        f"({', '.join(texts)}) that only the text term learns; "
                        "set objective.text_coeff (e.g. 0.1) or leave that data out")
    if not texts and config.objective.text_coeff > 0:
        raise UserError(f"objective.text_coeff = {config.objective.text_coeff} needs text beside the "
                        "conversations; add --data with packed text")


def stage_request(args: StageOptions, objective: BuiltIn, *, needs_data: bool = True,
                  lengthens: bool = False) -> RecipeRequest:
    """Return what a training command was asked for, with its data, and its checkpoint's architecture in
    the recipe's place; see `training_request`.

    Raises:
        UserError: it cannot be used, data is missing, or --from names nothing to start from,
            or another family.
    """
    # paths are checked before the model is opened, which takes seconds
    if objective == "lm" and args.start_from is not None and args.recipe is None and not args.configs:
        _propose_recipe(args.start_from)
    packing = _packing_of(args, objective)
    shards = parse_data_paths([text for text in args.data if text not in packing.arguments])
    asked = request_training(args, objective, needs_data=needs_data, lengthens=lengthens,
                             resumed=read_started_settings(args.run) if args.resume else None,
                             of_model=args.model_settings(None if lengthens else objective))
    base = asked.base
    if packing.files:
        config = asked.config()  # mistakes in the settings are named before anything is packed
        is_length_set = any(key.startswith("data.phases") for key in asked.said)
        if asked.is_model_only and is_length_set and (problems := config.position_problems()):
            raise SettingsError(f"recipe {config.recipe}", problems)
        # packing takes seconds, and the check of a proposed line has read the first record of each file
        packed = {} if is_check() else packing.pack()
        paths = parse_data_paths([packed.get(text, text) for text in args.data
                                  if packed or text not in packing.arguments])
    else:
        paths = shards or {path: base.data.paths[path] for path in parse_data_paths(list(base.data.paths))}
        warn_of_changed_files(args.run, () if shards else paths)
    base = dataclasses.replace(base, data=dataclasses.replace(base.data, paths=paths))
    if args.start_from is not None and not asked.is_model_only:
        asked.config()  # reports mistakes in the settings before torch is imported for the checkpoint
        base = dataclasses.replace(base, model=_model_of(args.start_from, asked))
    return dataclasses.replace(asked, base=base)


def _propose_recipe(start_from: Path) -> None:
    """Raise `UserError` for a model that learns from text without RECIPE, with a recipe of its family."""
    from megatron_sov import convert

    start = find_start(start_from)
    is_hf = is_hf_folder(start)
    model = convert.open_weights(start).model if is_hf else read_checkpoint_settings(start).model
    configs = [recipes.get(name) for name in recipes.find_family_recipes(model.family)]
    known = [config for config in configs if config.objective.name == "lm" and not config.extend.stages]
    size = count_params(model).total
    known.sort(key=lambda config: (abs(math.log(count_params(config.model).total / size)),
                                   len(config.recipe)))
    if known:
        raise UserError("RECIPE: is missing; steps, batches and learning rate come from a recipe of the "
                        f"model's family, {model.family}: {', '.join(config.recipe for config in known[:4])}",
                        Fix(arguments=(known[0].recipe,)))


def _packing_of(args: StageOptions, objective: BuiltIn) -> FilePacking:
    """Return how the files of --data are packed: by the tokenizer of --from, or that of packed data.

    Raises:
        UserError: a file cannot be packed, there is no tokenizer, or the run's folder is taken.
    """
    formats = list_packable_formats(objective)
    files = find_files(args.data, args.run, formats, _tokenizer_hint(args.start_from))
    if objective == "sft" and len(files) == len(args.data) and {one.format for one in files} == {"text"}:
        raise UserError(f"--data {files[0].argument}: is plain text, which has no responses; `megatron-sov "
                        "pretrain` learns from text, and chats have 'messages' or 'prompt' and 'completion'",
                        Fix(command="pretrain"))
    tokenizer = Path()
    if files:
        tokenizer = _tokenizer_for(args, files[0])
        RunFolder(args.run).check_available(args.resume)
    return FilePacking(args.run, files, tokenizer, args.dry_run)


def _tokenizer_for(args: StageOptions, first: DataFile) -> Path:
    """Return the folder of the tokenizer that packs files; `UserError` if there is none."""
    if args.start_from is not None:
        return find_tokenizer_folder(find_start(args.start_from))
    folders = [Path(split_source_name(split_weight(text, "--data")[0])[1]) for text in args.data]
    for folder in folders:
        if folder.is_dir():
            return folder / "tokenizer"
    raise UserError(f"--data {first.argument}: is a file, and no --from names a model whose tokenizer could "
                    "pack it; make a tokenizer by `sov-tokenizer train`, pack by `sov-data pack --tokenizer "
                    f"DIR --input {shlex.quote(str(first.file))} --output SHARDS`, and pass --data SHARDS",
                    _fix_without_tokenizer(args.recipe, first))


def _fix_without_tokenizer(recipe: str | None, first: DataFile) -> Fix | None:
    """Return the commands that learn a tokenizer of the recipe's size from a file of --data, and pack it."""
    if recipe not in recipes.names():
        return None
    size, name = recipes.get(recipe).model.vocab_size, f"{first.file.stem}-tokenizer"
    fix = fix_by_packing(first.file, Path(name), ["--format", first.format])
    learn = ["sov-tokenizer", "train", "--preset", "solar-open", "--vocab-size", str(size), "--input",
             str(first.file), "--output", name]
    pack = next(line for line in fix.before if line.startswith("sov-data")).replace(f"{name}-tokenizer", name)
    return Fix(words=fix.words, before=(shlex.join(learn), pack))


def _tokenizer_hint(start_from: Path | None) -> Path | None:
    """Return the folder of the tokenizer of --from; None: it cannot be found yet."""
    try:
        return find_tokenizer_folder(find_start(start_from)) if start_from is not None else None
    except UserError:  # raised where --from is read
        return None


def request_with_model(args: RecipeOptions, start_from: Path, stage: Stage) -> RecipeRequest:
    """Return what a command beside the training one was asked for, see `requested`."""
    asked = request_recipe(args, partial(_settings_of_model, start_from, stage))
    learned = dataclasses.replace(asked.base.objective, name=stage)
    return dataclasses.replace(asked, base=dataclasses.replace(asked.base, objective=learned))


def _settings_of_model(start_from: Path, stage: Stage, has_gpus: bool | None = None) -> RunConfig:
    """Return the settings of a stage that starts from a model; `has_gpus`: see `StageOptions.model_settings`.
    """
    start = find_start(start_from)
    if is_hf_folder(start):
        from megatron_sov import convert

        on_gpu = bool(list_visible_gpus()) if has_gpus is None else has_gpus
        return build_base_config(find_hub_name(start), convert.open_weights(start).model,
                             "bf16" if on_gpu else "fp32", stage)
    settings = read_checkpoint_settings(start)
    name = find_hub_name(start_from) if settings.recipe == IMPORTED_RECIPE else settings.recipe
    return build_base_config(name, settings.model, settings.train.precision, stage, settings.lora)


def _model_of(start_from: Path, asked: RecipeRequest) -> ModelConfig:
    """Return the architecture of what --from names, from headers alone.

    Raises:
        UserError: it is no checkpoint, run or Hugging Face folder, or of another family than the recipe.
    """
    start = find_start(start_from)
    if is_hf_folder(start):
        from megatron_sov import convert

        model = convert.open_weights(start).model
    else:
        model = read_checkpoint_settings(start).model
    family = asked.base.model.family
    for setting in asked.settings:  # the last one counts
        key, _, value = setting.partition("=")
        if key == "model.family":
            family = value.strip('"')
    if model.family != family:
        family_recipes = recipes.find_family_recipes(model.family)
        known = ", ".join(family_recipes) or "there is none: `megatron-sov recipes`"
        raise UserError(f"--from {start_from}: is a {model.family} model, recipe {asked.base.recipe} is for "
                        f"{family}; leave RECIPE out: the model is that of --from (or choose of {known})",
                        Fix(left_out=(asked.base.recipe,)))
    return model


def find_start(start_from: Path) -> Path:
    """Return the checkpoint, or Hugging Face folder, that --from means.

    Raises:
        UserError: it is neither, and no run with a checkpoint.
    """
    check_model_path(start_from, "--from ")
    return start_from if is_hf_folder(start_from) else find_checkpoint(start_from)


def refuse_many_converters(start: Path, run: Path) -> None:
    """Raise `UserError` where many processes would convert a Hugging Face folder at once."""
    if num_ranks(None) > 1 and is_hf_folder(start) and find_copy(start, run) is None:
        raise UserError(f"--from {start}: many processes would convert it at once; "
                        "run `megatron-sov convert from-hf` before, and pass its output",
                        Fix(words={str(start): f"{start.name}-checkpoint"},
                            before=(f"megatron-sov convert from-hf {shlex.quote(str(start))} "
                                    f"{shlex.quote(start.name)}-checkpoint",)))

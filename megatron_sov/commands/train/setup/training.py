"""Checks a training command's arguments and resolves its settings, before torch is imported."""

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import IS_CHECKING, DryRun, Fix, UserError, choose_free_path
from megatron_sov.base.hints.paths import fix_by_packing, list_data
from megatron_sov.base.settings import SettingsError
from megatron_sov.commands.train.kinds import STAGE_KINDS
from megatron_sov.commands.train.setup.data_defaults import complete_stage
from megatron_sov.commands.train.setup.export_benchmarks import check_benchmarks
from megatron_sov.commands.train.setup.feasibility import refuse_recipe_rate, refuse_unfit
from megatron_sov.commands.train.setup.packed_files import (
    DataFile, FilePacking, find_files, list_packable_formats, warn_of_changed_files)
from megatron_sov.commands.train.setup.stage_options import ExtendOptions, StageOptions
from megatron_sov.commands.train.setup.starts import (
    find_start, find_start_tokenizer, propose_recipe, read_matching_model, refuse_many_converters)
from megatron_sov.model import recipes
from megatron_sov.model.config import RunConfig, apply_settings, parse_data_paths, split_weight
from megatron_sov.model.config.data import split_source_name
from megatron_sov.model.pretrained import is_hf_folder
from megatron_sov.model.process_memory import MemoryEstimate
from megatron_sov.model.recipes.requested import BuiltIn, RecipeRequest, request_training
from megatron_sov.model.recipes.stage_defaults import Stage
from megatron_sov.plan.footprint.gpu_capacity import estimate_memory
from megatron_sov.runs.checkpoints import check_adapter_settings, find_tokenizer_folder, read_adapter_base
from megatron_sov.runs.folder import CONFIG, RunFolder, read_command, read_started_settings
from megatron_sov.runs.launch_environment import num_ranks, refuse_lone_world_size, typed_command
from megatron_sov.train.data.sources import Source, open_sources
from megatron_sov.train.data.views import apply_data_phases
from megatron_sov.train.guards.fault_injection import Fault, parse_faults

Complete = Callable[[RunConfig], RunConfig]


@dataclass(frozen=True)
class TrainingRequest:
    """A training command with checked arguments: input for `training_run.run_training`."""

    options: StageOptions
    config: RunConfig
    """Resolved settings."""
    start: Path | None = None
    """Checkpoint or Hugging Face folder to start from; None: initial weights."""
    faults: tuple[Fault, ...] = ()
    """Faults to inject."""
    notes: tuple[str, ...] = ()
    """Chosen defaults, with reasons."""
    memory: MemoryEstimate | None = None
    """Predicted memory per process; None for a complete run."""
    completion: dict[str, Any] | None = None
    """Manifest of a complete run, which needs no checks and no training."""


def check_training(options: StageOptions) -> TrainingRequest:
    """Check arguments for a command in `STAGE_KINDS`; write nothing."""
    options = options.with_implied_settings()
    return find_completed_run(options) or check_stage(options)


def check_stage(options: StageOptions, *, num_prompts: int = 0, complete: Complete = lambda config: config
                ) -> TrainingRequest:
    """Check arguments for an incomplete run; `complete` adds settings that follow from other settings."""
    options.check_paths()
    kind = STAGE_KINDS[options.stage]
    request = stage_request(options, kind.name, needs_data=kind.needs_data)
    stage: Stage | None = None if kind.name == "lm" else kind.name
    mixed = apply_data_phases(request.config(), request.base)
    deciding_options = options.deciding_options()
    if formats := _check_shards(options, mixed):
        deciding_options["data"] = formats
    request.refuse_inert(mixed, **deciding_options)
    if IS_CHECKING.get() and options.data and not mixed.data.paths:  # the files are not packed for a check
        if "train.global_batch_size" not in request.requested_keys:  # derived from the missing data
            size = mixed.train.micro_batch_size * num_ranks(options.nproc)
            mixed = apply_settings(mixed, [f"train.global_batch_size={size}"])
        mixed.check(num_ranks(options.nproc))
        options.check_settings(mixed)
        raise DryRun
    completed = complete_stage(request, mixed, stage, options.nproc, num_prompts)
    config = complete(completed.config)
    config.check(num_ranks(options.nproc))
    refuse_unfit(request, config, stage, options.nproc, is_initial=options.start_from is None,
                 dry_run=options.dry_run, num_prompts=num_prompts)
    faults = parse_faults(options.inject, num_ranks(options.nproc))
    start = None
    if options.start_from is not None:
        start = find_start(options.start_from)
        refuse_many_converters(start, options.run)
        if not is_hf_folder(start) and read_adapter_base(start):
            check_adapter_settings(start, config.lora, config.model)
    if IS_CHECKING.get() or options.resume:
        RunFolder(options.run).enter(config, options.resume)
    check_benchmarks(config)
    options.check_settings(config)
    return TrainingRequest(options, config, start=start, faults=faults, notes=completed.notes,
                           memory=estimate_memory(config, num_ranks(options.nproc)))


@dataclass(frozen=True)
class ExtensionRequest:
    """`megatron-sov extend` with checked arguments: input for `extend_run.run_extension`."""

    options: ExtendOptions
    request: RecipeRequest
    """Requested settings, from which the stages are planned."""
    faults: tuple[Fault, ...]


def check_extension(options: ExtendOptions) -> ExtensionRequest:
    if options.until is not None:
        raise UserError(f"--until {options.until}: every stage counts its own steps; leave it out, and stop "
                        "the command by Ctrl-C or SIGTERM")
    request = stage_request(options, STAGE_KINDS[options.stage].name, lengthens=True)
    return ExtensionRequest(options, request, parse_faults(options.inject, num_ranks(options.nproc)))


def find_completed_run(options: StageOptions) -> TrainingRequest | None:
    """Return the request for a complete run, or None. A complete run's data and start may have been deleted.

    The command must be the command that began the run, or `megatron-sov resume`, without changed settings and
    without user code. Any other command may ask for more, and is checked as if the run continued.
    """
    folder = RunFolder(options.run)
    completion = folder.completion() if options.resume else None
    config = folder.config() if completion is not None else None
    if completion is None or config is None or config.code or options.plugins:
        return None
    if config.objective.name != STAGE_KINDS[options.stage].name:
        return None
    # `megatron-sov resume` passes the run's own settings
    run_config = {(options.run / CONFIG).absolute()}
    is_resumed = options.recipe is None and {file.absolute() for file in options.configs} == run_config
    try:
        is_first_command = not options.configs and (
            _drop_resume(typed_command() or ()) == _drop_resume(read_command(options.run).words))
        if not (is_first_command or is_resumed) or apply_settings(config, options.settings) != config:
            return None
    except UserError:
        return None
    return TrainingRequest(options, config, completion=completion)


def _drop_resume(words: Sequence[str]) -> list[str]:
    return [word for word in words if word != "--resume"]


def _check_shards(options: StageOptions, config: RunConfig) -> list[str]:
    """Check the token shards' manifests and return the sources' formats."""
    if not config.data.paths:
        return []
    sources = open_sources(config.data.paths, config.model.vocab_size, None, warns=False,
                           is_fixed=options.start_from is not None)
    if config.objective.name == "sft":
        check_chats(config, sources)
    _refuse_only_chats(options, [(source.name, source.format) for source in sources])
    return sorted({source.format for source in sources})


def _refuse_only_chats(options: StageOptions, sources: Sequence[tuple[str, str]]) -> None:
    """Refuse pretraining on conversations alone, as (name, format); a typed `objective.name` consents."""
    consents = any(setting.startswith("objective.name=") for setting in options.settings)
    if options.stage != "pretrain" or options.resume or consents or {"chat"} != {kind for _, kind in sources}:
        return
    fix = Fix(command="sft") if options.start_from else Fix(options=("--set", "objective.name=lm"))
    raise UserError(f"--data {sources[0][0]}: holds chats, of which pretraining learns only the answers; "
                    "`megatron-sov sft --from MODEL` fine-tunes a model on chats, and objective.name=lm "
                    "trains a new one on chats alone; else add packed text", fix)


def check_chats(config: RunConfig, sources: list[Source]) -> None:
    """Check that every term in supervised fine-tuning has data, and that all data have a term."""
    chats = [s.name for s in sources if s.is_chat]
    texts = [s.name for s in sources if not s.is_chat]
    if not chats:
        local = list_data("chat")
        listed = f"; conversations here: {', '.join(local)}" if local else ""
        raise UserError(f"--data: no source ({', '.join(texts)}) contains conversations; pack some with "
                        f"`sov-data pack --format chat`; `megatron-sov pretrain` learns from text{listed}",
                        Fix(options=("--data", local[0])) if local else Fix(command="pretrain"))
    if texts and config.objective.text_coeff <= 0:
        raise UserError(f"objective.text_coeff = {config.objective.text_coeff}, but only the text term "
                        f"learns from the text in --data ({', '.join(texts)}); set "
                        "objective.text_coeff=0.1, or leave the text out")
    if not texts and config.objective.text_coeff > 0:
        raise UserError(f"objective.text_coeff = {config.objective.text_coeff} needs text in addition to "
                        "conversations; add --data with packed text")


def stage_request(options: StageOptions, objective: BuiltIn, *, needs_data: bool = True,
                  lengthens: bool = False) -> RecipeRequest:
    """Return the requested settings with the packed data from --data and, with --from, its architecture
    instead of the recipe's; see `request_training`."""
    refuse_lone_world_size(options.nproc)
    # check paths before the model is opened, which takes seconds
    if objective == "lm" and options.start_from is not None and options.recipe is None and (
            not options.configs):
        propose_recipe(options.start_from)
    packing = _plan_packing(options, objective)
    shards = parse_data_paths([text for text in options.data if text not in packing.arguments])
    request = request_training(options, objective, needs_data=needs_data, lengthens=lengthens,
                               resumed=read_started_settings(options.run) if options.resume else None,
                               of_model=options.model_settings(None if lengthens else objective))
    base = request.base
    config = request.config()  # mistakes in the settings are named before anything is packed
    refuse_recipe_rate(request, config, objective)
    if packing.files:
        is_length_set = any(key.startswith("data.phases") for key in request.requested_keys)
        if request.is_model_only and is_length_set and (problems := config.position_problems()):
            raise SettingsError(f"recipe {config.recipe}", problems)
        # packing takes seconds, and `find_files` has read the first records
        packed = {} if IS_CHECKING.get() else packing.pack()
        paths = parse_data_paths([packed.get(text, text) for text in options.data
                                  if packed or text not in packing.arguments])
    elif shards:
        paths = shards
    else:
        paths = {path: base.data.paths[path] for path in parse_data_paths(list(base.data.paths))}
        warn_of_changed_files(options.run, paths)
    base = dataclasses.replace(base, data=dataclasses.replace(base.data, paths=paths))
    if options.start_from is not None and not request.is_model_only:
        base = dataclasses.replace(base, model=read_matching_model(options.start_from, request))
    return dataclasses.replace(request, base=base)


def _plan_packing(options: StageOptions, objective: BuiltIn) -> FilePacking:
    """Plan the packing for files in --data with the tokenizer in --from, or in packed --data."""
    formats = list_packable_formats(objective)
    files = find_files(options.data, options.run, formats, find_start_tokenizer(options.start_from))
    if objective == "sft" and len(files) == len(options.data) and {file.format for file in files} == {"text"}:
        raise UserError(f"--data {files[0].argument}: is plain text, which has no responses; `megatron-sov "
                        "pretrain` learns from text, and chats have 'messages' or 'prompt' and 'completion'",
                        Fix(command="pretrain"))
    if len(files) == len(options.data):
        _refuse_only_chats(options, [(file.argument, file.format) for file in files])
    tokenizer = Path()
    if files:
        tokenizer = _find_packing_tokenizer(options, files[0])
        RunFolder(options.run).check_available(options.resume)
    return FilePacking(options.run, files, tokenizer, options.dry_run)


def _find_packing_tokenizer(options: StageOptions, first: DataFile) -> Path:
    """Return the folder of the tokenizer that packs the files in --data. Raises `UserError`: none."""
    if options.start_from is not None:
        return find_tokenizer_folder(find_start(options.start_from))
    if teachers := getattr(options, "teacher", ()):  # a student learns the teacher's tokens
        return find_tokenizer_folder(find_start(Path(split_source_name(teachers[0])[1])))
    folders = [Path(split_source_name(split_weight(text, "--data")[0])[1]) for text in options.data]
    for folder in folders:
        if folder.is_dir():
            return folder / "tokenizer"
    raise UserError(f"--data {first.argument}: is a file, and packing needs a tokenizer, which --from would "
                    "provide; make a tokenizer by `sov-tokenizer train`, pack by `sov-data pack --tokenizer "
                    f"DIR --input {shlex.quote(str(first.file))} --output SHARDS`, and pass --data SHARDS",
                    _fix_without_tokenizer(options.recipe, first))


def _fix_without_tokenizer(recipe: str | None, first: DataFile) -> Fix | None:
    """Return the commands that train a tokenizer of the recipe's size on a --data file, and pack the file."""
    if recipe not in recipes.names():
        return None
    size, name = recipes.get(recipe).model.vocab_size, choose_free_path(f"{first.file.stem}-tokenizer")
    fix = fix_by_packing(str(first.file), Path(name), ["--format", first.format])
    learn = ["sov-tokenizer", "train", "--preset", "solar-open", "--vocab-size", str(size), "--input",
             str(first.file), "--output", name]
    return Fix(words=fix.words, before=(shlex.join(learn), *fix.before))

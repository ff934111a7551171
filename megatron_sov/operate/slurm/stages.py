"""Stages for `submit`: their commands, arguments, records and completion files.

The commands' own parsers read the arguments; command modules pass their `add_arguments`, because this package
may not import them.
"""

import argparse
import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from megatron_sov.base.artifacts import MANIFEST
from megatron_sov.base.command_line import Parser
from megatron_sov.base.errors import Fix, UserError, suggest_name
from megatron_sov.base.plugins.loading import is_reference
from megatron_sov.base.settings import AtLeastOne, Flag, NotNegativeInt, apply_changes, read_command_options
from megatron_sov.model import recipes
from megatron_sov.model.config import RunConfig, apply_settings, parse_data_paths
from megatron_sov.model.config.data import split_source_name
from megatron_sov.model.config.run import add_rounds
from megatron_sov.model.recipes.requested import BuiltIn, RecipeRequest, request_training
from megatron_sov.plan.footprint.gpu_capacity import (
    can_run, get_usable_bytes, refuse_on_nodes, refuse_too_large)
from megatron_sov.plan.pricing import Machines
from megatron_sov.plan.search.local_search import choose_layout, leaves_layout_open
from megatron_sov.plan.search.recommended_layouts import sets_layout
from megatron_sov.runs.folder import COMPLETION, JOBS, read_started_settings
from megatron_sov.work.clusters import cluster
from megatron_sov.work.clusters.chips import CHIPS
from megatron_sov.work.clusters.cluster import ClusterProfile

Commands = Mapping[str, Callable[[argparse.ArgumentParser], None]]
"""Stage -> `add_arguments` of its command, for the `megatron-sov` commands."""
ENGINE_SET = "--engine-set"

PROFILES = f"{', '.join(cluster.list_profiles())}, or your own YAML file"
ARTIFACTS = {"tokenizer": ("train",), "data": ("pack", "mix", "demo-corpus", "pairs", "groups")}
"""Commands in `sov-tokenizer` and `sov-data` that write a folder with a manifest."""


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """Submit a stage, or a chain of stages from a file, to Slurm."""

    cluster: Annotated[str | None, Flag(value="PROFILE", help=PROFILES)] = None
    nodes: AtLeastOne | None = None
    """Nodes for a training stage (default 1)."""
    min_nodes: AtLeastOne | None = None
    """Continue with fewer nodes, down to this number, if nodes are missing."""
    nodes_set: Annotated[tuple[str, ...], Flag(value="N:key=value")] = ()
    """Setting for N nodes."""
    engine_nodes: NotNegativeInt = 0
    """rl-run --engine vllm: additional nodes for engine servers."""
    array: NotNegativeInt = 0
    """Divide the inputs for data pack, or the work for eval-lm, rl-generate and rl-reward, among N jobs
    (default: one job)."""
    account: Annotated[str | None, Flag(value="NAME")] = None
    """Instead of the profile's."""
    partition: Annotated[str | None, Flag(value="NAME")] = None
    """Instead of the profile's."""
    time_limit: Annotated[str | None, Flag("--time", "LIMIT")] = None
    """Time limit instead of the profile's: minutes, H:MM:SS or D-HH:MM:SS."""
    dry_run: bool = False
    """Print the scripts; writes nothing, needs no Slurm."""
    prove: bool = False
    """Training stage: first compare its layout in miniature with one process, like `plan --prove`; exits with
    3 and submits nothing on a difference."""
    scripts: Annotated[Path | None, Flag(value="DIR")] = None
    """Chain: submit nothing; write a script for `sbatch` per stage, with paths under $WORK."""
    continue_chain: Annotated[bool, Flag("--continue")] = False
    """Chain: submit the incomplete stages."""


@dataclass(frozen=True)
class StageKind:
    """Command and resources for a stage."""

    title: str
    """Description at the top of the script."""
    program: tuple[str, ...]
    """Words after `python -m`."""
    ranks: bool
    """Training stage: one process per GPU on many nodes; otherwise one process on one node."""
    gpus: bool
    """Uses GPUs."""
    time_limit: str = ""
    """Default time limit, unless the profile's is shorter; empty: the profile's."""
    objective: BuiltIn = "lm"
    """Training objective."""
    shares: bool = False
    """Several jobs with the same command divide the work."""


STAGES = {
    "tokenizer": StageKind(
        "Tokenizer: text to a tokenizer.  One process on one node.",
        ("tokenizer.cli",), ranks=False, gpus=False),
    "data": StageKind(
        "Data: text to token shards, on all cores of one node.  A killed job continues where it was.",
        ("data_prep.cli",), ranks=False, gpus=False),
    "pretrain": StageKind(
        "Pretraining: token shards to checkpoints.", ("megatron_sov", "pretrain"), ranks=True, gpus=True),
    "extend": StageKind(
        "Context extension: trains on at longer and longer contexts, each behind its gate (exit code 3 where "
        "it does not pass).", ("megatron_sov", "extend"), ranks=True, gpus=True),
    "sft": StageKind(
        "Supervised fine-tuning on chats.", ("megatron_sov", "sft"), ranks=True, gpus=True, objective="sft"),
    "prefer": StageKind(
        "Learning from preferences: pairs or groups of responses.",
        ("megatron_sov", "prefer"), ranks=True, gpus=True, objective="preference"),
    "distill": StageKind(
        "Distillation: a teacher reads the data, and a student learns its distributions.",
        ("megatron_sov", "distill"), ranks=True, gpus=True, objective="distill"),
    "rl-run": StageKind(
        "Reinforcement learning: writes, judges and trains its rounds, all in one job.",
        ("megatron_sov", "rl", "run"), ranks=True, gpus=True, objective="policy"),
    "rl-train": StageKind(
        "Reinforcement learning: trains the rounds that other jobs write and judge, and waits for them.",
        ("megatron_sov", "rl", "train"), ranks=True, gpus=True, objective="policy"),
    "convert": StageKind(
        "Conversion: a Hugging Face folder from a checkpoint, or the other way round; or the proof that both "
        "are the same model.  Needs no GPU.",
        ("megatron_sov", "convert"), ranks=False, gpus=False, time_limit="4:00:00"),
    "eval": StageKind(
        "Evaluation of a checkpoint or Hugging Face folder on one node.",
        ("megatron_sov", "eval"), ranks=False, gpus=True, time_limit="4:00:00"),
    "eval-lm": StageKind(
        "Evaluation on tasks of lm-eval's form, on one node.",
        ("megatron_sov", "eval", "lm"), ranks=False, gpus=True, time_limit="4:00:00", shares=True),
    "rl-generate": StageKind(
        "Reinforcement learning: writes responses into a rollout store, on one node.",
        ("megatron_sov", "rl", "generate"), ranks=False, gpus=True, shares=True),
    "rl-reward": StageKind(
        "Reinforcement learning: judges the responses of a rollout store, on the cores of one node.",
        ("megatron_sov", "rl", "reward"), ranks=False, gpus=False, shares=True)}


@dataclass(frozen=True)
class EngineShares:
    """Settings in `--engine-set` that decide an engine server's share of a node."""

    tp: AtLeastOne = 1
    dp: AtLeastOne = 1
    weights: str = ""
    """Folder for new weights; empty: not set."""
    transfer: str = "files"
    """Transfer method for weights."""

    @property
    def num_gpus(self) -> int:
        return self.tp * self.dp


@dataclass(frozen=True)
class StageWork:
    """A stage with its arguments, paths and settings."""

    stage: str
    """Name in `STAGES`."""
    arguments: tuple[str, ...]
    """Words after the command, as typed."""
    target: Path
    """Absolute folder for the run or artifact."""
    records: Path
    """Folder for the job's records: RUN/slurm, or OUTPUT.slurm next to an artifact, which stays unchanged."""
    completion: Path
    """File that exists when the stage is complete."""
    writes_completion: bool = True
    """The command writes `completion`; False: the job script does."""
    inputs: tuple[Path, ...] = ()
    """Folders to read, from earlier stages."""
    data: tuple[str, ...] = ()
    """--data for a training stage, as typed."""
    config: RunConfig | None = None
    """`RunConfig` of a training stage, without values from its checkpoint."""
    layout_open: bool = False
    """No `parallel` setting chooses the layout."""
    settings: tuple[str, ...] = ()
    """--set for a training stage."""
    request: RecipeRequest | None = None
    """Recipe request for a training stage."""
    start_from: Path | None = None
    """--from for a training stage; None: initial weights."""
    num_ranks: int = 0
    """Processes in a training stage; 0: unknown."""
    data_tokens: int = 0
    """Training tokens in its data; 0: unknown."""
    epochs: float = 0.0
    """Passes over its data; 0: unknown."""
    engines: EngineShares | None = None
    """Engine servers for rl-run; None: the trained model generates, or the servers already run."""

    @property
    def kind(self) -> StageKind:
        return STAGES[self.stage]


def check_stage(stage: str) -> None:
    """Raise `UserError` for an unknown stage, or for a recipe or script in place of a stage."""
    if stage in STAGES:
        return
    if stage in recipes.names() or is_reference(stage):
        raise UserError(f"submit {stage}: a stage comes before the recipe",
                        Fix(command="pretrain", arguments=(stage,)))
    if Path(stage).suffix in (".sh", ".sbatch", ".slurm", ".job", ".py"):
        raise UserError(f"submit {stage}: `submit` writes the job's script itself; name the stage and its "
                        f"arguments (`megatron-sov submit STAGE --help`); Slurm takes a script of your own",
                        Fix(f"sbatch {stage}"))
    near = next((name for name in STAGES if name.startswith(f"{stage}-")), "")  # rl: rl-run
    raise UserError(f"stage {stage!r}: does not exist{suggest_name(stage, STAGES)} (stages: "
                    f"{', '.join(STAGES)}, chain)", Fix(command=near) if near else None)


def build_stage_work(stage: str, arguments: list[str], commands: Commands,
                     has_gpus: bool | None = None) -> StageWork:
    """Parse a stage's arguments, without reading the named files. `commands`: parsers for the stages'
    commands; `has_gpus`: GPUs in the nodes, None: decided by this machine. Raises `UserError`: unknown stage,
    or invalid arguments or settings."""
    check_stage(stage)
    # the parsers of sov-tokenizer and sov-data are not in `commands`: parse their paths only
    if stage not in commands:
        return _build_artifact(stage, arguments)
    parser = Parser(prog=f"submit {stage}")
    commands[stage](parser)
    typed = parser.parse_args(arguments)
    if getattr(typed, "dry_run", False):  # from a chain's file: `submit` itself takes --dry-run
        raise UserError(f"--dry-run: the job would do nothing; leave it out of the arguments of {stage}, "
                        "and type it to `megatron-sov submit chain`")
    if STAGES[stage].shares:
        return _build_shared(stage, arguments, read_command_options(typed))
    if stage == "convert":
        return _build_conversion(arguments, typed)
    if stage == "eval":
        return _build_evaluation(arguments, typed)
    return _build_training(stage, arguments, read_command_options(typed), has_gpus)


def _list_teachers(args: Any) -> list[Path | None]:
    """Return the teachers' folders, in the order on the command line."""
    if hasattr(args, "given"):
        return [Path(place) for option, _, place in args.given() if option == "--teacher"]
    return [Path(split_source_name(text)[1]) for text in getattr(args, "teacher", ())]


def _build_training(stage: str, arguments: list[str], args: Any, has_gpus: bool | None) -> StageWork:
    if args.nproc is not None:
        raise UserError(f"--nproc {args.nproc}: under Slurm the nodes and the profile decide; leave it out",
                        Fix(left_out=(f"--nproc {args.nproc}",)))
    has_rounds = STAGES[stage].objective == "policy"
    objective = STAGES[stage].objective
    request = request_training(args, objective, needs_data=not has_rounds, lengthens=stage == "extend",
                               of_model=args.model_settings(None if stage == "extend" else objective,
                                                            has_gpus),
                               resumed=read_started_settings(args.run) if args.resume else None)
    config = add_rounds(request.config()) if has_rounds else request.config()
    run = args.run.absolute()
    # a job may start several times: without --resume, the second start would reject its own run
    argv = arguments if args.resume else [*arguments, "--resume"]
    # checked before submission, because a job may wait for days in the queue
    inputs = [parse_source_path(text) for text in args.data or config.data.paths]
    optional = (args.start_from, *args.configs,
                *(getattr(args, name, None) for name in ("reference", "prompts", "validation")),
                *_list_teachers(args))
    inputs += [path for path in optional if path is not None]
    return StageWork(stage, tuple(argv), run, run / JOBS, run / COMPLETION,
                     inputs=tuple(p.absolute() for p in inputs), data=tuple(args.data), config=config,
                     layout_open=leaves_layout_open(request), settings=tuple(request.settings),
                     request=request, start_from=args.start_from,
                     engines=_read_engine_shares(args) if stage == "rl-run" else None)


def _read_engine_shares(args: Any) -> EngineShares | None:
    if args.engine == "megatron" or args.engine_url:
        return None
    names = {field.name for field in fields(EngineShares)}
    settings = [setting for setting in args.engine_set if setting.partition("=")[0] in names]
    return apply_changes(EngineShares(), settings, ENGINE_SET)


def _build_artifact(stage: str, arguments: list[str]) -> StageWork:
    parser = Parser(prog=f"submit {stage}", add_help=False)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--input", nargs="+", action="extend", default=[])
    args, _ = parser.parse_known_args(arguments)
    if arguments[0] not in ARTIFACTS[stage]:
        raise UserError(f"submit {stage}: {arguments[0]!r} is no command that writes an artifact; "
                        f"begin with one of {', '.join(ARTIFACTS[stage])}, and run others where you are")
    inputs = [parse_source_path(text) for text in args.input]
    if args.tokenizer:
        inputs.append(args.tokenizer)
    return _build_writing(stage, arguments, args.output, inputs)


def parse_source_path(text: str) -> Path:
    """Return PATH from [NAME=]PATH[:WEIGHT]."""
    if Path(text).exists():
        return Path(text)
    # PATH itself may contain `=` and `:`
    path = text.partition("=")[2] if "=" in text else text
    head, colon, weight = path.rpartition(":")
    return Path(head if colon and re.fullmatch(r"[0-9.e+-]+", weight) else path)


def _build_writing(stage: str, arguments: list[str], output: Path, inputs: list[Path]) -> StageWork:
    """Build a stage that writes the folder `output`."""
    target = output.absolute()
    return StageWork(stage, tuple(arguments), target, target.with_name(f"{target.name}.slurm"),
                     target / MANIFEST, inputs=tuple(p.absolute() for p in inputs))


def _build_conversion(arguments: list[str], typed: argparse.Namespace) -> StageWork:
    if typed.action not in ("from-hf", "to-hf", "verify"):
        raise UserError(f"submit convert {typed.action}: writes no folder; "
                        "run it where you are (stages: from-hf, to-hf, verify)")
    args = read_command_options(typed)
    if typed.action == "verify":
        return _build_reading("convert", arguments, args.b, "verify", (args.a, args.b))
    return _build_writing("convert", arguments, args.out,
                          [args.hf_dir if typed.action == "from-hf" else args.checkpoint])


def _build_evaluation(arguments: list[str], typed: argparse.Namespace) -> StageWork:
    options = vars(read_command_options(typed))
    subjects = [options[name] for name in ("target", "checkpoint", "run") if options.get(name) is not None]
    subject = next(iter(subjects), None)
    if subject is None:
        raise UserError(f"submit eval {typed.action}: names no model or run; pass --run, "
                        "the job's records are written next to it")
    return _build_reading("eval", arguments, Path(subject), typed.action, (Path(subject),))


def _build_reading(stage: str, arguments: list[str], subject: Path, action: str,
                   inputs: tuple[Path, ...]) -> StageWork:
    """Build a stage that only reads the folder `subject`; its records are stored next to the folder."""
    target = subject.absolute()
    records = target.with_name(f"{target.name}.{action}.slurm")
    return StageWork(stage, tuple(arguments), target, records, records / COMPLETION, writes_completion=False,
                     inputs=tuple(path.absolute() for path in inputs))


def _build_shared(stage: str, arguments: list[str], args: Any) -> StageWork:
    """Build a stage whose jobs divide a rollout store's or an evaluation's work."""
    target = (args.settings.output if stage == "eval-lm" else args.store).absolute()
    records = target.with_name(f"{target.name}.{stage}.slurm")
    # new arguments, such as more rounds, are new work with its own completion file
    digest = hashlib.sha256("\0".join(arguments).encode()).hexdigest()[:8]
    optional: list[Path | None] = [getattr(args, "prompts", None), getattr(args, "start_from", None)]
    if stage == "eval-lm":
        optional = [Path(args.target), args.settings.sources.data_dir]
    inputs = [path for path in optional if path is not None]
    return StageWork(stage, tuple(arguments), target, records, records / f"complete-{digest}.json",
                     writes_completion=False, inputs=tuple(path.absolute() for path in inputs))


def check_inputs(work: StageWork, promised: set[Path]) -> None:
    """Raise `UserError` if an input is missing and no earlier stage in the chain writes it. `work`: the
    stage; `promised`: target folders of earlier stages."""
    future = [path for path in work.inputs if any(path.is_relative_to(folder) for folder in promised)]
    for path in work.inputs:
        if path not in future and not path.exists():
            raise UserError(f"{work.stage}: {path} does not exist; make it before, or submit its stage in "
                            "the same chain")
    # only existing folders have data to parse
    parse_data_paths([text for text in work.data if parse_source_path(text).absolute() not in future])


def find_layouts(work: StageWork, profile: ClusterProfile, num_nodes: int, min_nodes: int,
                 settings: dict[int, tuple[str, ...]]) -> dict[int, tuple[str, ...]]:
    """Return number of nodes -> settings, for valid layouts on `min_nodes` to `num_nodes`; `settings` are for
    single numbers. If the user sets no layout, a search chooses one for the profile's GPUs
    (`plan.search.local_search`). Raises `UserError`: the layout does not fit `num_nodes`, `min_nodes` or a
    key in `settings`, or exceeds memory."""
    assert work.config is not None, work.stage
    layouts: dict[int, tuple[str, ...]] = {}
    profile_ranks, gpu = profile.tasks_per_node, profile.gpu if profile.gpus_per_node else ""
    limit_bytes = get_usable_bytes(CHIPS[gpu]) if gpu else math.inf
    layout: tuple[str, ...] = ()
    # after a loss of nodes, a job continues with any smaller number in the result
    for count in range(num_nodes, min_nodes - 1, -1):
        num_ranks, node_settings = count * profile_ranks, settings.get(count, ())
        # a layout from the user is never replaced
        if not work.layout_open or sets_layout(node_settings):
            chosen = node_settings
        elif layout and can_run(apply_settings(work.config, [*layout, *node_settings]), num_ranks,
                                limit_bytes):
            chosen = (*layout, *node_settings)
        else:
            layout, _ = choose_layout(apply_settings(work.config, list(node_settings)),
                                      Machines(profile.description, profile, count),
                                      (*work.settings, *node_settings))
            chosen = (*layout, *node_settings)
        config = apply_settings(work.config, list(chosen)) if chosen else work.config
        _refuse_missing_kernels(config, profile)
        problems = config.problems(num_ranks)
        if not problems:
            if gpu:
                refuse_too_large(config, num_ranks, CHIPS[gpu])
            if profile.memory_bytes:
                refuse_on_nodes(config, num_ranks, profile_ranks, profile.memory_bytes,
                                CHIPS[gpu] if gpu else None)
            layouts[count] = chosen
        # a job does not use other numbers without a valid layout
        elif count in (num_nodes, min_nodes) or count in settings:
            raise UserError(f"--nodes {count} x {profile_ranks} processes do not fit {config.recipe}: "
                            f"{'; '.join(map(str, problems))}")
    return layouts


def _refuse_missing_kernels(config: RunConfig, profile: ClusterProfile) -> None:
    """Refuse dispatchers and CUDA graphs that the profile does not list."""
    dispatchers = [config.parallel.expert_dispatcher] if config.model.num_moe_layers() else []
    for setting, values, field, allowed in (
            ("parallel.expert_dispatcher", dispatchers, "dispatchers", profile.dispatchers),
            ("gpu.cuda_graphs", config.gpu.cuda_graphs, "cuda_graphs", profile.cuda_graphs)):
        if missing := ", ".join(value for value in values if value not in allowed):
            raise UserError(f"{setting} = {missing}: the profile's {field} are "
                            f"{', '.join(allowed) or 'empty'}; change the setting, or add {missing} to the "
                            "profile once it works in the job's Python (`megatron-sov doctor`)")

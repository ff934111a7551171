"""The stages that can be submitted: which command each one is, where its records lie, and when it is
complete.

Arguments are read by the commands' own parsers.  Commands stand above this room, so they hand their
`add_arguments` in.
"""

from __future__ import annotations

import argparse
import hashlib
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
from megatron_sov.plan.footprint.gpu_capacity import fits_gpu, refuse_on_nodes, refuse_too_large
from megatron_sov.plan.pricing import Machines
from megatron_sov.plan.search.local_search import choose_layout, leaves_layout_open
from megatron_sov.plan.search.recommended_layouts import sets_layout
from megatron_sov.runs.folder import COMPLETION, JOBS, read_started_settings
from megatron_sov.work.clusters import cluster
from megatron_sov.work.clusters.chips import CHIPS
from megatron_sov.work.clusters.cluster import ClusterProfile

Commands = Mapping[str, Callable[[argparse.ArgumentParser], None]]
"""Stage -> what declares the arguments of its command to a parser;
for every stage of `megatron-sov` itself."""

PROFILES = f"{', '.join(cluster.list_profiles())}, or a YAML file of your own"


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """Submit a stage, or a chain of stages from a file, to Slurm."""

    cluster: Annotated[str | None, Flag(value="PROFILE", help=PROFILES)] = None
    nodes: AtLeastOne | None = None
    """Nodes of a training stage (default 1)."""
    min_nodes: AtLeastOne | None = None
    """Go on with as few nodes as this when others are missing."""
    nodes_set: Annotated[tuple[str, ...], Flag(value="N:key=value")] = ()
    """A setting that changes with N nodes."""
    engine_nodes: NotNegativeInt = 0
    """rl-run --engine vllm: nodes beside these, for engine servers alone."""
    array: NotNegativeInt = 0
    """Share the inputs of data pack, or the work of eval-lm, rl-generate and rl-reward, out over N jobs
    (default: one job does all)."""
    account: Annotated[str | None, Flag(value="NAME")] = None
    """Instead of the profile's."""
    partition: Annotated[str | None, Flag(value="NAME")] = None
    """Instead of the profile's."""
    time_limit: Annotated[str | None, Flag("--time", "LIMIT")] = None
    """Time limit instead of the profile's: minutes, H:MM:SS or D-HH:MM:SS."""
    dry_run: bool = False
    """Print what would be submitted; writes nothing, needs no Slurm."""
    prove: bool = False
    """Training stage: play its layout in miniature here first, as `plan --prove` does; ends with 3 and
    submits nothing where it differs from one process."""
    scripts: Annotated[Path | None, Flag(value="DIR")] = None
    """Chain: submit nothing, write a script of each stage for `sbatch`, with paths that begin with $WORK."""
    continue_chain: Annotated[bool, Flag("--continue")] = False
    """Chain: submit what is not complete yet."""


@dataclass(frozen=True)
class StageKind:
    """One stage that can be submitted."""

    title: str
    """What it does, at the top of its script."""
    program: tuple[str, ...]
    """What follows `python -m`."""
    ranks: bool
    """Whether it trains: one process for each GPU, on many nodes; others are one process on one node."""
    gpus: bool
    """Whether it uses GPUs."""
    time_limit: str = ""
    """Time limit where nobody says another, and the profile's is not shorter; empty: the profile's."""
    objective: BuiltIn = "lm"
    """What a training stage learns."""
    shares: bool = False
    """Whether several jobs of the same command share its work."""


STAGES = {
    "tokenizer": StageKind(
        "Tokenizer: text to a tokenizer.  One process on one node.",
        ("tokenizer.cli",), ranks=False, gpus=False),
    "data": StageKind(
        "Data: text to token shards, on all cores of one node.  A killed job continues where it was.",
        ("data_prep.cli",), ranks=False, gpus=False),
    "pretrain": StageKind(
        "Pretraining: token shards to checkpoints.",
        ("megatron_sov", "pretrain"), ranks=True, gpus=True),
    "extend": StageKind(
        "Context extension: trains on at longer and longer contexts, each behind its gate (exit code 3 where "
        "it does not pass).", ("megatron_sov", "extend"), ranks=True, gpus=True),
    "sft": StageKind(
        "Supervised fine-tuning on chats.",
        ("megatron_sov", "sft"), ranks=True, gpus=True, objective="sft"),
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
        ("megatron_sov", "rl", "reward"), ranks=False, gpus=False, shares=True),
}
ARTIFACTS = {"tokenizer": ("train",), "data": ("pack", "mix", "demo-corpus", "pairs", "groups", "unpaired")}
"""Commands of `sov-tokenizer` and `sov-data` that leave a folder with a manifest."""


ENGINE_SET = "--engine-set"
"""Option of the settings of engine servers."""


@dataclass(frozen=True)
class EngineShares:
    """Of the settings of engine servers those that say what of a node each takes."""

    tp: AtLeastOne = 1
    dp: AtLeastOne = 1
    weights: str = ""
    """Where new weights lie for them; empty: nobody has said it."""
    transfer: str = "files"
    """How weights come to them."""

    @property
    def gpus(self) -> int:
        return self.tp * self.dp


@dataclass(frozen=True)
class StageWork:
    """A stage with its arguments: what a job has to do."""

    stage: str
    """Name in `STAGES`."""
    arguments: tuple[str, ...]
    """What follows the command, as a user would type it."""
    target: Path
    """The run's or artifact's folder, absolute."""
    records: Path
    """Where the job's records lie: RUN/slurm, or OUTPUT.slurm beside an artifact, which is one whole."""
    done: Path
    """What exists when the stage is complete."""
    writes_done: bool = True
    """Whether the command itself leaves `done`; where it does not the job writes it."""
    inputs: tuple[Path, ...] = ()
    """Folders of earlier stages that it reads."""
    data: tuple[str, ...] = ()
    """--data of a training stage, as a user would type it."""
    config: RunConfig | None = None
    """Settings of a training stage, as far as they are known before its checkpoint is."""
    layout_open: bool = False
    """Whether nobody has said anything about the layout of a training stage."""
    settings: tuple[str, ...] = ()
    """--set of a training stage."""
    request: RecipeRequest | None = None
    """What a training stage was asked for."""
    start_from: Path | None = None
    """--from of a training stage; None: initial weights."""
    num_ranks: int = 0
    """Processes of a training stage; 0: unknown."""
    data_tokens: int = 0
    """Training tokens of its data; 0: unknown."""
    epochs: float = 0.0
    """Passes over its data; 0: unknown."""
    engines: EngineShares | None = None
    """Servers that write for rl-run; None: its own model does, or servers that somebody else has started."""

    @property
    def kind(self) -> StageKind:
        return STAGES[self.stage]


def check_stage(stage: str) -> None:
    """Refuse a word after `submit` that is no stage.

    Raises:
        UserError: there is no such stage; a recipe or a file there belongs after the stage.
    """
    if stage in STAGES:
        return
    if stage in recipes.names() or is_reference(stage):
        raise UserError(f"submit {stage}: a stage comes before the recipe",
                        Fix(command="pretrain", arguments=(stage,)))
    if Path(stage).suffix in (".sh", ".sbatch", ".slurm", ".job", ".py"):
        raise UserError(f"submit {stage}: `submit` writes the job's script itself; name the stage and its "
                        f"arguments (a script of your own: sbatch {stage})",
                        Fix("megatron-sov submit pretrain --cluster NAME --account NAME --nodes 1 RECIPE "
                            "--data DIR --run DIR"))
    raise UserError(f"stage {stage!r}: does not exist{suggest_name(stage, STAGES)} (stages: "
                    f"{', '.join(STAGES)}, chain)")


def work_of(stage: str, arguments: list[str], commands: Commands, has_gpus: bool | None = None) -> StageWork:
    """Return what a job has to do; looks at the arguments alone, not at what they name.

    Args:
        stage: name in `STAGES`.
        arguments: what follows its command.
        commands: the parsers of those commands.
        has_gpus: whether the nodes have GPUs; None: those of this machine decide.

    Raises:
        UserError: there is no such stage, or its arguments or settings are wrong.
    """
    check_stage(stage)
    # of another program, whose parser is not handed in: read as far as paths go
    if stage not in commands:
        return _artifact(stage, arguments)
    parser = Parser(prog=f"submit {stage}")
    commands[stage](parser)
    if STAGES[stage].shares:
        return _sharing(stage, arguments, read_command_options(parser.parse_args(arguments)))
    reader = {"convert": _convert, "eval": _eval}.get(stage)
    typed = parser.parse_args(arguments)
    return reader(arguments, typed) if reader else _training(stage, arguments, read_command_options(typed),
                                                             has_gpus)


def _teachers(args: Any) -> list[Path | None]:
    """Return the folders of teachers: there may be one for each domain, or for the data of each name."""
    if hasattr(args, "given"):
        return [Path(place) for option, _, place in args.given() if option == "--teacher"]
    return [Path(split_source_name(text)[1]) for text in getattr(args, "teacher", ())]


def _training(stage: str, arguments: list[str], args: Any, has_gpus: bool | None) -> StageWork:
    if args.nproc is not None:
        raise UserError(f"--nproc {args.nproc}: under Slurm the nodes and the profile decide; leave it out",
                        Fix(left_out=("--nproc", str(args.nproc), f"--nproc={args.nproc}")))
    if args.dry_run:  # in a chain's file; from a command line `submit` takes it
        raise UserError(f"--dry-run: the job would train nothing; leave it out of the arguments of {stage}, "
                        "and type it to `megatron-sov submit chain`")
    has_rounds = STAGES[stage].objective == "policy"
    objective = STAGES[stage].objective
    request = request_training(args, objective, needs_data=not has_rounds, lengthens=stage == "extend",
                               of_model=args.model_settings(None if stage == "extend" else objective,
                                                            has_gpus),
                               resumed=read_started_settings(args.run) if args.resume else None)
    config = add_rounds(request.config()) if has_rounds else request.config()
    run = args.run.absolute()
    # a job may start several times; without --resume its second start would refuse its own run
    argv = arguments if args.resume else [*arguments, "--resume"]
    # checked before submission: a job should not wait for days to say that a folder is missing
    inputs = [path_of(text) for text in args.data or config.data.paths]
    others = (args.start_from, *args.configs,
              *(getattr(args, name, None) for name in ("reference", "prompts", "validation")),
              *_teachers(args))
    inputs += [path for path in others if path is not None]
    return StageWork(stage, tuple(argv), run, run / JOBS, run / COMPLETION,
                     inputs=tuple(p.absolute() for p in inputs), data=tuple(args.data), config=config,
                     layout_open=leaves_layout_open(request), settings=tuple(request.settings),
                     request=request, start_from=args.start_from,
                     engines=_engines(args) if stage == "rl-run" else None)


def _engines(args: Any) -> EngineShares | None:
    if args.engine == "megatron" or args.engine_url:
        return None
    names = {field.name for field in fields(EngineShares)}
    return apply_changes(EngineShares(), [setting for setting in args.engine_set
                                   if setting.partition("=")[0] in names], ENGINE_SET)


def _artifact(stage: str, arguments: list[str]) -> StageWork:
    parser = Parser(prog=f"submit {stage}", add_help=False, allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--input", nargs="+", action="extend", default=[])
    args, _ = parser.parse_known_args(arguments)
    if arguments[0] not in ARTIFACTS[stage]:
        raise UserError(f"submit {stage}: {arguments[0]!r} is no command that writes an artifact; "
                        f"begin with one of {', '.join(ARTIFACTS[stage])}, and run others where you are")
    inputs = [path_of(text) for text in args.input] + [p for p in (args.tokenizer,) if p]
    return _making(stage, arguments, args.output, inputs)


def path_of(text: str) -> Path:
    """Return the folder of [NAME=]PATH[:WEIGHT]."""
    if Path(text).exists():
        return Path(text)
    # NAME=PATH:WEIGHT, where a path may hold signs of both kinds
    path = text.partition("=")[2] if "=" in text else text
    head, colon, weight = path.rpartition(":")
    return Path(head if colon and re.fullmatch(r"[0-9.e+-]+", weight) else path)


def _making(stage: str, arguments: list[str], output: Path, inputs: list[Path]) -> StageWork:
    target = output.absolute()
    return StageWork(stage, tuple(arguments), target, target.with_name(f"{target.name}.slurm"),
                     target / MANIFEST, inputs=tuple(p.absolute() for p in inputs))


def _convert(arguments: list[str], typed: argparse.Namespace) -> StageWork:
    if typed.action not in ("from-hf", "to-hf", "verify"):
        raise UserError(f"submit convert {typed.action}: writes no folder; "
                        "run it where you are (stages: from-hf, to-hf, verify)")
    args = read_command_options(typed)
    if typed.action == "verify":
        return _looking("convert", arguments, args.b, "verify", (args.a, args.b))
    return _making("convert", arguments, args.out,
                   [args.hf_dir if typed.action == "from-hf" else args.checkpoint])


def _eval(arguments: list[str], typed: argparse.Namespace) -> StageWork:
    found = vars(read_command_options(typed))
    subject = next((found[name] for name in ("target", "checkpoint", "run") if found.get(name) is not None),
                   None)
    if subject is None:
        raise UserError(f"submit eval {typed.action}: names no model or run; pass --run, "
                        "the job's records lie beside it")
    return _looking("eval", arguments, Path(subject), typed.action, (Path(subject),))


def _looking(stage: str, arguments: list[str], subject: Path, action: str,
             inputs: tuple[Path, ...]) -> StageWork:
    """Return a job that looks at a folder and makes none; its records lie beside that folder."""
    target = subject.absolute()
    records = target.with_name(f"{target.name}.{action}.slurm")
    return StageWork(stage, tuple(arguments), target, records, records / COMPLETION, writes_done=False,
                     inputs=tuple(path.absolute() for path in inputs))


def _sharing(stage: str, arguments: list[str], args: Any) -> StageWork:
    """Return a job of those that meet in a rollout store, or in the answers beside an evaluation's output; it
    is complete when the command finds nothing left to do, and another command, such as one with more rounds,
    begins anew."""
    target = (args.settings.output if stage == "eval-lm" else args.store).absolute()
    records = target.with_name(f"{target.name}.{stage}.slurm")
    # other arguments are another piece of work, with a completion of its own
    asked = hashlib.sha256("\0".join(arguments).encode()).hexdigest()[:8]
    named = (Path(args.target), args.settings.sources.data_dir) if stage == "eval-lm" else (
        getattr(args, "prompts", None), getattr(args, "start_from", None))
    inputs = [path for path in named if path is not None]
    return StageWork(stage, tuple(arguments), target, records, records / f"complete-{asked}.json",
                     writes_done=False, inputs=tuple(path.absolute() for path in inputs))


def check_inputs(work: StageWork, promised: set[Path]) -> None:
    """Raise `UserError` where a stage reads what is not there and no earlier stage of its chain makes it."""
    # what an earlier stage of the chain will make cannot be looked at yet
    made = [path for path in work.inputs if any(path.is_relative_to(folder) for folder in promised)]
    for path in work.inputs:
        if path not in made and not path.exists():
            raise UserError(f"{work.stage}: {path} does not exist; make it before, or submit its stage in "
                            "the same chain")
    # weights are parsed only if the folder is there
    parse_data_paths([text for text in work.data if path_of(text).absolute() not in made])


def fitting_nodes(work: StageWork, profile: ClusterProfile, num_nodes: int, least: int,
                  settings: dict[int, tuple[str, ...]]) -> dict[int, tuple[str, ...]]:
    """Return number of nodes -> settings, for every number from `least` to `num_nodes` that the layout fits.

    If the user sets no layout, a search chooses one for the profile's GPUs (`plan.search.local_search`).

    Args:
        work: a training stage.
        profile: the cluster.
        num_nodes: nodes that are asked for; they have to fit.
        least: fewest nodes to go on with.
        settings: number of nodes -> settings that change then.

    Raises:
        UserError: the layout does not fit `num_nodes` or `least`, or a number has settings
            that do not fit it; or it does not fit the GPUs' memory.
    """
    assert work.config is not None, work.stage
    fitting: dict[int, tuple[str, ...]] = {}
    profile_ranks, gpu = profile.tasks_per_node, profile.gpu if profile.gpus_per_node else ""
    layout: tuple[str, ...] = ()
    # a job that lost nodes goes on with fewer, where the layout fits that many
    for count in range(num_nodes, least - 1, -1):
        num_ranks, said = count * profile_ranks, settings.get(count, ())
        # a layout that the user named is never replaced
        if not work.layout_open or sets_layout(said):
            chosen = said
        elif layout and _suits(apply_settings(work.config, [*layout, *said]), num_ranks, gpu):
            chosen = (*layout, *said)
        else:
            layout, _ = choose_layout(apply_settings(work.config, list(said)),
                                      Machines(profile.description, profile, count), (*work.settings, *said))
            chosen = (*layout, *said)
        config = apply_settings(work.config, list(chosen)) if chosen else work.config
        problems = config.problems(num_ranks)
        if not problems:
            if gpu:
                refuse_too_large(config, num_ranks, CHIPS[gpu])
            if profile.memory_bytes:
                refuse_on_nodes(config, num_ranks, profile_ranks, profile.memory_bytes,
                                CHIPS[gpu] if gpu else None)
            fitting[count] = chosen
        # numbers in between may not fit: the job just does not run on them
        elif count in (num_nodes, least) or count in settings:
            raise UserError(f"--nodes {count} x {profile_ranks} processes do not fit {config.recipe}: "
                            f"{'; '.join(map(str, problems))}")
    return fitting


def _suits(config: RunConfig, num_ranks: int, gpu: str) -> bool:
    """Return whether the layout found for more nodes keeps the rules and fits on fewer."""
    return not config.problems(num_ranks) and (not gpu or fits_gpu(config, num_ranks, CHIPS[gpu]))

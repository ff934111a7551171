"""`megatron-sov ladder RECIPE --sizes 1M,2M,4M,8M --data DIR --run DIR [--predict SIZE [--verify]]`: small
models of a recipe's structure, the law that their losses follow, and what it says of another size."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from megatron_sov.base.artifacts import atomic_write, to_json
from megatron_sov.base.errors import ExitCode, UserError, warn
from megatron_sov.base.figures import format_count
from megatron_sov.base.outputs import refuse_unwritable
from megatron_sov.base.settings import AtLeastOne, Flag, add_options, read_options
from megatron_sov.commands.shared_options import words_of
from megatron_sov.model.config import RunConfig, data_paths, from_dict
from megatron_sov.model.recipes.requested import RecipeOptions, RecipeRequest, requested
from megatron_sov.runs.launch_environment import num_ranks
from megatron_sov.work.clusters import cluster

if TYPE_CHECKING:
    from megatron_sov.base.pages.page import PageTable
    from megatron_sov.publish.ladder.family import Member
    from megatron_sov.publish.ladder.results import LadderText, Law, Point


SETTINGS, PAGE = "settings", "ladder.html"
DECIDED = ("train.tokens", "train.steps", "optim.groups", "optim.warmup_steps")
"""Settings that a ladder makes itself, for each size its own."""
SUBMIT = (f"Submit the runs to Slurm ({', '.join(cluster.names())}, or a YAML file of your own), instead of "
          "training them here one after the other.")


@dataclass(frozen=True, kw_only=True)
class LadderOptions(RecipeOptions):
    """Train small models of a recipe's structure, fit a scaling law, predict the next size."""

    sizes: Annotated[str, Flag(value="N,N,...")]
    """Parameters of the trunk that one token meets, such as 250K,500K,1M,2M."""
    tokens_per_param: Annotated[str, Flag(value="R[,R...]")] = "20"
    """Tokens of a run over its size (default 20); several: a run for each."""
    rates: Literal["mup", "step-law"] = "mup"
    """mup: the recipe's rates, carried to each width (default); step-law: rates and batch sizes fitted by
    arXiv 2503.04715."""
    predict: Annotated[str | None, Flag(value="SIZE")] = None
    """A size to predict (default: the next one, by the step between the last two)."""
    verify: bool = False
    """Train that size too, once its prediction is written."""
    data: Annotated[tuple[str, ...], Flag(value="[NAME=]DIR[:weight]")] = ()
    """Token shards made by `sov-data pack` with --heldout; needed unless --dry-run."""
    run: Annotated[Path, Flag(value="DIR")]
    """Folder of the ladder; each size is a run in it, and a ladder that was stopped goes on."""
    nproc: AtLeastOne | None = None
    """Local processes of each run."""
    submit: Annotated[str | None, Flag(value="CLUSTER", help=SUBMIT)] = None
    account: Annotated[str | None, Flag(value="NAME")] = None
    """--submit: Slurm account (default: the profile's)."""
    nodes: AtLeastOne = 1
    """--submit: nodes of each run."""
    dry_run: bool = False
    """Print the models and train nothing."""


add_arguments = partial(add_options, cls=LadderOptions)


def run(typed: argparse.Namespace) -> int:
    """Train what is not complete, fit, predict; returns 0 when all of it stands.

    Raises:
        UserError: a mistake in the arguments, sizes that the structure cannot have, another ladder in the
            folder, or losses that no law fits.
    """
    args = read_options(LadderOptions, typed)
    request = requested(args)
    members, predicted = _members(args, request)
    _check(args, [*members, predicted])
    from megatron_sov.publish.ladder.results import member_table

    if args.dry_run:
        _print(member_table([*members, predicted], []))
        return ExitCode.OK
    # the predicted size too: its prediction should not fail when it is verified
    _check_data(args, [*members, predicted])
    _declare(args.run, [*members, predicted])
    code = _train(args, members)
    if code != 0 or (args.submit is not None and not _are_complete(args.run, members)):
        return code
    return _fit(args, members, predicted)


def _members(args: LadderOptions, request: RecipeRequest) -> tuple[list[Member], Member]:
    from megatron_sov.publish.ladder.family import members, parse_size, parse_sizes
    from megatron_sov.publish.ladder.results import LEAST_POINTS

    sizes = parse_sizes(args.sizes, "--sizes")
    ratios = _ratios(args.tokens_per_param)
    law = "power" if len(ratios) == 1 else "parametric"
    if len(sizes) * len(ratios) < LEAST_POINTS[law] or len(sizes) < 2:
        raise UserError(f"--sizes {args.sizes}: makes {len(sizes) * len(ratios)} runs, and a law needs "
                        f"{LEAST_POINTS[law]} at least, of two sizes at least; add some")
    for setting in request.settings:
        key = setting.partition("=")[0]
        if key in DECIDED:
            raise UserError(f"--set {setting}: a ladder makes {key} itself, for each size its own; leave it "
                            "out, or change --tokens-per-param")
    if args.predict is None:
        # the next step of a geometric ladder
        size = round(sizes[-1]**2 / sizes[-2])
    else:
        size = parse_size(args.predict, "--predict")
    if size in sizes:
        raise UserError(f"--predict {args.predict}: is one of --sizes, so it would be known; leave it out "
                        "of --sizes")
    config = request.config()
    if config.objective.name != "lm":
        raise UserError(f"{config.recipe}: trains by objective {config.objective.name}; a ladder is of "
                        "pretraining: name a recipe that trains by lm")
    # a layout that was typed is meant for the ladder; that of the recipe is for its own size
    keeps = any(s.startswith("parallel.") for s in request.settings)
    found = members(config, sizes, size, ratios, args.rates, keeps_layout=keeps)
    return found[:-len(ratios)], found[-1]


def _ratios(text: str) -> list[float]:
    try:
        ratios = sorted(float(part) for part in text.split(","))
    except ValueError:
        ratios = []
    if not ratios or not all(0 < r <= 1e6 for r in ratios) or len(set(ratios)) < len(ratios):
        raise UserError(f"--tokens-per-param {text!r}: must be numbers above 0 between commas, each once, "
                        "such as 20 or 10,20,40")
    return ratios


def _check(args: LadderOptions, members: Sequence[Member]) -> None:
    if args.submit is not None:
        cluster.load(args.submit, account=args.account)
    elif args.account is not None:
        raise UserError(f"--account {args.account}: is for --submit CLUSTER; add it, or leave this out")
    if not args.data and not args.dry_run:
        raise UserError("--data: is missing; pass a folder made by `sov-data pack --heldout SHARE`")
    for member in members:
        try:
            member.config.check(num_ranks(args.nproc) if args.submit is None else
                                member.config.parallel.ranks_per_replica)
        except UserError as e:
            raise UserError(f"size {member.name}: {e}") from None


def _check_data(args: LadderOptions, members: Sequence[Member]) -> None:
    """Look at the data before the first run.

    Raises:
        UserError: they cannot be read, are not for these models, or hold nothing out.
    """
    from megatron_sov.train.data.token_shards import open_sources

    sources = open_sources(data_paths(args.data), members[0].config.model.vocab_size)
    # now: without it the last run would end before anybody learned that nothing can be compared
    if not any(source.num_tokens.get("heldout") for source in sources):
        raise UserError(f"--data {', '.join(args.data)}: holds no held-out text, by whose loss models are "
                        "compared; pack it with --heldout SHARE")
    most = max(member.num_tokens for member in members)
    there = sum(source.num_tokens["train"] for source in sources)
    if most > there:
        warn(f"--data {', '.join(args.data)}: holds {format_count(there)} tokens, and the largest run "
             "learns from "
             f"{format_count(most)}; a law of runs that see their text once does not hold for it")


def _declare(folder: Path, members: Sequence[Member]) -> None:
    """Write the settings of each run, from which it is started.

    Raises:
        UserError: the folder holds another ladder, or something else.
    """
    settings = folder / SETTINGS
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--run {folder}: is a file; a ladder needs a folder")
    refuse_unwritable(next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists()),
                      f"--run {folder}")
    if folder.is_dir() and any(folder.iterdir()) and not settings.is_dir():
        raise UserError(f"--run {folder}: is not empty and holds no ladder; choose another folder")
    # settings first: a ladder that is killed goes on with those it was begun with
    settings.mkdir(parents=True, exist_ok=True)
    for member in members:
        file = settings / f"{member.name}.json"
        # runs of two ladders would be points of one law
        if file.is_file() and _read(file) != member.config:
            raise UserError(f"{file}: the ladder in this folder was started with other settings for this "
                            "size; go on with those, or choose another --run")
        atomic_write(file, to_json(member.config.to_dict()))


def _read(file: Path) -> RunConfig:
    """Return the settings that a run of an earlier start has."""
    try:
        return from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, UserError) as e:
        raise UserError(f"{file}: cannot be read as a run's settings ({e}); restore it, or choose another "
                        "--run") from None


def _train(args: LadderOptions, members: Sequence[Member]) -> int:
    """Run, or submit, what is not complete; returns the exit code of the first that is not."""
    from megatron_sov.operate.slurm.stages import SubmitOptions
    from megatron_sov.publish.ladder.results import is_complete
    from megatron_sov.train.stages.stage_config import StageOptions
    from megatron_sov.work.processes.children import run_command

    for i, member in enumerate(members, 1):
        if is_complete(args.run / member.name):
            continue
        print(f"ladder: {member.name}, run {i} of {len(members)}", file=sys.stderr, flush=True)
        stage = StageOptions(configs=(args.run / SETTINGS / f"{member.name}.json",),
                             run=args.run / member.name, data=args.data, plugins=args.plugins,
                             nproc=args.nproc, resume=args.submit is None)
        if args.submit is not None:
            where = SubmitOptions(cluster=args.submit, nodes=args.nodes, account=args.account)
            command = ["submit", "pretrain", *words_of(where), *words_of(stage)]
        else:
            command = ["pretrain", *words_of(stage)]
        code = run_command(["megatron_sov", *command], "the same command goes on with the ladder")
        if code != 0:
            return code
    return ExitCode.OK


def _are_complete(folder: Path, members: Sequence[Member]) -> bool:
    from megatron_sov.publish.ladder.results import is_complete

    waiting = [m.name for m in members if not is_complete(folder / m.name)]
    if waiting:
        print(f"{folder}: {', '.join(waiting)} train on the cluster (megatron-sov status {folder}); the same "
              "command fits the law once they are complete")
    return not waiting


def _fit(args: LadderOptions, members: Sequence[Member], predicted: Member) -> int:
    from megatron_sov.publish.ladder.results import OUTSIDE, fitted, points, tell

    found = points(args.run, members)
    law = fitted(found)
    if not law.in_regime:
        warn(OUTSIDE)
    told = tell(law, predicted, args.run)
    _write(args, members, found, law, told, predicted)
    if args.verify and told.measured is None:
        code = _train(args, [predicted])
        if code != 0 or not _are_complete(args.run, [predicted]):
            return code
        told = tell(law, predicted, args.run)
        _write(args, members, found, law, told, predicted)
    from megatron_sov.publish.ladder.results import law_tables, member_table, prediction_table

    for table in (member_table(members, found), *law_tables(law), prediction_table([told])):
        _print(table)
    print(f"{args.run / PAGE}: opens in any browser without a network")
    return ExitCode.OK


def _write(args: LadderOptions, members: Sequence[Member], found: Sequence[Point], law: Law,
           told: LadderText, predicted: Member) -> None:
    from megatron_sov.publish.ladder.results import page, write

    recipe = predicted.config.recipe
    write(args.run, recipe, args.rates, found, law, [told])
    atomic_write(args.run / PAGE, page(recipe, args.rates, [*members, predicted], found, law, [told]))


def _print(table: PageTable) -> None:
    widths = [max(len(row[i]) for row in (table.head, *table.rows)) for i in range(len(table.head))]
    for row in (table.head, *table.rows):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    print()

"""`megatron-sov rl replay RUN --output DIR`: a run of reinforcement learning again, to the same tokens,
rewards and weights."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from megatron_sov.audit.repeating import LAYOUT, RepeatOutcome
from megatron_sov.base.artifacts import atomic_write, to_json
from megatron_sov.base.command_line import Parser
from megatron_sov.base.errors import ExitCode, GateFailed, StopRequested, UserError
from megatron_sov.base.outputs import refuse_nowhere
from megatron_sov.base.settings import AtLeastOne, Flag, add_options, read_options
from megatron_sov.commands.rl.rounds import RlRunOptions
from megatron_sov.commands.shared_options import words_of
from megatron_sov.commands.train.resume import (
    enter_folder, in_folder, refuse_unsaid_code, run_words, typed_options)
from megatron_sov.infer.engine import MEGATRON
from megatron_sov.model.config import RunConfig
from megatron_sov.runs.checkpoints import find_checkpoint, refuse_missing, refuse_no_run, step_of
from megatron_sov.runs.folder import RunFolder, TypedCommand, read_command
from megatron_sov.runs.launch_environment import under_launcher

COMMAND = "rl run"


@dataclass(frozen=True, kw_only=True)
class RlReplayOptions:
    """Do a run of reinforcement learning again, in a folder and a store of its own, and compare tokens,
    rewards and weights; a killed command goes on."""

    run: Annotated[Path, Flag("RUN")]
    """Run of `rl run`."""
    output: Annotated[Path, Flag(value="DIR", writes=True)]
    """Folder for the run again, its store and replay.json."""
    begin: Annotated[AtLeastOne, Flag("--from", "ROUND")] = 1
    """First round to write again; the newest before it that a checkpoint stands before is taken."""
    nproc: AtLeastOne | None = None
    """Processes (default: as many as the run had)."""
    settings: Annotated[tuple[str, ...], Flag("--set", "key=value")] = ()
    """Another layout, e.g. --set parallel.ep=2."""
    reward: str | None = None
    """The run's own, where it is code of yours: what a folder names alone is not run."""
    environment: str | None = None
    """Likewise."""


add_arguments = partial(add_options, cls=RlReplayOptions)


def run(typed: argparse.Namespace) -> int:
    """Replay, compare and tell; returns that of a gate where something is another one.

    Raises:
        UserError: the run cannot be replayed, or its command fails.
    """
    args = read_options(RlReplayOptions, typed)
    refuse_nowhere(args.output)
    folder, output = args.run.absolute(), args.output.absolute()
    began, options, parser, config = _checked(args, folder)
    confirmed = [word for option, value in (("--reward", args.reward), ("--environment", args.environment))
                 if value is not None for word in (option, value)]
    refuse_unsaid_code(folder, began, words_of(options), confirmed)

    from megatron_sov.audit.replaying import REPLAYED_RUN, REPLAYED_STORE, compare_replay, prepare_replay

    store = began.folder / options.store
    own_layout = not args.settings and args.nproc in (None, options.nproc)
    first = prepare_replay(folder, store, output, config, args.begin, {
        "nproc": None if own_layout else args.nproc, "settings": list(args.settings)})
    last_step = step_of(find_checkpoint(folder))
    words = words_of(dataclasses.replace(
        options, run=output / REPLAYED_RUN, store=output / REPLAYED_STORE, until=last_step,
        nproc=args.nproc or options.nproc, settings=(*options.settings, *args.settings), plugins=()))
    enter_folder(began)
    replayed = RunFolder(output / REPLAYED_RUN).checkpoint(last_step)
    if not replayed.is_dir():
        print(f"replay from round {first}: megatron-sov {COMMAND} {shlex.join(words)}", flush=True)
        try:
            run_words(COMMAND, parser, words, typed.began_s)
        except (StopRequested, GateFailed):  # --until comes before the end of a run that is not complete
            if not replayed.is_dir():
                raise
    found = compare_replay(folder, store, output, config, first, own_layout=own_layout)
    atomic_write(output / "replay.json", to_json(asdict(found)) + "\n")
    for one in found.rounds:
        print(f"round {one.number}: {one.responses:,} responses, "
              + ("every bit is the same" if one.is_equal and not one.tokens + one.rewards else
                 f"{one.tokens:,} of other tokens, {one.rewards:,} of other rewards"))
    print(f"step {found.step}: " + (
        "weights and moments are the same to the bit" if found.weights == RepeatOutcome.EQUAL.value else
        f"bits differ ({found.detail or 'rounding'}), weights are {found.distance:.1e} of their own size "
        "apart"))
    return ExitCode.OK if found.passed else ExitCode.GATE_FAILED


def _checked(args: RlReplayOptions, folder: Path) -> tuple[TypedCommand, RlRunOptions, Parser, RunConfig]:
    """Return how a run was begun, the options by which it would go on, what parses them, and its settings.

    Raises:
        UserError: it cannot be replayed.
    """
    if (config := RunFolder(folder).config()) is None:
        refuse_missing(args.run)
        refuse_no_run(args.run)
        raise UserError(f"{args.run}: holds no settings; name the --run of `{COMMAND}`")
    find_checkpoint(folder)
    if under_launcher():
        raise UserError("rl replay: starts its processes itself; give --nproc and leave the launcher out")
    for setting in args.settings:
        if not setting.startswith(LAYOUT):
            raise UserError(f"--set {setting}: is not of the layout; a replay has the run's own settings")
    began = read_command(folder)
    name, parser, typed_then = typed_options(began)
    if name != COMMAND:
        raise UserError(f"{args.run}: was begun by `megatron-sov {name}`; what can be replayed is of "
                        f"`{COMMAND}`")
    options: RlRunOptions = in_folder(typed_then, folder, began)
    if options.engine != MEGATRON:
        raise UserError(f"{args.run}: servers wrote its responses (--engine {options.engine}), which do not "
                        "write the same twice; what can be replayed are responses of the model that learns")
    return began, options, parser, config

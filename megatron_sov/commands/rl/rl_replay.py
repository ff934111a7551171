"""`megatron-sov rl replay RUN --output DIR`: a run of reinforcement learning again, to the same tokens,
rewards and weights."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from megatron_sov.audit.commitment import start_of
from megatron_sov.audit.own_folder import REPLAYED_RUN, REPLAYED_STORE
from megatron_sov.audit.repeating import LAYOUT, RepeatOutcome
from megatron_sov.base.artifacts import atomic_write, manifest_sha256, read_manifest, to_json
from megatron_sov.base.command_line import Parser
from megatron_sov.base.errors import ExitCode, StopRequested, UserError
from megatron_sov.base.outputs import refuse_nowhere
from megatron_sov.base.settings import AtLeastOne, Flag, add_options, read_options
from megatron_sov.commands.rl.asked import environment_of
from megatron_sov.commands.rl.rounds import RlRunOptions
from megatron_sov.commands.shared_options import words_of
from megatron_sov.commands.train.resume import (
    absolute_code, enter_folder, in_folder, option_changes, refuse_unsaid_code, run_words, typed_options)
from megatron_sov.infer.engine import MEGATRON
from megatron_sov.model.pretrained import is_hf_folder
from megatron_sov.model.recipes.requested import PluginOptions, load_plugins
from megatron_sov.runs.checkpoints import complete, refuse_missing, refuse_no_run, step_of
from megatron_sov.runs.folder import ROUNDS, RunFolder
from megatron_sov.runs.launch_environment import under_launcher
from megatron_sov.runs.lock import living_holder
from megatron_sov.train.stages.shared_copies import convert_start
from megatron_sov.train.stages.stage_config import find_start

if TYPE_CHECKING:
    from megatron_sov.audit.replaying import Replay, RunStretch

COMMAND = "rl run"


@dataclass(frozen=True, kw_only=True)
class RlReplayOptions(PluginOptions):
    """Do a run of reinforcement learning again, in a folder and a store of its own, and compare tokens,
    rewards and weights; a killed command goes on."""

    run: Annotated[Path, Flag("RUN")]
    """Run of `rl run`."""
    output: Annotated[Path, Flag(value="DIR", writes=True)]
    """Folder for the run again, its store and replay.json."""
    store: Annotated[Path | None, Flag(value="DIR")] = None
    """Its rollout store (default: that of the run's command)."""
    begin: Annotated[AtLeastOne, Flag("--from", "ROUND")] = 1
    """First round to write again; the newest before it that a checkpoint stands before is taken."""
    nproc: AtLeastOne | None = None
    """Processes (default: as many as the run had)."""
    settings: Annotated[tuple[str, ...], Flag("--set", "key=value")] = ()
    """Another layout, e.g. --set parallel.ep=2."""
    reward: str | None = None
    """The run's own, where it is code of yours: what a folder names alone is not run. It may lie elsewhere
    now, under the same name and with the same bytes."""
    environment: str | None = None
    """Likewise."""


add_arguments = partial(add_options, cls=RlReplayOptions)


@dataclass(frozen=True)
class StretchCommand:
    """The command by which a stretch of a run is done again."""

    stretch: RunStretch
    options: RlRunOptions
    """Of the run, as it would go on."""
    parser: Parser


def run(typed: argparse.Namespace) -> int:
    """Replay, compare and tell; returns that of a gate where something is another one.

    Raises:
        UserError: the run cannot be replayed, or its command fails.
    """
    args = read_options(RlReplayOptions, typed)
    refuse_nowhere(args.output)
    folder, output = args.run.absolute(), args.output.absolute()
    commands = _checked(args, folder)

    from megatron_sov.audit.replaying import compare_replay, first_round, prepare_replay

    last = commands[-1]
    store = (args.store or last.stretch.began.folder / last.options.store).absolute()
    own_layout = not args.settings and all(
        args.nproc in (None, command.options.nproc or 1) for command in commands)
    stretches = [command.stretch for command in commands]
    first = first_round(folder, stretches, args.begin)
    start = _start_of(folder, last, first)
    load_plugins(last.options.plugins)
    for command in commands:
        _refuse_other_code(folder, command, first)
    prepare_replay(folder, store, output, stretches, first, {
        "nproc": None if own_layout else args.nproc, "settings": list(args.settings)})
    print(f"replay from round {first}" + (f"; what comes before is taken from {folder}" if first > 1 else ""))
    changes = list(_changes(commands, first))
    for change in changes:
        print(change, flush=True)
    replayed = RunFolder(output / REPLAYED_RUN)
    for command in commands:
        if not any(step_of(path) >= command.stretch.end for path in complete(replayed.checkpoints)):
            _train_again(args, command, output, typed.began_s)
    found = compare_replay(folder, store, output, last.stretch.config, first, own_layout=own_layout,
                           start=convert_start(start, replayed.path))
    atomic_write(output / "replay.json",
                 to_json(asdict(found) | {"passed": found.passed, "changes": changes}) + "\n")
    _tell(found)
    return ExitCode.OK if found.passed else ExitCode.GATE_FAILED


def _checked(args: RlReplayOptions, folder: Path) -> list[StretchCommand]:
    """Return the commands of a run's stretches, in order.

    Raises:
        UserError: it cannot be replayed.
    """
    if RunFolder(folder).config() is None:
        refuse_missing(args.run)
        refuse_no_run(args.run)
        raise UserError(f"{args.run}: holds no settings; name the --run of `{COMMAND}`")
    if (holder := living_holder(folder)) is not None:
        raise UserError(f"{args.run}: is at work (process {holder['pid']} on {holder['host']}); wait for its "
                        "end, or stop it")
    if under_launcher():
        raise UserError("rl replay: starts its processes itself; give --nproc and leave the launcher out")
    for setting in args.settings:
        if not setting.startswith(LAYOUT):
            raise UserError(f"--set {setting}: is not of the layout; a replay has the run's own settings")
    from megatron_sov.audit.replaying import stretches_of

    return [_command_of(args, folder, stretch) for stretch in stretches_of(folder)]


def _command_of(args: RlReplayOptions, folder: Path, stretch: RunStretch) -> StretchCommand:
    began, rollout = stretch.began, stretch.config.rollout
    name, parser, typed_then = typed_options(began)
    if name != COMMAND:
        raise UserError(f"{args.run}: was begun by `megatron-sov {name}`; what can be replayed is of "
                        f"`{COMMAND}`")
    options: RlRunOptions = in_folder(typed_then, folder, began)
    if options.engine != MEGATRON:
        raise UserError(f"{args.run}: servers wrote its responses (--engine {options.engine}), which do not "
                        "write the same twice; what can be replayed are responses of the model that learns")
    if rollout.deadline_s:
        raise UserError(f"{args.run}: rollout.deadline_s = {rollout.deadline_s:g} in its steps "
                        f"{stretch.first} to {stretch.end}, and a clock cuts responses elsewhere each time; "
                        "what can be replayed has rollout.deadline_s = 0")
    reward, environment, *plugins = (word and _from_here(word, began.folder) for word in (
        args.reward, args.environment, *args.plugins))
    # a gate says of a model what it forgot; it teaches nothing
    options = dataclasses.replace(
        options, reward=reward or options.reward, environment=environment or options.environment,
        plugins=tuple(map(str, plugins)), gate=None, tolerance=None, gate_with=None)
    refuse_unsaid_code(folder, began, words_of(options), [reward or "", environment or "", *options.plugins],
                       f"rl replay {shlex.quote(str(args.run))} --output {shlex.quote(str(args.output))}")
    return StretchCommand(stretch, options, parser)


def _from_here(word: str, began: Path) -> str:
    """Return FILE.py:NAME with the whole path of the file that was typed here, or else of the one where the
    run was begun; other words as they are."""
    file, colon, _ = word.rpartition(":")
    if not colon or not file.endswith(".py"):
        return word
    return absolute_code(word, Path.cwd() if Path(file).is_file() else began)


def _start_of(folder: Path, command: StretchCommand, first: int) -> Path:
    """Return the checkpoint, or Hugging Face folder, that the replay begins from.

    Raises:
        UserError: it is another one than the run began from.
    """
    given = command.stretch.began.folder / command.options.start_from
    if is_hf_folder(start := find_start(given)):  # converted again, it has another time in its manifest
        return start
    if first == 1 and (now := manifest_sha256(start)) != (then := start_of(folder)):
        raise UserError(f"--from {given}: {start.name} is {now[:12]} by the hash of its manifest, and the "
                        f"run began from {then[:12]}; bring that back to where it was")
    return start


def _changes(commands: Sequence[StretchCommand], first: int) -> Iterator[str]:
    """Yield what a resume of the run has changed, from a round on."""
    for before, command in itertools.pairwise(commands):
        per_round, step = command.stretch.config.rollout.steps_per_round, command.stretch.first
        if step > (first - 1) * per_round + 1:
            for change in (*command.stretch.changes(before.stretch),
                           *option_changes(before.options, command.options)):
                yield f"from step {step}, of round {-(-step // per_round)}: {change}"


def _refuse_other_code(folder: Path, command: StretchCommand, first: int) -> None:
    """Refuse a reward, or an environment, that is not that of a stretch's rounds.

    Raises:
        UserError: its code or settings are others.
    """
    from megatron_sov.post.rl.publish import CHOSEN_BY, is_published
    from megatron_sov.post.rl.reward import reward_version
    from megatron_sov.train.data.rounds import folder_of_round

    options, config = command.options, command.stretch.config
    enter_folder(command.stretch.began)
    version, per_round = reward_version(options.reward, options.reward_set), config.rollout.steps_per_round
    played = environment_of(options, config)
    for number in range(max(first, (command.stretch.first - 2) // per_round + 2),
                        -(-command.stretch.end // per_round) + 1):
        if not is_published(rounds := folder / ROUNDS, number):
            continue
        said = read_manifest(folder_of_round(rounds, number), "tokens").content
        for option, value, now, then in (
                ("--reward", options.reward, version, said.get("reward_version")),
                ("--environment", options.environment, played and played.version,
                 said.get(CHOSEN_BY, {}).get("environment"))):
            # an earlier version noted no environment
            if now != then and (option == "--reward" or CHOSEN_BY in said):
                raise UserError(f"{option} {value}: is version {now}, and round {number} of {folder} is of "
                                f"version {then}: its code, what it reads or its settings changed since; "
                                "put back what the run had")


def _train_again(args: RlReplayOptions, command: StretchCommand, output: Path, began_s: float) -> None:
    """Do a stretch again, to its last step."""
    from megatron_sov.audit.replaying import config_of

    stretch, options = command.stretch, command.options
    words = words_of(dataclasses.replace(
        options, run=output / REPLAYED_RUN, store=output / REPLAYED_STORE, until=stretch.end,
        nproc=args.nproc or options.nproc, configs=(config_of(output, stretch),), settings=args.settings))
    enter_folder(stretch.began)
    print(f"replay to step {stretch.end}: megatron-sov {COMMAND} {shlex.join(words)}", flush=True)
    try:
        run_words(COMMAND, command.parser, words, began_s)
    except StopRequested:  # --until comes before the end of a run that is not complete
        if not RunFolder(output / REPLAYED_RUN).checkpoint(stretch.end).is_dir():
            raise


def _tell(found: Replay) -> None:
    for one in found.rounds:
        print(f"round {one.number}: {one.responses:,} responses, "
              + ("every bit is the same" if one.is_equal and not one.tokens + one.rewards else
                 f"{one.tokens:,} of other tokens, {one.rewards:,} of other rewards")
              + (f"; other {', '.join(one.others)}" if one.others else ""))
    print(f"step {found.step}: " + (
        "weights and moments are the same to the bit" if found.weights == RepeatOutcome.EQUAL.value else
        f"bits differ ({found.detail or 'rounding'}), weights are {found.distance:.1e} of their own size "
        f"apart, and have moved by {found.moved:.1e} of it"))

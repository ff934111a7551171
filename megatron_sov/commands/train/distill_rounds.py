"""`megatron-sov distill rounds RECIPE --from STUDENT --teacher TEACHER --prompts DIR --output DIR`.

On-policy distillation (arXiv 2306.13649): in each round the student writes, the teacher reads what it wrote,
and the student learns from it.  On one set of GPUs they take turns, since each is a command of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

from annotated_types import Gt, Le

from megatron_sov.base.artifacts import MANIFEST, read_manifest
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.base.settings import AtLeastOne, Flag, add_options, read_options
from megatron_sov.commands.option_words import words_of
from megatron_sov.commands.train.distill import DistillOptions, TeacherOptions
from megatron_sov.commands.train.distill_states import DistillStatesOptions
from megatron_sov.commands.train.distill_write import DistillWriteOptions, StudentSampling
from megatron_sov.model.config import RunConfig, data_paths, layout_settings
from megatron_sov.model.recipes.requested import RecipeOptions, requested
from megatron_sov.runs.checkpoints import refuse_missing
from megatron_sov.runs.folder import COMPLETION
from megatron_sov.runs.launch_environment import under_launcher
from megatron_sov.runs.rounds import ASKED, enter_rounds, is_done
from megatron_sov.work.processes.commands import run_command


@dataclass(frozen=True, kw_only=True)
class DistillRoundsOptions(RecipeOptions, TeacherOptions):
    """On-policy rounds: the student writes, the teacher reads, the student learns."""

    start_from: Annotated[Path, Flag("--from", "CHECKPOINT|RUN|HF_DIR")]
    """The student."""
    prompts: Annotated[tuple[str, ...], Flag(value="DIR")]
    """Token shards of prompts, which the student answers in every round."""
    data: Annotated[tuple[str, ...], Flag(value="DIR[:weight]")] = ()
    """Token shards that are learned from beside the student's answers."""
    share: Annotated[float, Gt(0), Le(1), Flag(value="LAMBDA")] = 1.0
    """Part of each round's tokens that the student wrote itself; the rest are of --data."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder of the rounds; the same command goes on where a killed one was."""
    sampling: StudentSampling = field(default_factory=StudentSampling)
    nproc: AtLeastOne | None = None
    """Local processes."""
    rounds: AtLeastOne = 1
    """How many."""

def run_rounds(typed: argparse.Namespace) -> int:
    """Do the rounds that are not complete; returns what the first command gives that is not."""
    args = read_options(DistillRoundsOptions, typed)
    return do_rounds(args, lambda argv: run_command(["megatron_sov", *argv],
                                                    "continue with the same command"))


def do_rounds(args: DistillRoundsOptions, command: Callable[[list[str]], int]) -> int:
    """Run the commands of all rounds.

    Args:
        args: the command's.
        command: runs `megatron-sov ARGV`, and returns its exit code.

    Raises:
        UserError: the arguments cannot be used.
    """
    _check(args)
    config = requested(args).config()
    enter_rounds(args.output, args.output / ASKED, _asked(args), "--output")
    for done, argv in _commands(args, config):
        if not is_done(done) and (code := command(argv)):
            return code
    print(f"{args.output}: {args.rounds} rounds are complete, the student is "
          f"{args.output / f'round-{args.rounds}' / 'run'}")
    return ExitCode.OK


def _check(args: DistillRoundsOptions) -> None:
    if under_launcher():
        raise UserError("distill rounds: starts the processes of each command itself; under torchrun or "
                        "Slurm run `distill write`, `distill states` and `distill` one after the other")
    if (args.share < 1) != bool(args.data):
        raise UserError(f"--share {args.share}: must be less than 1 with --data for the rest and "
                        f"1 without; --data is {', '.join(args.data) or 'left out'}")
    if args.data and not sum(data_paths(args.data).values()):
        raise UserError(f"--data {', '.join(args.data)}: at least one weight must be positive")
    for path, name in ((args.start_from, "--from "), (args.teacher, "--teacher ")):
        refuse_missing(path, name)
    for prompts in data_paths(args.prompts):  # else it would be told behind the teacher's reading of --data
        for source in read_manifest(prompts, "tokens").content["sources"]:
            if source["format"] != "prompt":
                raise UserError(f"--prompts {prompts}: source {source['name']!r} holds data of format "
                                f"{source['format']!r}; pack prompts with `sov-data pack --format prompt`")


def _asked(args: DistillRoundsOptions) -> dict[str, Any]:
    """Return what decides rounds that are complete, so that others cannot go on behind them; how many there
    will be, and how they are trained, may change."""
    def of(paths: dict[str, float]) -> dict[str, float]:
        return {read_manifest(path, "tokens").sha256 or path: weight for path, weight in paths.items()}

    return {"from": str(args.start_from), "teacher": str(args.teacher),
            "prompts": of(data_paths(args.prompts)), "data": of(data_paths(args.data)), "share": args.share,
            **{name: getattr(args.sampling, name) for name in (
                "max_new_tokens", "temperature", "top_p", "seed")}, "states_dtype": args.states_dtype}


def _commands(args: DistillRoundsOptions, config: RunConfig) -> Iterator[tuple[Path, list[str]]]:
    """Yield what exists when a command is complete, and the command, in order."""
    asked = config.distillation
    of_data, shares = args.output / "data.states", data_paths(args.data)
    total = sum(shares.values())
    data = [f"{path}:{(1 - args.share) * share / total:.9g}" for path, share in shares.items()]
    if data:
        yield of_data / MANIFEST, ["distill", "states", *words_of(DistillStatesOptions(
            teacher=args.teacher, data=tuple(shares), output=of_data, dtype=args.states_dtype,
            top_k=asked.top_k, temperature=asked.temperature, other_tokenizer=asked.other_tokenizer,
            settings=args.teacher_settings, plugins=args.plugins, redo=True, nproc=args.nproc))]
    student = args.start_from
    for number in range(1, args.rounds + 1):
        folder = args.output / f"round-{number}"
        answers, trained = folder / "answers", folder / "run"
        yield answers / MANIFEST, ["distill", "write", *words_of(DistillWriteOptions(
            student=student, prompts=args.prompts, output=answers,
            sampling=replace(args.sampling, seed=args.sampling.seed + number),
            settings=tuple(layout_settings(config)), plugins=args.plugins, redo=True, nproc=args.nproc))]
        # or every round would learn from the same part of --data
        seed = f"train.seed={config.train.seed + number - 1}"
        of_answers = answers.with_name(f"{answers.name}.states")
        yield trained / COMPLETION, ["distill", *words_of(DistillOptions(
            recipe=args.recipe, config=args.config, plugins=args.plugins, settings=(*args.settings, seed),
            start_from=student, teacher=args.teacher, teacher_settings=args.teacher_settings,
            data=(*data, f"{answers}:{args.share:.9g}"),
            states=(of_data, of_answers) if data else (of_answers,), states_dtype=args.states_dtype,
            run=trained, resume=True, nproc=args.nproc))]
        student = trained


ROUNDS = SimpleNamespace(add_arguments=partial(add_options, cls=DistillRoundsOptions), run=run_rounds)

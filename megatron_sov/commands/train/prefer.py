"""`megatron-sov prefer RECIPE --from CHECKPOINT --data PAIRS[:weight] ... --run DIR --method dpo`, and with
--rounds N: answer, judge, learn from it, and again."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge

from megatron_sov.base.artifacts import MANIFEST, disk_errors, read_manifest
from megatron_sov.base.command_line import check_part
from megatron_sov.base.digests import file_digest
from megatron_sov.base.documents.records import DESIRABLE
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.base.settings import (
    AboveZero, AtLeastOne, Flag, ProblemCode, SettingsProblem, add_options, only_with, parse_nested,
    read_options)
from megatron_sov.commands.models.generate import GenerateOptions
from megatron_sov.commands.score import ScoreOptions
from megatron_sov.commands.shared_options import words_of
from megatron_sov.commands.train.gate_options import (
    TunedOptions, gate_of, is_complete, refuse_gate, refuse_unknown_benchmarks)
from megatron_sov.infer.asking import read_prompts
from megatron_sov.infer.engine import MEGATRON
from megatron_sov.infer.request import Sampling
from megatron_sov.judge.rewards.registry import make, order
from megatron_sov.model.config import RunConfig, layout_settings
from megatron_sov.model.config.post_training import WITH_REFERENCE, PreferenceMethod
from megatron_sov.model.objectives import factory
from megatron_sov.runs.checkpoints import find_checkpoint, refuse_missing
from megatron_sov.runs.folder import COMMAND, COMPLETION, ROUNDS, record_command
from megatron_sov.runs.launch_environment import num_ranks, under_launcher
from megatron_sov.runs.rounds import ASKED, enter_rounds, is_done, keep_result
from megatron_sov.train.stages.stage_config import ParsedStage, parse_stage, stage_request
from megatron_sov.work.processes.children import run_command

if TYPE_CHECKING:
    from megatron_sov.post.reference import Reference
    from megatron_sov.train.data.token_shards import Source
    from megatron_sov.train.stages.gate import GateView


SOV_DATA = "data_prep.cli"
"""Module of `sov-data`, which a round runs between its commands."""
NEEDED = ("prompts", "reward", "tokenizer")
LINES = ".jsonl"
"""Results that have no manifest."""
FRAMED = ("tools", "chat_template_kwargs")
"""Fields of a prompt with which `sov-data pack` would frame answers otherwise than they were asked for."""


@dataclass(frozen=True, kw_only=True)
class PreferOptions(TunedOptions):
    """Learn from preferences, of pairs that there are, or in rounds of answers that are judged on the way."""

    groups: ClassVar[tuple[str, ...]] = ("preference",)

    method: PreferenceMethod | None = None
    """The loss (--set preference.method=...; default dpo)."""
    reference: Annotated[Path | None, Flag(value="CHECKPOINT|RUN")] = None
    """Compare with this model (dpo, ipo, dpo-norm, kto; default: the one of --from)."""
    rounds: AtLeastOne | None = None
    """N times: answer --prompts, judge by --reward, learn from it (--data is then what is learned beside,
    and not needed)."""
    prompts: Annotated[Path | None, Flag(value="FILE.jsonl"), only_with("rounds")] = None
    """--rounds: lines with "prompt" and what the reward needs."""
    reward: Annotated[str | None, Flag(value="NAME"), only_with("rounds")] = None
    """--rounds: as of `megatron-sov score`."""
    reward_set: Annotated[tuple[str, ...], Flag(value="key=value")] = ()
    """--rounds: a setting of the reward; may be repeated."""
    tokenizer: Annotated[Path | None, Flag(value="DIR"), only_with("rounds")] = None
    """--rounds: the tokenizer that the model was trained with, for `sov-data pack`."""
    samples: Annotated[int, Ge(2)] = 8
    """--rounds: answers to each prompt, which are compared."""
    temperature: Annotated[AboveZero, Flag(value="T")] = 1.0
    """--rounds: of these samples."""
    max_new_tokens: AtLeastOne = 512
    """--rounds: longest answer."""
    keep_unfinished: Annotated[bool, only_with("rounds")] = False
    """--rounds: learn an answer that --max-new-tokens cut off as a good one too, as `sov-data pairs`
    may."""

    def problems(self) -> list[SettingsProblem]:
        """Return what rounds need."""
        return [SettingsProblem(ProblemCode.RULE, "rounds", f"needs --{name}; add it", self.rounds)
                for name in NEEDED if self.rounds and getattr(self, name) is None]

    @property
    def num_rounds(self) -> int:
        """Return how many there are; 0: it is no command of rounds."""
        return self.rounds or 0


@dataclass(frozen=True)
class RoundJob:
    """One command of a round."""

    result: Path
    """The file that is there when it is done."""
    argv: list[str]
    """What follows `python -m`."""


def run_rounds(args: PreferOptions) -> int:
    """Do what is not done yet of all rounds; returns 0, or the exit code of a command that did not end well.

    A round is five commands that a user could give one by one, with a file between each two: so a round that
    is killed goes on at the first command whose result is not there.

    Raises:
        UserError: a mistake in the arguments, or the folder holds rounds that were asked for otherwise.
    """
    if under_launcher():
        raise UserError(f"--rounds {args.rounds}: starts processes of its own; under torchrun or Slurm give "
                        "the commands of a round one by one, as docs/prefer.md shows them")
    config, reward_version = _checked(args)
    _enter(args, reward_version)
    for number in range(1, args.num_rounds + 1):
        read = None
        for job in jobs_of(args, config, number):
            if not is_done(job.result):
                # what a command reads must be the bytes that the one before wrote
                if read is not None:
                    keep_result(read, is_new=False)
                print(f"round {number} of {args.rounds}: {job.argv[1]}", file=sys.stderr, flush=True)
                if (code := run_command(job.argv, "continue with --resume")) != ExitCode.OK:
                    return code
                if job.result.suffix == LINES:
                    keep_result(job.result, is_new=True)
            read = job.result if job.result.suffix == LINES else None
    print(f"{args.run}: has done its {args.rounds} rounds")
    return ExitCode.OK


def jobs_of(args: PreferOptions, config: RunConfig, number: int) -> Iterator[RoundJob]:
    """Yield the commands of a round, from 1, in order."""
    folder, start = folder_of(args.run, number), _run_of(args, number - 1)
    responses, scored, judged, packed = (folder / name for name in (
        "responses.jsonl", "scored.jsonl", "judged", "packed"))
    assert args.reward is not None and args.tokenizer is not None, "options are checked"
    yield RoundJob(responses, ["megatron_sov", "generate", *words_of(GenerateOptions(
        target=start, prompts=args.prompts, chat=True, samples=args.samples, engine=MEGATRON,
        # another seed each round, or the same numbers would draw from a policy that has hardly moved
        sampling=Sampling(args.max_new_tokens, args.temperature, seed=config.train.seed + number),
        settings=tuple(layout_settings(config)), plugins=args.plugins, nproc=args.nproc, output=responses))])
    yield RoundJob(scored, ["megatron_sov", "score", *words_of(ScoreOptions(
        reward=args.reward, input=responses, settings=args.reward_set, output=scored))])
    step, columns = (("groups", ["--column", "advantage", "--column", "group_share"])
                     if config.preference.method == "grouper" else ("pairs", []))
    kept = ["--keep-unfinished"] if args.keep_unfinished else []
    yield RoundJob(judged / MANIFEST, [SOV_DATA, step, "--input", str(scored), *kept, "--output",
                                       str(judged)])
    yield RoundJob(packed / MANIFEST, [SOV_DATA, "pack", "--tokenizer", str(args.tokenizer),
                                       "--format", "chat" if columns else "preference", *columns, "--input",
                                       f"round-{number}={judged / f'{step}.jsonl'}", "--output", str(packed)])
    run = _run_of(args, number)
    # or every round would learn from the same part of --data
    seed = f"train.seed={config.train.seed + number - 1}"
    training = PreferOptions(
        recipe=args.recipe, configs=args.configs, plugins=args.plugins, settings=(*args.settings, seed),
        data=(*args.data, str(packed)), inject=args.inject, reference=args.reference, start_from=start,
        run=run, resume=True, nproc=args.nproc, deterministic=args.deterministic)
    yield RoundJob(run / COMPLETION, ["megatron_sov", "prefer", *words_of(training)])


def folder_of(run: Path, number: int) -> Path:
    """Return the folder of a round's files."""
    return run / ROUNDS / f"{number:02d}"


def _run_of(args: PreferOptions, number: int) -> Path:
    """Return the run of a round, which is --run for the last one; of round 0 what the first starts from."""
    if number == 0:
        return Path(args.start_from)
    return Path(args.run) if number == args.rounds else folder_of(args.run, number) / "run"


def _checked(args: PreferOptions) -> tuple[RunConfig, str]:
    """Return the settings of the rounds' runs and the version of their reward, after everything that can be
    checked before the first one."""
    assert args.reward is not None and args.prompts is not None and args.tokenizer is not None
    # its commands come after those that generate, which may take hours
    check_part(SOV_DATA)
    for prompt in read_prompts([], args.prompts):
        if framed := [name for name in FRAMED if prompt.record.get(name)]:
            raise UserError(f"--prompts {args.prompts}: prompt {prompt.text[:40]!r} has {framed[0]!r}, and "
                            "rounds ask each prompt as a user's message alone; leave it out")
    reward_version = make(order(args.reward, parse_nested(args.reward_set, "--reward-set"))).version
    read_manifest(args.tokenizer, "tokenizer")
    # which stands for the data that are still to be made: they are asked for, and not read yet
    with_data = dataclasses.replace(args, data=(*args.data, str(args.tokenizer)))
    asked = stage_request(with_data, "preference")
    config = asked.config()
    config.check(num_ranks(args.nproc))
    return config, reward_version


def _enter(args: PreferOptions, reward_version: str) -> None:
    """Take note of what the rounds are asked for, or check that it is what they were begun with."""
    assert args.prompts is not None
    file = args.run / ROUNDS / ASKED
    # their number, too: the last round trains in --run itself, the others below it
    asked = {"rounds": args.rounds, "from": str(args.start_from), "prompts": file_digest(args.prompts),
             "reward": args.reward, "reward_set": args.reward_set, "samples": args.samples,
             "reward_version": reward_version,
             "temperature": args.temperature, "max_new_tokens": args.max_new_tokens,
             "reference": None if args.reference is None else str(args.reference)}
    if file.is_file() and not args.resume:
        raise UserError(f"{args.run}: already holds rounds; pass --resume to continue them, or choose "
                        "another --run")
    enter_rounds(args.run, file, asked, "--run", made_anew=(args.run / COMMAND,))
    record_command(args.run)
    with disk_errors(args.run):
        for number in range(1, args.num_rounds + 1):
            folder_of(args.run, number).mkdir(parents=True, exist_ok=True)


add_arguments = partial(add_options, cls=PreferOptions)


def run(typed: argparse.Namespace) -> int:
    """Learn from preferences; returns 0 when the run is complete."""
    args = read_options(PreferOptions, typed)
    if args.method is not None:
        settings = (*args.settings, f"preference.method={args.method}")
        args = dataclasses.replace(args, settings=settings)
    if args.rounds is not None:
        if args.dry_run:
            raise UserError(f"--dry-run: --rounds {args.rounds} are commands of their own, each of what the "
                            "one before has written; leave one of them out")
        refuse_gate(args, f"--rounds {args.rounds}")
        return run_rounds(args)
    if is_complete(args, "preference"):
        return 0
    parsed = parse_stage(args, "preference")
    refuse_unknown_benchmarks(parsed.config)
    if not args.dry_run:
        parsed = parsed.with_checkpoint(args.run)
    assert parsed.start is not None, f"--from is required, it is {args.start_from}"
    gate = gate_of(args, parsed.config, parsed.start)
    # looked up before Megatron is imported
    fixed = _fixed_reference(args.reference, parsed.config)

    from megatron_sov.engine.parallel.cpu_shims import prepare_megatron
    from megatron_sov.train.data.token_shards import open_sources

    prepare_megatron()
    from megatron_sov.post.preference import objective_of, rank_heldout_pairs
    from megatron_sov.post.reference import COLUMN
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.objectives.objective import columns_of, formats_of
    from megatron_sov.train.stages.stage import Stage, run_stage

    config = parsed.config
    objective = factory(config, objective_of(config))
    sources = tuple(open_sources(config.data.paths, config.model.vocab_size, formats_of(objective)))
    needed = columns_of(objective)
    if DESIRABLE not in needed:
        _refuse_other_judgements(config, sources)
    # single judged responses (kto) have no pairs that could be ranked
    pairs = [s for s in sources if s.format == "preference" and DESIRABLE not in needed]
    reference = _reference(args, parsed, sources, fixed) if COLUMN in needed else None

    def before(view: GateView) -> None:
        if reference is not None:
            reference.make(view)
        rank_heldout_pairs(view, pairs)

    def after(view: GateView) -> dict[str, Any]:
        return {"heldout_pairs": rank_heldout_pairs(view, pairs)}

    run_stage(Stage(config, RunFolder(args.run), objective, parsed.start, args.resume,
                    sources if reference is None else reference.sources, before=before, after=after,
                    end_gate=gate, faults=parsed.faults, dry_run=args.dry_run, notes=parsed.notes),
              args.nproc, typed.began_s)
    return 0


def _refuse_other_judgements(config: RunConfig, sources: Sequence[Source]) -> None:
    """Raise `UserError` where pairs of a response and a mismatched one would be learned as preferences."""
    method = config.preference.method
    for source in sources:
        if DESIRABLE in source.columns:
            raise UserError(f"{source.artifact}: source {source.name!r} has single responses with the column "
                            f"{DESIRABLE!r}, no pairs, and preference.method = {method} compares pairs; pass "
                            "--method kto, or make pairs (`sov-data pairs`)")


def _fixed_reference(path: Path | None, config: RunConfig) -> Path | None:
    """Return the checkpoint that --reference means.

    Raises:
        UserError: there is none, or the method compares with no reference.
    """
    if path is None:
        return None
    if config.preference.method not in WITH_REFERENCE:
        raise UserError(f"--reference {path}: preference.method = {config.preference.method} compares with "
                        "no reference; leave it out")
    refuse_missing(path, "--reference ")
    return find_checkpoint(path)


def _reference(args: PreferOptions, parsed: ParsedStage, sources: tuple[Source, ...],
               fixed: Path | None) -> Reference:
    """Return the run's reference: complete, where it is another model than the one that is trained.

    Raises:
        UserError: the folder may not be entered, holds another reference, or one that lacks what is needed.
    """
    from megatron_sov.chat.vocabulary import refuse_other_tokens
    from megatron_sov.post.reference import Reference
    from megatron_sov.runs import checkpoints
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.data.token_shards import tokenizer_folder

    assert parsed.start is not None, f"--from is required, it is {args.start_from}"
    config, folder = parsed.config, RunFolder(args.run)
    reference = Reference(args.run, fixed or parsed.start, sources, config.data.max_seq_len())
    if fixed is not None:
        refuse_other_tokens(tokenizer_folder(list(sources)), fixed / "tokenizer")
        folder.enter(config, args.resume)
        if not args.dry_run:
            reference.make_apart(fixed, config, args.nproc)
    # a run that goes on must compare with the same reference as before
    elif checkpoints.latest(folder.checkpoints) is not None:
        reference.refuse_changed()
    return reference

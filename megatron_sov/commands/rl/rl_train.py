"""`megatron-sov rl train RECIPE --store STORE --prompts FILE --reward NAME --from CHECKPOINT --run DIR`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated

from megatron_sov.base.errors import ExitCode
from megatron_sov.base.settings import Flag, NotNegative, add_options, read_options
from megatron_sov.commands.evaluate.benchmarks_beside import refuse_unknown_benchmarks
from megatron_sov.commands.operate.start_tokenizer import refuse_no_tokenizer
from megatron_sov.commands.rl.rl_reward import JudgedOptions
from megatron_sov.commands.train.forgetting_gate import ForgettingGate, TunedOptions, gate_of
from megatron_sov.judge.rollouts.prompts import RolloutPrompt, read_prompts, round_prompts
from megatron_sov.model.config.rounds import with_rounds
from megatron_sov.post.rl.reward import reward_version
from megatron_sov.runs.folder import ROUNDS
from megatron_sov.train.stages.stage_config import ParsedStage, parse_stage, tokenizer_of

if TYPE_CHECKING:
    from megatron_sov.post.rl.feed import Produce


@dataclass(frozen=True, kw_only=True)
class RoundsOptions(TunedOptions, JudgedOptions):
    """What is trained, and where its rounds come from."""

    prompts: Annotated[Path, Flag(value="FILE.jsonl")]
    """The prompts that responses are written to."""


@dataclass(frozen=True, kw_only=True)
class RlTrainOptions(RoundsOptions):
    """Rounds that other jobs write and judge."""

    wait: Annotated[NotNegative, Flag(value="SECONDS")] = 0.0
    """How long a round is waited for that is not written and judged yet, before the run ends with 75
    (default: not at all)."""

def run_train(args: argparse.Namespace) -> int:
    """Train the rounds that are there; returns 0 when the run is complete.

    Raises:
        UserError: a mistake in the arguments, or the store does not belong to the run.
        StopRequested: a round is not there yet, and everything is saved.
    """
    options = read_options(RlTrainOptions, args)
    train_rounds(options, parse_rounds(options), args.began_s, options.wait)
    return ExitCode.OK


@dataclass(frozen=True)
class ParsedRounds:
    """What a command that trains rounds is to do, checked."""

    stage: ParsedStage
    prompts: list[RolloutPrompt]
    """All of them."""
    reward_version: str
    gate: ForgettingGate | None
    """What judges the last policy."""


def parse_rounds(args: RoundsOptions) -> ParsedRounds:
    """Return what the options ask for.

    Raises:
        UserError: a mistake in them.
    """
    prompts = read_prompts(args.prompts)
    version = reward_version(args.reward, args.reward_set)
    parsed = parse_stage(args, "policy", needs_data=False, completed=with_rounds)
    refuse_unknown_benchmarks(parsed.config)
    round_prompts(prompts, parsed.config.rollout, 1)
    if not args.dry_run:
        parsed = parsed.with_checkpoint(args.run)
    return ParsedRounds(parsed, prompts, version, gate_of(args, parsed.config, parsed.start))


def train_rounds(args: RoundsOptions, parsed: ParsedRounds, began_s: float, wait_s: float = 0.0,
                 produce: Produce | None = None) -> None:
    """Run the stage.

    Args:
        args: of the command.
        parsed: the same, checked.
        began_s: Unix time at which the command began.
        wait_s: how long a round is waited for.
        produce: writes and judges rounds; None: other jobs do.
    """
    from megatron_sov.engine.data.rounds import rounds_of, rounds_source
    from megatron_sov.engine.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.post.policy import check_sources, objective_of, texts_of
    from megatron_sov.post.rl.feed import RoundFeed, columns_of_run
    from megatron_sov.post.rl.publish import Publisher
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.stages.stage import Stage, run_stage

    config, start = parsed.stage.config, parsed.stage.start
    assert start is not None, f"--from is required, it is {args.start_from}"
    tokenizer = tokenizer_of(start)
    refuse_no_tokenizer(args.start_from, tokenizer)
    publisher = Publisher(config, args.run / ROUNDS, args.store, parsed.prompts, parsed.reward_version,
                          tokenizer)
    publisher.refuse_other_store()
    objective = objective_of(config)
    columns = columns_of_run(config, objective.columns, start)
    source = rounds_source(args.run / ROUNDS, config.model.vocab_size, tokenizer, columns.names,
                           columns.routes)
    texts = texts_of(config)
    check_sources(config, [*texts, source])
    rounds = rounds_of([source])
    assert rounds is not None, "the source has no rounds"
    feed = RoundFeed(rounds, config.rollout, publisher.publish, columns, wait_s, produce)
    run_stage(Stage(config, RunFolder(args.run), objective, start, args.resume, texts, (source,),
                    feed=feed, end_gate=parsed.gate, faults=parsed.stage.faults,
                    dry_run=args.dry_run), args.nproc, began_s)


TRAIN = SimpleNamespace(add_arguments=partial(add_options, cls=RlTrainOptions), run=run_train)

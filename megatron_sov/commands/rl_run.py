"""`megatron-sov rl run RECIPE --store STORE --prompts FILE --reward NAME --from CHECKPOINT --run DIR`: all
rounds by one command, each written by the model that learns."""

from __future__ import annotations

import argparse
from functools import partial

from megatron_sov.commands.rl_generate import add_asking_arguments, environment_of, refuse_too_long, writer_of
from megatron_sov.commands.rl_train import (
    ParsedRounds,
    add_round_arguments,
    parse_rounds,
    train_rounds,
)
from megatron_sov.commands.start_tokenizer import refuse_no_tokenizer
from megatron_sov.data.vocabulary import tokenizer_digest
from megatron_sov.errors import ExitCode, UserError
from megatron_sov.generate.engine import MEGATRON
from megatron_sov.generate.request import Batching
from megatron_sov.post.rl.reward import ENVIRONMENT, judging, second_opinions
from megatron_sov.rewards.running import default_workers
from megatron_sov.rollouts.prompts import refuse_unaskable
from megatron_sov.settings import Problem


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_round_arguments(parser)
    add_asking_arguments(parser)
    parser.add_argument("--workers", type=int, default=default_workers(), metavar="N",
                        help="processes that judge (default: one for each core)")


def run(args: argparse.Namespace) -> int:
    """Write, judge and train all rounds; returns 0 when the run is complete.

    Raises:
        UserError: a mistake in the arguments, or the store does not belong to the run.
        StopRequested: it was asked to stop, and everything is saved.
    """
    problems: list[Problem | str] = [*Batching(args.batch_size).problems()]
    if args.workers < 1:
        problems.append(f"--workers {args.workers}: must be at least 1")
    if args.reward == ENVIRONMENT and args.environment is None:
        problems.append(f"--reward {ENVIRONMENT}: takes what an environment said of its episodes, and there "
                        "is none; add --environment, or choose another reward")
    if problems:
        raise UserError(str(problems[0]))
    parsed = parse_rounds(args)
    if args.environment is None:
        refuse_unaskable(args.prompts, parsed.prompts)
    _run(args, parsed)
    return ExitCode.OK


def _run(args: argparse.Namespace, parsed: ParsedRounds) -> None:
    from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.generate.target import find_target
    from megatron_sov.post.rl.producing import Producer
    from megatron_sov.rollouts.store import Store

    assert parsed.stage.start is not None, "--from is required"
    config, start = parsed.stage.config, find_target(parsed.stage.start)
    refuse_no_tokenizer(args.start_from, start.tokenizer_folder)
    environment = environment_of(args, config)
    refuse_too_long(config.rollout, environment, start)
    digest = tokenizer_digest(start.tokenizer_folder)
    producer = Producer(
        partial(Store.create, args.store, digest, start.vocab_size), parsed.prompts, config.rollout,
        args.run, start.path, writer_of(args, config, parsed.prompts, start, MEGATRON, environment),
        Batching(args.batch_size), parsed.reward_version,
        partial(judging, args.reward, args.reward_set, args.workers),
        {"engine": MEGATRON, "environment": args.environment, "reward": args.reward},
        partial(second_opinions, args.reward, args.reward_set, parsed.reward_version))
    try:
        train_rounds(args, parsed, produce=producer.produce)
    finally:
        producer.close()

"""`megatron-sov rl run RECIPE --store STORE --prompts FILE --reward NAME --from CHECKPOINT --run DIR`: all
rounds by one command, each written by the model that learns."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

from megatron_sov.base.errors import ExitCode
from megatron_sov.base.settings import ProblemCode, SettingsProblem, add_options, read_options
from megatron_sov.commands.operate.start_tokenizer import refuse_no_tokenizer
from megatron_sov.commands.reward_options import JudgeOptions
from megatron_sov.commands.rl.rl_generate import AskingOptions, environment_of, refuse_too_long, writer_of
from megatron_sov.commands.rl.rl_train import ParsedRounds, RoundsOptions, parse_rounds, train_rounds
from megatron_sov.engine.data.vocabulary import tokenizer_digest
from megatron_sov.infer.engine import MEGATRON
from megatron_sov.infer.request import Batching
from megatron_sov.judge.rollouts.prompts import refuse_unaskable
from megatron_sov.post.rl.reward import ENVIRONMENT, judging, second_opinions


@dataclass(frozen=True, kw_only=True)
class RlRunOptions(RoundsOptions, AskingOptions, JudgeOptions):
    """Rounds that the model which learns writes itself."""

    def problems(self) -> list[SettingsProblem]:
        """Return what does not go together."""
        return [] if self.reward != ENVIRONMENT or self.environment is not None else [
            SettingsProblem(ProblemCode.RULE, "reward",
                            "takes what an environment said of its episodes, and there is none",
                            self.reward, "add --environment, or choose another reward")]

def run_all(args: argparse.Namespace) -> int:
    """Write, judge and train all rounds; returns 0 when the run is complete.

    Raises:
        UserError: a mistake in the arguments, or the store does not belong to the run.
        StopRequested: it was asked to stop, and everything is saved.
    """
    options = read_options(RlRunOptions, args)
    parsed = parse_rounds(options)
    if options.environment is None:
        refuse_unaskable(options.prompts, parsed.prompts)
    _run(options, parsed, args.began_s)
    return ExitCode.OK


def _run(args: RlRunOptions, parsed: ParsedRounds, began_s: float) -> None:
    from megatron_sov.engine.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.infer.engines.target import find_target
    from megatron_sov.judge.rollouts.store import RolloutStore
    from megatron_sov.post.rl.feed import Producer

    assert parsed.stage.start is not None, "--from is required"
    config, start = parsed.stage.config, find_target(parsed.stage.start)
    refuse_no_tokenizer(args.start_from, start.tokenizer_folder)
    environment = environment_of(args, config)
    refuse_too_long(config.rollout, environment, start)
    digest = tokenizer_digest(start.tokenizer_folder)
    producer = Producer(
        partial(RolloutStore.create, args.store, digest, start.vocab_size), parsed.prompts, config.rollout,
        args.run, start.path, writer_of(args, config, parsed.prompts, start, MEGATRON, environment),
        Batching(args.batch_size), parsed.reward_version,
        partial(judging, args.reward, args.reward_set, args.workers),
        {"engine": MEGATRON, "environment": args.environment, "reward": args.reward},
        partial(second_opinions, args.reward, args.reward_set, parsed.reward_version))
    try:
        train_rounds(args, parsed, began_s, produce=producer.produce)
    finally:
        producer.close()


RUN = SimpleNamespace(add_arguments=partial(add_options, cls=RlRunOptions), run=run_all)

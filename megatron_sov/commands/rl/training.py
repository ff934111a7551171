"""`megatron-sov rl train` and `rl run`: the rounds of a run, written by other jobs or by itself."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from megatron_sov.base.errors import ExitCode
from megatron_sov.base.settings import (
    Flag, NotNegative, ProblemCode, SettingsProblem, command_of, read_options)
from megatron_sov.chat.vocabulary import tokenizer_digest
from megatron_sov.commands.rl.rounds import (
    AskingOptions, JudgedOptions, environment_of, longest_of, refuse_no_tokenizer, refuse_too_long, writer_of)
from megatron_sov.commands.score import JudgeOptions
from megatron_sov.commands.train.gate_options import (
    TunedOptions, gate_of, is_complete, refuse_unknown_benchmarks)
from megatron_sov.infer.asking import ServerOptions
from megatron_sov.infer.engine import ENGINE_SET, MEGATRON, VLLM
from megatron_sov.infer.request import Batching
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.run import with_rounds
from megatron_sov.model.objectives import factory
from megatron_sov.post.rl.reward import ENVIRONMENT, judging, reward_version, second_opinions
from megatron_sov.rollouts.prompts import RolloutPrompt, read_prompts, refuse_unaskable, round_prompts
from megatron_sov.runs.folder import ROUNDS, RunFolder
from megatron_sov.train.stages.stage_config import ParsedStage, parse_stage, tokenizer_of

if TYPE_CHECKING:
    from megatron_sov.infer.engines.target import Target
    from megatron_sov.post.rl.feed import Producer
    from megatron_sov.post.rl.requests import LiveServers
    from megatron_sov.train.stages.gate import EndGate

@dataclass(frozen=True, kw_only=True)
class RoundsOptions(TunedOptions, JudgedOptions):
    """What is trained, and where its rounds come from."""

    prompts: Annotated[Path, Flag(value="FILE.jsonl")]
    """The prompts that responses are written to."""
    groups: ClassVar[tuple[str, ...]] = ("policy", "rollout")


@dataclass(frozen=True, kw_only=True)
class RlTrainOptions(RoundsOptions):
    """Train on rounds that other jobs write and judge."""

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
    if not is_complete(options, "policy"):
        train_rounds(options, parse_rounds(options), args.began_s, options.wait)
    return ExitCode.OK


@dataclass(frozen=True)
class ParsedRounds:
    """What a command that trains rounds is to do, checked."""

    stage: ParsedStage
    prompts: list[RolloutPrompt]
    """All of them."""
    reward_version: str
    gate: EndGate | None
    """What judges the last policy."""


def parse_rounds(args: RoundsOptions) -> ParsedRounds:
    """Return what the options ask for.

    Raises:
        UserError: a mistake in them.
    """
    prompts = read_prompts(args.prompts)
    version = reward_version(args.reward, args.reward_set)
    parsed = parse_stage(args, "policy", needs_data=False, num_prompts=len(prompts), completed=with_rounds)
    refuse_unknown_benchmarks(parsed.config)
    round_prompts(prompts, parsed.config.rollout, 1)
    if not args.dry_run:
        parsed = parsed.with_checkpoint(args.run)
    return ParsedRounds(parsed, prompts, version, gate_of(args, parsed.config, parsed.start))


def train_rounds(args: RoundsOptions, parsed: ParsedRounds, began_s: float, wait_s: float = 0.0,
                 producer: Producer | None = None) -> None:
    """Run the stage.

    Args:
        args: of the command.
        parsed: the same, checked.
        began_s: Unix time at which the command began.
        wait_s: how long a round is waited for.
        producer: writes and judges rounds; None: other jobs do.
    """
    from megatron_sov.engine.parallel.cpu_shims import prepare_megatron
    from megatron_sov.train.data.rounds import rounds_of, rounds_source

    prepare_megatron()
    from megatron_sov.post.policy import check_sources, objective_of, texts_of
    from megatron_sov.post.rl.feed import RoundFeed, columns_of_run
    from megatron_sov.post.rl.publish import Publisher
    from megatron_sov.train.objectives.objective import columns_of
    from megatron_sov.train.stages.stage import Stage, run_stage

    config, start = parsed.stage.config, parsed.stage.start
    assert start is not None, f"--from is required, it is {args.start_from}"
    tokenizer = tokenizer_of(start)
    refuse_no_tokenizer(args.start_from, tokenizer)
    publisher = Publisher(config, args.run / ROUNDS, args.store, parsed.prompts, parsed.reward_version,
                          tokenizer)
    # rounds that were published from another store would be trained as if they were of this one
    publisher.refuse_other_store()
    objective = factory(config, objective_of(config))
    columns = columns_of_run(config, columns_of(objective), start)
    # a source whose rounds open one by one, as they are published
    source = rounds_source(args.run / ROUNDS, config.model.vocab_size, tokenizer, columns.names,
                           columns.routes)
    texts = texts_of(config)
    check_sources(config, [*texts, source])
    rounds = rounds_of([source])
    assert rounds is not None, "the source has no rounds"
    feed = RoundFeed(rounds, config.rollout, publisher.publish, columns, wait_s,
                     None if producer is None else producer.produce, args.store,
                    (lambda: None) if producer is None else producer.close)
    run_stage(Stage(config, RunFolder(args.run), objective, start, args.resume, texts, (source,),
                    feed=feed, end_gate=parsed.gate, faults=parsed.stage.faults,
                    dry_run=args.dry_run, notes=parsed.stage.notes), args.nproc, began_s)


TRAIN = command_of(RlTrainOptions, run_train)


RunEngine = Literal["megatron", "vllm"]


@dataclass(frozen=True, kw_only=True)
class RlRunOptions(RoundsOptions, AskingOptions, JudgeOptions, ServerOptions):
    """Train in rounds in which the model writes its responses itself."""

    engine: Annotated[RunEngine, Flag(help="What writes: the model that learns, or vLLM's servers, which are "
                                           "given its weights in each round")] = MEGATRON
    engine_set: Annotated[tuple[str, ...], Flag(ENGINE_SET, "key=value")] = ()
    """Servers, e.g. servers=2 or tp=8 (engine vllm)."""

    def problems(self) -> list[SettingsProblem]:
        if self.engine == MEGATRON and (self.engine_set or self.engine_url or self.engine_python):
            return [SettingsProblem(ProblemCode.RULE, "engine", "has no servers, and settings of servers are "
                                    "given", self.engine, "add --engine vllm, or leave them out")]
        if self.engine == VLLM and self.environment is not None:
            return [SettingsProblem(ProblemCode.RULE, "environment", "is played by the model that learns; "
                                    "servers write plain responses in `rl run`", self.environment,
                                    "leave --engine out, or write by `rl generate --engine vllm`")]
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
    if is_complete(options, "policy"):
        return ExitCode.OK
    parsed = parse_rounds(options)
    if options.environment is None:
        refuse_unaskable(options.prompts, parsed.prompts)
    _run(options, parsed, args.began_s)
    return ExitCode.OK


def _run(args: RlRunOptions, parsed: ParsedRounds, began_s: float) -> None:
    from megatron_sov.engine.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.infer.engines.target import find_target
    from megatron_sov.post.rl.feed import Producer
    from megatron_sov.rollouts.store import RolloutStore

    assert parsed.stage.start is not None, "--from is required"
    config, start = parsed.stage.config, find_target(parsed.stage.start)
    refuse_no_tokenizer(args.start_from, start.tokenizer_folder)
    environment = environment_of(args, config)
    refuse_too_long(config.rollout, environment, start)
    digest = tokenizer_digest(start.tokenizer_folder)
    producer = Producer(
        partial(RolloutStore.create, args.store, digest, start.vocab_size), parsed.prompts, config.rollout,
        args.run, start.path, writer_of(args, config, parsed.prompts, start, args.engine, environment),
        Batching(args.batch_size), parsed.reward_version,
        partial(judging, args.reward, args.reward_set, args.workers),
        {"engine": args.engine, "environment": args.environment, "reward": args.reward},
        config.policy.parts.max_gen_batches,
        partial(second_opinions, args.reward, args.reward_set, parsed.reward_version),
        _live_servers(args, config, start))
    try:
        train_rounds(args, parsed, began_s, producer=producer)
    # workers that judge end with the run, also with one that failed
    finally:
        producer.close()


def _live_servers(args: RlRunOptions, config: RunConfig, start: Target) -> LiveServers | None:
    if args.engine == MEGATRON:
        return None
    from megatron_sov.infer.engines.server_engine import server_settings
    from megatron_sov.post.rl.requests import LiveServers

    places = args.places(args.run)
    # a Hugging Face folder is what the servers load; of a checkpoint they get one
    return LiveServers(args.start_from, args.run, server_settings(args.engine_set, ENGINE_SET), places.urls,
                       longest_of(config.rollout, None), start.vocab_size, config.policy.router_replay)


RUN = command_of(RlRunOptions, run_all)

"""`megatron-sov rl generate | train RECIPE ...`, jobs that meet in a rollout store, and `megatron-sov rl
run`, all rounds by one command, each written by the model that learns."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from megatron_sov.base.artifacts import MANIFEST
from megatron_sov.base.errors import ExitCode, UserError, format_problems, warn
from megatron_sov.base.settings import (
    Flag, NotNegative, ProblemCode, SettingsProblem, build_command, read_options)
from megatron_sov.chat.vocabulary import TOKENIZER_JSON
from megatron_sov.commands.rl.asked import (
    VALIDATION_OPTION, AskedEnvironment, AskingOptions, PromptOptions, environment_of, kept, longest_of,
    read_heldout, refuse_too_long, source_of)
from megatron_sov.commands.rl.rl_reward import JudgedOptions
from megatron_sov.commands.rl.teachers import (
    ScoringTeacherOptions, live_teacher_of, refuse_teachers, teachers_of)
from megatron_sov.commands.score import JudgeOptions
from megatron_sov.commands.train.gate_options import (
    TunedOptions, gate_of, is_complete, refuse_unknown_benchmarks)
from megatron_sov.commands.train.setup.stage_options import ParsedStage, parse_stage, request_with_model
from megatron_sov.infer.engine import ENGINE_SET, MEGATRON, SERVER_ENGINES, Engine, choose_engine
from megatron_sov.infer.prompts import EngineOptions, ServerOptions, check_engine
from megatron_sov.infer.request import Batching
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.post_training import RolloutConfig
from megatron_sov.model.config.run import add_rounds, retain_policies
from megatron_sov.model.objectives import get_factory
from megatron_sov.model.recipes.requested import RecipeOptions
from megatron_sov.post.rl.reward import ENVIRONMENT, RewardJudge, check_reward_fields, resolve_reward_version
from megatron_sov.rollouts.prompts import (
    PromptList, parse_round_range, select_round_prompts, write_unused_rows)
from megatron_sov.runs.checkpoints import check_model_path, find_tokenizer_folder, hash_checkpoint_files
from megatron_sov.runs.folder import FIXED_ROLLOUT_SETTINGS, ROUNDS, VALIDATION, RunFolder, fixed_settings
from megatron_sov.runs.launch_environment import is_first_rank
from megatron_sov.runs.rounds import RunPolicies, build_start_policy, find_round_policy
from megatron_sov.work.progress.locks import Claims

if TYPE_CHECKING:
    from megatron_sov.infer.engines.target import Target
    from megatron_sov.post.rl.generate.live import LiveRollouts
    from megatron_sov.post.rl.generate.servers import LiveServers
    from megatron_sov.post.rl.generate.writers import GenerationSettings, RolloutWriter
    from megatron_sov.post.rl.validation import Validation
    from megatron_sov.train.guards.gate import EndGate


def refuse_no_tokenizer(start_from: Path, folder: Path) -> None:
    """Refuse a start without tokenizer.

    Args:
        start_from: what --from names.
        folder: where its tokenizer would lie.

    Raises:
        UserError: it has none.
    """
    if not (folder / TOKENIZER_JSON).is_file():
        raise UserError(f"--from {start_from}: has no tokenizer with it, and responses need one; start from "
                        "a checkpoint or Hugging Face folder that has one")


@dataclass(frozen=True, kw_only=True)
class RlGenerateOptions(RecipeOptions, PromptOptions, AskingOptions, EngineOptions, ServerOptions):
    """Write the responses of rounds, by the policies of a run."""

    store: Annotated[Path, Flag(value="DIR", writes=True)]
    """The rollout store, which is made where there is none."""
    start_from: Annotated[Path, Flag("--from", "CHECKPOINT|HF_DIR")]
    """The policy of the first round: what `rl train` starts from."""
    run: Annotated[Path, Flag(value="DIR")]
    """The run of `rl train`, whose checkpoints are the later policies; it need not be there yet."""
    rounds: Annotated[str | None, Flag(value="A-B")] = None
    """Rounds to write (default: all of rollout.rounds)."""
    wait: Annotated[NotNegative, Flag(value="SECONDS")] = 0.0
    """How long to wait for a policy, or for pieces that other jobs have claimed (default: not at all, but
    until it is known that these jobs live; the command then ends with 75)."""

def chosen_rounds(given: str | None, last: int) -> range:
    """Return the rounds that --rounds means; without it those up to the last.

    Raises:
        UserError: it has another form.
    """
    if given is not None:
        return parse_round_range(given)
    if not last:
        raise UserError("rollout.rounds = 0: there are no rounds; set it, or name some with --rounds")
    return range(1, last + 1)


def run_generate(args: argparse.Namespace) -> int:
    """Write what is missing, and say what was written.

    Raises:
        UserError: the settings, prompts or start cannot be used, or the store is another one's.
    """
    options = read_options(RlGenerateOptions, args)
    check_model_path(options.start_from, "--from ")
    prompts = options.read(is_asked=options.environment is None)
    config = _config(options, len(prompts))
    rollout = config.rollout
    rounds = chosen_rounds(options.rounds, rollout.rounds)
    if 0 < rollout.rounds < rounds[-1]:
        raise UserError(f"--rounds {options.rounds}: rollout.rounds = {rollout.rounds}, and nobody trains "
                        "the policy of a later one; name rounds up to it, or raise it here and in `rl train`")
    select_round_prompts(prompts, rollout, rounds[0])  # which refuses too few of them
    environment = environment_of(options, config)
    from megatron_sov.infer.engines.target import find_target

    start = find_target(options.start_from)
    if not (start.path / MANIFEST).is_file():
        raise UserError(f"--from {options.start_from}: has no {MANIFEST}, by whose hash its responses would "
                        "be known; make a checkpoint of it with `megatron-sov convert from-hf`")
    # a store has the digest of its tokenizer, and responses are tokens of it
    refuse_no_tokenizer(options.start_from, start.tokenizer_folder)
    engine = _engine(options, start, rollout, environment)
    summary = _write(options, config, rounds, prompts, start, engine_name=engine, environment=environment)
    return ExitCode.OK if summary is None else _tell_written(options, rounds, summary)


def _config(args: RlGenerateOptions, num_prompts: int) -> RunConfig:
    from megatron_sov.commands.train.setup.data_defaults import complete_stage  # numpy

    asked = request_with_model(args, args.start_from, "policy")
    # as `rl train` completes them, or the two would count rounds otherwise
    config = complete_stage(asked, asked.config(), "policy", None, num_prompts).config
    problems = [*map(str, config.rollout.problems()), *_other_settings(args.run, config.rollout)]
    if problems:
        raise UserError(format_problems("rl generate", problems))
    return config


def _other_settings(run: Path, rollout: RolloutConfig) -> list[str]:
    """Return a sentence for each setting by which the trainer, where it has begun, would not take what is
    written, or counts its rounds otherwise."""
    # both jobs count rounds by the same settings, or one waits for pieces that the other never writes
    trained = RunFolder(run).config()
    if trained is None:
        return []
    # rounds, staleness, deadline and lease are not among them: a resumed run may change these as well
    return [f"rollout.{name} = {getattr(rollout, name)}: --run {run} trains with "
            f"{getattr(trained.rollout, name)}; give the same" for name in FIXED_ROLLOUT_SETTINGS
            if getattr(rollout, name) != getattr(trained.rollout, name)]


def _engine(args: RlGenerateOptions, start: Target, rollout: RolloutConfig,
            environment: AskedEnvironment | None) -> str:
    name = args.engine or choose_engine(start)
    check_engine(name, start, args.engine_set, args.nproc, ENGINE_SET)
    refuse_too_long(rollout, environment, start)
    if rollout.deadline_s and name not in (MEGATRON, *SERVER_ENGINES) and environment is None:
        raise UserError(f"rollout.deadline_s = {rollout.deadline_s:g}: --engine {name} cannot be stopped in "
                        f"the middle of a response; use --engine {MEGATRON}, or set it to 0")
    return name


def _write(args: RlGenerateOptions, config: RunConfig, rounds: range, prompts: PromptList,
           start: Target, *, engine_name: str, environment: AskedEnvironment | None
           ) -> dict[str, Any] | None:
    """Load the policy and write; None on other processes than the first."""
    from megatron_sov.engine.parallel.world import run_on_first
    from megatron_sov.infer.engines.server_engine import ServerEngine
    from megatron_sov.post.rl.generate.pieces import FurtherPieces, PendingPieces, PieceQueue
    from megatron_sov.post.rl.generate.requests import build_requests, write_by_requests
    from megatron_sov.post.rl.generate.responses import compute_sampling_digest
    from megatron_sov.post.rl.generate.writers import EngineSettings, LoadPolicy, run_policies, write_batches
    from megatron_sov.post.rl.publish.publisher import is_published, read_further_pieces
    from megatron_sov.rollouts.store import StoreSettings

    folder, rollout = start.tokenizer_folder, config.rollout
    source, aside = source_of(args, config, prompts, start, engine_name=engine_name, environment=environment)
    prompts = args.kept(prompts, aside, args.store)
    select_round_prompts(prompts, rollout, rounds[0])  # which refuses too few of them
    policy_of = partial(find_round_policy, args.run, start.path, rollout=rollout)
    further: FurtherPieces | None = None
    if config.policy.parts.max_gen_batches > 1:
        # the trainer knows which groups learn: until it has published a round, this one may grow
        def further(number: int) -> tuple[int, bool]:
            return read_further_pieces(args.run / ROUNDS, number), is_published(args.run / ROUNDS, number)
    # the policy that the engine begins with; later ones are loaded as checkpoints appear
    held = build_start_policy(start.path)

    settings = StoreSettings(args.store, folder, start.vocab_size)
    # how rows were written goes into the parts' provenance
    provenance = {"engine": engine_name, "settings": list(args.engine_set), "environment": args.environment}

    def work(engine: Engine, load_policy: LoadPolicy) -> dict[str, Any]:
        run_on_first(lambda: write_unused_rows(settings.open().path,
                                               aside))  # made by one, before all open it
        store = settings.open()
        pending = PendingPieces(
            store=store, claims=Claims(store.claims, rollout.lease_s), prompts=prompts, rollout=rollout,
            rounds=rounds, find_policy=policy_of, further=further,
            # in the key: rows that were written otherwise are not taken for these
            sampling_digest=lambda number: compute_sampling_digest(rollout, number, source.chosen_by))
        queue = PieceQueue(pending=pending, store=store, wait_s=args.wait, provenance=provenance)
        if isinstance(engine, ServerEngine):
            return write_by_requests(build_requests(engine, source, engine.room), queue, engine.room,
                                     load_policy)
        return write_batches(engine, source, queue, loaded=held, load_policy=load_policy)

    engine = EngineSettings(
        name=engine_name, longest=longest_of(rollout, environment), batching=Batching(args.batch_size),
        settings=args.engine_set, nproc=args.nproc, option=ENGINE_SET,
        with_routes=config.policy.router_replay,
        places=None if engine_name not in SERVER_ENGINES else args.places(args.run))
    summary: dict[str, Any] | None = run_policies(engine, start, work)
    return summary


def _tell_written(args: RlGenerateOptions, rounds: range, summary: dict[str, Any]) -> int:
    print(f"{args.store}: {summary['parts']:,} parts with {summary['responses']:,} responses of "
          f"{summary['tokens']:,} tokens were written by this job"
          + (f", {summary['unfinished']:,} of them unfinished" if summary["unfinished"] else ""))
    if summary["waits_for"]:
        warn(f"{summary['waits_for']}; give the same command again, or more patience with --wait")
        return ExitCode.STOPPED
    print(f"rounds {rounds[0]} to {rounds[-1]} are written")
    return ExitCode.OK


GENERATE = build_command(RlGenerateOptions, run_generate)


@dataclass(frozen=True, kw_only=True)
class RoundsOptions(TunedOptions, PromptOptions, JudgedOptions, ScoringTeacherOptions):
    """What is trained, and where its rounds come from."""

    groups: ClassVar[tuple[str, ...]] = ("policy", "rollout", "distillation", "preference")
    validation: Annotated[Path | None, Flag(VALIDATION_OPTION, "FILE|DIR")] = None
    """Held-out prompts, in the form of --prompts, that `rl run` asks its policies every
    rollout.validation_every_rounds."""


@dataclass(frozen=True, kw_only=True)
class RlTrainOptions(RoundsOptions):
    """Train on rounds that other jobs write and judge."""

    wait: Annotated[NotNegative, Flag(value="SECONDS")] = 0.0
    """How long a round is waited for that is not written and judged yet, before the run ends with 75
    (default: not at all)."""

    def problems(self) -> list[SettingsProblem]:
        return [] if self.validation is None else [SettingsProblem(
            ProblemCode.RULE, "validation", "needs an engine that asks the policy, and `rl train` has none",
            self.validation, "use `rl run`, or measure its checkpoints by `megatron-sov eval passk`")]


def run_train(args: argparse.Namespace) -> int:
    """Train the rounds that are there; returns 0 when the run is complete.

    Raises:
        UserError: a mistake in the arguments, or the store does not belong to the run.
        StopRequested: a round is not there yet, and everything is saved.
    """
    options = read_options(RlTrainOptions, args)
    if not is_complete(options, "policy"):
        parsed = parse_rounds(options, lambda config: retain_policies(add_rounds(config)))
        train_rounds(options, parsed, wait_s=options.wait)
    return ExitCode.OK


@dataclass(frozen=True)
class ParsedRounds:
    """What a command that trains rounds is to do, checked."""

    stage: ParsedStage
    prompts: PromptList
    """All of them."""
    reward_version: str
    gate: EndGate | None
    """What judges the last policy."""
    heldout: PromptList | None
    """What its policies are validated by; None: they are not."""


def parse_rounds(args: RoundsOptions, completed: Callable[[RunConfig], RunConfig] = add_rounds, *,
                 is_asked: bool = False) -> ParsedRounds:
    """Return what the options ask for.

    Args:
        args: of the command.
        completed: settings as they are asked for -> with those that follow from the rounds.
        is_asked: whether its own policies are asked the prompts; see `read_prompts`.

    Raises:
        UserError: a mistake in them.
    """
    prompts = args.read(is_asked=is_asked)
    version = resolve_reward_version(args.reward, args.reward_set)
    parsed = parse_stage(args, "policy", needs_data=False, num_prompts=len(prompts), completed=completed)
    refuse_unknown_benchmarks(parsed.config)
    check_reward_fields(args.reward, args.reward_set, select_round_prompts(prompts, parsed.config.rollout, 1),
                    f"--prompts {args.prompts}")
    refuse_teachers(args, parsed.config.policy, args.reward, args.prompts, prompts)
    if not args.dry_run:
        parsed = parsed.with_checkpoint(args.run)
    heldout = None if args.validation is None else read_heldout(args.validation, args.renames, prompts,
                                                                is_asked=is_asked)
    return ParsedRounds(parsed, prompts, version, gate_of(args, parsed.config, parsed.start), heldout)


def train_rounds(args: RoundsOptions, parsed: ParsedRounds, *, wait_s: float = 0.0,
                 rollouts: LiveRollouts | None = None, validation: Validation | None = None) -> None:
    """Train the rounds. Without `rollouts` other jobs generate and judge each within `wait_s` seconds."""
    from megatron_sov.post.distillation.distill import OnPolicyDistillation, TeacherFactory, measure_teacher
    from megatron_sov.post.policy import build_policy_objective, check_sources, open_text_sources
    from megatron_sov.post.preference import build_round_objective
    from megatron_sov.post.rl.logprob_columns import select_columns
    from megatron_sov.post.rl.publish.publisher import Publisher, list_number_columns
    from megatron_sov.post.rl.round_loader import RoundLoader
    from megatron_sov.post.rl.run import RolloutCycle
    from megatron_sov.post.rl.validation import SampledRounds
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.data.rounds import BEHAVIOUR, build_rounds_source, find_round_documents
    from megatron_sov.train.objectives.objective import get_columns
    from megatron_sov.train.stages.stage import Stage, run_stage

    config, start = parsed.stage.config, parsed.stage.start
    assert start is not None, f"--from is required, it is {args.start_from}"
    tokenizer = find_tokenizer_folder(start)
    refuse_no_tokenizer(args.start_from, tokenizer)
    texts = open_text_sources(config)
    policies = RunPolicies(args.run, build_start_policy(start), config.rollout, fixed_settings(config) | {
        "train.steps": config.train.steps,
        "data": {text.name: hash_checkpoint_files(text.artifact) for text in texts
                 if text.artifact is not None}})
    publisher = Publisher(
        config=config, rounds=args.run / ROUNDS, store=args.store, prompts=parsed.prompts,
        reward_version=parsed.reward_version, tokenizer=tokenizer, is_own=policies.is_own,
        chosen_by={} if rollouts is None else rollouts.settings.source.chosen_by)
    # rounds that were published from another store would be trained as if they were of this one
    publisher.check_store()
    teacher = live_teacher_of(args, config, tokenizer, args.nproc)
    learned = build_round_objective if config.policy.learns_preferences else build_policy_objective
    objective = get_factory(config, learned(config) if teacher is None
                            else TeacherFactory(OnPolicyDistillation, [teacher]))
    columns = select_columns(config, get_columns(objective), start,
                             teachers_of(args, config, tokenizer) if teacher is None else ())
    # a source whose rounds open one by one, as they are published
    source = build_rounds_source(args.run / ROUNDS, config.model.vocab_size, tokenizer, columns.names,
                           routes=columns.routes, published=(BEHAVIOUR, *list_number_columns(config)))
    check_sources(config, [*texts, source])
    rounds = find_round_documents([source])
    assert rounds is not None, "the source has no rounds"
    loader = RoundLoader(documents=rounds, rollout=config.rollout, columns=columns, store=args.store,
                         samples=SampledRounds(config.obs.sample_rows, config.rollout.rounds))
    cycle = RolloutCycle(rollout=config.rollout, policies=policies, rollouts=rollouts, publisher=publisher,
                         loader=loader, validation=validation, wait_s=wait_s, store=args.store)
    after = partial(measure_teacher, sources=texts, teacher=teacher)
    run_stage(Stage(config, RunFolder(args.run), objective, start, args.resume, texts, (source,),
                    before=after, after=after, feed=cycle, end_gate=parsed.gate,
                    faults=parsed.stage.faults, until=args.until, dry_run=args.dry_run,
                    notes=parsed.stage.notes), args.nproc)


TRAIN = build_command(RlTrainOptions, run_train)


RunEngine = Literal["megatron", "vllm"]


@dataclass(frozen=True, kw_only=True)
class RlRunOptions(RoundsOptions, AskingOptions, JudgeOptions, ServerOptions):
    """Train in rounds in which the model writes its responses itself."""

    engine: Annotated[RunEngine, Flag(help="What writes: the model that learns, or servers, which are given "
                                           "its weights in each round")] = MEGATRON
    engine_set: Annotated[tuple[str, ...], Flag(ENGINE_SET, "key=value")] = ()
    """Servers, e.g. servers=2 or tp=8 (engine vllm)."""

    def problems(self) -> list[SettingsProblem]:
        if self.engine == MEGATRON and (self.engine_set or self.engine_url or self.engine_python):
            return [SettingsProblem(ProblemCode.RULE, "engine", "has no servers, and settings of servers are "
                                    "given", self.engine, "add --engine vllm, or leave them out")]
        return [] if self.reward != ENVIRONMENT or self.environment is not None else [
            SettingsProblem(ProblemCode.RULE, "reward",
                            "takes what an environment said of its episodes, and there is none",
                            self.reward, "add --environment, or choose another reward")]

def run_all(args: argparse.Namespace) -> int:
    """As `run_rl`, of what was typed."""
    return run_rl(read_options(RlRunOptions, args))


def run_rl(options: RlRunOptions) -> int:
    """Write, judge and train all rounds; returns 0 when the run is complete.

    Args:
        options: of the command.

    Raises:
        UserError: a mistake in the arguments, or the store does not belong to the run.
        StopRequested: it was asked to stop, and everything is saved.
    """
    if is_complete(options, "policy"):
        return ExitCode.OK
    # before anything is written; the first process has the servers
    if options.engine != MEGATRON and is_first_rank():
        from megatron_sov.infer.engines.server_process import check_engine_program

        check_engine_program(options.engine, options.engine_url, options.engine_python)
    _run(options, parse_rounds(options, is_asked=options.environment is None))
    return ExitCode.OK


def _run(args: RlRunOptions, parsed: ParsedRounds) -> None:
    from megatron_sov.infer.engines.target import find_target
    from megatron_sov.post.rl.generate.live import LiveRollouts
    from megatron_sov.post.rl.generate.writers import GenerationSettings
    from megatron_sov.rollouts.store import StoreSettings

    assert parsed.stage.start is not None, "--from is required"
    config, start = parsed.stage.config, find_target(parsed.stage.start)
    refuse_no_tokenizer(args.start_from, start.tokenizer_folder)
    environment = environment_of(args, config)
    refuse_too_long(config.rollout, environment, start)
    source, aside = source_of(args, config, parsed.prompts, start, engine_name=args.engine,
                              environment=environment)
    prompts = args.kept(parsed.prompts, aside, args.store)
    select_round_prompts(prompts, config.rollout, 1)  # which refuses too few of them
    settings = GenerationSettings(
        store=StoreSettings(args.store, start.tokenizer_folder, start.vocab_size), prompts=prompts,
        set_aside=aside, rollout=config.rollout, run=args.run, source=source,
        provenance={"engine": args.engine, "environment": args.environment, "reward": args.reward},
        max_gen_batches=config.policy.parts.max_gen_batches)
    servers = _live_servers(args, config, start)
    rollouts = LiveRollouts(
        settings=settings, writer=_writer(args, settings, servers),
        reward=RewardJudge(args.reward, args.reward_set, args.workers, parsed.reward_version))
    validation = _validation(args, parsed, rollouts, start, environment=environment, servers=servers)
    try:
        train_rounds(args, parsed, rollouts=rollouts, validation=validation)
    # workers that judge end with the run, also with one that failed
    finally:
        rollouts.close()
        if validation is not None:
            validation.rollouts.close()


def _validation(args: RlRunOptions, parsed: ParsedRounds, training: LiveRollouts, start: Target, *,
                environment: AskedEnvironment | None, servers: LiveServers | None) -> Validation | None:
    """Return what validates the run's policies, by the engine and the processes that judge of its training.

    Raises:
        UserError: a prompt is empty, or all are too long.
    """
    if parsed.heldout is None:
        return None
    from megatron_sov.post.rl.generate.live import LiveRollouts
    from megatron_sov.post.rl.validation import SampledRounds, Validation, digest_conditions
    from megatron_sov.rollouts.store import StoreSettings

    config, folder = parsed.stage.config, args.run / VALIDATION
    rollout = config.rollout.for_validation(len(parsed.heldout))
    # where tokens went is needed by a trainer alone
    asked = replace(config, rollout=rollout, policy=replace(config.policy, router_replay=False))
    source, aside = source_of(args, asked, parsed.heldout, start, engine_name=args.engine,
                              environment=environment)
    prompts = kept(f"{VALIDATION_OPTION} {args.validation}", parsed.heldout, aside, folder)
    rollout = config.rollout.for_validation(len(prompts))
    settings = replace(
        training.settings, store=StoreSettings(folder, start.tokenizer_folder, start.vocab_size),
        prompts=prompts, set_aside=aside, rollout=rollout, source=source, max_gen_batches=1)
    return Validation(
        run=args.run, rollouts=LiveRollouts(settings=settings, reward=training.reward,
                                            writer=_writer(args, settings, servers)),
        rollout=config.rollout, num_responses=len(prompts) * rollout.samples_per_prompt,
        right_from=config.policy.right_from, samples=SampledRounds(config.obs.sample_rows, rollout.rounds),
        measured_by=digest_conditions(prompts=prompts, reward_version=parsed.reward_version, rollout=rollout,
                                      chosen_by=source.chosen_by, right_from=config.policy.right_from))


def _writer(args: RlRunOptions, settings: GenerationSettings, servers: LiveServers | None) -> RolloutWriter:
    from megatron_sov.post.rl.generate.requests import RequestWriter
    from megatron_sov.post.rl.generate.writers import RowWriter

    if servers is None:
        return RowWriter(settings=settings, batching=Batching(args.batch_size))
    return RequestWriter(settings, servers)


def _live_servers(args: RlRunOptions, config: RunConfig, start: Target) -> LiveServers | None:
    if args.engine == MEGATRON:
        return None
    from megatron_sov.infer.engines.server_engine import parse_server_settings
    from megatron_sov.post.rl.generate.servers import LiveServers, ServerSettings

    # a Hugging Face folder is what the servers load; of a checkpoint they get one
    return LiveServers(ServerSettings(
        engine=args.engine, start=args.start_from, places=args.places(args.run),
        servers=parse_server_settings(args.engine, args.engine_set, ENGINE_SET),
        longest=longest_of(config.rollout, None), vocab_size=start.vocab_size,
        with_routes=config.policy.router_replay))


RUN = build_command(RlRunOptions, run_all)

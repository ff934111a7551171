"""Trains in rounds: builds the `RolloutCycle` of `megatron-sov rl run` and `rl train`.

`rl run` also generates and judges the rounds (`RolloutBuilder`); `rl train` finds them in `--store`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from megatron_sov.commands.rl.checks import (
    CycleRequest, RoundsRequest, check_sequence_length, count_max_tokens)
from megatron_sov.commands.rl.generation import GenerationBuilder
from megatron_sov.commands.rl.options import VALIDATION_OPTION
from megatron_sov.commands.train.setup.training import TrainingRequest
from megatron_sov.commands.train.training_run import run_training
from megatron_sov.infer.engine import ENGINE_SET
from megatron_sov.infer.engines.server_engine import parse_server_settings
from megatron_sov.infer.engines.target import Target, find_target
from megatron_sov.infer.request import MEGATRON, Batching
from megatron_sov.model.config import RunConfig
from megatron_sov.model.objectives import Factory, get_factory
from megatron_sov.post.distillation.distill import (
    LiveTeacher, OnPolicyDistillation, TeacherFactory, measure_teacher)
from megatron_sov.post.policy import build_policy_objective, check_sources, open_text_sources
from megatron_sov.post.preference import build_round_objective
from megatron_sov.post.rl.generate.live import LiveRollouts
from megatron_sov.post.rl.generate.requests import RequestWriter
from megatron_sov.post.rl.generate.servers import LiveServers, ServerSettings
from megatron_sov.post.rl.generate.writers import GenerationSettings, RolloutWriter, RowWriter
from megatron_sov.post.rl.logprob_columns import select_columns
from megatron_sov.post.rl.publish.publisher import Publisher, list_number_columns
from megatron_sov.post.rl.reward import RewardJudge
from megatron_sov.post.rl.round_loader import RoundLoader
from megatron_sov.post.rl.run import RolloutCycle
from megatron_sov.post.rl.validation import SampledRounds, Validation, digest_conditions
from megatron_sov.rollouts.round_order import select_round_prompts
from megatron_sov.runs.checkpoints import hash_checkpoint_files
from megatron_sov.runs.folder import ROUNDS, VALIDATION, fixed_settings
from megatron_sov.runs.launch_environment import num_ranks
from megatron_sov.runs.rounds import RunPolicies, build_start_policy
from megatron_sov.train.data.rounds import BEHAVIOUR, RoundDocuments, build_rounds_source
from megatron_sov.train.data.sources import Source
from megatron_sov.train.objectives.objective import get_columns
from megatron_sov.train.stages.stage import Stage


def run_cycle(request: CycleRequest | TrainingRequest) -> None:
    """Generate, judge and train all rounds; of a complete run, print the summary."""
    if isinstance(request, TrainingRequest):
        run_training(request)
        return
    builder = RolloutBuilder.open(request)
    rollouts = builder.build_training_rollouts()
    validation = builder.build_validation(rollouts)
    try:
        run_training(request.rounds, partial(add_rounds, rollouts=rollouts, validation=validation))
    finally:
        # Worker processes of the reward end with the run, after a failure too.
        rollouts.close()
        if validation is not None:
            validation.rollouts.close()


def add_rounds(request: TrainingRequest, stage: Stage, rollouts: LiveRollouts | None = None,
               validation: Validation | None = None) -> Stage:
    """Return the stage with the objective, data and feed of reinforcement learning.

    Args:
        request: a `RoundsRequest`.
        stage: stage to extend.
        rollouts: generates and judges the rounds; None: `rl generate` and `rl reward` do, within
            `request.wait_s` per round.
        validation: validates the policies; None: no validation.

    Raises:
        UserError: the store or a teacher does not belong to the run.
    """
    assert isinstance(request, RoundsRequest)
    config, options = stage.config, request.options
    texts = open_text_sources(config)
    policies = _build_policies(request, texts)
    publisher = Publisher(
        config=config, rounds=options.run / ROUNDS, store=options.store, prompts=request.prompts,
        reward_version=request.reward_version, tokenizer=request.tokenizer, is_own=policies.is_own,
        chosen_by={} if rollouts is None else rollouts.settings.source.chosen_by)
    # Rounds published from a different store must not be trained as rounds from this store.
    publisher.check_store()
    teacher = None
    if request.live_teacher is not None:
        teacher = LiveTeacher(request.live_teacher, config, num_ranks(options.nproc))
    objective = _build_objective(config, teacher)
    columns = select_columns(config, get_columns(objective), request.start, request.scoring_teachers)
    # The source has no documents before `RoundLoader.open` opens a published round.
    documents = RoundDocuments(options.run / ROUNDS, config.model.vocab_size, columns.names,
                               published=(BEHAVIOUR, *list_number_columns(config)))
    source = build_rounds_source(documents, request.tokenizer, columns.routes)
    check_sources(config, [*texts, source])
    loader = RoundLoader(documents=documents, rollout=config.rollout, columns=columns, store=options.store,
                         samples=SampledRounds(config.obs.sample_rows, config.rollout.rounds))
    cycle = RolloutCycle(rollout=config.rollout, policies=policies, rollouts=rollouts, publisher=publisher,
                         loader=loader, validation=validation, wait_s=request.wait_s, store=options.store)
    measure = partial(measure_teacher, sources=texts, teacher=teacher)
    return replace(stage, objective=objective, sources=texts, extra_sources=(source,), before=measure,
                   after=measure, feed=cycle)


@dataclass(frozen=True, kw_only=True)
class RolloutBuilder:
    """Builds the rollouts for training and validation with the same start, environment and servers."""

    request: CycleRequest
    generation: GenerationBuilder
    servers: LiveServers | None
    """Engine servers; None: the trained model generates."""

    @classmethod
    def open(cls, request: CycleRequest) -> "RolloutBuilder":
        """Open the start, and check that responses fit the context length."""
        options, config, start = request.options, request.rounds.config, find_target(request.rounds.start)
        check_sequence_length(config.rollout, request.environment, start)
        generation = GenerationBuilder(
            options=options, config=config, start=start, engine_name=options.engine,
            environment=request.environment,
            provenance={"engine": options.engine, "environment": options.environment,
                        "reward": options.reward})
        return cls(request=request, generation=generation, servers=_build_servers(request, start))

    def build_training_rollouts(self) -> LiveRollouts:
        """Return the rollouts that answer --prompts in --store."""
        options, rounds = self.request.options, self.request.rounds
        settings = self.generation.build(rounds.prompts, f"--prompts {options.prompts}", options.store)
        select_round_prompts(settings.prompts, settings.rollout, 1)  # refuses a file with too few prompts
        reward = RewardJudge(options.reward, options.reward_set, options.workers, rounds.reward_version)
        return LiveRollouts(settings=settings, writer=self._build_writer(settings), reward=reward)

    def build_validation(self, training: LiveRollouts) -> Validation | None:
        """Return the validation on --validation, or None without the option.

        Args:
            training: rollouts of the run, whose reward judges the validation too.
        """
        options, rounds = self.request.options, self.request.rounds
        if rounds.validation_prompts is None:
            return None
        config = rounds.config
        rollout = config.rollout.for_validation(len(rounds.validation_prompts))
        # Only training replays expert routes.
        sampled = replace(config, rollout=rollout, policy=replace(config.policy, router_replay=False))
        settings = replace(self.generation, config=sampled).build(
            rounds.validation_prompts, f"{VALIDATION_OPTION} {options.validation}", options.run / VALIDATION)
        rollout = config.rollout.for_validation(len(settings.prompts))
        settings = replace(settings, rollout=rollout, max_gen_batches=1)
        conditions = digest_conditions(
            prompts=settings.prompts, reward_version=rounds.reward_version, rollout=rollout,
            chosen_by=settings.source.chosen_by, right_from=config.policy.right_from)
        return Validation(
            run=options.run, rollout=config.rollout, right_from=config.policy.right_from,
            num_responses=len(settings.prompts) * rollout.samples_per_prompt, measured_by=conditions,
            samples=SampledRounds(config.obs.sample_rows, rollout.rounds),
            rollouts=LiveRollouts(settings=settings, reward=training.reward,
                                  writer=self._build_writer(settings)))

    def _build_writer(self, settings: GenerationSettings) -> RolloutWriter:
        if self.servers is None:
            return RowWriter(settings=settings, batching=Batching(self.request.options.batch_size))
        return RequestWriter(settings, self.servers)


def _build_servers(request: CycleRequest, start: Target) -> LiveServers | None:
    options, config = request.options, request.rounds.config
    if options.engine == MEGATRON:
        return None
    # Servers load a Hugging Face folder; a checkpoint in --from is converted.
    return LiveServers(ServerSettings(
        start=options.start_from, places=options.places(options.run),
        servers=parse_server_settings(options.engine_set, ENGINE_SET),
        longest=count_max_tokens(config.rollout, None), vocab_size=start.vocab_size,
        with_routes=config.policy.router_replay))


def _build_policies(request: RoundsRequest, texts: Sequence[Source]) -> RunPolicies:
    """Return a run's policies, identified by the settings that change training, and by data."""
    digests = {text.name: hash_checkpoint_files(text.artifact) for text in texts if text.artifact is not None}
    config = request.config
    settings = fixed_settings(config) | {"train.steps": config.train.steps, "data": digests}
    return RunPolicies(request.options.run, build_start_policy(request.start), config.rollout, settings)


def _build_objective(config: RunConfig, teacher: LiveTeacher | None) -> Factory:
    if teacher is not None:
        return get_factory(config, TeacherFactory(OnPolicyDistillation, [teacher]))
    if config.policy.learns_preferences:
        return get_factory(config, build_round_objective(config))
    return get_factory(config, build_policy_objective(config))

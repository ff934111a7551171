"""Runs `megatron-sov rl run`: builds the parts that generate and judge, and trains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from megatron_sov.commands.rl.checks import (
    CycleRequest, EnvironmentRequest, check_sequence_length, count_max_tokens, drop_unused_prompts,
    resolve_environment)
from megatron_sov.commands.rl.options import VALIDATION_OPTION
from megatron_sov.commands.rl.rollout_source import build_rollout_source
from megatron_sov.commands.rl.train_run import add_rounds
from megatron_sov.commands.train.setup.training import TrainingRequest
from megatron_sov.commands.train.training_run import run_training
from megatron_sov.infer.engine import ENGINE_SET
from megatron_sov.infer.engines.server_engine import parse_server_settings
from megatron_sov.infer.engines.target import Target, find_target
from megatron_sov.infer.request import MEGATRON, Batching
from megatron_sov.post.rl.generate.live import LiveRollouts
from megatron_sov.post.rl.generate.requests import RequestWriter
from megatron_sov.post.rl.generate.servers import LiveServers, ServerSettings
from megatron_sov.post.rl.generate.writers import GenerationSettings, RolloutWriter, RowWriter
from megatron_sov.post.rl.reward import RewardJudge
from megatron_sov.post.rl.validation import SampledRounds, Validation, digest_conditions
from megatron_sov.rollouts.round_order import select_round_prompts
from megatron_sov.rollouts.store import StoreSettings
from megatron_sov.runs.folder import VALIDATION


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


@dataclass(frozen=True, kw_only=True)
class RolloutBuilder:
    """Builds the rollouts for training and validation with the same start, environment and servers."""

    request: CycleRequest
    start: Target
    environment: EnvironmentRequest | None
    servers: LiveServers | None
    """Engine servers; None: the trained model generates."""

    @classmethod
    def open(cls, request: CycleRequest) -> RolloutBuilder:
        """Open the start, and check that responses fit the context length."""
        config, start = request.rounds.config, find_target(request.rounds.start)
        environment = resolve_environment(request.options, config)
        check_sequence_length(config.rollout, environment, start)
        return cls(request=request, start=start, environment=environment,
                   servers=_build_servers(request, start))

    def build_training_rollouts(self) -> LiveRollouts:
        """Return the rollouts that answer --prompts in --store."""
        options, rounds = self.request.options, self.request.rounds
        config = rounds.config
        source, unused = build_rollout_source(options, config, rounds.prompts, self.start,
                                              engine_name=options.engine, environment=self.environment)
        prompts = drop_unused_prompts(f"--prompts {options.prompts}", rounds.prompts, unused, options.store)
        select_round_prompts(prompts, config.rollout, 1)  # refuses a file with too few prompts
        settings = GenerationSettings(
            store=StoreSettings(options.store, self.start.tokenizer_folder, self.start.vocab_size),
            prompts=prompts, set_aside=unused, rollout=config.rollout, run=options.run, source=source,
            provenance={"engine": options.engine, "environment": options.environment,
                        "reward": options.reward},
            max_gen_batches=config.policy.parts.max_gen_batches)
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
        config, folder = rounds.config, options.run / VALIDATION
        rollout = config.rollout.for_validation(len(rounds.validation_prompts))
        # Only training replays expert routes.
        sampled = replace(config, rollout=rollout, policy=replace(config.policy, router_replay=False))
        source, unused = build_rollout_source(options, sampled, rounds.validation_prompts, self.start,
                                              engine_name=options.engine, environment=self.environment)
        prompts = drop_unused_prompts(f"{VALIDATION_OPTION} {options.validation}", rounds.validation_prompts,
                                      unused, folder)
        rollout = config.rollout.for_validation(len(prompts))
        settings = replace(
            training.settings, prompts=prompts, set_aside=unused, rollout=rollout, source=source,
            store=StoreSettings(folder, self.start.tokenizer_folder, self.start.vocab_size),
            max_gen_batches=1)
        conditions = digest_conditions(
            prompts=prompts, reward_version=rounds.reward_version, rollout=rollout,
            chosen_by=source.chosen_by, right_from=config.policy.right_from)
        return Validation(
            run=options.run, rollout=config.rollout, right_from=config.policy.right_from,
            num_responses=len(prompts) * rollout.samples_per_prompt, measured_by=conditions,
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

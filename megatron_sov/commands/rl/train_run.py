"""Adds the rounds in `--store` to a training stage: `megatron-sov rl train` and `rl run`."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from megatron_sov.commands.rl.checks import RoundsRequest
from megatron_sov.commands.train.setup.training import TrainingRequest
from megatron_sov.model.config import RunConfig
from megatron_sov.model.objectives import Factory, get_factory
from megatron_sov.post.distillation.distill import (
    LiveTeacher, OnPolicyDistillation, TeacherFactory, measure_teacher)
from megatron_sov.post.policy import build_policy_objective, check_sources, open_text_sources
from megatron_sov.post.preference import build_round_objective
from megatron_sov.post.rl.generate.live import LiveRollouts
from megatron_sov.post.rl.logprob_columns import select_columns
from megatron_sov.post.rl.publish.publisher import Publisher, list_number_columns
from megatron_sov.post.rl.round_loader import RoundLoader
from megatron_sov.post.rl.run import RolloutCycle
from megatron_sov.post.rl.validation import SampledRounds, Validation
from megatron_sov.runs.checkpoints import hash_checkpoint_files
from megatron_sov.runs.folder import ROUNDS, fixed_settings
from megatron_sov.runs.launch_environment import num_ranks
from megatron_sov.runs.rounds import RunPolicies, build_start_policy
from megatron_sov.train.data.rounds import BEHAVIOUR, RoundDocuments, build_rounds_source
from megatron_sov.train.data.sources import Source
from megatron_sov.train.objectives.objective import get_columns
from megatron_sov.train.stages.stage import Stage


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

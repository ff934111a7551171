"""Runs `megatron-sov rl train`: trains on rounds in `--store`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from megatron_sov.commands.rl.inputs.checks import RoundsRequest
from megatron_sov.commands.train.training_run import run_training
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
from megatron_sov.runs.folder import ROUNDS
from megatron_sov.runs.launch_environment import num_ranks
from megatron_sov.runs.rounds import RunPolicies, build_start_policy
from megatron_sov.train.data.rounds import BEHAVIOUR, build_rounds_source, find_round_documents
from megatron_sov.train.data.token_shards import Source
from megatron_sov.train.objectives.objective import get_columns


def train_rounds(request: RoundsRequest, rollouts: LiveRollouts | None = None,
                 validation: Validation | None = None) -> None:
    """Train the rounds that `rollouts`, or separate jobs, complete.

    Args:
        request: checked settings and prompts.
        rollouts: generates and judges the rounds; None: `rl generate` and `rl reward` do, within
            `request.wait_s` per round.
        validation: validates the policies; None: no validation.

    Raises:
        UserError: the store or a teacher does not belong to the run.
        StopRequested: a round is not complete in time, and everything is saved.
    """
    options = request.options
    config, start, tokenizer = request.stage.config, request.start, request.tokenizer
    texts = open_text_sources(config)
    policies = _build_policies(request, texts)
    publisher = Publisher(
        config=config, rounds=options.run / ROUNDS, store=options.store, prompts=request.prompts,
        reward_version=request.reward_version, tokenizer=tokenizer, is_own=policies.is_own,
        chosen_by={} if rollouts is None else rollouts.settings.source.chosen_by)
    # Rounds published from a different store must not be trained as rounds from this store.
    publisher.check_store()
    teacher = None
    if request.live_teacher is not None:
        teacher = LiveTeacher(request.live_teacher, config, num_ranks(options.nproc))
    objective = _build_objective(config, teacher)
    columns = select_columns(config, get_columns(objective), start, request.scoring_teachers)
    # Rounds in this source open when they are published.
    source = build_rounds_source(options.run / ROUNDS, config.model.vocab_size, tokenizer, columns.names,
                                 routes=columns.routes, published=(BEHAVIOUR, *list_number_columns(config)))
    check_sources(config, [*texts, source])
    rounds = find_round_documents([source])
    assert rounds is not None, "the source has no rounds"
    loader = RoundLoader(documents=rounds, rollout=config.rollout, columns=columns, store=options.store,
                         samples=SampledRounds(config.obs.sample_rows, config.rollout.rounds))
    cycle = RolloutCycle(rollout=config.rollout, policies=policies, rollouts=rollouts, publisher=publisher,
                         loader=loader, validation=validation, wait_s=request.wait_s, store=options.store)
    measure = partial(measure_teacher, sources=texts, teacher=teacher)
    run_training(request.stage, lambda _, stage: replace(
        stage, objective=objective, sources=texts, extra_sources=(source,), before=measure, after=measure,
        feed=cycle))


def _build_policies(request: RoundsRequest, texts: Sequence[Source]) -> RunPolicies:
    """Return a run's policies, identified by the settings that change training, and by data."""
    digests = {text.name: hash_checkpoint_files(text.artifact) for text in texts if text.artifact is not None}
    return RunPolicies(request.options.run, build_start_policy(request.start), request.stage.config.rollout,
                       {**request.policy_settings, "data": digests})


def _build_objective(config: RunConfig, teacher: LiveTeacher | None) -> Factory:
    if teacher is not None:
        return get_factory(config, TeacherFactory(OnPolicyDistillation, [teacher]))
    if config.policy.learns_preferences:
        return get_factory(config, build_round_objective(config))
    return get_factory(config, build_policy_objective(config))

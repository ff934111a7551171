"""Opens published rounds for training: verifies files, computes log-probability columns, skips idle steps."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.errors import warn
from megatron_sov.engine.parallel.world import run_on_each_rank, run_on_main
from megatron_sov.model.config import RolloutConfig
from megatron_sov.post.policy import TEACHER, has_auxiliary_gradients
from megatron_sov.post.rl.logprob_columns import LogprobColumns
from megatron_sov.post.rl.publish.advantages import has_advantage
from megatron_sov.post.rl.publish.metrics import (
    PASS_RATE, compute_round_meters, describe_groups, find_round_problem)
from megatron_sov.post.rl.teachers import compute_reverse_kl
from megatron_sov.post.rl.validation import SampledRounds
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs.checkpoints import hash_checkpoint_files
from megatron_sov.train.data.rounds import ADVANTAGE, PublishedRound, RoundDocuments
from megatron_sov.train.feed import FeedView

EVENT_FIELDS = ("groups", "unjudged", "reward_version", "policies", "means")
"""Manifest fields that the event `round` repeats."""


@dataclass(frozen=True)
class OpenedRound:
    """Identity and figures for a round opened for training."""

    digest: str
    """File digest from `hash_checkpoint_files`."""
    meters: Mapping[str, float]
    """Headline meters from `compute_round_meters`; {} on ranks other than 0."""


@dataclass(kw_only=True)
class RoundLoader:
    """Opens a run's rounds; every process has an object, and all processes call `open` together."""

    documents: RoundDocuments
    rollout: RolloutConfig
    columns: LogprobColumns
    store: Path | None = None
    """Rollout store for sample responses; None: no samples."""
    samples: SampledRounds = field(default_factory=lambda: SampledRounds(0, 0))
    _has_warned: bool = False
    """Whether `find_round_problem` warned in the previous round."""

    def is_open(self, number: int) -> bool:
        return self.documents.is_open(number)

    def open(self, view: FeedView, number: int, *, is_first: bool, figures: Mapping[str, float]
             ) -> OpenedRound:
        """Open a published round, and record the event `round`.

        Args:
            view: the run.
            number: number of the round, from 1.
            is_first: whether the next step is the first of the round.
            figures: seconds of generating and judging, for the event.

        Raises:
            UserError: a file is damaged, or `LogprobColumns.compute` fails.
        """
        seq_len = view.config.data.phases[0].seq_len
        read = partial(self.documents.read, number, seq_len, self.rollout.steps_per_round)

        def check_readable() -> None:
            read()

        run_on_each_rank(partial(self.documents.verify, number))  # an error on one process is raised on all
        # Rank 0 reads first, because its error is raised on every rank.
        run_on_main(view.world, check_readable)
        opened = read()
        # Rank 0 decides: processes that skip different steps would wait for one another forever.
        idle_steps = run_on_main(view.world, partial(self._find_idle_steps, view, number, opened))
        opened = replace(opened, idle=idle_steps)
        columns = self.columns.compute(view, opened, is_first=is_first)
        self._skip_idle_steps(view, number, opened)
        # Opened last, so that a failure leaves the data order unchanged.
        self.documents.open(number, replace(opened, trainer_columns=columns))
        digest = run_on_main(view.world, partial(hash_checkpoint_files, opened.path))
        meters: Mapping[str, float] = {}
        if view.world.is_main:
            content = read_manifest(opened.path).content
            divergence = compute_reverse_kl(opened, columns[TEACHER]) if TEACHER in columns else {}
            view.events.write("round", step=view.step, round=number, documents=opened.steps[-1].stop,
                              **figures, **divergence, **{name: content.get(name) for name in EVENT_FIELDS})
            meters = compute_round_meters(content)
            self._report_rewards(view, number, content)
        if self.store is not None:
            run_on_main(view.world, partial(self._record_samples, view, self.store, number, opened.path))
        return OpenedRound(digest, meters)

    def _report_rewards(self, view: FeedView, number: int, content: Mapping[str, Any]) -> None:
        """Print the initial policy's pass rate, and warn about the first of consecutive rounds in which
        few groups learn (`find_round_problem`)."""
        means = content.get("means") or {}
        if not view.step and PASS_RATE in means:
            print(f"pass rate before the first step: {means[PASS_RATE]:.1%} of {means['responses']:,} "
                  f"responses have a reward of at least policy.right_from = "
                  f"{view.config.policy.right_from:g}\n", end="", file=sys.stderr, flush=True)
        problem = find_round_problem(content, is_first=not view.step)
        if problem and not self._has_warned:
            warn(f"round {number}: {problem}", view.events.write, step=view.step)
        self._has_warned = bool(problem)

    def _record_samples(self, view: FeedView, store: Path, number: int, published: Path) -> None:
        version = str(read_manifest(published).content["reward_version"])
        self.samples.record(view, RolloutStore.open(store), number, version)

    def _find_idle_steps(self, view: FeedView, number: int, opened: PublishedRound) -> frozenset[int]:
        """Find the steps in a round, from 0, without gradient: no text, and either no documents, or only
        advantages of 0 and no other term with a gradient (`has_auxiliary_gradients`)."""
        policy, first = view.config.policy, (number - 1) * self.rollout.steps_per_round + 1
        learns_anyway = has_auxiliary_gradients(view.config)
        idle = []
        for i, documents in enumerate(opened.steps):
            if policy.has_text_at(self.rollout.seed, first + i):
                continue
            if not documents or not (learns_anyway or _has_advantages(opened, documents)):
                idle.append(i)
        return frozenset(idle)

    def _skip_idle_steps(self, view: FeedView, number: int, opened: PublishedRound) -> None:
        """Skip the idle steps that are still ahead, each with a warning."""
        first = (number - 1) * self.rollout.steps_per_round
        for step in sorted(first + i for i in opened.idle):
            if step < view.step:
                continue
            # The ledger records skipped steps for a resumed run.
            view.batches.ledger.skip_steps(step, step + 1)
            if view.world.is_main:
                groups = describe_groups(read_manifest(opened.path).content.get("groups") or {})
                warn(f"round {number}: step {step + 1} is skipped, because none of its groups learns (groups "
                     f"of the round: {groups})", view.events.write, step=step + 1)


def _has_advantages(opened: PublishedRound, documents: range) -> bool:
    """Return whether a document in a step has a nonzero `ADVANTAGE`."""
    source = opened.documents
    return source is not None and any(
        has_advantage(source.column(ADVANTAGE, document, 0, int(source.lengths[document])))
        for document in documents)

"""The cycle of reinforcement learning. For each round of a run:

    write(policy, round)    generate responses with the policy      generate/, or the job `rl generate`
    judge(round)            score them with the reward              reward.py, or the job `rl reward`
    publish(round)          turn groups into training documents     publish/
    train(round)            steps_per_round optimizer steps         train/loop.py

The training loop calls `RolloutCycle.prepare_data` before each step. At the first step of a round no round is
open, and `prepare_data` runs the first three phases; then the loop trains. A phase with results on disk is
skipped: a killed run repeats at most a piece of a phase, and rollbacks repeat nothing.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import warn
from megatron_sov.engine.parallel import collectives
from megatron_sov.engine.parallel.values import sum_dict
from megatron_sov.model.config import RolloutConfig
from megatron_sov.post.rl.generate.live import LiveRollouts
from megatron_sov.post.rl.publish.publisher import Publisher
from megatron_sov.post.rl.round_loader import RoundLoader
from megatron_sov.post.rl.validation import Validation
from megatron_sov.runs.rounds import RunPolicies
from megatron_sov.train.feed import FeedView

PACKED_DATA = "data"
"""Stands for the digest of a round's documents in a round that learns from packed data."""
POLL_S = (1.0, 10.0)
"""Bounds for the interval between two lookups in the store: a tenth of the time waited so far."""


@dataclass(kw_only=True)
class RolloutCycle:
    """Provides a run's rounds to the training loop: a `train.feed.Feed`."""

    rollout: RolloutConfig
    policies: RunPolicies
    """Digests of the policies, before the first and after each round."""
    rollouts: LiveRollouts | None
    """Generates and judges rounds; None: the jobs `rl generate` and `rl reward` do."""
    publisher: Publisher
    loader: RoundLoader
    validation: Validation | None = None
    wait_s: float = 0.0
    """Time limit for other jobs, per round."""
    store: Path | None = None
    """Rollout store, for the event `store`, which gives viewers the path."""
    meters: Mapping[str, float] = field(default_factory=dict)
    """The open round's figures, see `train.feed.Feed`."""
    _has_announced: bool = False

    def prepare_data(self, view: FeedView, asked_to_stop: Callable[[], bool]) -> str | None:
        """Generate, judge and publish the next step's round, and open it for training.

        Returns:
            The reason to end the run, e.g. a round that is not complete within `wait_s`; None to train.
        """
        self._announce_store(view)
        num_completed, step_in_round = divmod(view.step, self.rollout.steps_per_round)
        number, is_first = num_completed + 1, step_in_round == 0
        if self.loader.is_open(number):
            return None
        if is_first:
            # keeps the digest of the policy before the round: `begin`, below, overwrites its input
            self.policies.at(view.step)
            end_reason = self._validate_policy(view, number, asked_to_stop)
            if end_reason is not None:
                return end_reason
        if not view.config.policy.is_on_policy(self.rollout.seed, number):
            # the digest of a policy covers its start, its settings and the data of each round
            if is_first:
                self.policies.begin(view.step, PACKED_DATA)
            self.meters = {}
            return None
        begin_s, figures = time.monotonic(), dict[str, float]()
        wait = RoundWait(view, number, self.wait_s, announces=self.rollouts is None)
        generated_for = ""
        while lacking := self.publisher.publish(number):
            # `lacking` names the missing parts. Generate once per text: it changes if the round has too few
            # learning groups and needs further prompts. Otherwise wait for other jobs.
            if self.rollouts is not None and lacking != generated_for:
                generated_for = lacking
                policy = self.policies.at(view.step)
                _add_figures(figures, self.rollouts.write(view, number, policy, asked_to_stop))
                _add_figures(figures, self.rollouts.judge(view, number, asked_to_stop))
                continue
            end_reason = wait.poll(lacking, asked_to_stop)
            if end_reason is not None:
                return end_reason
        figures = {"waited_s": time.monotonic() - begin_s, **figures}
        opened = self.loader.open(view, number, is_first=is_first, figures=figures)
        self.policies.begin(view.step, opened.digest)
        self.meters = opened.meters
        return None

    def finish(self, view: FeedView, asked_to_stop: Callable[[], bool]) -> str | None:
        """Validate the last policy, see `Feed.finish`."""
        return self._validate_policy(view, view.step // self.rollout.steps_per_round + 1, asked_to_stop)

    def needs_checkpoint(self, step: int) -> bool:
        """Return whether the job `rl generate` needs a step's checkpoint; see `Feed.needs_checkpoint`."""
        return self.rollouts is None and step % self.rollout.steps_per_round == 0

    def close(self) -> None:
        if self.rollouts is not None:
            self.rollouts.close()

    def state(self) -> dict[str, Any]:
        return self.policies.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.policies.restore(state)

    def _validate_policy(self, view: FeedView, number: int, asked_to_stop: Callable[[], bool]) -> str | None:
        if self.validation is None:
            return None
        return self.validation.validate(view, number, self.policies.at(view.step), asked_to_stop)

    def _announce_store(self, view: FeedView) -> None:
        if self.store is not None and not self._has_announced and view.world.is_main:
            view.events.write("store", step=view.step, path=str(self.store.absolute()))
        self._has_announced = True


@dataclass
class RoundWait:
    """Waits until other jobs complete a round, the time limit passes, or the run is asked to stop."""

    view: FeedView
    number: int
    """Round number, from 1."""
    wait_s: float
    announces: bool
    """Whether to write an event before waiting, and to finish the save of the checkpoint, from which other
    jobs generate the round."""
    begin_s: float = field(default_factory=time.monotonic)

    def poll(self, lacking: str, asked_to_stop: Callable[[], bool]) -> str | None:
        """Sleep before the next lookup in the store; return the reason to end the run, or None.

        Args:
            lacking: parts that the round lacks, as the end of a sentence.
            asked_to_stop: whether this process was asked to stop.
        """
        if self.announces:
            self.announces = False
            self._announce_wait(lacking)
        view, waited_s = self.view, time.monotonic() - self.begin_s
        # Above 0 if any rank was asked to stop; whether it is late, the clock of rank 0 decides.
        ends = sum_dict({"asked": float(asked_to_stop()),
                         "late": float(view.world.is_main and waited_s >= self.wait_s)},
                        collectives.all_reduce_world)
        if ends["asked"]:
            return f"asked to stop while waiting for round {self.number}: {lacking}"
        if ends["late"]:
            reason = f"round {self.number} is not there yet: {lacking}"
            if self.wait_s:
                reason += (f"; the run waited {self.wait_s:g} s: check that `rl generate` and `rl reward` "
                           "are running, and give the same command with --resume")
            if view.world.is_main:
                warn(reason)  # the event `stop` contains it too
            return reason
        time.sleep(min(max(waited_s / 10, POLL_S[0]), POLL_S[1]))
        return None

    def _announce_wait(self, lacking: str) -> None:
        view = self.view
        view.checkpointer.finish()  # the policy that generates the round
        view.events.write("waiting", step=view.step, round=self.number, reason=lacking)
        if view.world.is_main and self.wait_s:
            # the line end in the text: one write, so that other processes' lines do not mix in
            print(f"waits up to {self.wait_s:g} s for round {self.number}: {lacking}\n", end="",
                  file=sys.stderr, flush=True)


def _add_figures(figures: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        figures[name] = figures.get(name, 0.0) + value

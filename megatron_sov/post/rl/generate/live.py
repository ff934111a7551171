"""Rollouts that a run generates with the live weights, and judges."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron_sov.engine.parallel.world import run_on_main
from megatron_sov.post.rl.generate.writers import GenerationSettings, RolloutWriter
from megatron_sov.post.rl.reward import JudgingJob, RewardJudge
from megatron_sov.rollouts.prompts import write_unused_rows
from megatron_sov.runs.rounds import Policy
from megatron_sov.train.feed import FeedView
from megatron_sov.work.progress.locks import Claims


@dataclass(kw_only=True)
class LiveRollouts:
    """Generates and judges rounds in a store; all processes have an object and call the methods together."""

    settings: GenerationSettings
    writer: RolloutWriter
    reward: RewardJudge

    def write(self, view: FeedView, number: int, policy: Policy, asked_to_stop: Callable[[], bool]
              ) -> dict[str, float]:
        """Generate the pending pieces in round `number`, and in later rounds within `rollout.max_staleness`.

        Args:
            view: the run, whose model is the policy.
            number: number of the round, from 1.
            policy: identity of the live weights.
            asked_to_stop: polled after each piece; the value on rank 0 counts.

        Returns:
            `write_s`, seconds of generation, and figures of the servers.
        """
        begin_s = time.monotonic()
        # Rank 0 creates the store before other ranks open it.
        run_on_main(view.world, lambda: write_unused_rows(self.settings.store.open().path,
                                                          self.settings.set_aside))
        figures = self.writer.write(view, self._find_rounds(number), policy, asked_to_stop)
        return {"write_s": time.monotonic() - begin_s, **figures}

    def judge(self, view: FeedView, number: int, asked_to_stop: Callable[[], bool]) -> dict[str, float]:
        """Judge the generated rows on rank 0; return `judge_s`, the seconds."""
        begin_s = time.monotonic()
        rounds = self._find_rounds(number)
        if not self.writer.completes_all:
            rounds = rounds[:1]  # servers still generate later rounds
        jobs: list[JudgingJob] = []

        def judge_part() -> bool:
            if not jobs:
                jobs.append(self._build_judging_job(rounds))
            return not asked_to_stop() and jobs[0].step()

        # Part by part, because collectives of the waiting processes time out.
        while run_on_main(view.world, judge_part):
            view.checkpointer.advance()
        return {"judge_s": time.monotonic() - begin_s}

    def close(self) -> None:
        self.reward.close()
        self.writer.close()

    def _find_rounds(self, number: int) -> range:
        rollout = self.settings.rollout
        return range(number, min(number + rollout.max_staleness, rollout.rounds) + 1)

    def _build_judging_job(self, rounds: range) -> JudgingJob:
        store, lease_s = self.settings.store.open(), self.settings.rollout.lease_s
        return JudgingJob(
            store=store, claims=Claims(store.claims, lease_s), version=self.reward.version,
            judge=self.reward.judge, rounds=rounds, provenance=dict(self.settings.provenance),
            claimed_wait_s=2 * lease_s)

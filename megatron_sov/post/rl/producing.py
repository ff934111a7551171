"""Rounds that a run writes and judges by itself, between two steps: by the model as it stands, so that its
weights go nowhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sov.config.rollout import RolloutConfig
from megatron_sov.generate.generator import MegatronEngine
from megatron_sov.generate.request import Batching
from megatron_sov.mcore.parallel.world import on_main
from megatron_sov.obs.warning import warn
from megatron_sov.post.rl.generate import Desk, Writer, write_rounds
from megatron_sov.post.rl.missing import Missing
from megatron_sov.post.rl.responses import key_digest
from megatron_sov.post.rl.reward import JudgeRows, JudgingJob
from megatron_sov.rewards.opinions import Opinions
from megatron_sov.rewards.reward import Result
from megatron_sov.rollouts.prompts import Prompt
from megatron_sov.rollouts.rows import Rollout
from megatron_sov.rollouts.store import Store
from megatron_sov.runs.policies import Policy, policy_of_round
from megatron_sov.train.feed import FeedView
from megatron_sov.work.claims import Claims


@dataclass
class Producer:
    """Makes rounds; one object on each process of a run, all of which call it together."""

    store: Callable[[], Store]
    """Opens the store, or makes it."""
    prompts: Sequence[Prompt]
    """All of them."""
    rollout: RolloutConfig
    run: Path
    """The run's folder."""
    start: Path
    """Checkpoint that it starts from."""
    writer: Writer
    """Makes rows."""
    batching: Batching
    """What bounds the memory of generation."""
    version: str
    """Of the reward."""
    judging: Callable[[], contextlib.AbstractContextManager[JudgeRows]]
    """The reward at work; begun on rank 0, with the first round."""
    provenance: Mapping[str, Any]
    """What stands in the manifests of parts."""
    opinions: Callable[[Store], Opinions | None] = lambda store: None
    """What a second verifier has said so far, see `reward.second_opinions`."""
    _opinions: Opinions | None = None
    _open: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _judge: JudgeRows | None = None
    _job: JudgingJob | None = None

    def produce(self, view: FeedView, number: int, asked_to_stop: Callable[[], bool]) -> dict[str, float]:
        """Write and judge what is missing of a round, and of those that its policy may write besides
        (`rollout.max_staleness`).

        Args:
            view: the run, whose model is the policy.
            number: of the round, from 1.
            asked_to_stop: looked at behind each piece and each part that is judged; rank 0's counts.

        Returns:
            Seconds of writing and of judging.
        """
        begin_s = time.monotonic()
        view.checkpointer.finish()  # responses are known by its hash
        policy_of = partial(policy_of_round, self.run, self.start, rollout=self.rollout)
        policy: Policy = on_main(view.world, lambda: policy_of(number))
        rounds = range(number, min(number + self.rollout.max_staleness, self.rollout.rounds) + 1)
        engine = MegatronEngine(view.policy, self.batching)
        engine.update(None, policy.step)
        on_main(view.world, lambda: self.store() and None)  # made by one, before all open it
        write_rounds(engine, _take_none, policy, self.writer, self._desk(rounds, policy_of, asked_to_stop))
        written_s = time.monotonic()
        on_main(view.world, lambda: self._begin_judging(rounds, view))
        # part by part: there is a limit to how long the others wait for a message
        while on_main(view.world, lambda: not asked_to_stop() and self._judge_part()):
            pass
        return {"write_s": written_s - begin_s, "judge_s": time.monotonic() - written_s}

    def close(self) -> None:
        """End the processes that judge."""
        self._open.close()

    def _desk(self, rounds: range, policy_of: Callable[[int], Policy | None],
              asked_to_stop: Callable[[], bool]) -> Desk:
        store = self.store()
        missing = Missing(store, Claims(store.claims, self.rollout.lease_s), self.prompts, self.rollout,
                          rounds, policy_of,
                          lambda number: key_digest(self.rollout, number, self.writer.chosen_by))
        # pieces that another job is at are waited for until it is taken for dead
        return Desk(missing, store, 2 * self.rollout.lease_s, self.provenance, asked_to_stop=asked_to_stop)

    def _begin_judging(self, rounds: range, view: FeedView) -> None:
        store = self.store()
        if self._opinions is None:
            self._opinions = self.opinions(store)
        alarmed = partial(warn, record=view.events.write, event="alarm", step=view.step, kind="verifiers")
        self._job = JudgingJob(store, Claims(store.claims, self.rollout.lease_s), self.version, self._judged,
                               rounds, dict(self.provenance), claimed_wait_s=2 * self.rollout.lease_s,
                               opinions=self._opinions, alarmed=alarmed)

    def _judge_part(self) -> bool:
        assert self._job is not None, "nothing is begun"
        return self._job.step()

    def _judged(self, rows: Sequence[Rollout]) -> Sequence[Result]:
        if self._judge is None:
            self._judge = self._open.enter_context(self.judging())
        return self._judge(rows)


def _take_none(policy: Policy) -> None:
    raise AssertionError(f"the model is its own policy, and {policy.path} is another")

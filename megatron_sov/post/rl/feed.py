"""Brings the rounds that a run trains: waits for each, publishes it, adds what the trainer says of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from megatron_sov.artifacts import read_manifest
from megatron_sov.config import RolloutConfig
from megatron_sov.data.rounds import Round, RoundDocuments
from megatron_sov.mcore.parallel import collectives
from megatron_sov.mcore.parallel.named_values import sum_dict
from megatron_sov.mcore.parallel.world import on_main
from megatron_sov.obs.warning import warn
from megatron_sov.post.rl.trainer_columns import TrainerColumns
from megatron_sov.train.feed import FeedView

POLL_S = (1.0, 10.0)
"""Between two looks at what is not there yet: a tenth of what was waited so far, within these bounds."""
TOLD = ("groups", "late", "late_from", "unjudged", "reward_version", "policies", "means")
"""What of a round's manifest its event tells."""
Produce = Callable[[FeedView, int, Callable[[], bool]], Mapping[str, float]]
"""Writes and judges what is missing of a round, on all processes together, unless it is asked to stop before
the end; returns figures for its event."""


@dataclass
class RoundFeed:
    """A `train.feed.Feed` of rounds."""

    rounds: RoundDocuments
    """The source that they are opened in."""
    rollout: RolloutConfig
    publish: Callable[[int], str]
    """Publishes a round (from 1), unless it is; returns what it lacks, or "".  Called on rank 0 alone."""
    columns: TrainerColumns
    """What the trainer says of each document before it learns from it."""
    wait_s: float = 0.0
    """How long a round is waited for."""
    produce: Produce | None = None
    """None: other jobs write and judge."""
    _figures: Mapping[str, float] = field(default_factory=dict)

    def bring(self, view: FeedView, asked_to_stop: Callable[[], bool]) -> str | None:
        """As `Feed.bring`: open the round of the next step."""
        before, step = divmod(view.step, self.rollout.steps_per_round)
        number = before + 1
        if self.rounds.is_open(number):
            return None
        begin_s = time.monotonic()
        if (lacking := self._wait(view, number, asked_to_stop)) is not None:
            return lacking
        self._open(view, number, is_first=step == 0, waited_s=time.monotonic() - begin_s)
        return None

    def _wait(self, view: FeedView, number: int, asked_to_stop: Callable[[], bool]) -> str | None:
        """Wait for a round to be published; returns None, or why it is waited for no longer."""
        begin_s, told = time.monotonic(), False
        while lacking := on_main(view.world, partial(self.publish, number)):
            if not told:
                told = True
                view.checkpointer.finish()  # the policy that is to write the round
                if self.produce is not None:
                    self._figures = self.produce(view, number, asked_to_stop)
                    continue
                view.events.write("waiting", step=view.step, round=number, reason=lacking)
                if view.world.is_main and self.wait_s:
                    print(f"waits up to {self.wait_s:g} s for round {number}: {lacking}\n", end="",
                          file=sys.stderr, flush=True)
            waited_s = time.monotonic() - begin_s
            # one clock decides
            ends = sum_dict({"asked": float(asked_to_stop()),
                             "late": float(view.world.is_main and waited_s >= self.wait_s)},
                            collectives.all_reduce_world)
            if ends["asked"]:
                return f"asked to stop while waiting for round {number}: {lacking}"
            if ends["late"]:
                late = f"round {number} is not there yet: {lacking}"
                if self.wait_s:
                    late += (f"; it was waited for {self.wait_s:g} s: see whether `rl generate` and "
                             "`rl reward` are still at work, and give the same command with --resume")
                if view.world.is_main:
                    warn(late)  # it stands in the event `stop` as well
                return late
            time.sleep(min(max(waited_s / 10, POLL_S[0]), POLL_S[1]))
        return None

    def _open(self, view: FeedView, number: int, *, is_first: bool, waited_s: float) -> None:
        seq_len = view.config.data.phases[0].seq_len
        read = partial(self.rounds.read, number, seq_len, self.rollout.steps_per_round)

        def check() -> None:  # what is wrong with it, everyone hears
            self.rounds.verify(number)
            read()

        on_main(view.world, check)
        opened = read()
        made = self.columns.of_round(view, number, opened, is_first=is_first)
        self._pass_over_empty(view, number, opened)
        self.rounds.open(number, replace(opened, beside=made))
        if view.world.is_main:
            content = read_manifest(opened.path).content
            view.events.write("round", step=view.step, round=number, waited_s=waited_s,
                              documents=opened.steps[-1].stop, **self._figures,
                              **{name: content.get(name) for name in TOLD})
            self._figures = {}

    def _pass_over_empty(self, view: FeedView, number: int, opened: Round) -> None:
        """Have the steps passed over of which no group learns: there is nothing to compute."""
        first = (number - 1) * self.rollout.steps_per_round
        for step, documents in enumerate(opened.steps, first):
            if len(documents) or step < view.step:
                continue
            view.batches.ledger.pass_over(step, step + 1)
            if view.world.is_main:
                groups = read_manifest(opened.path).content.get("groups")
                warn(f"round {number}: no group of step {step + 1} learns (groups of the round: {groups}), "
                     "it is passed over", view.events.write, step=step + 1)

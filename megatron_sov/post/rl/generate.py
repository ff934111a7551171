"""The generating job of a round: it takes up what is missing, piece by piece, writes it with the newest
policy, and publishes it.

It can be killed at any moment: pieces that are published stay, and another job, or the same one again, writes
the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from megatron_sov.generate.engine import Engine
from megatron_sov.mcore.parallel.world import on_first
from megatron_sov.obs.warning import warn
from megatron_sov.obs.work_bar import work_bar
from megatron_sov.post.rl.missing import Attempt, Missing
from megatron_sov.rollouts.parts import AlreadyPublished
from megatron_sov.rollouts.rows import UNFINISHED, Rollout
from megatron_sov.rollouts.store import Store
from megatron_sov.runs.launch_environment import is_first
from megatron_sov.runs.policies import Policy

if TYPE_CHECKING:
    from megatron_sov.post.rl.policy_weights import Take

POLL_S = 5.0
"""Between two looks at a store where nothing can be done at this moment."""
WAIT = "wait"
"""In the place of an attempt: look again."""


class Writer(Protocol):
    """What makes rows of an attempt."""

    @property
    def chosen_by(self) -> dict[str, Any]:
        """What tokens are chosen by beside the settings of `rollout`, see `responses.key_digest`."""
        ...

    def write(self, engine: Engine, attempt: Attempt) -> list[Rollout] | None:
        """Return the rows; called by all processes of the engine together, of which the first one needs
        them."""
        ...


@dataclass
class Desk:
    """What the first process does: takes up, waits and publishes."""

    missing: Missing
    store: Store
    wait_s: float
    """How long to wait where nothing can be done, before the job ends; claims that may be a dead job's are
    watched in any case."""
    provenance: Mapping[str, Any]
    """What stands in the parts' manifests."""
    sleep: Callable[[float], object] = time.sleep
    asked_to_stop: Callable[[], bool] = lambda: False
    """Whether to begin nothing more."""
    summary: dict[str, Any] = field(default_factory=lambda: {
        "parts": 0, "responses": 0, "unfinished": 0, "tokens": 0, "waits_for": ""})
    """What this job did, and why it ended before all was done."""
    _waited_s: float = 0.0

    def next(self) -> Attempt | str | None:
        """Return what to write; `WAIT`; None: this is the end."""
        if self.asked_to_stop():
            return None
        attempt = self.missing.take()
        if attempt is not None:
            self._waited_s = 0.0
            return attempt
        if self.missing.is_done:
            return None
        left_s = self.wait_s - self._waited_s
        if left_s <= 0 and not self.missing.may_be_dead:
            self.summary["waits_for"] = self.missing.waits_for
            return None
        pause_s = min(POLL_S, left_s) if left_s > 0 else POLL_S
        self.sleep(pause_s)
        self._waited_s += pause_s
        return WAIT

    def publish(self, attempt: Attempt, rows: list[Rollout]) -> None:
        """Publish what was written, and give up the claim."""
        written_by = {"policy": attempt.policy.sha256, "step": attempt.policy.step,
                      "checkpoint": str(attempt.policy.path)}
        try:
            self.store.add_rollouts(attempt.name, rows, {**self.provenance, **written_by})
        except AlreadyPublished as e:  # a job that was taken for dead has published its own
            warn(str(e))
        else:
            self.summary["parts"] += 1
            self.summary["responses"] += len(rows)
            self.summary["unfinished"] += sum(row.finish_reason == UNFINISHED for row in rows)
            before = sum(len(row.tokens) for row in attempt.begun)
            self.summary["tokens"] += sum(len(row.tokens) for row in rows) - before
        self.missing.leave()


def write_rounds(engine: Engine, take: Take, held: Policy, writer: Writer, desk: Desk) -> dict[str, Any]:
    """Write what is missing until nothing is; called by all processes of the engine together.

    Args:
        engine: which writes.
        take: gives it another policy.
        held: the policy that it has.
        writer: makes rows.
        desk: of the first process; the others' is not asked.

    Returns:
        `Desk.summary`.
    """
    with work_bar("write", desk.missing.num_pieces, "piece", is_first()) as bar:
        while (attempt := on_first(desk.next)) is not None:
            on_first(lambda: bar.update(desk.missing.num_done - bar.n))
            if isinstance(attempt, str):
                continue
            try:
                if attempt.policy != held:
                    take(attempt.policy)
                    held = attempt.policy
                rows = writer.write(engine, attempt)
                on_first(partial(desk.publish, attempt, rows or []))
            finally:
                desk.missing.leave()
    summary: dict[str, Any] = on_first(lambda: desk.summary)
    return summary

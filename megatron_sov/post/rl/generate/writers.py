"""Rollout writers with a common protocol, `RolloutWriter`: `RowWriter` runs batches on the live model,
`RequestWriter` (requests.py) sends requests to engine servers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

from megatron_sov.engine.parallel.world import run_on_first
from megatron_sov.infer.decoder.generator import MegatronEngine
from megatron_sov.infer.engine import Engine
from megatron_sov.infer.request import Batching
from megatron_sov.model.config import RolloutConfig
from megatron_sov.post.rl.generate.pieces import PendingPieces, PieceQueue, SampleAttempt
from megatron_sov.post.rl.generate.responses import compute_sampling_digest
from megatron_sov.post.rl.publish.publisher import is_published, read_further_pieces
from megatron_sov.rollouts.prompts import PromptList, UnusedRows
from megatron_sov.rollouts.rows import Rollout
from megatron_sov.rollouts.store import StoreSettings
from megatron_sov.runs.folder import ROUNDS
from megatron_sov.runs.launch_environment import is_first_rank
from megatron_sov.runs.rounds import Policy, can_generate_round
from megatron_sov.train.feed import FeedView
from megatron_sov.work.progress.locks import Claims
from megatron_sov.work.progress.progress_bar import create_bar

LoadPolicy = Callable[[Policy], None]
"""Loads another policy into the engine; called by all processes together."""


class RolloutSource(Protocol):
    """Turns prompts into rows: single responses (responses.py) or episodes with tools (episodes.py)."""

    @property
    def chosen_by(self) -> dict[str, Any]:
        """Settings besides `rollout` that change tokens, see `compute_sampling_digest`."""

    def write(self, engine: Engine, attempts: Sequence[SampleAttempt],
              should_yield: Callable[[], bool]) -> list[list[Rollout]] | None:
        """Generate the rows per attempt; called by all engine processes, but only the first one's rows count.

        Args:
            engine: generates the tokens.
            attempts: attempts by one policy.
            should_yield: on the first process, whether to cut off unfinished rows before the deadline.
        """


class RolloutWriter(Protocol):
    """Generates the pending pieces of rounds (a piece: some of a round's prompts) into the rollout store."""

    completes_all: ClassVar[bool]
    """Whether `write` completes all its rounds, or only the first."""

    def write(self, view: FeedView, rounds: range, policy: Policy, asked_to_stop: Callable[[], bool]
              ) -> dict[str, float]:
        """Complete `rounds[0]` by the live model, and further rounds if `policy` may generate them;
        called by all processes together.

        Args:
            view: the run, whose model is the policy.
            rounds: rounds that the policy may generate.
            policy: identity of the live weights.
            asked_to_stop: polled after each piece; the value on rank 0 counts.

        Returns:
            Figures for the event `round`.
        """

    def close(self) -> None:
        """Release claims and end servers."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Store, prompts and source for a run's rollouts."""

    store: StoreSettings
    prompts: PromptList
    set_aside: UnusedRows
    """Prompts that no round uses."""
    rollout: RolloutConfig
    run: Path
    """Run folder."""
    source: RolloutSource
    provenance: Mapping[str, Any]
    """Manifest fields for every part."""
    max_gen_batches: int = 1
    """`policy.max_gen_batches`: above 1, rounds may need further prompts."""
    wait_s: float | None = None
    """Longest wait for policies and claims of other jobs; None: this job publishes the rounds itself, and
    waits only for claims, until they expire."""

    def build_queue(self, rounds: range, find_policy: Callable[[int], Policy | None],
                    asked_to_stop: Callable[[], bool] = lambda: False) -> PieceQueue:
        store, lease_s = self.store.open(), self.rollout.lease_s
        pending = PendingPieces(
            store=store, claims=Claims(store.claims, lease_s), prompts=self.prompts, rollout=self.rollout,
            rounds=rounds, find_policy=find_policy,
            further=self._find_further if self.max_gen_batches > 1 else None,
            # Row keys contain the digest: rows from different sampling settings do not count as written.
            sampling_digest=lambda number: compute_sampling_digest(self.rollout, number,
                                                                   self.source.chosen_by))
        return PieceQueue(pending=pending, store=store, provenance=self.provenance,
                          wait_s=2 * lease_s if self.wait_s is None else self.wait_s,
                          asked_to_stop=asked_to_stop)

    def _find_further(self, number: int) -> tuple[int, bool]:
        """Return how many further pieces the publisher requests, and whether the count is final."""
        # The publisher of this job requests pieces only after judging; another job's, until it publishes.
        is_final = self.wait_s is None or is_published(self.run / ROUNDS, number)
        return read_further_pieces(self.run / ROUNDS, number), is_final


@dataclass(frozen=True, kw_only=True)
class RowWriter:
    """Generates rows in batches by a run's live model."""

    completes_all: ClassVar[bool] = True
    settings: GenerationSettings
    batching: Batching
    """Rows per batch, bounded by memory."""

    def write(self, view: FeedView, rounds: range, policy: Policy, asked_to_stop: Callable[[], bool]
              ) -> dict[str, float]:
        rollout = self.settings.rollout
        engine = MegatronEngine(view.policy, self.batching)
        # The model is the policy: no weights are copied, and the engine records the version.
        engine.update(None, policy.step)

        def find_policy(number: int) -> Policy | None:
            return policy if can_generate_round(policy.step, number, rollout) else None

        queue = self.settings.build_queue(rounds, find_policy, asked_to_stop)
        write_batches(engine, self.settings.source, queue, loaded=policy,
                      after_batch=view.checkpointer.advance)
        return {}

    def close(self) -> None:
        """Do nothing: claims end with `write`."""


def write_batches(engine: Engine, source: RolloutSource, queue: PieceQueue, *, loaded: Policy,
                  load_policy: LoadPolicy | None = None, after_batch: Callable[[], None] = lambda: None
                  ) -> dict[str, Any]:
    """Generate all pending pieces, batch by batch; called by all engine processes together.

    Args:
        engine: generates the tokens.
        source: turns prompts into rows.
        queue: pending pieces.
        loaded: policy in the engine at the beginning.
        load_policy: loads a later policy; None: the engine has the live weights, and no other policy comes.
        after_batch: called on all processes after each batch.

    Returns:
        `queue.summary`.
    """
    with create_bar("write", queue.pending.num_pieces, "piece", is_first_rank()) as bar:
        while (attempts := run_on_first(queue.next_attempts)) is not None:
            run_on_first(lambda: bar.update(queue.pending.num_complete - bar.n))
            if not attempts:  # none at the moment; `next_attempts` has waited
                continue
            try:
                # Weights change between batches only: all new tokens in a row have the same version.
                if attempts[0].policy != loaded:
                    assert load_policy is not None, f"the live model is the policy, not {attempts[0].policy}"
                    loaded = attempts[0].policy
                    load_policy(loaded)
                rows = source.write(engine, attempts, queue.should_yield)
                run_on_first(partial(queue.publish, attempts, rows or []))
            finally:
                # After a failure too: a remaining claim would block other jobs until the lease ends.
                queue.pending.release()
            after_batch()
    summary: dict[str, Any] = run_on_first(lambda: queue.summary)
    return summary

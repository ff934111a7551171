"""The judging job: what a reward has not judged of a store yet, part by part.  No torch here.

Nothing is generated again for a reward that changed: it has another version, and judges the same responses.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_sov.base.errors import UserError, warn
from megatron_sov.base.settings import parse_nested
from megatron_sov.judge.rewards.registry import lacking, make, order
from megatron_sov.judge.rewards.reward import Result
from megatron_sov.judge.rewards.scoring import ScoringTally, judges_groups, runner, whole_batches
from megatron_sov.rollouts.prompts import RolloutPrompt
from megatron_sov.rollouts.rows import (
    JUDGED, LAST_TURN, UNFINISHED, RewardRow, Rollout, RolloutPart, may_grow, not_written)
from megatron_sov.work.progress.locks import Claims, IdleTimeout
from megatron_sov.work.tables.table import AlreadyPublished

if TYPE_CHECKING:
    from megatron_sov.rollouts.store import RolloutStore

ENVIRONMENT = "environment"
"""The reward that takes what an environment has said of an episode, which stands in its row; also its
version, since the environment's own is in the rows' keys."""
NO_REWARD = "none"
"""The reward of a run that learns from teachers alone: 0 for every response; also its version."""
COLUMNS = ("record", "tokens", "response", "finish_reason", "outcome")
"""Of rollouts, which are read."""
JudgeRows = Callable[[Sequence[Rollout]], Sequence[Result]]


@dataclass
class RewardSummary:
    """What this job judged, and what is left."""

    parts: int = 0
    tally: ScoringTally = field(default_factory=ScoringTally)
    """Of the responses."""
    unfinished: int = 0
    """Responses that a later attempt goes on with: they have no reward."""
    left: int = 0
    """Parts that other jobs have claimed."""
    waited_for: str = ""
    """What was asked of those who write, and did not come while this job waited."""


def reward_version(name: str, settings: Sequence[str]) -> str:
    """Return the version under which a reward's verdicts stand in a store.

    Args:
        name: a built-in reward, FILE.py:NAME, `ENVIRONMENT` or `NO_REWARD`.
        settings: `key=value`.

    Raises:
        UserError: there is no such reward or setting.
    """
    if name in (ENVIRONMENT, NO_REWARD):
        if settings:
            what = "takes what stands in the rows and" if name == ENVIRONMENT else "judges nothing and"
            raise UserError(f"--reward-set {settings[0]}: --reward {name} {what} has no settings; leave it "
                            "out")
        return name
    return make(order(name, parse_nested(settings, "--reward-set"))).version


def refuse_unjudged(name: str, settings: Sequence[str], prompts: Iterable[RolloutPrompt], given: str) -> None:
    """Refuse prompts to which no response would have a reward, since each lacks what the reward needs.

    Args:
        name: of the reward, as of `reward_version`.
        settings: its own.
        prompts: of the first round.
        given: the option and file that they are from.

    Raises:
        UserError: all lack something.
    """
    if name in (ENVIRONMENT, NO_REWARD):
        return
    asked = order(name, parse_nested(settings, "--reward-set"))
    made, first = make(asked), ""
    for prompt in prompts:
        field = lacking(asked, made, prompt.record)
        if not field:
            return
        first = first or f"{prompt.place} has no {field!r}, which --reward {name} needs"
    raise UserError(f"{given}: {first}, and no prompt of round 1 has what it needs; add it, or name a field "
                    "that is called otherwise by --columns TARGET=FIELD")


@contextlib.contextmanager
def judging(name: str, settings: Sequence[str], workers: int) -> Iterator[JudgeRows]:
    """Give what judges rows by a reward, in processes of its own; arguments as of `reward_version`."""
    if name == ENVIRONMENT:
        yield lambda rows: [_outcome_of(row) for row in rows]
        return
    if name == NO_REWARD:
        yield lambda rows: [Result(0.0, "scored") for _ in rows]
        return
    asked = order(name, parse_nested(settings, "--reward-set"))
    made = make(asked)
    with runner(asked, made, workers) as running:
        yield lambda rows: running.score([
            {**row_of(row), **({"completion_ids": row.tokens.tolist()} if judges_groups(made) else {})}
            for row in rows])


def row_of(row: Rollout) -> dict[str, Any]:
    """Return a response as rewards know rows: its prompt's fields, `prompt`, and what `generate` writes of a
    response; of an episode what the model wrote in its last turn."""
    record = dict(row.record)
    if "messages" in record:
        record.setdefault("prompt", record["messages"])
    # an environment's row without it is refused: in its text tools speak too
    response = row.response if row.outcome is None else row.outcome.get(LAST_TURN)
    return {**record, "response": response, "num_tokens": len(row.tokens),
            "finish_reason": row.finish_reason}


def numbers_of(components: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the components of a reward that are numbers, those of its parts as `part.name`: what can be
    averaged over a round."""
    for name, value in components.items():
        if isinstance(value, Mapping):
            yield from numbers_of(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{name}", float(value)


def _outcome_of(row: Rollout) -> Result:
    given = row.outcome
    if given is None or "status" not in given:
        return Result(None, "refused", {}, "was played in no environment; judge it by another reward")
    return Result(given.get("reward"), given["status"], given.get("components", {}), given.get("reason", ""))


@dataclass
class JudgingJob:
    """A reward at work on a store."""

    store: RolloutStore
    claims: Claims
    version: str
    """Of the reward."""
    judge: JudgeRows
    rounds: range | None
    """None: all, and there may always be more of them."""
    provenance: dict[str, Any]
    """What stands in the manifests."""
    wait_s: float = 0.0
    """How long to wait for more, before the job ends; not where `rounds` are written to their end and cannot
    grow.  Claims that may be a dead job's are watched in any case."""
    claimed_wait_s: float = 0.0
    """How long to wait at least where other jobs have claimed what is left."""
    progress: Callable[[int], object] = lambda count: None
    """Is told how many more responses are judged."""
    patience: IdleTimeout = field(default_factory=IdleTimeout)
    summary: RewardSummary = field(default_factory=RewardSummary)
    _parts: list[RolloutPart] = field(default_factory=list)
    _looked_at: deque[RolloutPart] | None = None
    _refused: list[str] = field(default_factory=list)
    _has_judged: bool = False

    def run(self) -> RewardSummary:
        """Judge until nothing is left, and nothing more has come for as long as is waited.

        Raises:
            UserError: the reward meets a fault that would meet every row; parts that are published stay.
        """
        while self.step():
            pass
        return self.summary

    def step(self) -> bool:
        """Judge a part, or wait for a moment; returns whether there may be more to judge.

        Raises:
            UserError: as `run`.
        """
        if self._looked_at is None:
            # One look at the store for all its parts; then again, since others write and judge meanwhile.
            self._looked_at, self._refused, self._has_judged = deque(self.missing()), [], False
        while self._looked_at:
            part = self._looked_at.popleft()
            if self._take(part):
                self._has_judged, self.patience.waited_s = True, 0.0
                return True
            self._refused.append(self.store.claim_name(part.name, self.version))
        self._looked_at = None
        # What was judged took time, in which more may have come: look at once.
        return self._has_judged or self._waits()

    def _waits(self) -> bool:
        """Wait for a moment where nothing can be judged; returns False where it was waited long enough."""
        if self._refused or self.rounds is None or may_grow(self._parts) or not_written(
                self._parts, self.rounds) != "":
            most_s = max(self.wait_s, self.claimed_wait_s if self._refused else 0.0)
            if self.patience.wait(most_s, any(map(self.claims.may_be_dead, self._refused))):
                return True
        self.summary.left = len(self._refused)
        self.summary.waited_for = (not_written(self._parts, self.rounds) or "") if self.wait_s else ""
        return False

    def missing(self) -> list[RolloutPart]:
        rounds = [None] if self.rounds is None else self.rounds
        self._parts = [part for number in rounds for part in self.store.parts(number)]
        return [part for part in self._parts if not self.store.has_part(part.name, self.version)]

    def _take(self, part: RolloutPart) -> bool:
        claim = self.claims.take(self.store.claim_name(part.name, self.version))
        if claim is None:
            return False
        with claim.renew_while_open():
            # Another job may have judged it between the look and the claim.
            if not self.store.has_part(part.name, self.version):
                self._judge(part)
        return True

    def _judge(self, part: RolloutPart) -> None:
        rows = self.store.read_rollouts(part.name, COLUMNS)
        # Unfinished responses are judged in the attempt that ends them.
        whole = [row for row in rows if row.finish_reason != UNFINISHED]
        judged = []
        for batch in whole_batches(whole, lambda row: row.key.prompt):
            for row, result in zip(batch, self.judge(batch), strict=True):
                judged.append(RewardRow(row.key, row.attempt, self.version, result.reward, result.status,
                                        dict(numbers_of(result.components)), result.reason))
                self.summary.tally.add(result.reward, result.status, result.reason,
                                       f"{part.name}: prompt {row.key.prompt}, sample {row.key.sample}")
            self.progress(len(batch))
        self.summary.unfinished += len(rows) - len(whole)
        self.progress(len(rows) - len(whole))
        try:
            self.store.add_rewards(self.version, part.name, judged,
                                   {**self.provenance, JUDGED: part.manifest_sha256})
            self.summary.parts += 1
        except AlreadyPublished:
            self._tell_differences(part, judged)

    def _tell_differences(self, part: RolloutPart, judged: Sequence[RewardRow]) -> None:
        """Say where another job, taken for dead, has judged the same rows otherwise."""
        published = self.store.read_rewards(self.version, part.name, part)
        # What was published first stays; a difference means that the reward is no function of the row.
        there = {(row.key, row.attempt): row.reward for row in published}
        others = sum(there.get((row.key, row.attempt)) != row.reward for row in judged)
        if others:
            warn(f"{part.name}: {others:,} of {len(judged):,} responses have another reward under the same "
                 f"version {self.version}, given by another job, which stays: the reward depends on "
                 "something else than the row")

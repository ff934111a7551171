"""The judging job: computes rewards for the responses in a rollout store, part by part, without torch.

A changed reward has another version and judges the same responses again, without generation.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_sov.base.documents.layouts import propose_field
from megatron_sov.base.errors import Fix, UserError, warn
from megatron_sov.base.settings import parse_nested
from megatron_sov.judge.rewards.registry import build_versioned_reward, find_missing_field, request_reward
from megatron_sov.judge.rewards.reward import Result
from megatron_sov.judge.rewards.scoring import ScoringTally, create_runner, iter_batches, judges_in_groups
from megatron_sov.rollouts.rows import (
    JUDGED, LAST_TURN, UNFINISHED, RewardRow, Rollout, RolloutPart, can_grow, describe_missing_rows)
from megatron_sov.work.progress.locks import Claims, IdleTimeout
from megatron_sov.work.tables.table import AlreadyPublished

if TYPE_CHECKING:
    from megatron_sov.rollouts.prompts import RolloutPrompt  # numpy: not for `--help`
    from megatron_sov.rollouts.store import RolloutStore

ENVIRONMENT = "environment"
"""Name and version for the reward that copies an episode's outcome from the row; row keys contain the
environment's version."""
NO_REWARD = "none"
"""Name and version for the reward 0 for every response, for runs that learn from teachers only."""
COLUMNS = ("record", "tokens", "response", "finish_reason", "outcome")
"""Rollout columns that `JudgingJob` reads."""
JudgeRows = Callable[[Sequence[Rollout]], Sequence[Result]]
"""Responses -> a `Result` per response."""


@dataclass
class RewardSummary:
    """Counts of a judging job."""

    parts: int = 0
    """Judged parts."""
    tally: ScoringTally = field(default_factory=ScoringTally)
    unfinished: int = 0
    """Unfinished responses; a later attempt finishes them, and is judged instead."""
    left: int = 0
    """Parts left to other jobs, which hold their claims."""
    waited_for: str = ""
    """Describes responses that were not generated within `wait_s`."""


@dataclass
class JudgingJob:
    """Judges the parts in a rollout store that lack rewards with `version`."""

    store: "RolloutStore"
    claims: Claims
    version: str
    judge: JudgeRows
    rounds: range | None
    """None: all rounds, including rounds that jobs generate later."""
    provenance: dict[str, Any]
    """Manifest fields for every part."""
    wait_s: float = 0.0
    """Time to wait for more responses, unless `rounds` are complete and cannot grow. A claim whose
    holder may be dead extends the wait without a limit."""
    claimed_wait_s: float = 0.0
    """Minimum time to wait for parts claimed by other jobs."""
    progress: Callable[[int], object] = lambda count: None
    """Called with the number of judged responses."""
    patience: IdleTimeout = field(default_factory=IdleTimeout)
    summary: RewardSummary = field(default_factory=RewardSummary)
    _parts: list[RolloutPart] = field(default_factory=list)
    _pending: deque[RolloutPart] | None = None
    """Unjudged parts from the last lookup; None: look up again."""
    _refused: list[str] = field(default_factory=list)
    """Names of claims that other jobs hold."""
    _has_judged: bool = False
    """Whether a part was judged since the last lookup."""

    def run(self) -> RewardSummary:
        """Judge until no part is left and no part appears within the wait time."""
        while self.step():
            pass
        return self.summary

    def step(self) -> bool:
        """Judge one part, or wait for a moment; return whether more parts may come."""
        if self._pending is None:
            # Look up the parts, and again after the last one: other jobs generate and judge meanwhile.
            self._pending, self._refused, self._has_judged = deque(self.find_unjudged()), [], False
        while self._pending:
            part = self._pending.popleft()
            if self._judge_claimed(part):
                self._has_judged, self.patience.waited_s = True, 0.0
                return True
            self._refused.append(self.store.claim_name(part.name, self.version))
        self._pending = None
        # More parts may have appeared during the judging: look again at once.
        return self._has_judged or self._wait_for_parts()

    def find_unjudged(self) -> list[RolloutPart]:
        rounds = [None] if self.rounds is None else self.rounds
        self._parts = [part for number in rounds for part in self.store.parts(number)]
        return [part for part in self._parts if not self.store.has_part(part.name, self.version)]

    def _wait_for_parts(self) -> bool:
        """Wait for a moment; return False after the wait time."""
        missing = describe_missing_rows(self._parts, self.rounds)  # "": none; None: unknown
        if self._refused or self.rounds is None or can_grow(self._parts) or missing != "":
            most_s = max(self.wait_s, self.claimed_wait_s if self._refused else 0.0)
            if self.patience.wait(most_s, any(map(self.claims.may_be_dead, self._refused))):
                return True
        self.summary.left = len(self._refused)
        self.summary.waited_for = (missing or "") if self.wait_s else ""
        return False

    def _judge_claimed(self, part: RolloutPart) -> bool:
        """Claim and judge a part; return False if another job holds the claim."""
        claim = self.claims.take(self.store.claim_name(part.name, self.version))
        if claim is None:
            return False
        with claim.renew_while_open():
            # Another job may have judged the part between lookup and claim.
            if not self.store.has_part(part.name, self.version):
                self._judge_part(part)
        return True

    def _judge_part(self, part: RolloutPart) -> None:
        rows = self.store.read_rollouts(part.name, COLUMNS)
        finished = [row for row in rows if row.finish_reason != UNFINISHED]
        rewards = []
        for batch in iter_batches(finished, lambda row: row.key.prompt):
            for row, result in zip(batch, self.judge(batch), strict=True):
                rewards.append(RewardRow(
                    row.key, row.attempt, self.version, result.reward, result.status,
                    components=dict(flatten_components(result.components)), reason=result.reason))
                self.summary.tally.add(result.reward, result.status, result.reason,
                                       f"{part.name}: prompt {row.key.prompt}, sample {row.key.sample}")
            self.progress(len(batch))
        self.summary.unfinished += len(rows) - len(finished)
        self.progress(len(rows) - len(finished))
        try:
            self.store.add_rewards(self.version, part.name, rewards,
                                   {**self.provenance, JUDGED: part.manifest_sha256})
            self.summary.parts += 1
        except AlreadyPublished:
            self._report_differences(part, rewards)

    def _report_differences(self, part: RolloutPart, rewards: Sequence[RewardRow]) -> None:
        """Warn if another job, after this job's claim expired, published different rewards for the same rows.

        The first published rewards stay. A difference means that the reward depends on more than the row.
        """
        published = self.store.read_rewards(self.version, part.name, part)
        published_rewards = {(row.key, row.attempt): row.reward for row in published}
        num_different = sum(published_rewards.get((row.key, row.attempt)) != row.reward for row in rewards)
        if num_different:
            warn(f"{part.name}: {num_different:,} of {len(rewards):,} responses have another reward under "
                 f"the same version {self.version}, published by another job, which stays: the reward "
                 "depends on more than the row")


@dataclass
class RewardJudge:
    """A reward with worker processes, which start with the first rows and end with `close`."""

    name: str
    settings: Sequence[str]
    workers: int
    version: str
    _open: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _judge: JudgeRows | None = None

    def judge(self, rows: Sequence[Rollout]) -> Sequence[Result]:
        if self._judge is None:
            self._judge = self._open.enter_context(start_judge(self.name, self.settings, self.workers))
        return self._judge(rows)

    def close(self) -> None:
        self._open.close()


def resolve_reward_version(name: str, settings: Sequence[str]) -> str:
    """Return a reward's version, which names its rewards in the store."""
    if name in (ENVIRONMENT, NO_REWARD):
        if settings:
            action = "copies the rewards of the rows and" if name == ENVIRONMENT else "judges nothing and"
            raise UserError(f"--reward-set {settings[0]}: --reward {name} {action} has no settings; leave it "
                            "out")
        return name
    return build_versioned_reward(request_reward(name, parse_nested(settings, "--reward-set"))).version


def check_reward_fields(name: str, settings: Sequence[str], prompts: "Iterable[RolloutPrompt]", option: str
                        ) -> None:
    """Raise `UserError` if no prompt has all fields that the reward needs; `option` names the prompts."""
    if name in (ENVIRONMENT, NO_REWARD):
        return
    reward_order = request_reward(name, parse_nested(settings, "--reward-set"))
    reward, problem, fix = build_versioned_reward(reward_order), "", None
    for prompt in prompts:
        field = find_missing_field(reward_order, reward, prompt.record)
        if not field:
            return
        problem = problem or f"{prompt.place} has no {field!r}, which --reward {name} needs"
        unread = [name for name in prompt.record if name not in ("prompt", "instruction", "id", "messages")]
        if other := propose_field(prompt.record, field) or (unread[0] if len(unread) == 1 else ""):
            # the option replaces the layout in which the file names its prompts
            named = "" if "prompt" in prompt.record else propose_field(prompt.record, "prompt")
            columns = f"prompt={named},{field}={other}" if named else f"{field}={other}"
            fix = Fix(options=("--columns", columns))
    raise UserError(f"{option}: {problem}, and no prompt of round 1 has all fields of the reward; add the "
                    "field, or rename another one by --columns TARGET=FIELD", fix)


@contextlib.contextmanager
def start_judge(name: str, settings: Sequence[str], workers: int) -> Iterator[JudgeRows]:
    """Start a reward's worker processes, and yield a function that judges rows."""
    if name == ENVIRONMENT:
        yield lambda rows: [_read_outcome(row) for row in rows]
        return
    if name == NO_REWARD:
        yield lambda rows: [Result(0.0, "scored") for _ in rows]
        return
    reward_order = request_reward(name, parse_nested(settings, "--reward-set"))
    reward = build_versioned_reward(reward_order)
    with create_runner(reward_order, reward, workers) as running:
        def judge(rows: Sequence[Rollout]) -> Sequence[Result]:
            records = [build_record(row) for row in rows]
            if judges_in_groups(reward):
                for record, row in zip(records, rows, strict=True):
                    record["completion_ids"] = row.tokens.tolist()
            return running.score(records)

        yield judge


def build_record(row: Rollout) -> dict[str, Any]:
    """Convert a rollout to a record for rewards: the prompt's fields, and `response`, `num_tokens`,
    `finish_reason`. An episode's `response` is the last turn's text."""
    record = dict(row.record)
    if "messages" in record:
        record.setdefault("prompt", record["messages"])
    # An episode's text contains tool results: judge its last turn only. Rewards refuse a row without one.
    response = row.response if row.outcome is None else row.outcome.get(LAST_TURN)
    return {**record, "response": response, "num_tokens": len(row.tokens), "finish_reason": row.finish_reason}


def flatten_components(components: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield a reward's numeric components, nested components as `part.name`."""
    for name, value in components.items():
        if isinstance(value, Mapping):
            yield from flatten_components(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{name}", float(value)


def _read_outcome(row: Rollout) -> Result:
    outcome = row.outcome
    if outcome is None or "status" not in outcome:
        return Result(None, "refused", {}, "has no outcome of an environment; judge it by another reward")
    return Result(outcome.get("reward"), outcome["status"], outcome.get("components", {}),
                  outcome.get("reason", ""))

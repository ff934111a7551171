"""Rows of the rollout store: responses and their rewards, in parts whose provenance names rounds and
pieces."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from megatron_sov.work.tables.table import TablePart

if TYPE_CHECKING:
    import numpy as np

STOP, LENGTH, UNFINISHED = "stop", "length", "unfinished"
"""Finish reasons: the model ended the response; it reached the token limit; a deadline cut it off, and the
next attempt continues it."""
NOT_WRITTEN = -1
"""Version of a token that no policy generated: a tool result, or the opening of a turn."""
LAST_TURN = "last_turn"
"""In the outcome of an episode: the text of the model's last turn."""
_DOMAIN_FIELD = "domain"
_NAME = re.compile(r"round-([1-9]\d{4,}|\d{4})-piece-([1-9]\d{4,}|\d{4})(?:-attempt-([1-9]\d*))?")


class Key(NamedTuple):
    """Identity of a response; the store contains each key once per attempt."""

    prompt: str
    """Id of the prompt's record, see `rollouts.prompts`."""
    sample: int
    """Index in its group, from 0."""
    policy: str
    """Digest of the policy of its first token (`runs.rounds.Policy`)."""
    sampling: str
    """Digest of the sampling settings."""


@dataclass(frozen=True)
class Rollout:
    """One response, token for token as the policy generated it."""

    key: Key
    round: int
    attempt: int
    """0, or the attempt of the unfinished row that this row continues and replaces, plus 1."""
    record: Mapping[str, Any]
    """Record of the prompt, with the fields that a reward needs (answer, tests, domain, ...)."""
    prompt_tokens: np.ndarray
    """[prompt] int32."""
    tokens: np.ndarray
    """[n] int32: tokens after the prompt, tool results included."""
    logprobs: np.ndarray
    """[n] float32: log-probability under the sampled distribution; 0 for tokens that no policy generated."""
    versions: np.ndarray
    """[n] int32: optimizer step of the weights that generated the token, or `NOT_WRITTEN`."""
    finish_reason: str
    """`STOP`, `LENGTH`, `UNFINISHED`, or how an episode with tools ended (`tools.episode.ENDS`)."""
    response: str
    """Text of the tokens, after the opening mark of thoughts if the template contains it."""
    temperature: float
    """Temperature of the distribution of `logprobs`."""
    engine: str
    began_s: float
    """Unix time."""
    ended_s: float
    """Unix time."""
    outcome: Mapping[str, Any] | None = None
    """Result of an episode by its environment: reward, status, components, reason, reward_version."""
    routes: np.ndarray | None = None
    """[prompt + n - 1, layers, K] uint8 or uint16: experts of each token that the policy read."""

    @property
    def is_written(self) -> np.ndarray:
        """[n] bool: tokens that a policy generated."""
        import numpy as np

        return np.asarray(self.versions != NOT_WRITTEN)

    @property
    def num_written(self) -> int:
        return int(self.is_written.sum())

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The turns of the policy, as half-open intervals of `tokens`."""
        import numpy as np

        written = np.concatenate([[False], self.is_written, [False]])
        # Padded with False at both ends, so that edges come in pairs.
        edges = np.flatnonzero(written[1:] != written[:-1])
        return list(zip(edges[0::2].tolist(), edges[1::2].tolist(), strict=True))

    def problems(self, vocab_size: int) -> list[str]:
        """Return a sentence for each broken rule; a row with problems is not trained on."""
        import numpy as np

        n, written = len(self.tokens), self.is_written
        ids = np.concatenate([self.prompt_tokens, self.tokens])
        rules = [
            (len(self.logprobs) == n == len(self.versions),
             f"has {n} tokens, {len(self.logprobs)} log-probabilities and {len(self.versions)} versions; one "
             "belongs to each"),
            (len(self.prompt_tokens) > 0, "has no prompt"),
            (not len(ids) or (ids.min() >= 0 and ids.max() < vocab_size),
             f"has token ids outside of the vocabulary of {vocab_size}"),
            (bool(np.isfinite(self.logprobs).all() and (self.logprobs <= 0).all()),
             "has log-probabilities above 0, or not finite"),
            # Different lengths are reported above, and cannot be indexed.
            (len(written) != len(self.logprobs) or not self.logprobs[~written].any(),
             "has log-probabilities of tokens that no policy generated"),
            (self.temperature > 0, f"has temperature {self.temperature}"),
            # The last token was never read, so it has no route.
            (self.routes is None or len(self.routes) == len(self.prompt_tokens) + n - 1,
             f"has routes of {0 if self.routes is None else len(self.routes)} tokens; one belongs to each of "
             f"{len(self.prompt_tokens) + n - 1} that were read")]
        return [sentence for holds, sentence in rules if not holds]


@dataclass(frozen=True, slots=True)
class RewardRow:
    """One reward of one response."""

    key: Key
    attempt: int
    reward_version: str
    """Version of the reward's code and settings."""
    reward: float | None
    """None: the response has no reward, and `status` says why; never 0 instead."""
    status: str
    """See `rewards.reward.Result`: scored, timeout, failed, refused."""
    components: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


def read_domain(record: Mapping[str, Any]) -> str:
    """Return the field `domain` of a prompt's record, by which figures are grouped; "" without one."""
    domain = record.get(_DOMAIN_FIELD)
    return "" if domain is None else str(domain)


class AttemptRow(Protocol):
    """A response with any of its fields."""

    @property
    def key(self) -> Key: ...
    @property
    def attempt(self) -> int: ...


R = TypeVar("R", bound=AttemptRow)


def select_last_attempts(rows: Sequence[R]) -> list[R]:
    """Return the last attempt of each key, in order of first appearance."""
    last: dict[Key, R] = {}
    for row in rows:
        # A dict keeps the position of a key when its value is replaced.
        if row.key not in last or row.attempt > last[row.key].attempt:
            last[row.key] = row
    return list(last.values())


class RolloutPart(TablePart):
    """A part of a store: one attempt at a piece of a round."""

    @property
    def round(self) -> int:
        """From 1."""
        return self.key[0]

    @property
    def piece(self) -> int:
        """From 0."""
        return self.key[1]

    @property
    def attempt(self) -> int:
        """0, or the number of the continuation."""
        return self.key[2]


def format_part_name(round: int, piece: int, attempt: int = 0) -> str:
    """Return the name of a part; rounds count from 1, pieces and attempts from 0."""
    return f"round-{round:04d}-piece-{piece:04d}" + (f"-attempt-{attempt}" if attempt else "")


def parse_part_name(name: str) -> tuple[int, int, int] | None:
    """Return the round, piece and attempt of a part's name; None if it is not the name of a part."""
    match = _NAME.fullmatch(name)
    if match is None or not int(match[1]):
        return None
    return int(match[1]), int(match[2]), int(match[3] or 0)


ROUNDS, PIECES, UNFINISHED_ROWS, GROWS = "asked_rounds", "pieces_per_round", "unfinished", "grows"
"""Fields in the provenance of a part of rollouts: the last planned round, the pieces of each round,
unfinished rows of this part, and whether a round may need further prompts until it is trained."""
JUDGED = "rollouts"
"""Field in the provenance of rewards: hash of the judged part's manifest."""


@dataclass(frozen=True)
class StorePlan:
    """Rounds and pieces that the jobs of a store generate together."""

    rounds: int
    """The last round, from 1."""
    pieces: int
    """Pieces of each round, without further prompts."""
    grows: bool = False
    """Whether a round may need further prompts until it is trained."""

    def to_provenance(self, unfinished: int) -> dict[str, int]:
        """Return the provenance of a part with `unfinished` unfinished rows."""
        provenance = {ROUNDS: self.rounds, PIECES: self.pieces, UNFINISHED_ROWS: unfinished}
        if self.grows:
            provenance[GROWS] = True
        return provenance


def describe_missing_rows(parts: Sequence[RolloutPart], rounds: range | None) -> str | None:
    """Return the missing rows as the end of a sentence; "": none are missing; None: no part records the plan.

    Args:
        parts: all parts of rollouts of these rounds.
        rounds: None: all rounds that the newest part records.
    """
    # A later command may have planned more rounds, which the newest part records.
    newest = max(parts, key=lambda part: part.created_s, default=None)
    plan = None if newest is None else _read_plan(newest.provenance)
    if plan is None:
        return None
    # Sorted by attempt, so that the last attempt of each piece remains: it counts the unfinished rows.
    last = {(part.round, part.piece): part for part in sorted(parts, key=lambda part: part.attempt)}
    written = Counter(number for number, _ in last)
    unfinished = Counter(number for (number, _), part in last.items()
                         if part.provenance.get(UNFINISHED_ROWS))
    for number in rounds or range(1, plan.rounds + 1):
        if written[number] < plan.pieces:
            return f"{plan.pieces - written[number]:,} of {plan.pieces:,} pieces of round {number}"
        if unfinished[number]:
            return (f"the ends of responses in {unfinished[number]:,} of {plan.pieces:,} pieces of round "
                    f"{number}")
    return ""


def can_grow(parts: Sequence[RolloutPart]) -> bool:
    """Return whether the rounds of these parts may need further prompts once all rows are judged."""
    return any(part.provenance.get(GROWS) for part in parts)


def _read_plan(provenance: Mapping[str, Any]) -> StorePlan | None:
    rounds, pieces = provenance.get(ROUNDS), provenance.get(PIECES)
    if type(rounds) is not int or type(pieces) is not int or min(rounds, pieces) < 1:
        return None
    return StorePlan(rounds, pieces)

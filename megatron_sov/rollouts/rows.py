"""Rows in the rollout store: responses and rewards, in parts named by round and piece."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from megatron_sov.base.errors import UserError
from megatron_sov.work.tables.table import TablePart

if TYPE_CHECKING:
    import numpy as np  # `--help` does not load numpy

STOP, LENGTH, UNFINISHED = "stop", "length", "unfinished"
"""Finish reasons: the model ended the response; the response reached the token limit; a deadline cut the
response off, for the next attempt to continue."""
NOT_WRITTEN = -1
"""Version for tokens that no policy generated: tool results, and the opening of a turn."""
LAST_TURN = "last_turn"
"""Key in the outcome of an episode: the text in the model's last turn."""
_DOMAIN_FIELD = "domain"
_NAME = re.compile(r"round-([1-9]\d{4,}|\d{4})-piece-([1-9]\d{4,}|\d{4})(?:-attempt-([1-9]\d*))?")
ROUNDS, PIECES, UNFINISHED_ROWS, GROWS = "asked_rounds", "pieces_per_round", "unfinished", "grows"
"""Fields in a part's provenance: the last planned round, pieces per round, unfinished rows in this part, and
whether a round may need further prompts until training."""
JUDGED = "rollouts"
"""Field in a reward's provenance: hash of the judged part's manifest."""


class Key(NamedTuple):
    """Identity of a response; a store contains each key once per attempt."""

    prompt: str
    """Id of the prompt, see `rollouts.prompts.RolloutPrompt`."""
    sample: int
    """Index in the group, from 0."""
    policy: str
    """Digest of the policy that generated the first token (`runs.rounds.Policy`)."""
    sampling: str
    """Digest from `rollouts.prompts.sampling_digest`."""


@dataclass(frozen=True)
class Rollout:
    """A response, with exactly the tokens that the policy generated."""

    key: Key
    round: int
    attempt: int
    """0 for a new response; a continuation has the attempt of the unfinished row plus 1."""
    record: Mapping[str, Any]
    """Record from the prompt file, with the fields that a reward needs (answer, tests, domain, ...)."""
    prompt_tokens: np.ndarray
    """[prompt] int32."""
    tokens: np.ndarray
    """[n] int32: tokens after the prompt, tool results included."""
    logprobs: np.ndarray
    """[n] float32: log-probability under the sampled distribution; 0 if no policy generated the token."""
    versions: np.ndarray
    """[n] int32: optimizer step whose weights generated the token, or `NOT_WRITTEN`."""
    finish_reason: str
    """`STOP`, `LENGTH`, `UNFINISHED`, or how an episode with tools ended (`tools.episode.ENDS`)."""
    response: str
    """Decoded tokens, after the opening mark for thoughts if the template contains the mark."""
    temperature: float
    """Sampling temperature, applied to `logprobs`, too."""
    engine: str
    began_s: float
    """Unix time."""
    ended_s: float
    """Unix time."""
    outcome: Mapping[str, Any] | None = None
    """Result from the environment: reward, status, components, reason, reward_version."""
    routes: np.ndarray | None = None
    """[prompt + n - 1, layers, K] uint8 or uint16: experts for each token that the policy read."""

    @property
    def is_written(self) -> np.ndarray:
        """[n] bool: whether a policy generated the token."""
        is_written: np.ndarray = self.versions != NOT_WRITTEN
        return is_written

    @property
    def num_written(self) -> int:
        return int(self.is_written.sum())

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The policy's turns, as half-open intervals in `tokens`."""
        is_written = self.is_written
        edges = (is_written[1:] != is_written[:-1]).nonzero()[0] + 1
        bounds = pairwise([0, *edges.tolist(), len(is_written)])
        return [(start, end) for start, end in bounds if start < end and is_written[start]]

    def problems(self, vocab_size: int) -> list[str]:
        """Return a sentence for each broken rule; rows with problems are not trained on."""
        n, written = len(self.tokens), self.is_written
        all_ids = [ids for ids in (self.prompt_tokens, self.tokens) if len(ids)]
        rules = [
            (len(self.logprobs) == n == len(self.versions),
             f"has {n} tokens, {len(self.logprobs)} log-probabilities and {len(self.versions)} versions; one "
             "belongs to each"),
            (len(self.prompt_tokens) > 0, "has no prompt"),
            (all(ids.min() >= 0 and ids.max() < vocab_size for ids in all_ids),
             f"has token ids outside of the vocabulary of {vocab_size}"),
            (((self.logprobs > -math.inf) & (self.logprobs <= 0)).all(),
             "has log-probabilities above 0, or not finite"),
            # Different lengths are reported above, and cannot be indexed.
            (len(written) != len(self.logprobs) or not self.logprobs[~written].any(),
             "has log-probabilities of tokens that no policy generated"),
            (self.temperature > 0, f"has temperature {self.temperature}"),
            # The last token was never read, and has no route.
            (self.routes is None or len(self.routes) == len(self.prompt_tokens) + n - 1,
             f"has routes of {0 if self.routes is None else len(self.routes)} tokens; one belongs to each of "
             f"{len(self.prompt_tokens) + n - 1} that were read")]
        return [sentence for holds, sentence in rules if not holds]


@dataclass(frozen=True, slots=True)
class RewardRow:
    """A reward for a response."""

    key: Key
    attempt: int
    reward_version: str
    """Version of code and settings."""
    reward: float | None
    """Reward, or None with an explanation in `status`; a missing reward is never 0."""
    status: str
    """See `rewards.reward.Result`: scored, timeout, failed, refused."""
    components: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


def read_domain(record: Mapping[str, Any]) -> str:
    """Return `record["domain"]` as text, or ""."""
    domain = record.get(_DOMAIN_FIELD)
    return "" if domain is None else str(domain)


class AttemptRow(Protocol):
    """A response with `key` and `attempt`."""

    @property
    def key(self) -> Key: ...
    @property
    def attempt(self) -> int: ...


R = TypeVar("R", bound=AttemptRow)


def select_last_attempts(rows: Sequence[R]) -> list[R]:
    """Return the last attempt for each key, in order of first appearance."""
    last: dict[Key, R] = {}
    for row in rows:
        # A dict preserves a key's position when the value is replaced.
        if row.key not in last or row.attempt > last[row.key].attempt:
            last[row.key] = row
    return list(last.values())


class RolloutPart(TablePart):
    """A part in a store: an attempt at a piece."""

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
        """0, or the continuation's number."""
        return self.key[2]


def format_part_name(round: int, piece: int, attempt: int = 0) -> str:
    """Return a part's name; rounds count from 1, pieces and attempts from 0."""
    return f"round-{round:04d}-piece-{piece:04d}" + (f"-attempt-{attempt}" if attempt else "")


def parse_part_name(name: str) -> tuple[int, int, int] | None:
    """Parse round, piece and attempt from a part's name; return None for invalid names."""
    match = _NAME.fullmatch(name)
    if match is None or not int(match[1]):
        return None
    return int(match[1]), int(match[2]), int(match[3] or 0)


def parse_round_range(text: str) -> range:
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"--rounds {text}: must be a round, or the first and the last one, from 1, e.g. "
                        "--rounds 2 or --rounds 3-7")
    return range(first, last + 1)


@dataclass(frozen=True)
class StorePlan:
    """Rounds and pieces that jobs generate together into a store."""

    rounds: int
    """The last round, from 1."""
    pieces: int
    """Pieces per round, without further prompts."""
    grows: bool = False
    """Whether a round may need further prompts until training."""

    def to_provenance(self, unfinished: int) -> dict[str, int]:
        """Return the provenance for a part with `unfinished` unfinished rows."""
        provenance = {ROUNDS: self.rounds, PIECES: self.pieces, UNFINISHED_ROWS: unfinished}
        if self.grows:
            provenance[GROWS] = True
        return provenance


def describe_missing_rows(parts: Sequence[RolloutPart], rounds: range | None) -> str | None:
    """Describe missing rows, to end a sentence.

    Returns "" if no rows are missing, and None if no part records the plan.
    """
    # A later command may have planned more rounds; the newest part records the last plan.
    newest = max(parts, key=lambda part: part.created_s, default=None)
    plan = None if newest is None else _read_plan(newest.provenance)
    if plan is None:
        return None
    # Sorted by attempt, so the dict retains the last attempt per piece, which counts the unfinished rows.
    last = {(part.round, part.piece): part for part in sorted(parts, key=lambda part: part.attempt)}
    written = Counter(number for number, _ in last)
    unfinished = Counter(number for (number, _), part in last.items() if part.provenance.get(UNFINISHED_ROWS))
    for number in rounds or range(1, plan.rounds + 1):
        if written[number] < plan.pieces:
            return f"{plan.pieces - written[number]:,} of {plan.pieces:,} pieces of round {number}"
        if unfinished[number]:
            return (f"the ends of responses in {unfinished[number]:,} of {plan.pieces:,} pieces of round "
                    f"{number}")
    return ""


def can_grow(parts: Sequence[RolloutPart]) -> bool:
    """Return whether the rounds may need further prompts after judging."""
    return any(part.provenance.get(GROWS) for part in parts)


def _read_plan(provenance: Mapping[str, Any]) -> StorePlan | None:
    rounds, pieces = provenance.get(ROUNDS), provenance.get(PIECES)
    if type(rounds) is not int or type(pieces) is not int or min(rounds, pieces) < 1:
        return None
    return StorePlan(rounds, pieces)

"""What the store holds: a row for each response, and a row for each reward of it, in parts that say what they
were written for."""

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
"""Finish reasons: the model ended it; it is as long as allowed; its piece's deadline came first, and a row
of the next attempt goes on behind it."""
NOT_WRITTEN = -1
"""Version of a token that no policy wrote: a tool's result, or the opening of a turn."""
LAST_TURN = "last_turn"
"""In the outcome of an episode: what the model wrote in its last turn, as text."""
_DOMAIN = "domain"
_NAME = re.compile(r"round-([1-9]\d{4,}|\d{4})-piece-([1-9]\d{4,}|\d{4})(?:-attempt-([1-9]\d*))?")


class Key(NamedTuple):
    """What a response is: the same key is the same response, written once."""

    prompt: str
    """Of the prompt's record, see `rollouts.prompts`."""
    sample: int
    """Number in its group, from 0."""
    policy: str
    """Digest of the policy that began it (`runs.rounds.Policy`)."""
    sampling: str
    """Digest of the settings that tokens were chosen by."""


@dataclass(frozen=True)
class Rollout:
    """One response, token for token as the policy wrote it."""

    key: Key
    round: int
    """Round that it was written for, from 1."""
    attempt: int
    """0, or one more than that of the unfinished row which it goes on behind, and stands in the place of."""
    record: Mapping[str, Any]
    """The prompt as it was given: what a reward needs (answer, tests, domain, ...)."""
    prompt_tokens: np.ndarray
    """[prompt] int32."""
    tokens: np.ndarray
    """[n] int32: everything behind the prompt; with tools, their results too."""
    logprobs: np.ndarray
    """[n] float32: of each under the distribution that it was drawn from; 0 where no policy wrote it."""
    versions: np.ndarray
    """[n] int32: optimizer step of the weights that wrote it; `NOT_WRITTEN`."""
    finish_reason: str
    """`STOP`, `LENGTH`, `UNFINISHED`, or how an episode with tools ended (`tools.episode.ENDS`)."""
    response: str
    """Text of the tokens, with the mark of the thoughts that the template has opened."""
    temperature: float
    """Of the distribution."""
    engine: str
    """Name of what wrote it."""
    began_s: float
    """Unix time."""
    ended_s: float
    """Unix time."""
    outcome: Mapping[str, Any] | None = None
    """What an environment said of the episode: reward, status, components, reason, reward_version."""
    routes: np.ndarray | None = None
    """[prompt + n - 1, layers, K] uint8 or uint16: experts that each token which the policy read went to."""

    @property
    def is_written(self) -> np.ndarray:
        """Return [n] bool: whether a policy wrote each token."""
        import numpy as np

        return np.asarray(self.versions != NOT_WRITTEN)

    @property
    def num_written(self) -> int:
        return int(self.is_written.sum())

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Return the turns that a policy wrote, as half-open intervals of `tokens`."""
        import numpy as np

        written = np.concatenate([[False], self.is_written, [False]])
        # padded with False at both ends: edges come in pairs of begin and end
        edges = np.flatnonzero(written[1:] != written[:-1])
        return list(zip(edges[0::2].tolist(), edges[1::2].tolist(), strict=True))

    def problems(self, vocab_size: int) -> list[str]:
        """Return one sentence for each rule that the row breaks: such a row is kept out of training.

        Args:
            vocab_size: what token ids must lie below.
        """
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
             "has log-probabilities that are greater than 0, or no numbers"),
            # lengths that differ have been told above, and cannot be indexed
            (len(written) != len(self.logprobs) or not self.logprobs[~written].any(),
             "has log-probabilities of tokens that no policy wrote"),
            (self.temperature > 0, f"has temperature {self.temperature}"),
            # the last token was drawn and never read, so it has no route
            (self.routes is None or len(self.routes) == len(self.prompt_tokens) + n - 1,
             f"has routes of {0 if self.routes is None else len(self.routes)} tokens; one belongs to each of "
             f"{len(self.prompt_tokens) + n - 1} that were read")]
        return [sentence for holds, sentence in rules if not holds]


@dataclass(frozen=True, slots=True)
class RewardRow:
    """What one reward said of one response."""

    key: Key
    attempt: int
    """Of the row that was judged."""
    reward_version: str
    """Of the reward's code and settings."""
    reward: float | None
    """None: there is none, for which `status` has the cause; never a 0 in its place."""
    status: str
    """As `rewards.reward.Result`: scored, timeout, failed, refused."""
    components: Mapping[str, float] = field(default_factory=dict)
    """Parts of the reward by name."""
    reason: str = ""
    """Where there is no reward: why."""


def domain_of(record: Mapping[str, Any]) -> str:
    """Return what a prompt's record says that it is about, by which figures are told apart; "": nothing."""
    found = record.get(_DOMAIN)
    return "" if found is None else str(found)


class Attempted(Protocol):
    """A response, whatever of it is read."""

    @property
    def key(self) -> Key: ...
    @property
    def attempt(self) -> int: ...


R = TypeVar("R", bound=Attempted)


def later(rows: Sequence[R]) -> list[R]:
    """Return, of the rows of each key, the one of the last attempt, in order of first appearance."""
    found: dict[Key, R] = {}
    for row in rows:
        # a dict keeps the place of a key's first row, also where its value is replaced
        if row.key not in found or row.attempt > found[row.key].attempt:
            found[row.key] = row
    return list(found.values())


class RolloutPart(TablePart):
    """One part of a store."""

    @property
    def round(self) -> int:
        """Return its round, from 1."""
        return self.key[0]

    @property
    def piece(self) -> int:
        """Return its piece, from 0."""
        return self.key[1]

    @property
    def attempt(self) -> int:
        """Return 0, or which continuation of the piece's unfinished rows it is."""
        return self.key[2]


def part_name(round: int, piece: int, attempt: int = 0) -> str:
    """Return the name of a piece's part: of a round from 1, a piece from 0, and an attempt from 0."""
    return f"round-{round:04d}-piece-{piece:04d}" + (f"-attempt-{attempt}" if attempt else "")


def numbers_in(name: str) -> tuple[int, int, int] | None:
    """Return the round, piece and attempt of a part's name; None where it is the name of none."""
    found = _NAME.fullmatch(name)
    return None if found is None or not int(found[1]) else (int(found[1]), int(found[2]), int(found[3] or 0))


ROUNDS, PIECES, UNFINISHED_ROWS, GROWS = "asked_rounds", "pieces_per_round", "unfinished", "grows"
"""In the provenance of a part of rollouts: the last round that is asked for, the pieces of each, how many of
its own rows an attempt behind it goes on with, and whether a round may ask more until it is trained."""
JUDGED = "rollouts"
"""In the provenance of rewards: hash of the manifest of the part that was judged."""


@dataclass(frozen=True)
class AskedPrompt:
    """What a store is written for."""

    rounds: int
    """The last one, from 1."""
    pieces: int
    """Of each round's own prompts."""
    grows: bool = False
    """Whether a round may ask further ones until it is trained."""

    def to_provenance(self, unfinished: int) -> dict[str, int]:
        """Return what stands in the provenance of a part with so many unfinished rows."""
        return {ROUNDS: self.rounds, PIECES: self.pieces, UNFINISHED_ROWS: unfinished,
                **({GROWS: True} if self.grows else {})}


def not_written(parts: Sequence[RolloutPart], rounds: range | None) -> str | None:
    """Return what is still to be written, as the end of a sentence; "": nothing is; None: no part tells.

    Args:
        parts: of rollouts, all that there are of these rounds.
        rounds: those that are meant; None: all that the newest part tells of.
    """
    # a later command may have asked for more rounds: the newest part knows
    newest = max(parts, key=lambda part: part.created_s, default=None)
    asked = None if newest is None else _asked_of(newest.provenance)
    if asked is None:
        return None
    # sorted by attempt, the last one stays: it says how many rows are still unfinished
    last = {(part.round, part.piece): part for part in sorted(parts, key=lambda part: part.attempt)}
    written = Counter(number for number, _ in last)
    begun = Counter(number for (number, _), part in last.items() if part.provenance.get(UNFINISHED_ROWS))
    for number in rounds or range(1, asked.rounds + 1):
        if written[number] < asked.pieces:
            return f"{asked.pieces - written[number]:,} of {asked.pieces:,} pieces of round {number}"
        if begun[number]:
            return f"the ends of responses in {begun[number]:,} of {asked.pieces:,} pieces of round {number}"
    return ""


def may_grow(parts: Sequence[RolloutPart]) -> bool:
    """Return whether rounds of which these are parts may ask further prompts when all of this is judged."""
    return any(part.provenance.get(GROWS) for part in parts)


def _asked_of(provenance: Mapping[str, Any]) -> AskedPrompt | None:
    rounds, pieces = provenance.get(ROUNDS), provenance.get(PIECES)
    return AskedPrompt(rounds, pieces) if type(rounds) is type(pieces) is int and min(rounds,
                                                                                      pieces) > 0 else None

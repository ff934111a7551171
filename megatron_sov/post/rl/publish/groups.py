"""Groups of judged responses in the store: the last attempt at each response, with its reward."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, starmap

import numpy as np

from megatron_sov.base.errors import UserError
from megatron_sov.rollouts.prompts import PromptPiece
from megatron_sov.rollouts.rows import LENGTH, NOT_WRITTEN, UNFINISHED, Key, RolloutPart, select_last_attempts
from megatron_sov.rollouts.store import RewardsByRow, RolloutStore, read_keys, read_problems
from megatron_sov.work.tables.parquet import read_strings

FACT_COLUMNS = ("versions", "finish_reason")
"""Columns read for `RolloutFacts`."""
INVALID = "kept_out"
"""Status for a response whose last attempt breaks a rule in `Rollout.problems`."""
ROW = np.dtype([
    ("part", np.int32), ("row", np.int32), ("tokens", np.int32), ("written", np.int32),
    ("versions", np.int64), ("reward", np.float64), ("advantage", np.float64), ("is_cut", np.bool_),
    ("order", np.int32)])
"""A judged response: index among the round's parts; row in that part; its tokens; tokens of a policy; sum of
their versions; reward; advantage within its group; whether it hit the token limit; index among the training
documents of its group, -1 if it is not trained on."""


@dataclass(frozen=True, slots=True)
class RolloutFacts:
    """A response without its tokens."""

    key: Key
    attempt: int
    finish_reason: str
    num_tokens: int
    num_written: int
    """Tokens that a policy generated."""
    first_version: int
    """Policy step for the first generated token; 0 without tokens."""
    sum_versions: int
    part: str
    row: int
    """Index within `part`, from 0."""


@dataclass(frozen=True, slots=True)
class JudgedResponse:
    """A response with its reward."""

    rollout: RolloutFacts
    reward: float
    components: Mapping[str, float]


@dataclass(frozen=True)
class JudgedGroup:
    """Responses to one prompt, before `compute_step_advantages`."""

    advantages: np.ndarray
    """[responses] float64."""
    learned: list[int]
    """Indices of the responses to train on, in document order."""
    reason: str
    """Why the group does not learn, or `advantages.LEARNS`."""


JudgeGroups = Callable[[Sequence[Sequence[JudgedResponse]]], Sequence[JudgedGroup]]
"""Groups -> advantages."""


@dataclass(frozen=True)
class JudgedPiece:
    """A piece, in the form that a process sends to the process that plans the round."""

    number: int
    rows: np.ndarray
    """[judged responses] `ROW`, ordered by prompt and sample."""
    counts: list[int]
    """Judged responses per prompt; may be 0."""
    reasons: list[str]
    """For each prompt: why the group does not learn, or `advantages.LEARNS`."""
    domains: list[str]
    components: dict[str, np.ndarray]
    """Reward component -> [responses with this component] float64."""
    unfinished: set[str]
    """Prompts with an unfinished response."""
    unjudged: Counter[str]
    """Status -> responses without a reward, which are not trained on."""
    begun: set[tuple[int, str]]
    """Step and digest of the policies behind first attempts."""
    policies: set[str]


@dataclass(frozen=True)
class JudgedRound:
    """The judged pieces, joined."""

    number: int
    parts: tuple[RolloutPart, ...]
    """Parts in the store with the responses."""
    pieces: tuple[JudgedPiece, ...]

    @cached_property
    def rows(self) -> np.ndarray:
        return np.concatenate([piece.rows for piece in self.pieces])

    @cached_property
    def groups(self) -> list[slice]:
        """Rows per prompt."""
        ends = np.cumsum([0, *(count for piece in self.pieces for count in piece.counts)]).tolist()
        return list(starmap(slice, pairwise(ends)))

    @cached_property
    def row_groups(self) -> np.ndarray:
        """[rows] int64."""
        counts = [count for piece in self.pieces for count in piece.counts]
        return np.repeat(np.arange(len(counts)), counts)

    @cached_property
    def reasons(self) -> list[str]:
        return [reason for piece in self.pieces for reason in piece.reasons]

    @cached_property
    def row_domains(self) -> list[str]:
        domains: list[str] = []
        for piece in self.pieces:
            for domain, count in zip(piece.domains, piece.counts, strict=True):
                domains += [domain] * count
        return domains

    @property
    def components(self) -> dict[str, np.ndarray]:
        names = sorted({name for piece in self.pieces for name in piece.components})
        return {name: np.concatenate([piece.components[name] for piece in self.pieces
                                      if name in piece.components]) for name in names}

    @property
    def unjudged(self) -> dict[str, int]:
        # Invalid responses come first in messages.
        total = sum((piece.unjudged for piece in self.pieces), Counter[str]())
        return {name: total[name] for name in sorted(total, key=lambda name: name != INVALID)}


@dataclass(frozen=True, kw_only=True)
class StoredRound:
    """A round's responses in a store."""

    store: RolloutStore
    number: int
    pieces: Sequence[PromptPiece]
    """All pieces that the round may have."""
    num_pieces: int
    """Pieces in use, the first ones; the store may contain further pieces from another run."""
    samples_per_prompt: int
    reward_version: str

    @cached_property
    def prompts(self) -> list[str]:
        """Ids of the prompts in use, in order."""
        return [prompt for piece in self.pieces[:self.num_pieces] for prompt in piece.prompts.ids]

    def parts(self) -> list[RolloutPart] | str:
        """Return the parts, or a description of missing parts."""
        parts = self.store.parts(self.number)
        self._check_pieces(parts)
        used = [part for part in parts if part.piece < self.num_pieces]
        return self._describe_missing(used) or used

    def judge_piece(self, number: int, parts: Mapping[int, RolloutPart], judge: JudgeGroups,
               domain: Callable[[str], str]) -> JudgedPiece:
        """Read a piece and judge its groups.

        Args:
            number: of the piece, from 0.
            parts: parts of the piece, by their index among all parts of the round.
            judge: computes the advantages of groups.
            domain: prompt -> its domain.
        """
        rows, num_invalid = self._read_last_attempts(list(parts.values()))
        unjudged = Counter({INVALID: num_invalid} if num_invalid else {})
        # Every prompt has an entry: a prompt without responses still counts as a group in its step.
        prompt_responses: dict[str, list[JudgedResponse]] = {
            prompt: [] for prompt in self.pieces[number].prompts.ids}
        finished = defaultdict[str, list[RolloutFacts]](list)
        for row in rows:
            if row.finish_reason != UNFINISHED:
                finished[row.part].append(row)
        for part in parts.values():
            judgements = self.store.read_judgements(self.reward_version, [part])
            for response in _join_rewards(finished[part.name], judgements, unjudged):
                prompt_responses[response.rollout.key.prompt].append(response)
        groups = [sorted(group, key=lambda r: r.rollout.key.sample) for group in prompt_responses.values()]
        judged = judge(groups)
        responses = [response for group in groups for response in group]
        first_attempts = [r.rollout for r in responses if not r.rollout.attempt]
        return JudgedPiece(
            number=number, rows=_build_rows(responses, judged, parts), counts=list(map(len, groups)),
            reasons=[group.reason for group in judged], domains=list(map(domain, prompt_responses)),
            components=_collect_components(responses), unjudged=unjudged,
            unfinished={row.key.prompt for row in rows if row.finish_reason == UNFINISHED},
            begun={(rollout.first_version, rollout.key.policy) for rollout in first_attempts},
            policies={r.rollout.key.policy for r in responses})

    def describe_wait(self, gathered: JudgedRound) -> str:
        """Return a description of the responses that the round waits for, or ""."""
        # Unfinished responses alone: responses whose reward failed would fail again.
        waiting = sum(len(piece.unfinished) for piece in gathered.pieces)
        if not waiting:
            return ""
        return f"{waiting} of {len(self.prompts)} groups wait for responses that are not finished"

    def _describe_missing(self, parts: Sequence[RolloutPart]) -> str:
        count = self.num_pieces
        # Attempt 0 has a row for every response in a piece, finished or not.
        written = {part.piece for part in parts if part.attempt == 0}
        unwritten = [piece for piece in range(count) if piece not in written]
        if unwritten:
            return f"{len(unwritten)} of {count} pieces are not written yet, the first is {unwritten[0]}"
        unjudged = [part.name for part in parts if not self.store.has_part(part.name, self.reward_version)]
        if unjudged:
            return (f"{len(unjudged)} of {len(parts)} parts are not judged yet by reward version "
                    f"{self.reward_version[:12]}, the first is {unjudged[0]}")
        return ""

    def _read_last_attempts(self, parts: Sequence[RolloutPart]) -> tuple[list[RolloutFacts], int]:
        """Return the last valid attempts, and the number of invalid last attempts. An invalid attempt also
        replaces the unfinished row before it: no job continues that row again."""
        rows: list[RolloutFacts] = []
        invalid: set[tuple[Key, int]] = set()
        for part in parts:
            facts, problems = read_facts(self.store, part)
            self._check_prompts(part, facts)
            rows += facts
            invalid |= {(row.key, row.attempt) for row, problem in zip(facts, problems, strict=True)
                        if problem}
        last = select_last_attempts(rows)
        valid = [row for row in last if (row.key, row.attempt) not in invalid]
        return valid, len(last) - len(valid)

    def _prompts_of_piece(self, piece: int) -> set[str]:
        return set(self.pieces[piece].prompts.ids) if piece < len(self.pieces) else set()

    def _check_pieces(self, parts: Sequence[RolloutPart]) -> None:
        """Raise `UserError` if a part has another size: a few pieces would count as the whole round."""
        for part in parts:
            num_rows = len(self._prompts_of_piece(part.piece)) * self.samples_per_prompt
            if part.num_rows > num_rows or (part.attempt == 0 and part.num_rows != num_rows):
                raise UserError(f"{part.path}: has {part.num_rows:,} responses, and rollout.piece_prompts, "
                                "rollout.prompts_per_round and rollout.samples_per_prompt make "
                                f"{num_rows:,}; use the settings that they were generated with, or another "
                                "--store")

    def _check_prompts(self, part: RolloutPart, rows: Sequence[RolloutFacts]) -> None:
        foreign = {row.key.prompt for row in rows}.difference(self._prompts_of_piece(part.piece))
        if foreign:
            raise UserError(f"{self.store.path}: round {self.number} holds responses to prompt "
                            f"{min(foreign)}, which is not in piece {part.piece} now; pass the --prompts and "
                            "rollout settings that they were generated with, or another --store")


def read_facts(store: RolloutStore, part: RolloutPart) -> tuple[list[RolloutFacts], list[str]]:
    """Return the rows in a part, and a problem per row ("" for sound rows)."""
    table = store.read_columns(part, FACT_COLUMNS)
    column = table["versions"].combine_chunks()
    versions, num_tokens = column.flatten().to_numpy().astype(np.int64), column.value_lengths().to_numpy()
    ends = np.cumsum(num_tokens, dtype=np.int64)
    is_written = versions != NOT_WRITTEN
    # Prefix sums over all tokens: figures for a row are differences between two entries.
    written_before = np.concatenate([[0], np.cumsum(is_written)])
    version_sums = np.concatenate([[0], np.cumsum(np.where(is_written, versions, 0))])
    starts = ends - num_tokens
    num_written = written_before[ends] - written_before[starts]
    sums = version_sums[ends] - version_sums[starts]
    written_places = np.append(np.flatnonzero(is_written), 0)  # the last row may have no generated token
    first = np.where(num_written > 0, np.append(versions, 0)[written_places[written_before[starts]]], 0)
    columns = zip(read_keys(table), table["attempt"].to_pylist(), read_strings(table["finish_reason"]),
                  zip(num_tokens.tolist(), num_written.tolist(), first.tolist(), sums.tolist(), strict=True),
                  strict=True)
    facts = []
    for index, (key, attempt, reason, (tokens, written, version, total)) in enumerate(columns):
        facts.append(RolloutFacts(
            key, attempt, reason or "", num_tokens=tokens, num_written=written, first_version=version,
            sum_versions=total, part=part.name, row=index))
    return facts, read_problems(table)


def _join_rewards(rows: Sequence[RolloutFacts], judgements: RewardsByRow, unjudged: Counter[str]
                  ) -> list[JudgedResponse]:
    """Return the rows with a reward, and count rows without one in `unjudged` by status."""
    responses = []
    for row in rows:
        judgement = judgements.get((row.key, row.attempt))
        if judgement is None:
            unjudged["missing"] += 1
        elif judgement.reward is None:
            unjudged[judgement.status] += 1
        else:
            responses.append(JudgedResponse(row, judgement.reward, judgement.components))
    return responses


def _build_rows(responses: Sequence[JudgedResponse], groups: Sequence[JudgedGroup],
                parts: Mapping[int, RolloutPart]) -> np.ndarray:
    part_indices = {part.name: index for index, part in parts.items()}
    advantages: list[float] = []
    orders: list[int] = []
    for group in groups:
        order = {response: index for index, response in enumerate(group.learned)}
        advantages += group.advantages.tolist()
        orders += [order.get(response, -1) for response in range(len(group.advantages))]
    values = ((part_indices[facts.part], facts.row, facts.num_tokens, facts.num_written, facts.sum_versions,
               response.reward, advantage, facts.finish_reason == LENGTH, order)
              for response, advantage, order in zip(responses, advantages, orders, strict=True)
              for facts in [response.rollout])
    return np.fromiter(values, ROW, len(responses))


def _collect_components(responses: Sequence[JudgedResponse]) -> dict[str, np.ndarray]:
    components = defaultdict[str, list[float]](list)
    for response in responses:
        for name, value in response.components.items():
            if isinstance(value, int | float):  # a verifier may also return text
                components[name].append(value)
    return {name: np.array(values, np.float64) for name, values in components.items()}

"""What of the store makes a round: the last attempt at each response, with what the reward said of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, starmap
from typing import Any

import numpy as np

from megatron_sov.base.errors import UserError
from megatron_sov.model.config import RolloutConfig
from megatron_sov.post.policy import GROUPS_LEARNING, RESPONSE_TOKENS, REWARD
from megatron_sov.rollouts.prompts import PromptPiece
from megatron_sov.rollouts.rows import LENGTH, NOT_WRITTEN, UNFINISHED, Key, RolloutPart, later
from megatron_sov.rollouts.store import RolloutStore, keys_of, problems_of
from megatron_sov.runs.rounds import TRAINED_GROUPS
from megatron_sov.work.tables.parquet import read_strings

LIGHT = ("versions", "finish_reason")
"""Columns that say what is there and how long it is."""
KEPT_OUT = "kept_out"
"""Status of a response whose last attempt breaks a rule of the store."""
PASS_RATE = "pass_rate"
"""Among the means of a round: share of its responses whose reward is `policy.right_from` or more."""
FEW_LEARN, HALF = 0.1, 0.5
"""Share of a round's groups that learn below which the run warns; where the start is far off."""
FAR_RATES = (0.05, 0.95)
"""Pass rates of the start at or outside of which nearly all responses to most prompts have one reward."""


@dataclass(frozen=True, slots=True)
class RolloutFacts:
    """A response without its tokens: what a round asks of all of them at once."""

    key: Key
    attempt: int
    finish_reason: str
    num_tokens: int
    """Behind the prompt."""
    num_written: int
    """Of these, by a policy."""
    first_version: int
    """Optimizer step of the weights that wrote the first of those; 0: there is none."""
    sum_versions: int
    """Over those."""
    part: str
    """Name of the part that it stands in."""
    row: int
    """In that part, from 0."""


def facts_of(store: RolloutStore, part: RolloutPart) -> tuple[list[RolloutFacts], list[str]]:
    """Return the rows of a part, and what is wrong with each: an empty text where nothing is.

    Raises:
        UserError: the part is damaged.
    """
    table = store.table_of(part, LIGHT)
    column = table["versions"].combine_chunks()
    versions, num_tokens = column.flatten().to_numpy().astype(np.int64), column.value_lengths().to_numpy()
    ends = np.cumsum(num_tokens, dtype=np.int64)
    is_written = versions != NOT_WRITTEN
    # what stands before each token, and behind the last: rows are differences of these
    before = np.concatenate([[0], np.cumsum(is_written)])
    totals = np.concatenate([[0], np.cumsum(np.where(is_written, versions, 0))])
    num_written = before[ends] - before[ends - num_tokens]
    sums = totals[ends] - totals[ends - num_tokens]
    places = np.append(np.flatnonzero(is_written), 0)  # a row that nobody wrote may be the last
    first = np.where(num_written > 0, np.append(versions, 0)[places[before[ends - num_tokens]]], 0)
    rows = zip(keys_of(table), table["attempt"].to_pylist(), read_strings(table["finish_reason"]),
               num_tokens.tolist(), num_written.tolist(), first.tolist(), sums.tolist(), strict=True)
    facts = [RolloutFacts(key, attempt, reason, tokens, written, version, total, part.name, i)
             for i, (key, attempt, reason, tokens, written, version, total) in enumerate(rows)]
    return facts, problems_of(table)


@dataclass(frozen=True, slots=True)
class PublishedResponse:
    """One response of a group that has a reward."""

    rollout: RolloutFacts
    reward: float
    components: Mapping[str, float]


ROW = np.dtype([
    ("part", np.int32), ("row", np.int32), ("tokens", np.int32), ("written", np.int32),
    ("versions", np.int64), ("reward", np.float64), ("advantage", np.float64), ("is_cut", np.bool_),
    ("order", np.int32)])
"""What a round asks of a response that has a reward: index among the round's parts, row in that part; of
`RolloutFacts` tokens, those a policy wrote and the sum of their versions; its reward and its advantage in its
group alone; whether the limit of tokens ended it; its place among the documents of its group, -1: none."""


@dataclass(frozen=True)
class JudgedGroup:
    """What is learned of the responses to one prompt, before the other groups of its step are seen."""

    advantages: np.ndarray
    """[responses] float64."""
    learned: list[int]
    """Indices of those that are learned, in the order of their documents."""
    reason: str
    """Why none is; else `LEARNS` of advantages."""


@dataclass(frozen=True)
class GatheredPiece:
    """A piece of a round, as one process hands it to the one that plans the round: numbers, not objects."""

    number: int
    """From 0."""
    rows: np.ndarray
    """[responses] `ROW`, of those that have a reward, in order of prompts and of samples."""
    counts: list[int]
    """Of these, by prompt; some may have none."""
    reasons: list[str]
    """Why each prompt's group is left out; `LEARNS` of advantages."""
    domains: list[str]
    """Of each prompt."""
    components: dict[str, np.ndarray]
    """Name -> [n] float64, of the responses that have it."""
    unfinished: set[str]
    """Prompts of which a response is not finished."""
    unjudged: Counter[str]
    """Status -> responses without a reward, which are not trained."""
    begun: set[tuple[int, str]]
    """Step and digest of the policies that began responses, in their first attempt."""
    policies: set[str]


@dataclass(frozen=True)
class Gathered:
    """A round that is complete, or as complete as it has to be: what its pieces have, one after the other."""

    number: int
    """Of the round, from 1."""
    parts: tuple[RolloutPart, ...]
    """Where all of this stands."""
    pieces: tuple[GatheredPiece, ...]

    @cached_property
    def rows(self) -> np.ndarray:
        return np.concatenate([piece.rows for piece in self.pieces])

    @cached_property
    def groups(self) -> list[slice]:
        """The rows of each prompt of the round."""
        ends = np.cumsum([0, *(count for piece in self.pieces for count in piece.counts)]).tolist()
        return list(starmap(slice, pairwise(ends)))

    @cached_property
    def group_of_row(self) -> np.ndarray:
        """[rows] int64."""
        counts = [count for piece in self.pieces for count in piece.counts]
        return np.repeat(np.arange(len(counts)), counts)

    @cached_property
    def reasons(self) -> list[str]:
        return [reason for piece in self.pieces for reason in piece.reasons]

    @cached_property
    def domain_of_row(self) -> list[str]:
        return [domain for piece in self.pieces
                for domain, count in zip(piece.domains, piece.counts, strict=True) for _ in range(count)]

    @property
    def components(self) -> dict[str, np.ndarray]:
        names = sorted({name for piece in self.pieces for name in piece.components})
        return {name: np.concatenate([piece.components[name] for piece in self.pieces
                                      if name in piece.components]) for name in names}

    @property
    def unjudged(self) -> dict[str, int]:
        # those that are kept out are told first
        total = sum((piece.unjudged for piece in self.pieces), Counter[str]())
        return {name: total[name] for name in sorted(total, key=lambda name: name != KEPT_OUT)}


def _places(learned: Sequence[int], count: int) -> list[int]:
    """Return the place of each of some responses among those that are learned, -1: it is not."""
    found = dict(zip(learned, range(len(learned)), strict=True))
    return [found.get(i, -1) for i in range(count)]


Judge = Callable[[Sequence[Sequence[PublishedResponse]]], Sequence[JudgedGroup]]
"""Groups of responses -> what is learned of each in itself."""


@dataclass(frozen=True)
class RoundOfStore:
    """Where a round's responses are looked for."""

    store: RolloutStore
    number: int
    """Of the round, from 1."""
    pieces: Sequence[PromptPiece]
    """All that it may have."""
    num_pieces: int
    """Of these, the first ones that are asked; others may be there for another run."""
    samples_per_prompt: int
    """Responses to each prompt."""
    reward_version: str

    @cached_property
    def prompts(self) -> list[str]:
        """Ids of the prompts that are asked, in order."""
        return [prompt for piece in self.pieces[:self.num_pieces] for prompt in piece.prompts.ids]

    def parts(self) -> list[RolloutPart] | str:
        """Return the parts of the round, or what it still lacks.

        Raises:
            UserError: the store holds responses in other pieces.
        """
        there = self.store.parts(self.number)
        self._refuse_other_pieces(there)
        parts = [part for part in there if part.piece < self.num_pieces]
        return self._lacking(parts) or parts

    def gather(self, number: int, parts: Mapping[int, RolloutPart], judge: Judge,
               domain: Callable[[str], str]) -> GatheredPiece:
        """Return a piece of the round.

        Args:
            number: of the piece, from 0.
            parts: those of the piece, by their place among all of the round.
            judge: gives groups of it their advantages.
            domain: prompt -> what it is about.

        Raises:
            UserError: the store holds responses to other prompts, or a part is damaged.
        """
        place = {part.name: i for i, part in parts.items()}
        rows, num_kept_out = self._last_rows(list(parts.values()))
        unjudged = Counter({KEPT_OUT: num_kept_out} if num_kept_out else {})
        # A place for every prompt: one without responses still counts as a group of its step.
        found: dict[str, list[PublishedResponse]] = {
            prompt: [] for prompt in self.pieces[number].prompts.ids}
        finished = defaultdict[str, list[RolloutFacts]](list)
        for row in rows:
            if row.finish_reason != UNFINISHED:
                finished[row.part].append(row)
        for part in parts.values():
            judged = self.store.judgements(self.reward_version, [part])
            for row in finished[part.name]:
                said = judged.get((row.key, row.attempt))
                if said is None or said.reward is None:
                    unjudged["missing" if said is None else said.status] += 1
                else:
                    found[row.key.prompt].append(PublishedResponse(row, said.reward, said.components))
        groups = [sorted(group, key=lambda r: r.rollout.key.sample) for group in found.values()]
        responses, said_of = [r for group in groups for r in group], judge(groups)
        components = defaultdict[str, list[float]](list)
        for response in responses:
            for name, value in response.components.items():
                if isinstance(value, int | float):  # a verifier may also say in words what it found
                    components[name].append(value)
        judged_rows = (pair for said in said_of for pair in zip(
            said.advantages.tolist(), _places(said.learned, len(said.advantages)), strict=True))
        facts = ((place[r.rollout.part], r.rollout.row, r.rollout.num_tokens, r.rollout.num_written,
                  r.rollout.sum_versions, r.reward, value, r.rollout.finish_reason == LENGTH, order)
                 for r, (value, order) in zip(responses, judged_rows, strict=True))
        return GatheredPiece(
            number, np.fromiter(facts, ROW, len(responses)), list(map(len, groups)),
            [said.reason for said in said_of], list(map(domain, found)),
            {name: np.array(listed, np.float64) for name, listed in components.items()},
            {row.key.prompt for row in rows if row.finish_reason == UNFINISHED}, unjudged,
            {(r.rollout.first_version, r.rollout.key.policy) for r in responses if not r.rollout.attempt},
            {r.rollout.key.policy for r in responses})

    def waits(self, gathered: Gathered) -> str:
        """Return which responses the round waits for; "": for none."""
        # Only unfinished responses are waited for: what the reward failed on does not come by waiting.
        waiting = sum(len(piece.unfinished) for piece in gathered.pieces)
        if not waiting:
            return ""
        return f"{waiting} of {len(self.prompts)} groups wait for responses that are not finished"

    def _lacking(self, parts: Sequence[RolloutPart]) -> str:
        count = self.num_pieces
        # Attempt 0 has a row for every response of a piece, finished or not.
        written = {part.piece for part in parts if part.attempt == 0}
        unwritten = [piece for piece in range(count) if piece not in written]
        if unwritten:
            return f"{len(unwritten)} of {count} pieces are not written yet, the first is {unwritten[0]}"
        unjudged = [part.name for part in parts if not self.store.has_part(part.name, self.reward_version)]
        if unjudged:
            return (f"{len(unjudged)} of {len(parts)} parts are not judged yet by reward version "
                    f"{self.reward_version[:12]}, the first is {unjudged[0]}")
        return ""

    def _last_rows(self, parts: Sequence[RolloutPart]) -> tuple[list[RolloutFacts], int]:
        """Return the last attempt at each response, and the number of those that are kept out: what stands
        behind an unfinished row stands in its place, sound or not, and nobody goes on with it again."""
        rows: list[RolloutFacts] = []
        kept_out: set[tuple[Key, int]] = set()
        for part in parts:
            found, problems = facts_of(self.store, part)
            self._refuse_other_prompts(part, found)
            rows += found
            kept_out |= {(row.key, row.attempt) for row, problem in zip(found, problems, strict=True)
                         if problem}
        last = later(rows)
        sound = [row for row in last if (row.key, row.attempt) not in kept_out]
        return sound, len(last) - len(sound)

    def _prompts_of(self, piece: int) -> set[str]:
        return set(self.pieces[piece].prompts.ids) if piece < len(self.pieces) else set()

    def _refuse_other_pieces(self, parts: Sequence[RolloutPart]) -> None:
        """Raise `UserError` where a part was cut otherwise: some pieces would be taken for the whole
        round."""
        for part in parts:
            num_rows = len(self._prompts_of(part.piece)) * self.samples_per_prompt
            if part.num_rows > num_rows or (part.attempt == 0 and part.num_rows != num_rows):
                raise UserError(f"{part.path}: has {part.num_rows:,} responses, and rollout.piece_prompts, "
                                "rollout.prompts_per_round and rollout.samples_per_prompt make "
                                f"{num_rows:,}; give the settings that they were written with, or another "
                                "--store")

    def _refuse_other_prompts(self, part: RolloutPart, rows: Sequence[RolloutFacts]) -> None:
        others = {row.key.prompt for row in rows}.difference(self._prompts_of(part.piece))
        if others:
            raise UserError(f"{self.store.path}: round {self.number} holds responses to prompt "
                            f"{min(others)}, which is none of piece {part.piece} now; pass the --prompts and "
                            "rollout settings that they were written with, or another --store")


def means_of(gathered: Gathered, rollout: RolloutConfig, right_from: float | None) -> dict[str, Any]:
    """Return means over the responses of a round that have a reward, trained or not.

    Args:
        gathered: the round.
        rollout: says which optimizer step the round is trained from.
        right_from: least reward of a right response; None: nothing judges, so that there is no reward to tell
            rather than one of 0.
    """
    rows, has_reward = gathered.rows, right_from is not None
    if not len(rows):
        return {"responses": 0}
    num_written = int(rows["written"].sum())
    trained_steps = (gathered.number - 1) * rollout.steps_per_round
    # Steps between the policy that wrote a token and the one that begins to train on it.
    behind = trained_steps * num_written - int(rows["versions"].sum())
    rewards = defaultdict[str, list[float]](list)
    for domain, reward in zip(gathered.domain_of_row, rows["reward"].tolist(), strict=True):
        rewards[domain].append(reward)
    return {
        "responses": len(rows), **({} if right_from is None else {
            "reward": _mean(rows["reward"]), PASS_RATE: _mean(rows["reward"] >= right_from)}),
        "components": {name: _mean(values) for name, values in gathered.components.items()},
        "response_tokens": _mean(rows["written"]), "truncated": _mean(rows["is_cut"]),
        "staleness_steps": behind / max(1, num_written), "domains": {
            name: {"responses": len(values), **({"reward": _mean(values)} if has_reward else {})}
            for name, values in sorted(rewards.items()) if name}}


def _mean(values: np.ndarray | Sequence[float]) -> float:
    # side by side, since a sum over places apart may add in another order
    return float(np.array(values, np.float64).mean())


def meters_of_round(content: Mapping[str, Any]) -> dict[str, float]:
    """Return the headline meters of a round, by its manifest."""
    means, groups = content.get("means") or {}, content.get("groups") or {}
    found = {REWARD: means.get("reward"), RESPONSE_TOKENS: means.get("response_tokens")}
    count = sum(groups.values())
    if count:
        found[GROUPS_LEARNING] = groups.get(TRAINED_GROUPS, 0) / count
    return {name: float(value) for name, value in found.items() if value is not None}


def describe_groups(groups: Mapping[str, int]) -> str:
    """Return the groups of a round in words: "3 learns, 2 no advantage"."""
    return ", ".join(f"{number:,} {reason.replace('_', ' ')}" for reason, number in groups.items())


def doubt_of_round(content: Mapping[str, Any], *, is_first: bool) -> str:
    """Return a sentence on a round of which few groups learn, with the remedy; "" where enough do.

    Args:
        content: of the round's manifest.
        is_first: whether the model that the run starts from wrote it: then a pass rate near 0 or 1 is told as
            soon as it leaves less than half of the groups to learn.
    """
    groups, rate = content.get("groups") or {}, (content.get("means") or {}).get(PASS_RATE)
    count = sum(groups.values())
    share = groups.get(TRAINED_GROUPS, 0) / count if count else 1.0
    is_far = rate is not None and not FAR_RATES[0] < rate < FAR_RATES[1]
    if share >= (HALF if is_first and is_far else FEW_LEARN):
        return ""
    told = f"{groups.get(TRAINED_GROUPS, 0):,} of {count:,} groups learn ({describe_groups(groups)})"
    if rate is None:
        return f"{told}; the others have responses of equal worth, or too few"
    measured = "`sov-data difficulty` measures pass rates and selects by them"
    if not is_far:
        return (f"{told}, and {rate:.1%} of the responses are right: each prompt is solved always or never; "
                f"take prompts in between ({measured})")
    if rate < HALF:
        return (f"{told}, and only {rate:.1%} of the responses are right: take easier prompts ({measured}), "
                "or fine-tune on right answers first (`megatron-sov sft`)")
    return (f"{told}, and {rate:.1%} of the responses are right already: take harder prompts ({measured}), "
            "or end the run")

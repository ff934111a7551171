"""What of the store makes a round: the last attempt at each response, with what the reward said of it; and
what came after its round was published, which joins a later one."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_sov.base.artifacts import MANIFEST, read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.rollouts.prompts import PromptPiece
from megatron_sov.rollouts.rows import NOT_WRITTEN, UNFINISHED, Key, RolloutPart, later
from megatron_sov.rollouts.store import RolloutStore, keys_of, problems_of
from megatron_sov.train.data.rounds import folder_of_round
from megatron_sov.work.tables.parquet import texts_of

LIGHT = ("versions", "finish_reason")
"""Columns that say what is there and how long it is."""
KEPT_OUT = "kept_out"
"""Status of a response whose last attempt breaks a rule of the store."""
LATE, LATE_FROM = "late", "late_from"
"""In a round's manifest: what was left out of it, as [prompt, sample]; and what of earlier rounds has joined
it, as [round, prompt, sample, why it is not learned, or ""]."""


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
    rows = zip(keys_of(table), table["attempt"].to_pylist(), texts_of(table["finish_reason"]),
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


@dataclass(frozen=True)
class Gathered:
    """A round that is complete, or as complete as it has to be."""

    number: int
    """Of the round, from 1."""
    groups: tuple[tuple[PublishedResponse, ...], ...]
    """Responses to each prompt of the round, in order of prompts and of samples; some may have none."""
    late: tuple[Key, ...]
    """Responses that are not finished, and not trained."""
    unjudged: Mapping[str, int]
    """Status -> responses without a reward, which are not trained."""
    parts: tuple[RolloutPart, ...]
    """Where all of this stands."""


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
    missing_share: float
    """Share of its groups that may go without their unfinished responses."""

    @cached_property
    def prompts(self) -> list[str]:
        """Ids of the prompts that are asked, in order."""
        return [prompt for piece in self.pieces[:self.num_pieces] for prompt in piece.prompts.ids]

    def gather(self) -> Gathered | str:
        """Return the round, or what it still lacks.

        Raises:
            UserError: the store holds responses to other prompts, or in other pieces, or a part is damaged.
        """
        there = self.store.parts(self.number)
        self._refuse_other_pieces(there)
        parts = [part for part in there if part.piece < self.num_pieces]
        if lacking := self._lacking(parts):
            return lacking
        rows, num_kept_out = self._last_rows(parts)
        late = tuple(row.key for row in rows if row.finish_reason == UNFINISHED)
        # Only late responses are waited for: what the reward failed on does not come by waiting.
        waiting = len({key.prompt for key in late})
        if waiting > self.missing_share * len(self.prompts):
            return (f"{waiting} of {len(self.prompts)} groups wait for responses that are not finished "
                    f"(policy.missing_share = {self.missing_share:g})")
        unjudged = Counter({KEPT_OUT: num_kept_out} if num_kept_out else {})
        # A place for every prompt: one without responses still counts as a group of its step.
        groups: dict[str, list[PublishedResponse]] = {prompt: [] for prompt in self.prompts}
        finished = defaultdict[str, list[RolloutFacts]](list)
        for row in rows:
            if row.finish_reason != UNFINISHED:
                finished[row.part].append(row)
        # part by part: what a reward says beside its number is no more needed then
        for part in parts:
            judged = self.store.judgements(self.reward_version, [part])
            for row in finished[part.name]:
                said = judged.get((row.key, row.attempt))
                if said is None or said.reward is None:
                    unjudged["missing" if said is None else said.status] += 1
                else:
                    groups[row.key.prompt].append(PublishedResponse(row, said.reward, said.components))
        ordered = (tuple(sorted(group, key=lambda r: r.rollout.key.sample)) for group in groups.values())
        return Gathered(self.number, tuple(ordered), late, dict(unjudged), tuple(parts))

    def _lacking(self, parts: Sequence[RolloutPart]) -> str:
        count = self.num_pieces
        # Attempt 0 has a row for every response of a piece, finished or not.
        written = {part.piece for part in parts if part.attempt == 0}
        unwritten = [piece for piece in range(count) if piece not in written]
        if unwritten:
            return f"{len(unwritten)} of {count} pieces are not written yet, the first is {unwritten[0]}"
        unjudged = [part.name for part in parts if not self.store.has(part.name, self.reward_version)]
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


@dataclass(frozen=True)
class LateGroup:
    """Late responses to one prompt that have been judged since, with all others of their group."""

    number: int
    """Round that they were written for, from 1."""
    group: tuple[PublishedResponse, ...]
    """All responses of the group that have a reward, by sample: what the late ones are compared with."""
    joining: Mapping[Key, RolloutPart]
    """Late responses that have a reward, with the parts that they stand in."""
    without: Mapping[Key, str]
    """Late responses that the reward has looked at and not judged -> its status."""


def late_groups(rounds: Path, source: RoundOfStore) -> list[LateGroup]:
    """Return what may join a round, by round and in the order in which it was left out.

    Args:
        rounds: RUN/rounds, with the rounds before it.
        source: of the round that is to be published.

    Raises:
        UserError: a manifest or a part cannot be read.
    """
    return [group for number, waiting in _waiting(rounds, source.number).items() if waiting
            for group in _judged_since(replace(source, number=number), waiting)]


def late_responses(groups: Sequence[LateGroup]) -> Iterator[tuple[RolloutPart, list[PublishedResponse]]]:
    """Yield the late responses of groups by the part that they stand in, in its order."""
    parts = {part.name: part for group in groups for part in group.joining.values()}
    joining = [r for group in groups for r in group.group if r.rollout.key in group.joining]
    for name, part in parts.items():
        yield part, sorted((r for r in joining if r.rollout.part == name), key=lambda r: r.rollout.row)


def _waiting(rounds: Path, before: int) -> dict[int, list[tuple[str, int]]]:
    """Return what was left out of each published round and has joined none yet: prompts and samples."""
    found: dict[int, list[tuple[str, int]]] = {}
    joined: set[tuple[int, str, int]] = set()
    for number in range(1, before):
        folder = folder_of_round(rounds, number)
        if (folder / MANIFEST).is_file():
            content = read_manifest(folder, "tokens").content
            found[number] = [(prompt, sample) for prompt, sample in content.get(LATE, ())]
            # A late response joins once, even where no advantage came of it.
            joined |= {(first, prompt, sample) for first, prompt, sample, _ in content.get(LATE_FROM, ())}
    return {number: [late for late in left_out if (number, *late) not in joined]
            for number, left_out in found.items()}


def _judged_since(source: RoundOfStore, waiting: Sequence[tuple[str, int]]) -> Iterator[LateGroup]:
    """Yield the groups of a round with late responses that the reward has looked at."""
    store, parts = source.store, source.store.parts(source.number)
    last: dict[Key, tuple[RolloutFacts, RolloutPart]] = {}
    for part in sorted(parts, key=lambda part: part.attempt):
        # By attempt, so the last one at each response stays.
        last |= {row.key: (row, part) for row, problem in zip(*facts_of(store, part), strict=True)
                 if not problem}
    judged = store.judgements(source.reward_version, parts)
    said = {row.key: judged[row.key, row.attempt] for row, _ in last.values()
            if row.finish_reason != UNFINISHED and (row.key, row.attempt) in judged}
    for prompt in dict.fromkeys(prompt for prompt, _ in waiting):
        late = [key for key in said if key.prompt == prompt and (prompt, key.sample) in waiting]
        group = tuple(PublishedResponse(last[key][0], reward, said[key].components)
                      for key in sorted(said, key=lambda key: key.sample)
                      if key.prompt == prompt and (reward := said[key].reward) is not None)
        if late:
            yield LateGroup(source.number, group,
                            {key: last[key][1] for key in late if said[key].reward is not None},
                            {key: said[key].status for key in late if said[key].reward is None})

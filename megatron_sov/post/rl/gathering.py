"""What a round is made of: the last attempt at each response, with what the reward said of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_sov.errors import UserError
from megatron_sov.rollouts.parts import Part
from megatron_sov.rollouts.rows import UNFINISHED, Judged, Key, Rollout, later
from megatron_sov.rollouts.store import Store

LIGHT = ("versions", "finish_reason")
"""Columns that say what is there and how long it is."""
KEPT_OUT = "kept_out"
"""Status of a response whose last attempt breaks a rule of the store."""


@dataclass(frozen=True)
class Response:
    """One response of a group that has a reward."""

    rollout: Rollout
    judged: Judged

    @property
    def reward(self) -> float:
        """Return the reward that it has."""
        assert self.judged.reward is not None, f"{self.rollout.key} has no reward"
        return self.judged.reward


@dataclass(frozen=True)
class Gathered:
    """A round that is complete, or as complete as it has to be; of rollouts the `LIGHT` columns alone."""

    number: int
    """Of the round, from 1."""
    groups: tuple[tuple[Response, ...], ...]
    """Responses to each prompt of the round, in order of prompts and of samples; some may have none."""
    late: tuple[Key, ...]
    """Responses that are not finished, and not trained."""
    unjudged: Mapping[str, int]
    """Status -> responses without a reward, which are not trained."""
    parts: tuple[Part, ...]
    """Where all of this stands."""

    def pieces(self) -> Iterator[list[Part]]:
        """Yield the parts of each piece, whose prompts follow those of the piece before."""
        for piece in sorted({part.piece for part in self.parts}):
            yield [part for part in self.parts if part.piece == piece]


@dataclass(frozen=True)
class RoundOfStore:
    """Where a round's responses are looked for."""

    store: Store
    number: int
    """Of the round, from 1."""
    prompts: Sequence[str]
    """Ids of its prompts, in order."""
    piece_prompts: int
    """Prompts of a piece."""
    samples_per_prompt: int
    """Responses to each prompt."""
    reward_version: str
    missing_share: float
    """Share of its groups that may go without their unfinished responses."""

    def gather(self) -> Gathered | str:
        """Return the round, or what it still lacks.

        Raises:
            UserError: the store holds responses to other prompts, or in other pieces, or a part is damaged.
        """
        parts = self.store.rollout_parts(self.number)
        self._refuse_other_pieces(parts)
        if lacking := self._lacking(parts):
            return lacking
        rows, num_kept_out = self._last_rows(parts)
        late = tuple(row.key for row in rows if row.finish_reason == UNFINISHED)
        waiting = len({key.prompt for key in late})
        if waiting > self.missing_share * len(self.prompts):
            return (f"{waiting} of {len(self.prompts)} groups wait for responses that are not finished "
                    f"(policy.missing_share = {self.missing_share:g})")
        judged = self.judged(parts)
        unjudged = Counter({KEPT_OUT: num_kept_out} if num_kept_out else {})
        groups: dict[str, list[Response]] = {prompt: [] for prompt in self.prompts}
        for row in sorted(rows, key=lambda row: row.key.sample):
            said = judged.get((row.key, row.attempt))
            if row.finish_reason == UNFINISHED:
                continue
            if said is None or said.reward is None:
                unjudged["missing" if said is None else said.status] += 1
                continue
            groups[row.key.prompt].append(Response(row, said))
        return Gathered(self.number, tuple(map(tuple, groups.values())), late, dict(unjudged), tuple(parts))

    def judged(self, parts: Sequence[Part]) -> dict[tuple[Key, int], Judged]:
        """Return what the reward said of the rows of some parts, by key and attempt."""
        return {(said.key, said.attempt): said for part in parts
                for said in self.store.read_rewards(self.reward_version, part.name)}

    def _lacking(self, parts: Sequence[Part]) -> str:
        count = -(-len(self.prompts) // self.piece_prompts)
        written = {part.piece for part in parts if part.attempt == 0}
        unwritten = [piece for piece in range(count) if piece not in written]
        if unwritten:
            return f"{len(unwritten)} of {count} pieces are not written yet, the first is {unwritten[0]}"
        unjudged = [part.name for part in parts if not self.store.has_rewards(self.reward_version, part.name)]
        if unjudged:
            return (f"{len(unjudged)} of {len(parts)} parts are not judged yet by reward version "
                    f"{self.reward_version[:12]}, the first is {unjudged[0]}")
        return ""

    def _last_rows(self, parts: Sequence[Part]) -> tuple[list[Rollout], int]:
        """Return the last attempt at each response, and the number of those that are kept out: what stands
        behind an unfinished row stands in its place, sound or not, and nobody goes on with it again."""
        rows: list[Rollout] = []
        kept_out: set[tuple[Key, int]] = set()
        for part in parts:
            found, problems = self.store.read_all(part.name, LIGHT)
            self._refuse_other_prompts(part, found)
            rows += found
            kept_out |= {(row.key, row.attempt) for row, problem in zip(found, problems, strict=True)
                         if problem}
        last = later(rows)
        sound = [row for row in last if (row.key, row.attempt) not in kept_out]
        return sound, len(last) - len(sound)

    def _prompts_of(self, piece: int) -> Sequence[str]:
        return self.prompts[piece * self.piece_prompts:(piece + 1) * self.piece_prompts]

    def _refuse_other_pieces(self, parts: Sequence[Part]) -> None:
        """Raise `UserError` where a part was cut otherwise: some pieces would be taken for the whole
        round."""
        for part in parts:
            num_rows = len(self._prompts_of(part.piece)) * self.samples_per_prompt
            if part.num_rows > num_rows or (part.attempt == 0 and part.num_rows != num_rows):
                raise UserError(f"{part.path}: has {part.num_rows:,} responses, and rollout.piece_prompts = "
                                f"{self.piece_prompts} with rollout.samples_per_prompt = "
                                f"{self.samples_per_prompt} make {num_rows:,}; give the settings that "
                                "they were written with, or another --store")

    def _refuse_other_prompts(self, part: Part, rows: Sequence[Rollout]) -> None:
        others = {row.key.prompt for row in rows}.difference(self._prompts_of(part.piece))
        if others:
            raise UserError(f"{self.store.path}: round {self.number} holds responses to prompt "
                            f"{min(others)}, which is none of piece {part.piece} now; pass the --prompts and "
                            "rollout settings that they were written with, or another --store")

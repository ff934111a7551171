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
    reward_version: str
    missing_share: float
    """Share of its groups that may go without their unfinished responses."""

    def gather(self) -> Gathered | str:
        """Return the round, or what it still lacks.

        Raises:
            UserError: the store holds responses to other prompts, or a part is damaged.
        """
        parts = self.store.rollout_parts(self.number)
        if lacking := self._lacking(parts):
            return lacking
        rows = later([row for part in parts for row in self.store.read_rollouts(part.name, LIGHT)])
        self._refuse_other_prompts(rows)
        late = tuple(row.key for row in rows if row.finish_reason == UNFINISHED)
        waiting = len({key.prompt for key in late})
        if waiting > self.missing_share * len(self.prompts):
            return (f"{waiting} of {len(self.prompts)} groups wait for responses that are not finished "
                    f"(policy.missing_share = {self.missing_share:g})")
        judged = self.judged(parts)
        unjudged: Counter[str] = Counter()
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

    def _refuse_other_prompts(self, rows: Sequence[Rollout]) -> None:
        others = {row.key.prompt for row in rows} - set(self.prompts)
        if others:
            raise UserError(f"{self.store.path}: round {self.number} holds responses to prompt "
                            f"{min(others)}, which is none of its {len(self.prompts)} prompts now; pass the "
                            "--prompts and rollout settings that they were written with, or another --store")

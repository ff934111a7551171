"""The rollout store: the table that generation, reward and training share.

    STORE/store.json                      what all parts share: tokenizer and vocabulary
    STORE/rollouts/NAME/                  a part: responses to the prompts of one piece
    STORE/rewards/VERSION/NAME/           what one reward said of them
    STORE/claims/                         who works on what

The same rows may be published twice, at whatever time they were written; other rows are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_sov.base.errors import UserError, warn
from megatron_sov.judge.rollouts import columns
from megatron_sov.judge.rollouts.rows import (
    Key, RewardRow, Rollout, RolloutPart, later, numbers_in, part_name)
from megatron_sov.work.tables.table import AlreadyPublished, Table

_Row = TypeVar("_Row", Rollout, RewardRow)
Judgements = dict[tuple[Key, int], RewardRow]
"""Key and attempt of a row -> what a reward said of it."""


class RolloutStore(Table[RolloutPart]):
    """A store that exists; `RolloutStore.create` takes the tokenizer's digest and its vocabulary's size."""

    WHAT, HEAD, ROWS, ADDED, VERSION = "rollout store", "store.json", "rollouts", "rewards", "reward_version"
    CLAIM, FIRST, EXAMPLE, PART = "reward", "round", part_name(1, 0), RolloutPart
    IDENTITY = {"tokenizer": str, "vocab_size": int}
    MADE_BY = "pass a folder that `megatron-sov rl run` or `rl generate` wrote"
    REPEATED, SPLIT = columns.REPEATED, columns.SPLIT
    key_of = staticmethod(numbers_in)

    @staticmethod
    def tell(identity: Mapping[str, Any]) -> str:
        return f"tokenizer {str(identity.get('tokenizer'))[:24]}, {identity.get('vocab_size')} ids"

    @property
    def tokenizer_digest(self) -> str:
        return str(self.identity["tokenizer"])

    @property
    def vocab_size(self) -> int:
        """Return what token ids lie below."""
        return int(self.identity["vocab_size"])

    def add_rollouts(self, name: str, rows: Sequence[Rollout], provenance: Mapping[str, Any]) -> None:
        """Publish a part of rollouts; rows with problems are written too, and kept out where rows are read.

        Args:
            name: see `part_name`.
            rows: of that round.
            provenance: JSON values: what wrote them.

        Raises:
            AlreadyPublished: there is a part of that name with other rows, which stay.
            UserError: the rows cannot be written.
        """
        path, numbers = self.part_path(name), numbers_in(name)
        if numbers is not None and (strangers := {row.round for row in rows} - {numbers[0]}):
            raise ValueError(f"{name}: has a row of round {strangers.pop()}")
        table = _converted(path, lambda: columns.rollouts_table(rows, self.vocab_size))
        if not self.publish(name, "", table, provenance, sum(map(bool, table["problem"].to_pylist()))):
            _refuse_others(path, self.read_all(name)[0], rows, _without_times)

    def add_rewards(self, version: str, name: str, rows: Sequence[RewardRow],
                    provenance: Mapping[str, Any] | None = None) -> None:
        """Publish what a reward said of a part's rows.

        Args:
            version: of the reward; that of each row.
            name: of the part of rollouts.
            rows: one for each row that was judged.
            provenance: JSON values: what wrote them.

        Raises:
            AlreadyPublished: there is a part of that name with other rows, which stay.
            UserError: the rows cannot be written.
        """
        path = self.part_path(name, version)
        if strangers := {row.reward_version for row in rows} - {version}:
            raise ValueError(f"{name}: has a reward of version {strangers.pop()!r}, not {version!r}")
        table = _converted(path, lambda: columns.rewards_table(rows))
        if not self.publish(name, version, table, provenance or {}):
            _refuse_others(path, self.read_rewards(version, name), rows, repr)

    def read_rollouts(self, name: str, fields: Sequence[str] | None = None) -> list[Rollout]:
        """Return the rows of a part, those with a problem left out, which a warning counts.

        Args:
            name: of the part.
            fields: to read (`columns.NAMES`); the others are empty, and a row's key, round and attempt are
                always there.  None: all.

        Raises:
            UserError: there is no such part, or it is damaged.
        """
        rows, problems = self.read_all(name, fields)
        if (count := sum(map(bool, problems))) and name not in self._told:
            self._told.add(name)
            i = next(i for i, problem in enumerate(problems) if problem)
            warn(f"{self.part_path(name)}: {count:,} of {len(rows):,} rows are kept out; the first is "
                 f"row {i}: {problems[i]}")
        return [row for row, problem in zip(rows, problems, strict=True) if not problem]

    def read_all(self, name: str, fields: Sequence[str] | None = None) -> tuple[list[Rollout], list[str]]:
        """Return all rows of a part, and what is wrong with each: an empty text where nothing is.

        Args:
            name: of the part.
            fields: as `read_rollouts` has them.

        Raises:
            UserError: there is no such part, or it is damaged.
        """
        part, names = self.part(name), columns.NAMES if fields is None else fields
        table = self.read(part, columns.schema_for(names))
        rows = _converted(part.file, lambda: columns.rollouts_of(table, names))
        if strangers := {row.round for row in rows} - {part.round}:
            raise UserError(f"{part.file}: has a row of round {strangers.pop()}; the store did not write it")
        problems = columns.problems_of(table)
        if set(columns.RULES) <= set(names) and not columns.all_sound(table, self.vocab_size):
            # a stranger who wrote it may not have looked
            problems = [problem or "; ".join(row.problems(self.vocab_size))
                        for problem, row in zip(problems, rows, strict=True)]
        return rows, problems

    def read_rewards(self, version: str, name: str) -> list[RewardRow]:
        """Return what a reward said of the rows of a part.

        Raises:
            UserError: there is no such part, or it is damaged.
        """
        part = self.part(name, version)
        return _converted(part.file, lambda: columns.rewards_of(self.read(part, columns.REWARDS)))

    def judgements(self, version: str, parts: Sequence[RolloutPart]) -> Judgements:
        """Return what a reward said of the rows of those parts that it has judged."""
        return {(said.key, said.attempt): said for part in parts if self.has(part.name, version)
                for said in self.read_rewards(version, part.name)}

    def pieces(self, parts: Sequence[RolloutPart], fields: Sequence[str] | None = None
               ) -> Iterator[tuple[list[RolloutPart], list[Rollout], int]]:
        """Yield the parts of each piece, the last attempt at each of its responses, and how many rows of it
        such attempts replace; no more of the rows is in memory at a time.

        Args:
            parts: of one round.
            fields: as `read_rollouts` has them.
        """
        for piece in sorted({part.piece for part in parts}):
            here = [part for part in parts if part.piece == piece]
            rows = [row for part in here for row in self.read_rollouts(part.name, fields)]
            last = later(rows)
            yield here, last, len(rows) - len(last)


def _converted(where: Path, convert: Callable[[], Any]) -> Any:
    """Return what a conversion of rows gives; what it finds wrong names the part."""
    try:
        return convert()
    except (ValueError, OverflowError) as e:
        raise UserError(f"{where}: a row holds what the store does not take: {e}") from None


def _refuse_others(path: Path, there: Sequence[_Row], rows: Sequence[_Row],
                   what: Callable[[_Row], Any]) -> None:
    """Raise `AlreadyPublished` where published rows are not these."""
    if len(there) == len(rows) and all(what(a) == what(b) for a, b in zip(there, rows, strict=True)):
        return
    raise AlreadyPublished(f"{path}: another job has published {len(there):,} rows under this name, which "
                           f"stay; these {len(rows):,} differ and are dropped")


def _without_times(row: Rollout) -> tuple[Any, ...]:
    """Return what makes a rollout what it is, arrays to the bit; when it was written does not count."""
    values = {name: getattr(row, name) for name in columns.NAMES if name not in ("began_s", "ended_s")}
    return (row.key, row.attempt, *((value.tobytes(), value.shape) if isinstance(value, np.ndarray) else value
                                    for value in values.values()))

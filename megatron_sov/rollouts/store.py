"""The rollout store: the table that generation, reward and training share.

    STORE/store.json                      tokenizer and vocabulary of all parts
    STORE/rollouts/NAME/                  a part: responses to the prompts of one piece
    STORE/rewards/VERSION/NAME/           rewards of these responses by one version
    STORE/claims/                         pieces and parts that jobs work on

Equal rows may be published twice; a second publication with other rows is dropped.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from megatron_sov.base.errors import UserError, warn
from megatron_sov.chat.vocabulary import tokenizer_digest
from megatron_sov.rollouts.rows import (
    JUDGED, Key, RewardRow, Rollout, RolloutPart, format_part_name, parse_part_name, select_last_attempts)
from megatron_sov.rollouts.tables import (
    NAMES, REPEATED, REWARDS, RULES, SPLIT, are_rows_sound, read_problems, rewards_to_table,
    rollouts_to_table, select_schema, table_to_rewards, table_to_rollouts)
from megatron_sov.work.tables.parquet import REBUILD_HINT
from megatron_sov.work.tables.table import AlreadyPublished, Table

_Row = TypeVar("_Row", Rollout, RewardRow)
RewardsByRow = dict[tuple[Key, int], RewardRow]
"""(key, attempt) -> reward."""


class RolloutStore(Table[RolloutPart]):
    """An existing store; `RolloutStore.create` takes the digest of the tokenizer and the vocabulary size.

    >>> store = RolloutStore.create("rollouts", "sha256:0123", 2048)
    >>> store.add_rollouts(format_part_name(1, 0), [], {"policy": "initial"})
    >>> RolloutStore.open("rollouts").vocab_size
    2048
    """

    NOUN, HEAD, ROWS, ADDED, VERSION = "rollout store", "store.json", "rollouts", "rewards", "reward_version"
    CLAIM, FIRST, EXAMPLE, PART = "reward", "round", format_part_name(1, 0), RolloutPart
    IDENTITY = {"tokenizer": str, "vocab_size": int}
    CREATE_HINT = "pass a folder that `megatron-sov rl run` or `rl generate` wrote"
    REPEATED, SPLIT = REPEATED, SPLIT
    key_of = staticmethod(parse_part_name)

    @staticmethod
    def tell(identity: Mapping[str, Any]) -> str:
        return f"tokenizer {str(identity.get('tokenizer'))[:24]}, {identity.get('vocab_size')} ids"

    def is_written_in(self, tokenizer: Path) -> bool:
        """Return whether the store uses the tokenizer in the folder `tokenizer`."""
        return self.tokenizer_digest == tokenizer_digest(tokenizer)

    @property
    def tokenizer_digest(self) -> str:
        return str(self.identity["tokenizer"])

    @property
    def vocab_size(self) -> int:
        """Upper bound for token ids."""
        return int(self.identity["vocab_size"])

    def add_rollouts(self, name: str, rows: Sequence[Rollout], provenance: Mapping[str, Any]) -> None:
        """Publish a part with rollouts, including rows with problems, which readers skip. Raises
        `AlreadyPublished`: the part exists with other rows, which stay. Raises `UserError`: the rows cannot
        be written."""
        path, numbers = self.part_path(name), parse_part_name(name)
        if numbers is not None and (strangers := {row.round for row in rows} - {numbers[0]}):
            raise ValueError(f"{name}: has a row of round {strangers.pop()}")
        table = _convert_rows(path, lambda: rollouts_to_table(rows, self.vocab_size))
        # If another job published first, equal rows are accepted and different rows refused.
        if not self.publish(name, "", table, provenance, sum(map(bool, table["problem"].to_pylist()))):
            _check_same_rows(path, self.read_rows_with_problems(name)[0], rows, _drop_times)

    def add_rewards(self, version: str, name: str, rows: Sequence[RewardRow],
                    provenance: Mapping[str, Any] | None = None) -> None:
        """Publish rewards for the rows in a part. Raises `AlreadyPublished`: the rewards exist with other
        rows, which stay. Raises `UserError`: the rows cannot be written."""
        path = self.part_path(name, version)
        if strangers := {row.reward_version for row in rows} - {version}:
            raise ValueError(f"{name}: has a reward of version {strangers.pop()!r}, not {version!r}")
        table = _convert_rows(path, lambda: rewards_to_table(rows))
        if not self.publish(name, version, table, provenance or {}):
            _check_same_rows(path, self.read_rewards(version, name), rows, repr)

    def read_rollouts(self, name: str, fields: Sequence[str] | None = None) -> list[Rollout]:
        """Return the sound rows in a part, and warn about the number of invalid rows.

        Args:
            name: of the part.
            fields: fields to read (`NAMES`) in addition to key, round and attempt; None: all.
        """
        rows, problems = self.read_rows_with_problems(name, fields)
        if (count := sum(map(bool, problems))) and name not in self._told:
            self._told.add(name)
            i = next(i for i, problem in enumerate(problems) if problem)
            warn(f"{self.part_path(name)}: {count:,} of {len(rows):,} rows break a rule and are "
                 f"skipped; the first is row {i}: {problems[i]}")
        return [row for row, problem in zip(rows, problems, strict=True) if not problem]

    def read_rows_with_problems(self, name: str, fields: Sequence[str] | None = None
                                ) -> tuple[list[Rollout], list[str]]:
        """Return a part's rows, and a problem per row ("": none); arguments as in `read_rollouts`."""
        part, names = self.part(name), NAMES if fields is None else fields
        table = self.read_columns(part, names)
        rows = _convert_rows(part.file, lambda: table_to_rollouts(table, names))
        problems = read_problems(table)
        # Rules can be checked only if all columns in `RULES` were read.
        if set(RULES) <= set(names) and not are_rows_sound(table, self.vocab_size):
            # Another program may have written the part without these checks.
            problems = [problem or "; ".join(row.problems(self.vocab_size))
                        for problem, row in zip(problems, rows, strict=True)]
        return rows, problems

    def read_columns(self, part: RolloutPart, fields: Sequence[str]) -> pa.Table:
        """Return fields of all rows in a part as columns, without `Rollout.problems`."""
        table = self.read(part, select_schema(fields))
        if strangers := set(table["round"].unique().to_pylist()) - {part.round}:
            raise UserError(f"{part.file}: has a row of round {strangers.pop()}; the store did not write it")
        return table

    def read_rewards(self, version: str, name: str, rollouts: RolloutPart | None = None) -> list[RewardRow]:
        """Return the rewards for the rows in a part. Raises `UserError`: the rewards do not exist, are
        damaged, or judge rows that were replaced."""
        part = self.part(name, version)
        # Rows that were deleted and generated again have equal keys.
        if rollouts is None and self.part_path(name).exists():
            rollouts = self.part(name)
        if rollouts is not None and part.provenance.get(
                JUDGED, rollouts.manifest_sha256) != rollouts.manifest_sha256:
            raise UserError(f"{part.path}: judges other rows than {self.part_path(name)} has now; delete it, "
                            "and the rows are judged again")
        rows = _convert_rows(part.file, lambda: table_to_rewards(self.read(part, REWARDS)))
        for i, row in enumerate(rows):
            if row.reward_version != version:
                raise UserError(f"{part.file}: row {i} is of reward version {row.reward_version!r}, not "
                                f"{version!r}; {REBUILD_HINT}")
            if row.reward is not None and not math.isfinite(row.reward):
                raise UserError(f"{part.file}: row {i} has a reward of {row.reward}, which is not finite; "
                                f"{REBUILD_HINT}")
        return rows

    def read_judgements(self, version: str, parts: Sequence[RolloutPart]) -> RewardsByRow:
        return {(reward.key, reward.attempt): reward for part in parts
                if self.part_path(part.name, version).exists()
                for reward in self.read_rewards(version, part.name, part)}

    def iter_pieces(self, parts: Sequence[RolloutPart], fields: Sequence[str] | None = None
                    ) -> Iterator[tuple[list[RolloutPart], list[Rollout], int]]:
        """Yield, piece by piece: parts, last attempts (see `select_last_attempts`), and the number of
        replaced rows; `fields` as in `read_rollouts`."""
        for piece in sorted({part.piece for part in parts}):
            # All attempts at a response are in parts with the same piece number.
            piece_parts = [part for part in parts if part.piece == piece]
            rows = [row for part in piece_parts for row in self.read_rollouts(part.name, fields)]
            last = select_last_attempts(rows)
            yield piece_parts, last, len(rows) - len(last)


@dataclass(frozen=True)
class StoreSettings:
    """Folder of a rollout store, and the tokenizer for `tokens`."""

    path: Path
    tokenizer: Path
    """Folder with the tokenizer.json."""
    vocab_size: int

    def open(self) -> RolloutStore:
        """Open or create the store. Raises `UserError`: the tokenizer cannot be read, or `path` is no store
        or has another tokenizer."""
        return RolloutStore.create(self.path, tokenizer_digest(self.tokenizer), self.vocab_size)


def _convert_rows(where: Path, convert: Callable[[], Any]) -> Any:
    """Convert rows; errors name the part."""
    try:
        return convert()
    except (ValueError, OverflowError) as e:
        raise UserError(f"{where}: a row does not fit the store: {e}") from None


def _check_same_rows(path: Path, published: Sequence[_Row], rows: Sequence[_Row],
                     identify: Callable[[_Row], Any]) -> None:
    """Raise `AlreadyPublished` if the published rows differ from `rows`."""
    if len(published) == len(rows) and all(
            identify(a) == identify(b) for a, b in zip(published, rows, strict=True)):
        return
    raise AlreadyPublished(f"{path}: another job has published {len(published):,} rows under this name, "
                           f"which stay; these {len(rows):,} differ and are dropped")


def _drop_times(row: Rollout) -> tuple[Any, ...]:
    """Return a rollout's fields except `began_s` and `ended_s`, for comparison to the bit."""
    values = {name: getattr(row, name) for name in NAMES if name not in ("began_s", "ended_s")}
    # Bytes instead of values: -0.0 and 0.0 differ, and NaN equals NaN.
    return (row.key, row.attempt, *((value.tobytes(), value.shape) if isinstance(value, np.ndarray) else value
                                    for value in values.values()))

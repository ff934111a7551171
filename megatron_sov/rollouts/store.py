"""The rollout store: a folder that jobs on many machines write to and read from at once.

    STORE/store.json                      what all parts share: tokenizer and vocabulary
    STORE/rollouts/NAME/                  a part: responses to the prompts of one piece
    STORE/rewards/VERSION/NAME/           what one reward said of them
    STORE/claims/                         who works on what, see `work.claims`

Parts never change, and of two of one name the first one stays: whoever reads needs no lock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_sov.artifacts import atomic_write, disk_errors, fsync_path, to_json
from megatron_sov.errors import UserError
from megatron_sov.obs.warning import warn
from megatron_sov.outputs import refuse_nowhere
from megatron_sov.rollouts import tables
from megatron_sov.rollouts.parts import (
    REWARDS,
    ROLLOUTS,
    AlreadyPublished,
    Part,
    numbers_in,
    open_part,
    read_part,
    write_part,
)
from megatron_sov.rollouts.rows import Judged, Key, Rollout

STORE, CLAIMS = "store.json", "claims"
FORMAT_VERSION = 1
VERSION_CHARS = 12
"""Of a reward's version, in the name of its folder."""
_Row = TypeVar("_Row", Rollout, Judged)


class Store:
    """A store that exists; obtained from `Store.open` or `Store.create`."""

    def __init__(self, path: Path, tokenizer_digest: str, vocab_size: int) -> None:
        self.path = path
        """Its folder."""
        self.tokenizer_digest = tokenizer_digest
        """Of the tokenizer that all rows are written with."""
        self.vocab_size = vocab_size
        """What token ids lie below."""
        self.identity = {"tokenizer": tokenizer_digest, "vocab_size": vocab_size}
        """What stands in the manifest of each of its parts."""
        self._told: set[str] = set()

    @staticmethod
    def open(path: str | Path) -> Store:
        """Return the store in a folder.

        Raises:
            UserError: there is none, or it is newer than this version reads.
        """
        file = Path(path) / STORE
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            if raw["format_version"] > FORMAT_VERSION:
                raise UserError(f"{file}: format_version {raw['format_version']} is newer than "
                                f"{FORMAT_VERSION}, the newest that this version reads; update megatron-sov")
            found = Store(Path(path), raw["tokenizer"], raw["vocab_size"])
            if not isinstance(found.tokenizer_digest, str) or type(found.vocab_size) is not int:
                raise ValueError("tokenizer must be text, vocab_size a whole number")
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{path}: is no rollout store (it has no {STORE}); pass a folder that "
                            "`megatron-sov rl run` or `rl generate` wrote") from None
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise UserError(f"{file}: is damaged ({e}); restore it from a copy") from None
        for name in (ROLLOUTS, REWARDS, CLAIMS):  # a copy may lack those that were empty
            with contextlib.suppress(OSError):
                (found.path / name).mkdir(exist_ok=True)
        return found

    @staticmethod
    def create(path: str | Path, tokenizer_digest: str, vocab_size: int) -> Store:
        """Return the store in a folder, which is made where it is not there yet, also by several at once.

        Args:
            path: the folder.
            tokenizer_digest: of the tokenizer that all rows are written with.
            vocab_size: what token ids lie below.

        Raises:
            UserError: the store is one of another tokenizer, or the folder is taken by something else.
        """
        path = Path(path)
        refuse_nowhere(path)
        identity = {"tokenizer": tokenizer_digest, "vocab_size": vocab_size}
        if not (path / STORE).is_file():
            _make(path, identity)
        found = Store.open(path)
        if found.identity != identity:
            raise UserError(f"{path}: is a store of tokenizer {found.tokenizer_digest} with "
                            f"{found.vocab_size:,} ids, and this is {tokenizer_digest} with {vocab_size:,}; "
                            "choose another store")
        return found

    @property
    def claims(self) -> Path:
        """Return the folder of `Claims`."""
        return self.path / CLAIMS

    def rollouts_path(self, name: str) -> Path:
        """Return the folder of a part's rollouts, be it there or not."""
        return self.path / ROLLOUTS / _checked(name)

    def rewards_path(self, version: str, name: str) -> Path:
        """Return the folder of what a reward said of a part, be it there or not."""
        if not re.fullmatch(r"[\w-]+", version):
            raise ValueError(f"reward version {version!r}: must be of letters, digits, '_' and '-'")
        return self.path / REWARDS / version[:VERSION_CHARS] / _checked(name)

    def add_rollouts(self, name: str, rows: Sequence[Rollout], provenance: Mapping[str, Any]) -> Path:
        """Publish a part of rollouts; rows with problems are written too, and kept out where rows are read.

        Args:
            name: see `part_name`.
            rows: of that round.
            provenance: JSON values: what wrote them.

        Returns:
            Its folder; the same rows (at whatever time they were written) may be published again.

        Raises:
            AlreadyPublished: there is a part of that name with other rows, which stay.
            UserError: the rows cannot be written.
        """
        path, numbers = self.rollouts_path(name), numbers_in(name)
        if numbers is not None and (strangers := {row.round for row in rows} - {numbers[0]}):
            raise ValueError(f"{name}: has a row of round {strangers.pop()}")
        table = _converted(path, lambda: tables.rollouts_table(rows, self.vocab_size))
        kept_out = sum(map(bool, table["problem"].to_pylist()))
        content = {"num_kept_out": kept_out, "store": self.identity}
        if not write_part(path, ROLLOUTS, table, content, provenance):
            _refuse_others(path, self.read_all(name)[0], rows, _without_times)
        return path

    def add_rewards(self, version: str, name: str, rows: Sequence[Judged],
                    provenance: Mapping[str, Any] | None = None) -> Path:
        """Publish what a reward said of a part's rows.

        Args:
            version: of the reward; that of each row.
            name: of the part of rollouts.
            rows: one for each row that was judged.
            provenance: JSON values: what wrote them.

        Returns:
            Its folder; the same rows may be published again.

        Raises:
            AlreadyPublished: there is a part of that name with other rows, which stay.
            UserError: the rows cannot be written.
        """
        path = self.rewards_path(version, name)
        if strangers := {row.reward_version for row in rows} - {version}:
            raise ValueError(f"{name}: has a reward of version {strangers.pop()!r}, not {version!r}")
        table = _converted(path, lambda: tables.rewards_table(rows))
        content = {"reward_version": version, "store": self.identity}
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        if not write_part(path, REWARDS, table, content, provenance or {}):
            _refuse_others(path, self.read_rewards(version, name), rows, repr)
        return path

    def has_rollouts(self, name: str) -> bool:
        """Return whether a part is published.

        Raises:
            UserError: it is there and torn, or of another store.
        """
        return self._is_there(self.rollouts_path(name), ROLLOUTS)

    def has_rewards(self, version: str, name: str) -> bool:
        """Return whether a reward has judged a part.

        Raises:
            UserError: what it said is there and torn, or of another store or version.
        """
        path = self.rewards_path(version, name)
        return self._is_there(path, REWARDS) and self._of_version(path, version) is not None

    def rollout_parts(self, round: int | None = None) -> list[Part]:
        """Return the parts of a round (None: of all), by round, piece and attempt.  Foreign and torn ones are
        kept out and named in a warning, once."""
        return self._parts(self.path / ROLLOUTS, ROLLOUTS, round)

    def reward_versions(self) -> list[str]:
        """Return the folders of rewards, by the beginning of their version."""
        folder = self.path / REWARDS
        return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))

    def reward_parts(self, version: str, round: int | None = None) -> list[Part]:
        """Return the parts of a reward, by its version or the name of its folder, as `rollout_parts` does."""
        folder = self.path / REWARDS / version[:VERSION_CHARS]
        return self._parts(folder, REWARDS, round) if folder.is_dir() else []

    def read_rollouts(self, name: str, columns: Sequence[str] | None = None) -> list[Rollout]:
        """Return the rows of a part, those with a problem left out, which a warning counts.

        Args:
            name: of the part.
            columns: fields to read (`tables.NAMES`); the others are empty, and a row's key, round and attempt
                are always there.  None: all.

        Raises:
            UserError: there is no such part, or it is damaged.
        """
        rows, problems = self.read_all(name, columns)
        if (count := sum(map(bool, problems))) and name not in self._told:
            self._told.add(name)
            i = next(i for i, problem in enumerate(problems) if problem)
            warn(f"{self.rollouts_path(name)}: {count:,} of {len(rows):,} rows are kept out; the first is "
                 f"row {i}: {problems[i]}")
        return [row for row, problem in zip(rows, problems, strict=True) if not problem]

    def read_all(self, name: str, columns: Sequence[str] | None = None) -> tuple[list[Rollout], list[str]]:
        """Return all rows of a part, and what is wrong with each: an empty text where nothing is.

        Args:
            name: of the part.
            columns: as `read_rollouts` has them.

        Raises:
            UserError: there is no such part, or it is damaged.
        """
        part = self._part(self.rollouts_path(name), ROLLOUTS)
        names = tables.NAMES if columns is None else columns
        table = read_part(part, tables.schema_for(names))
        rows = _converted(part.file, lambda: tables.rollouts_of(table, names))
        if strangers := {row.round for row in rows} - {part.round}:
            raise UserError(f"{part.file}: has a row of round {strangers.pop()}; the store did not write it")
        problems = tables.problems_of(table)
        if set(tables.RULES) <= set(names) and not tables.all_sound(table, self.vocab_size):
            # a stranger who wrote it may not have looked
            problems = [problem or "; ".join(row.problems(self.vocab_size))
                        for problem, row in zip(problems, rows, strict=True)]
        return rows, problems

    def read_rewards(self, version: str, name: str) -> list[Judged]:
        """Return what a reward said of the rows of a part.

        Raises:
            UserError: there is no such part, or it is damaged.
        """
        part = self._of_version(self.rewards_path(version, name), version)
        return _converted(part.file, lambda: tables.rewards_of(read_part(part, tables.REWARDS)))

    def index(self, round: int | None = None) -> Iterator[tuple[Part, list[tuple[Key, int]]]]:
        """Yield each part of a round (None: of all) with key and attempt of its rows, those that are kept out
        left out; nothing else is read."""
        for part in self.rollout_parts(round):
            table = read_part(part, tables.KEYS)
            heads = zip(tables.keys_of(table), table["attempt"].to_pylist(), strict=True)
            yield part, [head for head, problem in zip(heads, tables.problems_of(table), strict=True)
                         if not problem]

    def _part(self, path: Path, kind: str) -> Part:
        return open_part(path, kind, self.identity)

    def _of_version(self, path: Path, version: str) -> Part:
        part = self._part(path, REWARDS)
        if part.reward_version != version:
            raise UserError(f"{path}: is of reward version {part.reward_version!r}, whose first "
                            f"{VERSION_CHARS} characters are those of {version!r}; change that reward's "
                            "settings")
        return part

    def _is_there(self, path: Path, kind: str) -> bool:
        return path.exists() and self._part(path, kind) is not None

    def _parts(self, folder: Path, kind: str, round: int | None) -> list[Part]:
        numbered = [(numbers_in(name), folder / name) for name in os.listdir(folder)
                    if not name.startswith(".")]
        found = []
        for numbers, path in sorted(numbered, key=lambda item: (item[0] or (0, 0, 0), item[1])):
            if numbers is not None and round not in (None, numbers[0]):
                continue
            try:
                found.append(self._part(path, kind))
            except UserError as e:
                if str(e) not in self._told:
                    self._told.add(str(e))
                    warn(f"kept out: {e}")
        return found


def _make(path: Path, identity: Mapping[str, Any]) -> None:
    """Make an empty store, unless another one is first."""
    built = path.with_name(f".{path.name}.new-{uuid.uuid4().hex}")
    with disk_errors(path):
        try:
            for name in (ROLLOUTS, REWARDS, CLAIMS):
                (built / name).mkdir(parents=True)
            atomic_write(built / STORE, to_json({"format_version": FORMAT_VERSION, **identity}))
            os.rename(built, path)
            fsync_path(path.parent)
        except OSError as e:
            if (path / STORE).is_file():
                return
            if e.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise UserError(f"{path}: is not empty and no rollout store; choose another folder") from None
            raise
        finally:
            shutil.rmtree(built, ignore_errors=True)


def _checked(name: str) -> str:
    if numbers_in(name) is None:
        raise ValueError(f"{name!r} is no name of a part (part_name makes one)")
    return name


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
    values = {name: getattr(row, name) for name in tables.NAMES if name not in ("began_s", "ended_s")}
    return (row.key, row.attempt, *((value.tobytes(), value.shape) if isinstance(value, np.ndarray) else value
                                    for value in values.values()))

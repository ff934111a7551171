"""The rollout store: the table that generation, reward and training share.

    STORE/store.json                      what all parts share: tokenizer and vocabulary
    STORE/rollouts/NAME/                  a part: responses to the prompts of one piece
    STORE/rewards/VERSION/NAME/           what one reward said of them
    STORE/claims/                         who works on what

The same rows may be published twice, at whatever time they were written; other rows are dropped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from megatron_sov.base.errors import UserError, warn
from megatron_sov.chat.vocabulary import tokenizer_digest
from megatron_sov.rollouts.rows import (
    JUDGED, NOT_WRITTEN, Key, RewardRow, Rollout, RolloutPart, later, numbers_in, part_name)
from megatron_sov.work.tables.parquet import REBUILD_HINT, build_list_column, read_arrays, read_strings
from megatron_sov.work.tables.table import AlreadyPublished, Table


def _lists_of(element: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", element, nullable=False))


def _schema(nullable: Collection[str], **types: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=name in nullable) for name, kind in types.items()])


_KEY = {"prompt": pa.string(), "sample": pa.int32(), "policy": pa.string(), "sampling": pa.string()}
ROLLOUTS = _schema(
    ("outcome", "routes"), **_KEY, round=pa.int32(), attempt=pa.int32(), record=pa.string(),
    prompt_tokens=_lists_of(pa.int32()), tokens=_lists_of(pa.int32()), logprobs=_lists_of(pa.float32()),
    versions=_lists_of(pa.int32()), finish_reason=pa.string(), response=pa.string(), temperature=pa.float64(),
    engine=pa.string(), began_s=pa.float64(), ended_s=pa.float64(), outcome=pa.string(),
    routes=pa.large_binary(), route_layers=pa.int32(), route_top_k=pa.int32(), route_width=pa.int32(),
    problem=pa.string())
"""`problem`: what is wrong with a row, which is kept out; empty where nothing is."""
REWARDS = _schema(("reward",), **_KEY, attempt=pa.int32(), reward_version=pa.string(), reward=pa.float64(),
                  status=pa.string(), components=pa.string(), reason=pa.string())
REPEATED = (*dict.fromkeys(column.name for column in (*ROLLOUTS, *REWARDS) if column.type == pa.string()
                           and column.name != "response"), "versions.list.element")
"""Leaves that are written with a dictionary."""
SPLIT = ("logprobs.list.element",)
"""Leaves of floats that are written byte by byte."""
_ALWAYS = (*_KEY, "round", "attempt", "problem")
_ROUTES = ("routes", "route_layers", "route_top_k", "route_width")
RULES = ("prompt_tokens", "tokens", "logprobs", "versions", "temperature")
"""Columns that `Rollout.problems` asks of a row, and `routes` where they are read."""
_ARRAYS = {"prompt_tokens": np.int32, "tokens": np.int32, "logprobs": np.float32, "versions": np.int32}
_OTHERS: dict[str, Any] = {"record": {}, "finish_reason": "", "response": "", "temperature": 1.0,
                           "engine": "", "began_s": 0.0, "ended_s": 0.0, "outcome": None, "routes": None}
"""Field -> what a row has in its place where it was not asked for."""
NAMES = (*_ARRAYS, *_OTHERS)
"""Fields that can be asked for; a row's key, round and attempt are always read."""


def rollouts_table(rows: Sequence[Rollout], vocab_size: int) -> pa.Table:
    """Return rows as columns.

    Args:
        rows: to convert.
        vocab_size: what token ids must lie below.

    Raises:
        ValueError: a record or an outcome is not what JSON holds, or routes are no bytes.
    """
    lists_of = {name: build_list_column([getattr(row, name) for row in rows], dtype)
                for name, dtype in _ARRAYS.items()}
    columns = _key_columns([row.key for row in rows]) | lists_of
    columns |= {name: [getattr(row, name) for row in rows]
                for name in ("round", "attempt", "finish_reason", "temperature", "engine", "began_s",
                             "ended_s")}
    columns["record"] = _json_texts([row.record for row in rows])
    columns["outcome"] = _json_texts([row.outcome for row in rows])
    columns["response"] = [_utf8(row.response) for row in rows]
    columns |= _route_columns(rows)
    # int64 ids would wrap around silently in an int32 column, and look sound
    wide = any(getattr(row, name).dtype != np.int32 for row in rows for name in ("prompt_tokens", "tokens"))
    columns["problem"] = [""] * len(rows)
    table = _table(columns, ROLLOUTS)
    # the common case: no row is looked at by itself
    if all_sound(table, vocab_size) and not wide:
        return table
    columns["problem"] = ["; ".join(row.problems(vocab_size)) for row in rows]
    return _table(columns, ROLLOUTS)


def all_sound(table: pa.Table, vocab_size: int) -> bool:
    """Return whether no row breaks a rule of `Rollout.problems`, asked of all at once: row by row it takes
    longer than all the rest of writing them.

    Args:
        table: has at least the columns `RULES`; where it has routes, rows are looked at one by one.
        vocab_size: what token ids must lie below.
    """
    # all tokens of all rows as one array each: the rules become a few numpy operations
    column = {name: table[name].combine_chunks() for name in _ARRAYS}
    flat = {name: array.flatten().to_numpy() for name, array in column.items()}
    lengths = {name: array.value_lengths().to_numpy() for name, array in column.items()}
    if not all(np.array_equal(lengths["tokens"], lengths[name]) for name in ("logprobs", "versions")):
        return False
    ids, logprobs = np.concatenate([flat["prompt_tokens"], flat["tokens"]]), flat["logprobs"]
    return bool((lengths["prompt_tokens"] > 0).all()
                and ((ids >= 0) & (ids < vocab_size)).all()
                # NaN fails both comparisons, so it is caught as well
                and ((logprobs <= 0) & (logprobs > -np.inf)).all()
                # a log-probability of what no policy wrote would be trained on
                and not logprobs[flat["versions"] == NOT_WRITTEN].any()
                and (table["temperature"].to_numpy() > 0).all()
                and ("routes" not in table.column_names or table["routes"].null_count == table.num_rows))


def rollouts_of(table: pa.Table, columns: Sequence[str]) -> list[Rollout]:
    """Return the rows of a table that has the columns of `schema_for`.

    Args:
        table: as `RolloutStore.read` gives it.
        columns: fields that were read; others are empty.

    Raises:
        ValueError: a field does not hold what belongs there.
    """
    read: dict[str, list[Any]] = {name: _values(table, name) for name in columns if name != "routes"}
    if "routes" in columns:
        read["routes"] = routes_of(table)
    nothing = {name: np.zeros(0, dtype) for name, dtype in _ARRAYS.items()} | _OTHERS
    left = {name: value for name, value in nothing.items() if name not in columns}
    # Rollout takes key, round and attempt by place, all else by name
    heads = zip(keys_of(table), table["round"].to_pylist(), table["attempt"].to_pylist(), strict=True)
    rows = []
    for i, (key, number, attempt) in enumerate(heads):
        fields = {name: values[i] for name, values in read.items()}
        rows.append(Rollout(key, number, attempt, **fields, **left))
    return rows


def schema_for(columns: Sequence[str]) -> pa.Schema:
    """Return the columns of a file that fields of rows are read from.

    Raises:
        ValueError: there is no such field.
    """
    if unknown := set(columns) - set(NAMES):
        raise ValueError(f"{sorted(unknown)[0]!r} is no field of a rollout (fields: {', '.join(NAMES)})")
    wanted = {*_ALWAYS, *columns, *(_ROUTES if "routes" in columns else ())}
    return pa.schema([column for column in ROLLOUTS if column.name in wanted])


def keys_of(table: pa.Table) -> list[Key]:
    return list(map(Key, *(_values(table, name) for name in _KEY)))


def problems_of(table: pa.Table) -> list[str]:
    """Return what was found wrong with each row when it was written; empty where nothing was."""
    return [str(text) for text in read_strings(table["problem"])]


def rewards_table(rows: Sequence[RewardRow]) -> pa.Table:
    """Return rewards as columns.

    Raises:
        ValueError: components are not what JSON holds.
    """
    columns = _key_columns([row.key for row in rows])
    columns |= {name: [getattr(row, name) for row in rows] for name in ("attempt", "reward")}
    columns |= {name: [_utf8(getattr(row, name)) for row in rows]
                for name in ("reward_version", "status", "reason")}
    columns["components"] = _json_texts([row.components for row in rows])
    return _table(columns, REWARDS)


def rewards_of(table: pa.Table) -> list[RewardRow]:
    """Return the rewards of a table that has the columns `REWARDS`.

    Raises:
        ValueError: a field does not hold what belongs there.
    """
    names = ("attempt", "reward_version", "reward", "status", "components", "reason")
    return list(map(RewardRow, keys_of(table), *(_values(table, name) for name in names)))


def _table(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    return pa.table([columns[column.name] if isinstance(columns[column.name], pa.Array)
                     else pa.array(columns[column.name], column.type) for column in schema], schema=schema)


def _key_columns(keys: Sequence[Key]) -> dict[str, Any]:
    return {name: [key[i] for key in keys] for i, name in enumerate(Key._fields)}


def _json_texts(values: Sequence[Mapping[str, Any] | None]) -> list[str | None]:
    """Return each value as JSON; the samples of a prompt share theirs, which is converted once."""
    # by identity, as mappings have no hash; `values` keeps them alive, so an id stays its own
    texts: dict[int, str | None] = {id(None): None}
    for value in values:
        if id(value) not in texts:
            texts[id(value)] = _json_text(value)
    return [texts[id(value)] for value in values]


def _json_text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    # half of a surrogate pair is no UTF-8: escaped it can be read back exactly
    return text if _utf8(text) == text else json.dumps(value, allow_nan=False)


def _utf8(text: str) -> str:
    """Return a text that UTF-8 can hold; half of a surrogate pair, which a broken engine may send, becomes a
    question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _route_columns(rows: Sequence[Rollout]) -> dict[str, list[Any]]:
    shapes = [(0, 0, 0) if row.routes is None else _route_shape(row.routes) for row in rows]
    layers, top_k, width = (list(column) for column in zip(*shapes, strict=True)) if rows else ([], [], [])
    return {"routes": [None if row.routes is None else row.routes.tobytes() for row in rows],
            "route_layers": layers, "route_top_k": top_k, "route_width": width}


def _route_shape(routes: np.ndarray) -> tuple[int, int, int]:
    if routes.ndim != 3 or routes.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"routes of shape {routes.shape} and type {routes.dtype}: must be [tokens, layers, "
                         "K] of uint8 or uint16")
    return routes.shape[1], routes.shape[2], routes.dtype.itemsize


def routes_of(table: pa.Table) -> list[np.ndarray | None]:
    """Return the routes of each row, as views; None where it has none.

    Raises:
        ValueError: bytes that are no routes.
    """
    buffers = (scalar.as_buffer() if scalar.is_valid else None
               for chunk in table["routes"].chunks for scalar in chunk)
    shapes = zip(*(table[name].to_pylist() for name in _ROUTES[1:]), strict=True)
    return [None if buffer is None else _array_of(buffer, *shape)
            for buffer, shape in zip(buffers, shapes, strict=True)]


def _array_of(buffer: Any, layers: int, top_k: int, width: int) -> np.ndarray:
    token_bytes = layers * top_k * width
    if layers < 1 or top_k < 1 or width not in (1, 2) or buffer.size % token_bytes:
        raise ValueError(f"routes of {buffer.size:,} bytes are not [tokens, {layers}, {top_k}] of {width} "
                         "bytes each")
    # a view of Arrow's memory: routes are the largest column, and are not copied
    return np.frombuffer(buffer, f"<u{width}").reshape(-1, layers, top_k)


def _values(table: pa.Table, name: str) -> list[Any]:
    column = table[name]
    if pa.types.is_dictionary(column.type):
        texts = read_strings(column)
        return _from_json(texts) if name in ("record", "outcome", "components") else texts
    return read_arrays(column) if pa.types.is_list(column.type) else column.to_pylist()


def _from_json(texts: Sequence[str | None]) -> list[Any]:
    """Return what each text stands for; equal ones become one object."""
    # samples of one prompt share one record, in memory too
    found: dict[str | None, Any] = {None: None}
    read: Callable[[str], Any] = json.loads
    for text in texts:
        if text is not None and text not in found:
            try:
                found[text] = read(text)
            except RecursionError:
                raise ValueError("JSON that is nested too deep") from None
            if not isinstance(found[text], dict):
                raise ValueError(f"{text[:40]!r} is no JSON object")
    return [found[text] for text in texts]


_Row = TypeVar("_Row", Rollout, RewardRow)
Judgements = dict[tuple[Key, int], RewardRow]
"""Key and attempt of a row -> what a reward said of it."""


class RolloutStore(Table[RolloutPart]):
    """A store that exists; `RolloutStore.create` takes the tokenizer's digest and its vocabulary's size.

    >>> store = RolloutStore.create("rollouts", "sha256:0123", 2048)
    >>> store.add_rollouts(part_name(1, 0), [], {"policy": "initial"})
    >>> RolloutStore.open("rollouts").vocab_size
    2048
    """

    NOUN, HEAD, ROWS, ADDED, VERSION = "rollout store", "store.json", "rollouts", "rewards", "reward_version"
    CLAIM, FIRST, EXAMPLE, PART = "reward", "round", part_name(1, 0), RolloutPart
    IDENTITY = {"tokenizer": str, "vocab_size": int}
    CREATE_HINT = "pass a folder that `megatron-sov rl run` or `rl generate` wrote"
    REPEATED, SPLIT = REPEATED, SPLIT
    key_of = staticmethod(numbers_in)

    @staticmethod
    def tell(identity: Mapping[str, Any]) -> str:
        return f"tokenizer {str(identity.get('tokenizer'))[:24]}, {identity.get('vocab_size')} ids"

    @classmethod
    def create_for(cls, path: str | Path, tokenizer: Path, vocab_size: int) -> RolloutStore:
        """Return the store of a folder for responses in the tokens of a tokenizer; see `create`.

        Args:
            path: the store's folder.
            tokenizer: folder with the tokenizer.json.
            vocab_size: number that token ids lie below.

        Raises:
            UserError: as `create`, or the tokenizer cannot be read.
        """
        return cls.create(path, tokenizer_digest(tokenizer), vocab_size)

    def is_written_in(self, tokenizer: Path) -> bool:
        """Return whether the rollouts are tokens of the tokenizer in a folder."""
        return self.tokenizer_digest == tokenizer_digest(tokenizer)

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
        table = _converted(path, lambda: rollouts_table(rows, self.vocab_size))
        # another job was first: equal rows are fine, since the work is deterministic; other rows are refused
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
        table = _converted(path, lambda: rewards_table(rows))
        if not self.publish(name, version, table, provenance or {}):
            _refuse_others(path, self.read_rewards(version, name), rows, repr)

    def read_rollouts(self, name: str, fields: Sequence[str] | None = None) -> list[Rollout]:
        """Return the rows of a part, those with a problem left out, which a warning counts.

        Args:
            name: of the part.
            fields: to read (`NAMES`); the others are empty, and a row's key, round and attempt are
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
        part, names = self.part(name), NAMES if fields is None else fields
        table = self.table_of(part, names)
        rows = _converted(part.file, lambda: rollouts_of(table, names))
        problems = problems_of(table)
        # only where all columns of the rules were read
        if set(RULES) <= set(names) and not all_sound(table, self.vocab_size):
            # a stranger who wrote it may not have looked
            problems = [problem or "; ".join(row.problems(self.vocab_size))
                        for problem, row in zip(problems, rows, strict=True)]
        return rows, problems

    def table_of(self, part: RolloutPart, fields: Sequence[str]) -> pa.Table:
        """Return fields of all rows of a part as columns, and with them those that are always read; rules of
        rows are not looked at.

        Raises:
            UserError: the part is damaged.
        """
        table = self.read(part, schema_for(fields))
        if strangers := set(table["round"].unique().to_pylist()) - {part.round}:
            raise UserError(f"{part.file}: has a row of round {strangers.pop()}; the store did not write it")
        return table

    def read_rewards(self, version: str, name: str, rollouts: RolloutPart | None = None) -> list[RewardRow]:
        """Return what a reward said of the rows of a part.

        Args:
            version: of the reward.
            name: of the part.
            rollouts: the part itself, where it is at hand; else its manifest is read.

        Raises:
            UserError: there is no such part, it is damaged, or judges rows that are there no more.
        """
        part = self.part(name, version)
        # rows that were deleted and written again have the keys of those that were judged
        if rollouts is None and self.part_path(name).exists():
            rollouts = self.part(name)
        if rollouts is not None and part.provenance.get(
                JUDGED, rollouts.manifest_sha256) != rollouts.manifest_sha256:
            raise UserError(f"{part.path}: judges other rows than {self.part_path(name)} has now; delete it, "
                            "and they are judged")
        rows = _converted(part.file, lambda: rewards_of(self.read(part, REWARDS)))
        for i, row in enumerate(rows):
            if row.reward_version != version:
                raise UserError(f"{part.file}: row {i} is of reward version {row.reward_version!r}, not "
                                f"{version!r}; {REBUILD_HINT}")
            if row.reward is not None and not math.isfinite(row.reward):
                raise UserError(f"{part.file}: row {i} has a reward of {row.reward}, which is no number; "
                                f"{REBUILD_HINT}")
        return rows

    def judgements(self, version: str, parts: Sequence[RolloutPart]) -> Judgements:
        return {(said.key, said.attempt): said for part in parts
                if self.part_path(part.name, version).exists()
                for said in self.read_rewards(version, part.name, part)}

    def pieces(self, parts: Sequence[RolloutPart], fields: Sequence[str] | None = None
               ) -> Iterator[tuple[list[RolloutPart], list[Rollout], int]]:
        """Yield the parts of each piece, the last attempt at each of its responses, and how many rows of it
        such attempts replace; no more of the rows is in memory at a time.

        Args:
            parts: of one round.
            fields: as `read_rollouts` has them.
        """
        for piece in sorted({part.piece for part in parts}):
            # attempts of a response are always in parts of its own piece
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
    values = {name: getattr(row, name) for name in NAMES if name not in ("began_s", "ended_s")}
    # bytes, not values: -0.0 and 0.0 differ here, and NaN equals itself
    return (row.key, row.attempt, *((value.tobytes(), value.shape) if isinstance(value, np.ndarray) else value
                                    for value in values.values()))

"""The rollout store: the table that generation, reward and training share.

    STORE/store.json                      tokenizer and vocabulary of all parts
    STORE/rollouts/NAME/                  a part: responses to the prompts of one piece
    STORE/rewards/VERSION/NAME/           rewards of these responses by one version
    STORE/claims/                         pieces and parts that jobs work on

Equal rows may be published twice; a second publication with other rows is dropped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from megatron_sov.base.errors import UserError, warn
from megatron_sov.chat.vocabulary import tokenizer_digest
from megatron_sov.rollouts.rows import (
    JUDGED, NOT_WRITTEN, Key, RewardRow, Rollout, RolloutPart, format_part_name, parse_part_name,
    select_last_attempts)
from megatron_sov.work.tables.parquet import REBUILD_HINT, build_list_column, read_arrays, read_strings
from megatron_sov.work.tables.table import AlreadyPublished, Table


def _build_list_type(element: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", element, nullable=False))


def _build_schema(nullable: Collection[str], **types: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=name in nullable) for name, kind in types.items()])


_KEY = {"prompt": pa.string(), "sample": pa.int32(), "policy": pa.string(), "sampling": pa.string()}
ROLLOUTS = _build_schema(
    ("outcome", "routes"), **_KEY, round=pa.int32(), attempt=pa.int32(), record=pa.string(),
    prompt_tokens=_build_list_type(pa.int32()), tokens=_build_list_type(pa.int32()),
    logprobs=_build_list_type(pa.float32()),
    versions=_build_list_type(pa.int32()), finish_reason=pa.string(), response=pa.string(),
    temperature=pa.float64(),
    engine=pa.string(), began_s=pa.float64(), ended_s=pa.float64(), outcome=pa.string(),
    routes=pa.large_binary(), route_layers=pa.int32(), route_top_k=pa.int32(), route_width=pa.int32(),
    problem=pa.string())
"""Column `problem`: the rules that a row breaks; "" for a sound row. Readers skip rows with problems."""
REWARDS = _build_schema(("reward",), **_KEY, attempt=pa.int32(), reward_version=pa.string(),
                        reward=pa.float64(), status=pa.string(), components=pa.string(), reason=pa.string())
REPEATED = (*dict.fromkeys(column.name for column in (*ROLLOUTS, *REWARDS) if column.type == pa.string()
                           and column.name != "response"), "versions.list.element")
"""Parquet leaves with dictionary encoding."""
SPLIT = ("logprobs.list.element",)
"""Parquet leaves with byte-stream-split encoding of floats."""
_ALWAYS = (*_KEY, "round", "attempt", "problem")
_ROUTES = ("routes", "route_layers", "route_top_k", "route_width")
RULES = ("prompt_tokens", "tokens", "logprobs", "versions", "temperature")
"""Columns that `Rollout.problems` checks; `routes` in addition if they are read."""
_ARRAYS = {"prompt_tokens": np.int32, "tokens": np.int32, "logprobs": np.float32, "versions": np.int32}
_OTHERS: dict[str, Any] = {"record": {}, "finish_reason": "", "response": "", "temperature": 1.0,
                           "engine": "", "began_s": 0.0, "ended_s": 0.0, "outcome": None, "routes": None}
"""Field -> value in rows that were read without the field."""
NAMES = (*_ARRAYS, *_OTHERS)
"""Fields that a reader can select; `key`, `round` and `attempt` are always read."""


def rollouts_to_table(rows: Sequence[Rollout], vocab_size: int) -> pa.Table:
    """Convert rows to columns. Raises `ValueError`: JSON cannot hold a record or an outcome, or routes have
    another dtype."""
    list_columns = {name: build_list_column([getattr(row, name) for row in rows], dtype)
                    for name, dtype in _ARRAYS.items()}
    columns = _key_columns([row.key for row in rows]) | list_columns
    columns |= {name: [getattr(row, name) for row in rows]
                for name in ("round", "attempt", "finish_reason", "temperature", "engine", "began_s",
                             "ended_s")}
    columns["record"] = _json_texts([row.record for row in rows])
    columns["outcome"] = _json_texts([row.outcome for row in rows])
    columns["response"] = [_replace_surrogates(row.response) for row in rows]
    columns |= _route_columns(rows)
    # int64 ids would wrap around silently in an int32 column and look valid.
    wide = any(getattr(row, name).dtype != np.int32 for row in rows for name in ("prompt_tokens", "tokens"))
    columns["problem"] = [""] * len(rows)
    table = _build_table(columns, ROLLOUTS)
    # Usually all rows are sound, and `Rollout.problems` need not run row by row.
    if are_rows_sound(table, vocab_size) and not wide:
        return table
    columns["problem"] = ["; ".join(row.problems(vocab_size)) for row in rows]
    return _build_table(columns, ROLLOUTS)


def are_rows_sound(table: pa.Table, vocab_size: int) -> bool:
    """Return whether all rows satisfy `Rollout.problems`, checked by a few numpy operations, since checks row
    by row take longer than writing. False for tables with routes."""
    column = {name: table[name].combine_chunks() for name in _ARRAYS}
    flat = {name: array.flatten().to_numpy() for name, array in column.items()}
    lengths = {name: array.value_lengths().to_numpy() for name, array in column.items()}
    if not all(np.array_equal(lengths["tokens"], lengths[name]) for name in ("logprobs", "versions")):
        return False
    ids, logprobs = np.concatenate([flat["prompt_tokens"], flat["tokens"]]), flat["logprobs"]
    return bool((lengths["prompt_tokens"] > 0).all()
                and ((ids >= 0) & (ids < vocab_size)).all()
                # NaN fails both comparisons.
                and ((logprobs <= 0) & (logprobs > -np.inf)).all()
                # Training would use log-probabilities at tokens that no policy generated.
                and not logprobs[flat["versions"] == NOT_WRITTEN].any()
                and (table["temperature"].to_numpy() > 0).all()
                and ("routes" not in table.column_names or table["routes"].null_count == table.num_rows))


def table_to_rollouts(table: pa.Table, columns: Sequence[str]) -> list[Rollout]:
    """Convert a table with the columns from `select_schema` to rows."""
    read: dict[str, list[Any]] = {name: _read_values(table, name) for name in columns if name != "routes"}
    if "routes" in columns:
        read["routes"] = read_routes(table)
    empty = {name: np.zeros(0, dtype) for name, dtype in _ARRAYS.items()} | _OTHERS
    unread = {name: value for name, value in empty.items() if name not in columns}
    heads = zip(read_keys(table), table["round"].to_pylist(), table["attempt"].to_pylist(), strict=True)
    rows = []
    for i, (key, number, attempt) in enumerate(heads):
        fields = {name: values[i] for name, values in read.items()}
        rows.append(Rollout(key, number, attempt, **fields, **unread))
    return rows


def select_schema(columns: Sequence[str]) -> pa.Schema:
    """Return the stored columns for `columns`."""
    if unknown := set(columns) - set(NAMES):
        raise ValueError(f"{sorted(unknown)[0]!r} is not a field of a rollout (fields: {', '.join(NAMES)})")
    names = {*_ALWAYS, *columns, *(_ROUTES if "routes" in columns else ())}
    return pa.schema([column for column in ROLLOUTS if column.name in names])


def read_keys(table: pa.Table) -> list[Key]:
    return list(map(Key, *(_read_values(table, name) for name in _KEY)))


def read_problems(table: pa.Table) -> list[str]:
    """Return the `problem` column; "" for sound rows."""
    return [str(text) for text in read_strings(table["problem"])]


def rewards_to_table(rows: Sequence[RewardRow]) -> pa.Table:
    """Convert rewards to columns."""
    columns = _key_columns([row.key for row in rows])
    columns |= {name: [getattr(row, name) for row in rows] for name in ("attempt", "reward")}
    columns |= {name: [_replace_surrogates(getattr(row, name)) for row in rows]
                for name in ("reward_version", "status", "reason")}
    columns["components"] = _json_texts([row.components for row in rows])
    return _build_table(columns, REWARDS)


def table_to_rewards(table: pa.Table) -> list[RewardRow]:
    """Convert a table with the columns `REWARDS` to rewards."""
    names = ("attempt", "reward_version", "reward", "status", "components", "reason")
    return list(map(RewardRow, read_keys(table), *(_read_values(table, name) for name in names)))


def _build_table(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    return pa.table([columns[column.name] if isinstance(columns[column.name], pa.Array)
                     else pa.array(columns[column.name], column.type) for column in schema], schema=schema)


def _key_columns(keys: Sequence[Key]) -> dict[str, Any]:
    return {name: [key[i] for key in keys] for i, name in enumerate(Key._fields)}


def _json_texts(values: Sequence[Mapping[str, Any] | None]) -> list[str | None]:
    """Convert each value to JSON; samples with one prompt share a record, which is converted once."""
    # By identity, since mappings have no hash. `values` holds the objects alive, so ids stay unique.
    texts: dict[int, str | None] = {id(None): None}
    for value in values:
        if id(value) not in texts:
            texts[id(value)] = _json_text(value)
    return [texts[id(value)] for value in values]


def _json_text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    # Half a surrogate pair is not valid UTF-8; the escape can be read back exactly.
    return text if _replace_surrogates(text) == text else json.dumps(value, allow_nan=False)


def _replace_surrogates(text: str) -> str:
    """Replace half surrogate pairs, which a broken engine may send, by question marks."""
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


def read_routes(table: pa.Table) -> list[np.ndarray | None]:
    """Return each row's routes as a view, or None."""
    buffers = (scalar.as_buffer() if scalar.is_valid else None
               for chunk in table["routes"].chunks for scalar in chunk)
    shapes = zip(*(table[name].to_pylist() for name in _ROUTES[1:]), strict=True)
    return [None if buffer is None else _view_routes(buffer, *shape)
            for buffer, shape in zip(buffers, shapes, strict=True)]


def _view_routes(buffer: Any, layers: int, top_k: int, width: int) -> np.ndarray:
    token_bytes = layers * top_k * width
    if layers < 1 or top_k < 1 or width not in (1, 2) or buffer.size % token_bytes:
        raise ValueError(f"routes of {buffer.size:,} bytes are not [tokens, {layers}, {top_k}] of {width} "
                         "bytes each")
    # A view into Arrow's memory, since routes are the largest column.
    return np.frombuffer(buffer, f"<u{width}").reshape(-1, layers, top_k)


def _read_values(table: pa.Table, name: str) -> list[Any]:
    column = table[name]
    if pa.types.is_dictionary(column.type):
        texts = read_strings(column)
        return _from_json(texts) if name in ("record", "outcome", "components") else texts
    return read_arrays(column) if pa.types.is_list(column.type) else column.to_pylist()


def _from_json(texts: Sequence[str | None]) -> list[Any]:
    """Parse JSON texts; equal texts become one object, as samples with one prompt share the record."""
    parsed: dict[str | None, Any] = {None: None}
    read: Callable[[str], Any] = json.loads
    for text in texts:
        if text is not None and text not in parsed:
            try:
                parsed[text] = read(text)
            except RecursionError:
                raise ValueError("JSON that is nested too deep") from None
            if not isinstance(parsed[text], dict):
                raise ValueError(f"{text[:40]!r} is not a JSON object")
    return [parsed[text] for text in texts]


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
        """Return all rows in a part, and a problem per row ("" for sound rows); arguments as in
        `read_rollouts`."""
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

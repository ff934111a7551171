"""Rows of the store as columns: what DuckDB, pandas and datasets read as it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_sov.judge.rollouts.rows import NOT_WRITTEN, Key, RewardRow, Rollout
from megatron_sov.work.tables.parquet import arrays_of, lists, texts_of


def _lists_of(element: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", element, nullable=False))


def _schema(nullable: Collection[str], **types: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=name in nullable) for name, kind in types.items()])


_KEY = {"prompt": pa.string(), "sample": pa.int32(), "policy": pa.string(), "sampling": pa.string()}
KEYS = _schema((), **_KEY, attempt=pa.int32(), problem=pa.string())
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
    lists_of = {name: lists([getattr(row, name) for row in rows], dtype) for name, dtype in _ARRAYS.items()}
    columns = _key_columns([row.key for row in rows]) | lists_of
    columns |= {name: [getattr(row, name) for row in rows]
                for name in ("round", "attempt", "finish_reason", "temperature", "engine", "began_s",
                             "ended_s")}
    columns["record"] = _json_texts([row.record for row in rows])
    columns["outcome"] = _json_texts([row.outcome for row in rows])
    columns["response"] = [_utf8(row.response) for row in rows]
    columns |= _route_columns(rows)
    wide = any(getattr(row, name).dtype != np.int32 for row in rows for name in ("prompt_tokens", "tokens"))
    columns["problem"] = [""] * len(rows)
    table = _table(columns, ROLLOUTS)
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
    column = {name: table[name].combine_chunks() for name in _ARRAYS}
    flat = {name: array.flatten().to_numpy() for name, array in column.items()}
    lengths = {name: array.value_lengths().to_numpy() for name, array in column.items()}
    if not all(np.array_equal(lengths["tokens"], lengths[name]) for name in ("logprobs", "versions")):
        return False
    ids, logprobs = np.concatenate([flat["prompt_tokens"], flat["tokens"]]), flat["logprobs"]
    return bool((lengths["prompt_tokens"] > 0).all()
                and ((ids >= 0) & (ids < vocab_size)).all()
                and ((logprobs <= 0) & (logprobs > -np.inf)).all()
                and not logprobs[flat["versions"] == NOT_WRITTEN].any()
                and (table["temperature"].to_numpy() > 0).all()
                and ("routes" not in table.column_names or table["routes"].null_count == table.num_rows))


def rollouts_of(table: pa.Table, columns: Sequence[str]) -> list[Rollout]:
    """Return the rows of a table that has the columns of `schema_for`.

    Args:
        table: as `Store.read` gives it.
        columns: fields that were read; others are empty.

    Raises:
        ValueError: a field does not hold what belongs there.
    """
    read: dict[str, list[Any]] = {name: _values(table, name) for name in columns if name != "routes"}
    if "routes" in columns:
        read["routes"] = _routes_of(table)
    nothing = {name: np.zeros(0, dtype) for name, dtype in _ARRAYS.items()} | _OTHERS
    left = {name: value for name, value in nothing.items() if name not in columns}
    heads = zip(keys_of(table), table["round"].to_pylist(), table["attempt"].to_pylist(), strict=True)
    return [Rollout(key, number, attempt, **dict(zip(read, values, strict=True)), **left)
            for (key, number, attempt), values in
            zip(heads, zip(*read.values(), strict=True) if read else [()] * table.num_rows, strict=True)]


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
    return [str(text) for text in texts_of(table["problem"])]


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
    texts: dict[int, str | None] = {id(None): None}
    for value in values:
        if id(value) not in texts:
            texts[id(value)] = _json_text(value)
    return [texts[id(value)] for value in values]


def _json_text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
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


def _routes_of(table: pa.Table) -> list[np.ndarray | None]:
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
    return np.frombuffer(buffer, f"<u{width}").reshape(-1, layers, top_k)


def _values(table: pa.Table, name: str) -> list[Any]:
    column = table[name]
    if pa.types.is_dictionary(column.type):
        texts = texts_of(column)
        return _from_json(texts) if name in ("record", "outcome", "components") else texts
    return arrays_of(column) if pa.types.is_list(column.type) else column.to_pylist()


def _from_json(texts: Sequence[str | None]) -> list[Any]:
    """Return what each text stands for; equal ones become one object."""
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

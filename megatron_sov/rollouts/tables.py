"""Arrow tables of rollouts and rewards: schemas, and conversion from and to rows."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_sov.base.documents.rows import replace_surrogates
from megatron_sov.rollouts.rows import NOT_WRITTEN, Key, RewardRow, Rollout
from megatron_sov.work.tables.parquet import build_list_column, read_arrays, read_strings

_KEY = {"prompt": pa.string(), "sample": pa.int32(), "policy": pa.string(), "sampling": pa.string()}
_ALWAYS = (*_KEY, "round", "attempt", "problem")
_ROUTES = ("routes", "route_layers", "route_top_k", "route_width")
RULES = ("prompt_tokens", "tokens", "logprobs", "versions", "temperature")
"""Columns that `Rollout.problems` checks; `routes` in addition if they are read."""
_ARRAYS = {"prompt_tokens": np.int32, "tokens": np.int32, "logprobs": np.float32, "versions": np.int32}
_OTHERS: dict[str, Any] = {"record": {}, "finish_reason": "", "response": "", "temperature": 1.0,
                           "engine": "", "began_s": 0.0, "ended_s": 0.0, "outcome": None, "routes": None}
"""Fields besides the arrays -> value in rows that are read without the field."""
NAMES = (*_ARRAYS, *_OTHERS)
"""Fields that a reader can select; `key`, `round` and `attempt` are always read."""
SPLIT = ("logprobs.list.element",)
"""Parquet leaves with byte-stream-split encoding of floats."""


def _build_list_type(element: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", element, nullable=False))


def _build_schema(nullable: Collection[str], **types: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=name in nullable) for name, kind in types.items()])


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
REWARDS = _build_schema(
    ("reward",), **_KEY, attempt=pa.int32(), reward_version=pa.string(), reward=pa.float64(),
    status=pa.string(), components=pa.string(), reason=pa.string())
REPEATED = (*dict.fromkeys(column.name for column in (*ROLLOUTS, *REWARDS) if column.type == pa.string()
                           and column.name != "response"), "versions.list.element")
"""Parquet leaves with dictionary encoding."""


def rollouts_to_table(rows: Sequence[Rollout], vocab_size: int) -> pa.Table:
    """Convert rows to a table. Raises `ValueError` if JSON cannot hold a record or outcome, or if routes have
    another shape than [tokens, layers, K] or another dtype than uint8 and uint16."""
    columns = _key_columns([row.key for row in rows])
    columns |= {name: build_list_column(values, _ARRAYS[name])
                for name, values in _attribute_columns(rows, _ARRAYS).items()}
    columns |= _attribute_columns(
        rows, ("round", "attempt", "finish_reason", "temperature", "engine", "began_s", "ended_s"))
    columns["record"] = _json_texts([row.record for row in rows])
    columns["outcome"] = _json_texts([row.outcome for row in rows])
    columns["response"] = [replace_surrogates(row.response) for row in rows]
    columns |= _route_columns(rows)
    # int64 ids would wrap around silently in an int32 column and look valid.
    is_int32 = all(row.prompt_tokens.dtype == row.tokens.dtype == np.int32 for row in rows)
    columns["problem"] = [""] * len(rows)
    table = _build_table(columns, ROLLOUTS)
    # Usually all rows are sound, and `Rollout.problems` need not run row by row.
    if are_rows_sound(table, vocab_size) and is_int32:
        return table
    columns["problem"] = ["; ".join(row.problems(vocab_size)) for row in rows]
    return _build_table(columns, ROLLOUTS)


def are_rows_sound(table: pa.Table, vocab_size: int) -> bool:
    """Return whether `Rollout.problems` finds nothing in any row. Numpy checks all rows at once, since checks
    row by row take longer than writing. False for tables with routes, which are not checked here."""
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
    values: dict[str, list[Any]] = {name: _read_values(table, name) for name in columns if name != "routes"}
    if "routes" in columns:
        values["routes"] = read_routes(table)
    defaults = {name: np.zeros(0, dtype) for name, dtype in _ARRAYS.items()} | _OTHERS
    unread = {name: default for name, default in defaults.items() if name not in columns}
    heads = zip(read_keys(table), table["round"].to_pylist(), table["attempt"].to_pylist(), strict=True)
    rows = []
    for i, (key, round, attempt) in enumerate(heads):
        fields = {name: column[i] for name, column in values.items()}
        rows.append(Rollout(key, round, attempt, **fields, **unread))
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
    columns |= _attribute_columns(rows, ("attempt", "reward"))
    columns |= {name: list(map(replace_surrogates, texts)) for name, texts
                in _attribute_columns(rows, ("reward_version", "status", "reason")).items()}
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


def _attribute_columns(rows: Sequence[object], names: Iterable[str]) -> dict[str, list[Any]]:
    return {name: list(map(attrgetter(name), rows)) for name in names}


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
    return text if replace_surrogates(text) == text else json.dumps(value, allow_nan=False)


def _route_columns(rows: Sequence[Rollout]) -> dict[str, list[Any]]:
    shapes = [(0, 0, 0) if row.routes is None else _route_shape(row.routes) for row in rows]
    layers, top_k, width = np.array(shapes, np.int64).reshape(-1, 3).T.tolist()
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
    for text in texts:
        if text is not None and text not in parsed:
            try:
                parsed[text] = json.loads(text)
            except RecursionError:
                raise ValueError("JSON that is nested too deep") from None
            if not isinstance(parsed[text], dict):
                raise ValueError(f"{text[:40]!r} is not a JSON object")
    return [parsed[text] for text in texts]

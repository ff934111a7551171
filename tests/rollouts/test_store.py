"""The store: what goes in comes out to the bit, parts never change, and what is foreign or torn is named."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sov.errors import UserError
from megatron_sov.rollouts import columns
from megatron_sov.rollouts.rows import NOT_WRITTEN, Judged, Key, Rollout, numbers_in, part_name
from megatron_sov.rollouts.store import Store
from megatron_sov.work.tables.parquet import read_table, write_table
from megatron_sov.work.tables.table import AlreadyPublished

VOCAB_SIZE = 100


def rollout(sample: int = 0, **changes: Any) -> Rollout:
    """A sound row of round 1: two tokens of a policy around one of a tool."""
    row = Rollout(Key("p0", sample, "f" * 64, "s" * 64), 1, 0, {"prompt": "2 + 2?", "answer": "4"},
                  np.array([1, 2], np.int32), np.array([5, 6, 7], np.int32),
                  np.array([-0.5, 0, -1.25], np.float32), np.array([3, NOT_WRITTEN, 4], np.int32), "stop",
                  "네 4", 1.0, "transformers", 10.5, 11.5)
    return dataclasses.replace(row, **changes)


def judged(row: Rollout, reward: float | None = 1.0, **changes: Any) -> Judged:
    """What reward v1 said of a row."""
    found = Judged(row.key, row.attempt, "v1" * 8, reward, "failed" if reward is None else "scored",
                   {"format": 0.5})
    return dataclasses.replace(found, **changes)


def bits(row: Rollout | Judged) -> dict[str, Any]:
    """Return a row as values that can be compared, arrays with their type, shape and bits."""
    return {field.name: (value.dtype.str, value.shape, value.tobytes()) if isinstance(value, np.ndarray)
            else repr(value) if isinstance(value, float) else value
            for field in dataclasses.fields(row) for value in [getattr(row, field.name)]}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty one."""
    return Store.create(tmp_path / "store", "sha256:ab", VOCAB_SIZE)


def test_a_part_is_written_and_read(store: Store) -> None:
    rows, name = [rollout(0), rollout(1, outcome={"reward": 1.0})], part_name(1, 3)
    assert not store.has(name)
    store.add_rollouts(name, rows, {"job": 7})
    assert store.has(name) and (store.path / "rollouts/round-0001-piece-0003").is_dir()
    assert [bits(row) for row in store.read_rollouts(name)] == [bits(row) for row in rows]
    (part,) = store.parts()
    assert (part.round, part.piece, part.attempt, part.num_rows, part.num_kept_out) == (1, 3, 0, 2, 0)
    assert part.provenance == {"job": 7}
    store.add_rewards("v1" * 8, name, [judged(row) for row in rows])
    assert store.read_rewards("v1" * 8, name) == [judged(row) for row in rows]
    assert store.versions() == ["v1v1v1v1v1v1"] and store.has(name, "v1" * 8)
    assert not store.has(name, "v2" * 8)
    assert store.judgements("v1" * 8, [part]) == {(row.key, 0): judged(row) for row in rows}


def arrays(dtype: Any, values: st.SearchStrategy[Any], length: st.SearchStrategy[int]) -> Any:
    """Draw arrays."""
    return length.flatmap(lambda n: st.lists(values, min_size=n, max_size=n)).map(
        lambda drawn: np.array(drawn, dtype))


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.dictionaries(TEXT, st.recursive(
    st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8) | st.just("크" * 70_000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6),
    max_size=4)
IDS = arrays(np.int32, st.integers(-2**31, 2**31 - 1) | st.integers(0, VOCAB_SIZE - 1), st.integers(0, 5))
ROUTES = st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(1, 3), st.sampled_from(["u1", "u2"])
                   ).map(lambda drawn: np.arange(math.prod(drawn[:3])).astype(drawn[3]).reshape(drawn[:3]))
ROWS = st.lists(st.builds(
    Rollout, st.builds(Key, TEXT, st.integers(0, 2**31 - 1), TEXT, TEXT), st.just(2), st.integers(0, 9), JSON,
    IDS, IDS, arrays(np.float32, st.floats(width=32) | st.just(-1.0), st.integers(0, 5)), IDS, TEXT, TEXT,
    st.floats(), TEXT, st.floats(), st.floats(), st.none() | JSON, st.none() | ROUTES), max_size=4)


@settings(max_examples=12)
@given(rows=ROWS)
def test_whatever_a_row_holds_comes_back_to_the_bit(rows: list[Rollout],
                                                    tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "any.parquet"
    write_table(file, columns.rollouts_table(rows, VOCAB_SIZE), columns.REPEATED, columns.SPLIT)
    table = read_table(file, columns.ROLLOUTS)
    assert [bits(row) for row in columns.rollouts_of(table, columns.NAMES)] == [bits(row) for row in rows]
    assert columns.problems_of(table) == ["; ".join(row.problems(VOCAB_SIZE)) for row in rows]


def test_a_store_is_what_a_dictionary_would_be(store: Store) -> None:
    draw, parts, said = random.Random(7), {}, {}
    for _ in range(30):
        name = part_name(draw.randint(1, 2), draw.randint(0, 2), draw.randint(0, 1))
        number = numbers_in(name)
        rows = [rollout(i, round=number[0], attempt=number[2], response=f"r{draw.randint(0, 1)}",
                        key=Key(name[:21], i, "f", "s"), temperature=draw.choice([1.0, 1.0, 1.0, 0.0]))
                for i in range(draw.randint(0, 2))]
        if name in parts and list(map(bits, parts[name])) != list(map(bits, rows)):
            with pytest.raises(AlreadyPublished):
                store.add_rollouts(name, rows, {})
        else:
            store.add_rollouts(name, rows, {})
        rows = parts.setdefault(name, rows)
        if draw.random() < 0.3 and name not in said:
            said[name] = [judged(row, draw.choice([None, 0.1])) for row in rows]
            store.add_rewards("v1" * 8, name, said[name])
    parts = {name: [row for row in rows if row.temperature] for name, rows in parts.items()}
    for number in (None, 1, 2):
        found = [name for name in sorted(parts, key=numbers_in) if number in (None, numbers_in(name)[0])]
        assert [part.name for part in store.parts(number)] == found
    for name, rows in parts.items():
        assert list(map(bits, store.read_rollouts(name))) == list(map(bits, rows))
        assert store.has(name, "v1" * 8) == (name in said)
        assert name not in said or store.read_rewards("v1" * 8, name) == said[name]


def test_the_first_part_of_a_name_stays(store: Store) -> None:
    name = part_name(1, 0)
    store.add_rollouts(name, [rollout()], {})
    store.add_rollouts(name, [rollout(ended_s=99.0)], {})
    with pytest.raises(AlreadyPublished, match="another job has published 1 rows under this name"):
        store.add_rollouts(name, [rollout(response="other")], {})
    store.add_rewards("v1" * 8, name, [judged(rollout())])
    with pytest.raises(AlreadyPublished, match="these 1 differ"):
        store.add_rewards("v1" * 8, name, [judged(rollout(), 0.0)])
    assert store.read_rollouts(name)[0].response == "네 4"
    assert [p.name for p in (store.path / "rollouts").iterdir()] == [name]


def test_columns_that_are_not_asked_for_are_not_read(store: Store) -> None:
    routes = np.arange(4 * 2 * 2, dtype=np.uint16).reshape(4, 2, 2)
    store.add_rollouts(part_name(1, 0), [rollout(routes=routes)], {})
    (row,) = store.read_rollouts(part_name(1, 0), ["response", "record"])
    assert (row.key, row.response, row.record["answer"]) == (rollout().key, "네 4", "4")
    assert row.routes is None and len(row.tokens) == 0
    assert np.array_equal(store.read_rollouts(part_name(1, 0), ["routes"])[0].routes, routes)
    with pytest.raises(ValueError, match="'text' is no field of a rollout"):
        store.read_rollouts(part_name(1, 0), ["text"])


BROKEN = [
    {"logprobs": np.zeros(2, np.float32)}, {"prompt_tokens": np.zeros(0, np.int32)},
    {"tokens": np.array([5, VOCAB_SIZE, 7], np.int32)}, {"tokens": np.array([5, -1, 7], np.int32)},
    {"tokens": np.array([5, 2**32, 7])}, {"logprobs": np.array([0.5, 0, 0], np.float32)},
    {"logprobs": np.array([math.nan, 0, 0], np.float32)},
    {"logprobs": np.array([-math.inf, 0, 0], np.float32)},
    {"logprobs": np.array([-1, -1, -1], np.float32)}, {"temperature": 0.0}, {"temperature": math.nan},
    {"routes": np.zeros((3, 2, 2), np.uint8)}]


@pytest.mark.parametrize("changes", BROKEN, ids=lambda changes: "-".join(changes))
def test_a_row_with_a_problem_is_kept_out_and_counted(changes: dict[str, Any], store: Store,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    (sentence,) = rollout(**changes).problems(VOCAB_SIZE)
    store.add_rollouts(part_name(1, 0), [rollout(0), rollout(1, **changes)], {})
    for _ in range(2):
        assert [row.key.sample for row in store.read_rollouts(part_name(1, 0))] == [0]
    assert store.parts()[0].num_kept_out == 1
    assert capsys.readouterr().err.count(f"1 of 2 rows are kept out; the first is row 1: {sentence}") == 1


def test_a_store_has_one_tokenizer(store: Store, tmp_path: Path) -> None:
    assert Store.create(store.path, "sha256:ab", VOCAB_SIZE).vocab_size == VOCAB_SIZE
    for tokenizer, vocab_size in (("sha256:cd", VOCAB_SIZE), ("sha256:ab", 101)):
        with pytest.raises(UserError, match="choose another store"):
            Store.create(store.path, tokenizer, vocab_size)
    (tmp_path / "taken").mkdir()
    Store.create(tmp_path / "taken", "sha256:ab", 1)  # empty
    (tmp_path / "taken/claims").rmdir()  # as by a copy that has files alone
    assert Store.open(tmp_path / "taken").claims.is_dir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").write_text("")
    with pytest.raises(UserError, match="no rollout store; choose another folder"):
        Store.create(tmp_path / "full", "sha256:ab", 1)
    with pytest.raises(UserError, match="is no rollout store"):
        Store.open(tmp_path / "full")
    (store.path / "store.json").write_text(json.dumps({"format_version": 2}))
    with pytest.raises(UserError, match="format_version 2 is newer than 1"):
        Store.open(store.path)

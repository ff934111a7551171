"""The rollout store: parts are complete or absent, whatever happens to the writer, and files from others
are read within bounds."""

import dataclasses
import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings, strategies as st
from pyarrow import parquet

from megatron_sov.base.artifacts import Manifest, create_artifact, format_json
from megatron_sov.base.errors import UserError
from megatron_sov.rollouts.rows import (
    JUDGED, NOT_WRITTEN, Key, RewardRow, Rollout, RolloutPart, StorePlan, describe_missing_rows,
    format_part_name, parse_part_name)
from megatron_sov.rollouts.store import RolloutStore, StoreSettings
from megatron_sov.rollouts.tables import (
    NAMES, REPEATED, ROLLOUTS, SPLIT, read_problems, rewards_to_table, rollouts_to_table, table_to_rollouts)
from megatron_sov.work.tables import parquet as bounds
from megatron_sov.work.tables.parquet import read_table, write_table
from megatron_sov.work.tables.table import AlreadyPublished

VOCAB_SIZE = 100
NAME = format_part_name(1, 0)


def create_rollout(sample: int = 0, **changes: Any) -> Rollout:
    """Return a valid rollout of round 1: two tokens of the policy around a token of a tool result."""
    row = Rollout(Key("p0", sample, "f" * 64, "s" * 64), 1, 0, {"prompt": "2 + 2?", "answer": "4"},
                  np.array([1, 2], np.int32), np.array([5, 6, 7], np.int32),
                  np.array([-0.5, 0, -1.25], np.float32), np.array([3, NOT_WRITTEN, 4], np.int32), "stop",
                  "네 4", 1.0, "transformers", 10.5, 11.5)
    return dataclasses.replace(row, **changes)


def build_reward(row: Rollout, reward: float | None = 1.0, **changes: Any) -> RewardRow:
    """The verdict of reward v1 for a row."""
    reward_row = RewardRow(row.key, row.attempt, "v1" * 8, reward, "failed" if reward is None else "scored",
                           {"format": 0.5})
    return dataclasses.replace(reward_row, **changes)


def list_values(row: Rollout | RewardRow) -> dict[str, Any]:
    """Return a row as values that can be compared: arrays as dtype, shape and bytes, floats as text (nan)."""
    values = {}
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        if isinstance(value, np.ndarray):
            value = (value.dtype.str, value.shape, value.tobytes())
        values[field.name] = repr(value) if isinstance(value, float) else value
    return values


@pytest.fixture
def store(tmp_path: Path) -> RolloutStore:
    """An empty one."""
    return RolloutStore.create(tmp_path / "store", "sha256:ab", VOCAB_SIZE)


def test_a_part_is_written_and_read(store: RolloutStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, name = [create_rollout(0), create_rollout(1, outcome={"reward": 1.0})], format_part_name(1, 3)
    assert not store.has_part(name)
    store.add_rollouts(name, rows, {"job": 7})
    assert store.has_part(name) and (store.path / "rollouts/round-0001-piece-0003").is_dir()
    assert [list_values(row) for row in store.read_rollouts(name)] == [list_values(row) for row in rows]
    (part,) = store.parts()
    assert (part.round, part.piece, part.attempt, part.num_rows, part.num_excluded) == (1, 3, 0, 2, 0)
    assert part.provenance == {"job": 7}
    store.add_rewards("v1" * 8, name, [build_reward(row) for row in rows])
    assert store.read_rewards("v1" * 8, name) == [build_reward(row) for row in rows]
    assert store.versions() == ["v1v1v1v1v1v1"] and store.has_part(name, "v1" * 8)
    assert not store.has_part(name, "v2" * 8)
    with pytest.raises(UserError, match="whose first 12 characters are those of 'v1v1v1v1v1v1-other'"):
        store.has_part(name, "v1" * 6 + "-other")
    opened_versions, get_part = list[str](), store.part

    def record_version(name: str, version: str = "") -> RolloutPart:
        opened_versions.append(version)
        return get_part(name, version)

    monkeypatch.setattr(store, "part", record_version)
    assert store.read_judgements("v1" * 8, [part]) == {(row.key, 0): build_reward(row) for row in rows}
    assert opened_versions == ["v1" * 8], "a part that is at hand is not opened again"


def draw_arrays(dtype: Any, values: st.SearchStrategy[Any], length: st.SearchStrategy[int]) -> Any:
    """Return a strategy of arrays of a dtype, with drawn values and length."""
    return length.flatmap(lambda n: st.lists(values, min_size=n, max_size=n)).map(
        lambda drawn: np.array(drawn, dtype))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
OBJECTS = st.dictionaries(TEXTS, st.recursive(
    st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8) | st.just("크" * 70_000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6),
    max_size=4)
IDS = draw_arrays(np.int32, st.integers(-2**31, 2**31 - 1) | st.integers(0, VOCAB_SIZE - 1),
                  st.integers(0, 5))
ROUTES = st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(1, 3), st.sampled_from(["u1", "u2"])
                   ).map(lambda drawn: np.arange(math.prod(drawn[:3])).astype(drawn[3]).reshape(drawn[:3]))
ROWS = st.lists(st.builds(
    Rollout, st.builds(Key, TEXTS, st.integers(0, 2**31 - 1), TEXTS, TEXTS), st.just(2), st.integers(0, 9),
    OBJECTS, IDS, IDS, draw_arrays(np.float32, st.floats(width=32) | st.just(-1.0), st.integers(0, 5)),
    IDS, TEXTS, TEXTS, st.floats(), TEXTS, st.floats(), st.floats(), st.none() | OBJECTS,
    st.none() | ROUTES), max_size=4)


@settings(max_examples=12)
@given(rows=ROWS)
def test_any_row_is_read_back_bit_for_bit(rows: list[Rollout],
                                          tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "any.parquet"
    write_table(file, rollouts_to_table(rows, VOCAB_SIZE), REPEATED, SPLIT)
    table = read_table(file, ROLLOUTS)
    assert [list_values(row) for row in table_to_rollouts(table, NAMES)] == [list_values(row) for row in rows]
    assert read_problems(table) == ["; ".join(row.problems(VOCAB_SIZE)) for row in rows]


def test_the_first_part_of_a_name_stays(store: RolloutStore) -> None:
    name = NAME
    store.add_rollouts(name, [create_rollout()], {})
    store.add_rollouts(name, [create_rollout(ended_s=99.0)], {})
    with pytest.raises(AlreadyPublished, match="published 1 rows"):
        store.add_rollouts(name, [create_rollout(response="other")], {})
    store.add_rewards("v1" * 8, name, [build_reward(create_rollout())])
    with pytest.raises(AlreadyPublished, match="these 1 differ"):
        store.add_rewards("v1" * 8, name, [build_reward(create_rollout(), 0.0)])
    assert store.read_rollouts(name)[0].response == "네 4"
    assert [p.name for p in (store.path / "rollouts").iterdir()] == [name]


@pytest.mark.parametrize(("changes", "message"), [
    ({"reward": math.nan}, "row 1 has a reward of nan"), ({"reward": -math.inf}, "has a reward of -inf"),
    ({"reward_version": "v2" * 8}, "row 1 is of reward version 'v2v2")])
def test_invalid_rewards_are_refused(changes: dict[str, Any], message: str, store: RolloutStore) -> None:
    rows = [create_rollout(0), create_rollout(1)]
    store.add_rollouts(NAME, rows, {})
    table = rewards_to_table([build_reward(rows[0]), build_reward(rows[1], **changes)])
    assert store.publish(NAME, "v1" * 8, table, {})
    with pytest.raises(UserError, match=message):
        store.read_judgements("v1" * 8, store.parts())


def test_rewards_are_of_the_rows_that_were_judged(store: RolloutStore) -> None:
    """Of a part that was deleted and written again, the rows have the same keys."""
    store.add_rollouts(NAME, [create_rollout()], {})
    [part] = store.parts()
    store.add_rewards("v1" * 8, NAME, [build_reward(create_rollout())], {JUDGED: part.manifest_sha256})
    assert len(store.read_judgements("v1" * 8, [part])) == 1
    shutil.rmtree(part.path)
    store.add_rollouts(NAME, [create_rollout(response="5")], {})
    with pytest.raises(UserError, match=r"v1v1v1v1v1v1/.*judges other rows"):
        store.read_judgements("v1" * 8, store.parts())


def test_unrequested_columns_are_not_read(store: RolloutStore) -> None:
    routes = np.arange(4 * 2 * 2, dtype=np.uint16).reshape(4, 2, 2)
    store.add_rollouts(NAME, [create_rollout(routes=routes)], {})
    (row,) = store.read_rollouts(NAME, ["response", "record"])
    assert (row.key, row.response, row.record["answer"]) == (create_rollout().key, "네 4", "4")
    assert row.routes is None and len(row.tokens) == 0
    assert np.array_equal(store.read_rollouts(NAME, ["routes"])[0].routes, routes)
    with pytest.raises(ValueError, match="'text' is not a field"):
        store.read_rollouts(NAME, ["text"])


INVALID_CHANGES = [
    {"logprobs": np.zeros(2, np.float32)}, {"prompt_tokens": np.zeros(0, np.int32)},
    {"tokens": np.array([5, VOCAB_SIZE, 7], np.int32)}, {"tokens": np.array([5, -1, 7], np.int32)},
    {"tokens": np.array([5, 2**32, 7])}, {"logprobs": np.array([0.5, 0, 0], np.float32)},
    {"logprobs": np.array([math.nan, 0, 0], np.float32)},
    {"logprobs": np.array([-math.inf, 0, 0], np.float32)},
    {"logprobs": np.array([-1, -1, -1], np.float32)}, {"temperature": 0.0}, {"temperature": math.nan},
    {"routes": np.zeros((3, 2, 2), np.uint8)}]


@pytest.mark.parametrize("changes", INVALID_CHANGES, ids=lambda changes: "-".join(changes))
def test_an_invalid_row_is_excluded_and_counted(changes: dict[str, Any], store: RolloutStore,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    (sentence,) = create_rollout(**changes).problems(VOCAB_SIZE)
    store.add_rollouts(NAME, [create_rollout(0), create_rollout(1, **changes)], {})
    for _ in range(2):
        assert [row.key.sample for row in store.read_rollouts(NAME)] == [0]
    assert store.parts()[0].num_excluded == 1
    warning = f"1 of 2 rows break a rule and are skipped; the first is row 1: {sentence}"
    assert capsys.readouterr().err.count(warning) == 1


def test_a_store_belongs_to_a_tokenizer_not_to_its_file_bytes(tmp_path: Path) -> None:
    texts = {"base": json.dumps({"model": {"vocab": {"a": 0}}}, indent=2),
             "sft": json.dumps({"model": {"vocab": {"a": 0}}}), "other": '{"model": {"vocab": {"b": 0}}}'}
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(text)
    StoreSettings(tmp_path / "store", tmp_path / "base", 100).open()
    store = StoreSettings(tmp_path / "store", tmp_path / "sft", 100).open()
    assert store.is_written_in(tmp_path / "base") and not store.is_written_in(tmp_path / "other")
    store.add_rollouts(format_part_name(1, 0), [create_rollout()], {})
    with pytest.raises(UserError, match="rollout store of tokenizer"):
        StoreSettings(store.path, tmp_path / "other", 100).open()


def test_a_store_has_one_tokenizer(store: RolloutStore, tmp_path: Path) -> None:
    assert RolloutStore.create(store.path, "sha256:ab", VOCAB_SIZE).vocab_size == VOCAB_SIZE
    for tokenizer, vocab_size in (("sha256:cd", VOCAB_SIZE), ("sha256:ab", 101)):
        with pytest.raises(UserError, match="choose another store"):
            RolloutStore.create(store.path, tokenizer, vocab_size)
    (tmp_path / "taken").mkdir()
    RolloutStore.create(tmp_path / "taken", "sha256:ab", 1)  # empty
    (tmp_path / "taken/claims").rmdir()  # as by a copy that has files alone
    assert RolloutStore.open(tmp_path / "taken").claims.is_dir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").write_text("")
    with pytest.raises(UserError, match="rollout store; choose another"):
        RolloutStore.create(tmp_path / "full", "sha256:ab", 1)
    with pytest.raises(UserError, match="is no rollout store"):
        RolloutStore.open(tmp_path / "full")
    (store.path / "store.json").write_text(json.dumps({"format_version": 2}))
    with pytest.raises(UserError, match="format_version 2 is newer"):
        RolloutStore.open(store.path)


def test_names_say_round_piece_and_attempt() -> None:
    for numbers in ((1, 0, 0), (9999, 10000, 0), (12345, 3, 12)):
        assert parse_part_name(format_part_name(*numbers)) == numbers
    for name in ("round-0000-piece-0000", "round-1-piece-0000", "round-00001-piece-0000", "x", ".hidden",
                 "round-0001-piece-0000-attempt-0", "round-0001-piece-0000-attempt-01",
                 "round-0001-piece-0000\n"):
        assert parse_part_name(name) is None, name


def run_in_forks(count: int, action: Callable[..., None], *arguments: Any) -> list[int | None]:
    """Run a function in forks, number by number; returns how they ended."""
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(count)
    processes = [fork.Process(target=_run_together, args=(action, barrier, number, *arguments))
                 for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _run_together(action: Callable[..., None], barrier: Any, *arguments: Any) -> None:
    barrier.wait()
    action(*arguments)
    os._exit(0)


def publish_parts(number: int, path: Path) -> None:
    """Create the store, and publish each of several parts with a row of this process."""
    store = RolloutStore.create(path, "sha256:ab", 100)
    for piece in range(6):
        try:
            rows = [create_rollout(response=f"of {number}")] * (number + 1)
            store.add_rollouts(format_part_name(1, piece), rows, {})
        except AlreadyPublished:
            assert len(store.read_rollouts(format_part_name(1, piece))) != number + 1


@pytest.mark.distributed
def test_one_of_many_concurrent_writers_wins_completely(tmp_path: Path) -> None:
    assert run_in_forks(4, publish_parts, tmp_path / "store") == [0] * 4
    store = RolloutStore.open(tmp_path / "store")
    for part in store.parts():
        rows = store.read_rollouts(part.name)
        (number,) = {int(row.response.removeprefix("of ")) for row in rows}
        assert len(rows) == part.num_rows == number + 1
    assert [part.piece for part in store.parts()] == list(range(6))
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert len(list((tmp_path / "store/rollouts").iterdir())) == 6


def write_foreign_part(store: RolloutStore, table: pa.Table, dictionary: bool = False) -> None:
    """Leave a part as a stranger would, whose manifest is in order."""
    with create_artifact(store.path / "rollouts" / NAME, "rollouts") as artifact:
        texts = [field.name for field in table.schema if field.type == pa.string()]
        parquet.write_table(table, artifact.path / "rollouts.parquet", use_dictionary=dictionary or texts)
        artifact.content = {"num_rows": table.num_rows, "store": store.identity}


def build_table(name: str, values: Any, column_type: pa.DataType | None = None) -> pa.Table:
    """Return two valid rows with one column replaced."""
    table = rollouts_to_table([create_rollout(0), create_rollout(1)], 100)
    return table.set_column(table.schema.get_field_index(name), name, pa.array(values, column_type))


FOREIGN_TABLES = [
    (build_table("sample", [0, 1], pa.int64()), "column 'sample' is int64, must be int32"),
    (build_table("sample", [0, None], pa.int32()), "column 'sample' has places without a value"),
    (build_table("response", ["a", None]), "column 'response' has places without a value"),
    (build_table("record", ["{}", "[" * 100_000]), "JSON that is nested too deep"),
    (build_table("record", ["{}", "[]"]), r"'\[\]' is not a JSON object"),
    (build_table("record", ["{}", "{"]), "a row does not fit the store"),
    (build_table("record", ["{}", '{"a": ' + "9" * 5000 + "}"]), "a row does not fit the store"),
    (build_table("response", pa.array([b"a", b"\xff"]).view(pa.string())), "is damaged"),
    (build_table("routes", [None, b"123"], pa.large_binary()), "routes of 3 bytes are not"),
    (build_table("round", [1, 2], pa.int32()), "has a row of round 2"),
    (rollouts_to_table([create_rollout()], 100).drop_columns(["tokens"]), "has no column 'tokens'"),
]


@pytest.mark.parametrize("number", range(len(FOREIGN_TABLES)))
def test_foreign_files_are_refused_by_name(number: int, store: RolloutStore) -> None:
    table, sentence = FOREIGN_TABLES[number]
    write_foreign_part(store, table)
    with pytest.raises(UserError, match=rf"{NAME}/rollouts\.parquet: .*{sentence}"):
        store.read_rollouts(NAME)


def test_rows_of_a_stranger_are_looked_at(store: RolloutStore, capsys: pytest.CaptureFixture[str]) -> None:
    write_foreign_part(store, build_table("temperature", [1.0, 0.0]))
    assert [row.key.sample for row in store.read_rollouts(NAME)] == [0]
    assert "are skipped; the first is row 1: has temperature 0.0" in capsys.readouterr().err


def test_a_decompression_bomb_is_not_read(store: RolloutStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_ROWS", 50)
    monkeypatch.setattr(bounds, "MAX_BYTES", 1 << 20)
    zero_tokens, text = np.zeros(300_000, np.int32), "x" * 400_000
    big = rollouts_to_table([create_rollout()], 100)
    column_index = big.schema.get_field_index("tokens")
    lists = pa.ListArray.from_arrays(pa.array([0, len(zero_tokens)], pa.int32()), pa.array(zero_tokens),
                                     big.schema.field(column_index).type)
    routes = build_table("routes", [b"12" * 1000] * 2, pa.large_binary())
    bombs = {
        "has 51 rows, at most 50": (rollouts_to_table([create_rollout()] * 51, 100), False),
        "takes 0.0 GiB in memory": (
            big.set_column(column_index, big.schema.field(column_index), lists), True),
        "is dictionary-encoded": (routes, True)}
    for sentence, (table, dictionary) in bombs.items():
        write_foreign_part(store, table, dictionary)
        assert (store.path / "rollouts" / NAME / "rollouts.parquet").stat().st_size < 20_000
        with pytest.raises(UserError, match=sentence):
            store.read_rollouts(NAME)
        for file in (store.path / "rollouts" / NAME).iterdir():
            file.unlink()
    # equal texts are one text, however many rows have it
    write_foreign_part(store, build_table("response", [text] * 2).take([0, 1] * 20))
    rows = store.read_rollouts(NAME)
    assert len(rows) == 40 and len({id(row.response) for row in rows}) == 1
    with pytest.raises(UserError, match="piece-0001: has 51 rows"):
        store.add_rollouts(format_part_name(1, 1), [create_rollout(i) for i in range(51)], {})
    with pytest.raises(UserError, match=r"piece-0001: .*GiB in memory"):
        store.add_rollouts(format_part_name(1, 1), [create_rollout(
            tokens=np.full(300_000, 5, np.int32), logprobs=np.zeros(300_000, np.float32),
            versions=np.zeros(300_000, np.int32))], {})
    assert len(list((store.path / "rollouts").iterdir())) == 1


INVALID_MANIFESTS = [
    ({"num_rows": 1}, {}, "belongs to another store .of none;"),
    ({"num_rows": -1, "store": True}, {"rollouts.parquet": b"1"}, "has num_rows = -1"),
    ({"num_rows": 1, "num_kept_out": "1", "store": True}, {"rollouts.parquet": b"1"}, "num_kept_out = '1'"),
    ({"num_rows": 1, "store": True}, {}, "has the files none, must have rollouts.parquet alone"),
    ({"num_rows": 1, "store": True}, {"rollouts.parquet": b"1", "x": b""}, "must have rollouts.parquet a"),
]


@pytest.mark.parametrize("content, files, message", INVALID_MANIFESTS, ids=[m[2] for m in INVALID_MANIFESTS])
def test_a_part_with_an_invalid_manifest_is_excluded(content: dict[str, Any], files: dict[str, bytes],
                                                     message: str, store: RolloutStore,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    with create_artifact(store.path / "rollouts" / NAME, "rollouts") as artifact:
        artifact.content = {**content, **({"store": store.identity} if "store" in content else {})}
        for name, data in files.items():
            (artifact.path / name).write_bytes(data)
    for _ in range(2):
        assert store.parts() == []
    assert capsys.readouterr().err.count(f"skipped: {store.path}/rollouts/{NAME}: ") == 1
    with pytest.raises(UserError, match=message):
        store.has_part(NAME)


def test_a_part_without_manifest_or_of_another_kind_is_excluded(store: RolloutStore) -> None:
    folder = store.path / "rollouts" / NAME
    folder.mkdir()
    (folder / "manifest.json").write_text(format_json(Manifest("tokens", {})))
    with pytest.raises(UserError, match="'rollouts' artifact is needed"):
        store.has_part(NAME)
    (folder / "manifest.json").unlink()
    (folder / "other").write_text("")
    assert store.parts() == []
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        store.add_rollouts(NAME, [create_rollout()], {})


# The stated purpose of parts: foreign parts may state anything.


def create_part(number: int, piece: int, provenance: dict[str, Any], attempt: int = 0,
                created_s: float = 0.0) -> RolloutPart:
    return RolloutPart("", Path(), "rollouts", (number, piece, attempt), 1, 0, "", created_s, provenance)


def test_the_newest_part_states_the_planned_total() -> None:
    old_plan, new_plan = StorePlan(1, 1).to_provenance(0), StorePlan(2, 1).to_provenance(0)
    parts = [create_part(1, 0, old_plan, created_s=1.0)]
    assert describe_missing_rows(parts, None) == ""
    assert describe_missing_rows([*parts, create_part(2, 0, new_plan, created_s=2.0)], None) == ""
    newest = create_part(1, 0, new_plan, created_s=2.0)
    assert describe_missing_rows([newest], None) == "1 of 1 pieces of round 2"
    continued = create_part(1, 0, StorePlan(1, 1).to_provenance(3), attempt=1)
    assert (describe_missing_rows([*parts, continued], None)
            == "the ends of responses in 1 of 1 pieces of round 1")


@pytest.mark.each("provenance", [
    {}, {"asked_rounds": 2}, {"asked_rounds": "2", "pieces_per_round": 1},
    {"asked_rounds": True, "pieces_per_round": True}, {"asked_rounds": -1, "pieces_per_round": 1}])
def test_who_does_not_say_it_has_no_end(provenance: dict[str, Any]) -> None:
    assert describe_missing_rows([create_part(1, 0, provenance)], None) is None
    assert describe_missing_rows([], range(1, 3)) is None

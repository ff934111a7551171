"""Parts: whole or not there, whatever happens to the writer; what a stranger wrote is read within bounds."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_sov.artifacts import Manifest, new_artifact, to_json
from megatron_sov.errors import UserError
from megatron_sov.rollouts import columns
from megatron_sov.rollouts.rows import Asked, Key, Part, Rollout, not_written, numbers_in, part_name
from megatron_sov.rollouts.store import Store
from megatron_sov.work.tables import parquet as bounds
from megatron_sov.work.tables.table import AlreadyPublished

NAME = part_name(1, 0)


def rollout(sample: int = 0, num_tokens: int = 3, response: str = "4") -> Rollout:
    """A sound row."""
    return Rollout(Key("p0", sample, "f", "s"), 1, 0, {}, np.array([1], np.int32),
                   np.full(num_tokens, 5, np.int32), np.full(num_tokens, -0.5, np.float32),
                   np.zeros(num_tokens, np.int32), "stop", response, 1.0, "e", 0.0, 1.0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty one."""
    return Store.create(tmp_path / "store", "sha256:ab", 100)


def test_names_say_round_piece_and_attempt() -> None:
    for numbers in ((1, 0, 0), (9999, 10000, 0), (12345, 3, 12)):
        assert numbers_in(part_name(*numbers)) == numbers
    for name in ("round-0000-piece-0000", "round-1-piece-0000", "round-00001-piece-0000", "x", ".hidden",
                 "round-0001-piece-0000-attempt-0", "round-0001-piece-0000-attempt-01",
                 "round-0001-piece-0000\n"):
        assert numbers_in(name) is None, name


def in_processes(count: int, work: Callable[..., None], *arguments: Any) -> list[int | None]:
    """Run a function in forks, number by number; returns how they ended."""
    fork = multiprocessing.get_context("fork")
    started = fork.Barrier(count)
    processes = [fork.Process(target=_at_once, args=(work, started, number, *arguments))
                 for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _at_once(work: Callable[..., None], started: Any, *arguments: Any) -> None:
    started.wait()
    work(*arguments)
    os._exit(0)


def publish(number: int, path: Path) -> None:
    """Make the store, and publish each of some parts as a row of one's own."""
    store = Store.create(path, "sha256:ab", 100)
    for piece in range(6):
        try:
            store.add_rollouts(part_name(1, piece), [rollout(response=f"of {number}")] * (number + 1), {})
        except AlreadyPublished:
            assert len(store.read_rollouts(part_name(1, piece))) != number + 1


@pytest.mark.distributed
def test_of_many_writers_of_one_name_one_stays_whole(tmp_path: Path) -> None:
    assert in_processes(4, publish, tmp_path / "store") == [0] * 4
    store = Store.open(tmp_path / "store")
    for part in store.parts():
        rows = store.read_rollouts(part.name)
        (number,) = {int(row.response.removeprefix("of ")) for row in rows}
        assert len(rows) == part.num_rows == number + 1
    assert [part.piece for part in store.parts()] == list(range(6))
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert len(list((tmp_path / "store/rollouts").iterdir())) == 6


def fill_the_disk(number: int, path: Path) -> None:
    """Publish what is larger than a file may be."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
    row = rollout(num_tokens=20_000)
    object.__setattr__(row, "logprobs", -np.random.default_rng(0).random(20_000, np.float32))
    with pytest.raises(UserError, match=rf"{NAME}: larger than the limit on file sizes.*the same command"):
        Store.open(path).add_rollouts(NAME, [row], {})


def die(number: int, path: Path) -> None:
    """Be killed behind the last byte and before the rename."""
    os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    Store.open(path).add_rollouts(NAME, [rollout()], {})


@pytest.mark.parametrize("work, code", [(fill_the_disk, 0), (die, -signal.SIGKILL)])
def test_a_writer_that_fails_leaves_no_part(work: Callable[..., None], code: int, store: Store) -> None:
    assert in_processes(1, work, store.path) == [code]
    assert not store.has(NAME) and store.parts() == []
    if not code:
        assert list((store.path / "rollouts").iterdir()) == []
    store.add_rollouts(NAME, [rollout()], {})
    assert len(store.read_rollouts(NAME)) == 1


def foreign(store: Store, table: pa.Table, dictionary: bool = False) -> None:
    """Leave a part as a stranger would, whose manifest is in order."""
    with new_artifact(store.path / "rollouts" / NAME, "rollouts") as artifact:
        texts = [field.name for field in table.schema if field.type == pa.string()]
        parquet.write_table(table, artifact.path / "rollouts.parquet", use_dictionary=dictionary or texts)
        artifact.content = {"num_rows": table.num_rows, "store": store.identity}


def with_column(name: str, values: Any, kind: pa.DataType | None = None) -> pa.Table:
    """Return two sound rows of which a column is another one."""
    table = columns.rollouts_table([rollout(0), rollout(1)], 100)
    return table.set_column(table.schema.get_field_index(name), name, pa.array(values, kind))


FOREIGN = [
    (with_column("sample", [0, 1], pa.int64()), "column 'sample' is int64, must be int32"),
    (with_column("sample", [0, None], pa.int32()), "column 'sample' has places without a value"),
    (with_column("response", ["a", None]), "column 'response' has places without a value"),
    (with_column("record", ["{}", "[" * 100_000]), "JSON that is nested too deep"),
    (with_column("record", ["{}", "[]"]), r"'\[\]' is no JSON object"),
    (with_column("record", ["{}", "{"]), "a row holds what the store does not take"),
    (with_column("record", ["{}", '{"a": ' + "9" * 5000 + "}"]), "a row holds what the store does not take"),
    (with_column("response", pa.array([b"a", b"\xff"]).view(pa.string())), "is damaged"),
    (with_column("routes", [None, b"123"], pa.large_binary()), "routes of 3 bytes are not"),
    (with_column("round", [1, 2], pa.int32()), "has a row of round 2"),
    (columns.rollouts_table([rollout()], 100).drop_columns(["tokens"]), "has no column 'tokens'"),
]


@pytest.mark.parametrize("number", range(len(FOREIGN)))
def test_what_a_stranger_wrote_is_named_and_refused(number: int, store: Store) -> None:
    table, sentence = FOREIGN[number]
    foreign(store, table)
    with pytest.raises(UserError, match=rf"{NAME}/rollouts\.parquet: .*{sentence}"):
        store.read_rollouts(NAME)


def test_rows_of_a_stranger_are_looked_at(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    foreign(store, with_column("temperature", [1.0, 0.0]))
    assert [row.key.sample for row in store.read_rollouts(NAME)] == [0]
    assert "1 of 2 rows are kept out; the first is row 1: has temperature 0.0" in capsys.readouterr().err


def test_a_small_file_that_stands_for_much_is_not_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_ROWS", 50)
    monkeypatch.setattr(bounds, "MAX_BYTES", 1 << 20)
    zeros, text = np.zeros(300_000, np.int32), "x" * 400_000
    big = columns.rollouts_table([rollout()], 100)
    at = big.schema.get_field_index("tokens")
    lists = pa.ListArray.from_arrays(pa.array([0, len(zeros)], pa.int32()), pa.array(zeros),
                                     big.schema.field(at).type)
    routes = with_column("routes", [b"12" * 1000] * 2, pa.large_binary())
    bombs = {
        "has 51 rows, at most 50": (columns.rollouts_table([rollout()] * 51, 100), False),
        "takes 0.0 GiB in memory": (big.set_column(at, big.schema.field(at), lists), True),
        "repeats its values by a dictionary": (routes, True)}
    for sentence, (table, dictionary) in bombs.items():
        foreign(store, table, dictionary)
        assert (store.path / "rollouts" / NAME / "rollouts.parquet").stat().st_size < 20_000
        with pytest.raises(UserError, match=sentence):
            store.read_rollouts(NAME)
        for file in (store.path / "rollouts" / NAME).iterdir():
            file.unlink()
    # equal texts are one text, however many rows have it
    foreign(store, with_column("response", [text] * 2).take([0, 1] * 20))
    rows = store.read_rollouts(NAME)
    assert len(rows) == 40 and len({id(row.response) for row in rows}) == 1
    with pytest.raises(UserError, match=r"piece-0001: has 51 rows, at most 50; make pieces smaller"):
        store.add_rollouts(part_name(1, 1), [rollout(i) for i in range(51)], {})
    with pytest.raises(UserError, match=r"piece-0001: .*GiB in memory"):
        store.add_rollouts(part_name(1, 1), [rollout(0, 300_000)], {})
    assert len(list((store.path / "rollouts").iterdir())) == 1


MANIFESTS = [
    ({"num_rows": 1}, {}, "belongs to another store .of none;"),
    ({"num_rows": -1, "store": True}, {"rollouts.parquet": b"1"}, "has num_rows = -1"),
    ({"num_rows": 1, "num_kept_out": "1", "store": True}, {"rollouts.parquet": b"1"}, "num_kept_out = '1'"),
    ({"num_rows": 1, "store": True}, {}, "has the files none, must have rollouts.parquet alone"),
    ({"num_rows": 1, "store": True}, {"rollouts.parquet": b"1", "x": b""}, "must have rollouts.parquet a"),
]


@pytest.mark.parametrize("content, files, sentence", MANIFESTS, ids=[m[2] for m in MANIFESTS])
def test_a_manifest_that_is_none_of_a_part_keeps_it_out(
        content: dict[str, Any], files: dict[str, bytes], sentence: str, store: Store,
        capsys: pytest.CaptureFixture[str]) -> None:
    with new_artifact(store.path / "rollouts" / NAME, "rollouts") as artifact:
        artifact.content = {**content, **({"store": store.identity} if "store" in content else {})}
        for name, data in files.items():
            (artifact.path / name).write_bytes(data)
    for _ in range(2):
        assert store.parts() == []
    assert capsys.readouterr().err.count(f"kept out: {store.path}/rollouts/{NAME}: ") == 1
    with pytest.raises(UserError, match=sentence):
        store.has(NAME)


def test_a_part_without_a_manifest_or_of_another_kind_is_kept_out(store: Store) -> None:
    folder = store.path / "rollouts" / NAME
    folder.mkdir()
    (folder / "manifest.json").write_text(to_json(Manifest("tokens", {})))
    with pytest.raises(UserError, match="is a 'tokens' artifact where a 'rollouts' artifact is needed"):
        store.has(NAME)
    (folder / "manifest.json").unlink()
    (folder / "other").write_text("")
    assert store.parts() == []
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        store.add_rollouts(NAME, [rollout()], {})


# What parts tell of what they were written for: foreign ones may tell anything.


def part(round_: int, piece: int, provenance: dict[str, Any], attempt: int = 0,
         created_s: float = 0.0) -> Part:
    return Part("", Path(), "rollouts", (round_, piece, attempt), 1, 0, "", created_s, provenance)


def test_the_newest_part_says_how_much_there_will_be() -> None:
    before, after = Asked(1, 1).told(0), Asked(2, 1).told(0)
    parts = [part(1, 0, before, created_s=1.0)]
    assert not_written(parts, None) == ""
    assert not_written([*parts, part(2, 0, after, created_s=2.0)], None) == ""
    assert not_written([part(1, 0, after, created_s=2.0)], None) == "1 of 1 pieces of round 2"
    assert not_written([*parts, part(1, 0, Asked(1, 1).told(3), attempt=1)],
                       None) == "the ends of responses in 1 of 1 pieces of round 1"


@pytest.mark.parametrize("provenance", [
    {}, {"asked_rounds": 2}, {"asked_rounds": "2", "pieces_per_round": 1},
    {"asked_rounds": True, "pieces_per_round": True}, {"asked_rounds": -1, "pieces_per_round": 1}])
def test_who_does_not_say_it_has_no_end(provenance: dict[str, Any]) -> None:
    assert not_written([part(1, 0, provenance)], None) is None
    assert not_written([], range(1, 3)) is None

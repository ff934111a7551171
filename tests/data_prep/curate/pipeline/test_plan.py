"""Shards of a source: a file more or less moves the cuts around it, and no others."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_prep.curate.pipeline import plan as plan_module
from data_prep.curate.pipeline.pipeline_file import load_pipeline
from data_prep.curate.pipeline.plan import KEYS, link, make_plan, reusable, shards_of
from data_prep.curate.sources.source import SourcePiece
from tests.data_prep.curate.pipeline.conftest import PIPELINE
from tests.data_prep.curate.pipeline.test_running import change, contents, run

SHARD_BYTES = 10_000


def pieces(sizes: dict[str, int]) -> list[SourcePiece]:
    return [SourcePiece("text", name, 0, size, size) for name, size in sorted(sizes.items())]


def some_sizes(count: int) -> dict[str, int]:
    random_ = random.Random(1)
    return {f"file-{number:05d}": random_.randint(0, 300) for number in range(count)}


def test_every_piece_is_in_one_shard_of_about_the_asked_size() -> None:
    whole = pieces(some_sizes(5000))
    found = shards_of(whole, SHARD_BYTES)
    assert [piece for group in found.values() for piece in group] == whole
    sizes = [sum(piece.size_bytes for piece in group) for group in found.values()]
    assert max(sizes) <= 1.5 * SHARD_BYTES and min(sizes[:-1]) >= SHARD_BYTES / 2
    assert 0.8 * SHARD_BYTES < sum(sizes) / len(sizes) < 1.1 * SHARD_BYTES
    assert all(0 <= number < 10**9 for number in found), "nine digits of an id"


@pytest.mark.deep
def test_a_change_moves_only_the_cuts_around_it() -> None:
    sizes = some_sizes(5000)
    before = shards_of(pieces(sizes), SHARD_BYTES)
    random_ = random.Random(2)
    for name in random_.sample(sorted(sizes), 20):
        for changed in (sizes | {name: 299}, sizes | {f"{name}-more": 150},
                        {other: size for other, size in sizes.items() if other != name}):
            after = shards_of(pieces(changed), SHARD_BYTES)
            assert sum(after.get(number) != group for number, group in before.items()) <= 8 < len(before)


def test_large_pieces_have_shards_of_their_own_and_empty_ones_go_along() -> None:
    found = shards_of(pieces({"a": 0, "b": 50_000, "c": 0, "d": 50_000, "e": 10}), SHARD_BYTES)
    assert [[piece.file for piece in group] for group in found.values()] == [
        ["a"], ["b", "c"], ["d"], ["e"]]


def test_many_files_without_content_make_shards_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "MAX_PIECES", 100)
    lengths = [len(group) for group in shards_of(pieces(dict.fromkeys(map(str, range(2000)), 0)),
                                                 SHARD_BYTES).values()]
    assert sum(lengths) == 2000 and max(lengths) <= 150 and len(lengths) > 10


# Results of an earlier plan: whole ones are taken over, and what cannot be read is no reason to stop.


def test_whole_results_of_a_shard_are_taken_over_and_no_others(raw: Path) -> None:
    change(raw, "  - unique: {}\n  - shorten: {longest: 300}\n", "")
    output = run(raw)
    (raw / "web/5.txt").write_text("another text " * 60)  # the second shard of two
    plan = make_plan(load_pipeline(raw / "pipeline.yaml"), output, keep=False)
    found = {(layer.number, shard): folder for layer, shard, folder in reusable(plan, output)}
    first = next(iter(plan.source("web").shards))
    assert set(found) == {(number, first) for number in range(3)}
    (found[1, first] / f"{first:05d}.json").unlink()
    assert [layer.number for layer, *_ in reusable(plan, output)] == [0, 2], "without counts it is half"
    (found[2, first] / KEYS).write_text('{"half')
    assert [layer.number for layer, *_ in reusable(plan, output)] == [0]
    later = contents(run(raw))
    parsed = [output / plan.source("web").layers[0].folder / f"{first:05d}.parquet",
              found[0, first] / f"{first:05d}.parquet"]
    assert parsed[0].samefile(parsed[1]) and pq.read_table(parsed[0]).num_rows == 5
    output.rename(raw / "before")
    assert contents(run(raw)) == later


def test_where_a_disk_has_no_second_names_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                           ) -> None:
    def refused(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refused)
    (tmp_path / "a").write_text("text")
    link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "text" and not (tmp_path / "a").samefile(tmp_path / "b")


def test_steps_behind_one_that_looks_at_all_documents_are_not_taken_over(raw: Path) -> None:
    assert "unique" in PIPELINE
    output = run(raw)
    (raw / "web/5.txt").write_text("another text " * 60)
    plan = make_plan(load_pipeline(raw / "pipeline.yaml"), output, keep=False)
    found = {(layer.folder.split("/")[1], layer.number) for layer, *_ in reusable(plan, output)}
    assert found == {("web", 0), ("web", 1)}

"""Step `exact_dedup`: one of several equal documents remains."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from data_prep.curate.dedup import work_files
from data_prep.curate.dedup.exact import ExactDedup, ExactSettings
from megatron_sov.base.errors import UserError
from tests.data_prep.curate.pipeline.memory_view import MemoryView, docs, run_step


def find_duplicates(view: MemoryView, **settings: object) -> dict[str, str]:
    """Return the id of each dropped document -> the id of the document that remains."""
    outcomes = run_step(ExactDedup, ExactSettings(**{"partitions": 3, **settings}), view)
    assert {o.reason for o in outcomes.values()} <= {"", "exact duplicate"}
    return {id_: o.values["duplicate_of"] for id_, o in outcomes.items() if o.reason}


def test_the_first_of_the_highest_priority_stays(tmp_path: Path) -> None:
    web = docs("one", "two\n", "three", "one ")
    more = docs("three", "four", "two", source="more", shard=0)
    book = docs("four", "two", "five", source="book", shard=7)
    view = MemoryView.of([web, more, book], tmp_path, book=1)
    assert find_duplicates(view) == {"web:0:0000000000000003": web[0].id,
                                     "web:0:0000000000000001": book[1].id,
                                     "more:0:0000000000000000": web[2].id,
                                     "more:0:0000000000000001": book[0].id,
                                     "more:0:0000000000000002": book[1].id}


def test_results_do_not_depend_on_shards_and_partitions(tmp_path: Path) -> None:
    texts = [str(number * number % 61) for number in range(200)]  # at most 61 different texts
    expected = {position: texts.index(text) for position, text in enumerate(texts)
                if texts.index(text) != position}
    for size, partitions in ((200, 1), (30, 7), (23, 40)):
        shards = [docs(*texts[start:start + size], shard=start) for start in range(0, 200, size)]
        position = {d.id: number for number, d in enumerate(d for shard in shards for d in shard)}
        duplicates = find_duplicates(MemoryView.of(shards, tmp_path / str(size)), partitions=partitions)
        assert {position[one]: position[other] for one, other in duplicates.items()} == expected


def test_character_width_and_spaces_are_ignored(tmp_path: Path) -> None:
    texts = ["A word.", "A word.", "A  ｗord.\n", "a *word*"]
    assert len(find_duplicates(MemoryView.of([docs(*texts)], tmp_path))) == 2


def test_partitions_larger_than_the_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                       ) -> None:
    shard = docs(*map(str, range(200)))
    monkeypatch.setattr(work_files.psutil, "virtual_memory", lambda: SimpleNamespace(available=4096))
    with pytest.raises(UserError, match=r"keys: a partition .* set `partitions: (16|32)`"):
        find_duplicates(MemoryView.of([shard], tmp_path), partitions=1)
    assert find_duplicates(MemoryView.of([shard], tmp_path / "more"), partitions=16) == {}

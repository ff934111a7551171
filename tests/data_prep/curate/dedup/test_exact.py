"""Documents with one text: who stays, whatever the shards and partitions."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.curate.dedup import exact
from data_prep.curate.dedup.exact import ExactDedup, ExactSettings
from tests.data_prep.curate.pipeline.memory_view import MemoryView, docs, outcomes


def dropped(view: MemoryView, **settings: object) -> dict[str, str]:
    found = outcomes(ExactDedup, ExactSettings(**{"partitions": 3, **settings}), view)
    assert {o.reason for o in found.values()} <= {"", "exact duplicate"}
    return {id_: o.values["duplicate_of"] for id_, o in found.items() if o.reason}


def test_the_first_of_the_highest_priority_stays(tmp_path: Path) -> None:
    web = docs("one", "two\n", "three", "one ")
    more = docs("three", "four", "two", source="more", shard=0)
    book = docs("four", "two", "five", source="book", shard=7)
    view = MemoryView.of([web, more, book], tmp_path, book=1)
    assert dropped(view) == {"web:0:0000000000000003": web[0].id, "web:0:0000000000000001": book[1].id,
                             "more:0:0000000000000000": web[2].id, "more:0:0000000000000001": book[0].id,
                             "more:0:0000000000000002": book[1].id}


def test_the_cut_into_shards_and_ranges_changes_nothing(tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [str(number * number % 61) for number in range(200)]
    first: dict[str, int] = {}
    expected = {place: first[text] for place, text in enumerate(texts)
                if first.setdefault(text, place) != place}
    for size, records in ((200, 1 << 20), (30, 7), (23, 40)):
        monkeypatch.setattr(exact, "RANGE_RECORDS", records)
        shards = [docs(*texts[start:start + size], shard=start) for start in range(0, 200, size)]
        place = {d.id: number for number, d in enumerate(d for shard in shards for d in shard)}
        found = dropped(MemoryView.of(shards, tmp_path / str(size)), partitions=5)
        assert {place[one]: place[other] for one, other in found.items()} == expected


def test_widths_and_blanks_make_no_difference(tmp_path: Path) -> None:
    texts = ["A word.", "A word.", "A  ｗord.\n", "a *word*"]
    assert len(dropped(MemoryView.of([docs(*texts)], tmp_path))) == 2

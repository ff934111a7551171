"""Equal documents and equal paragraphs are removed once each."""

from pathlib import Path
from typing import Any

import pytest

from data_prep.curate.dedup import exact
from data_prep.curate.dedup.exact import (
    ExactDedup, ExactSettings, ParagraphDedup, ParagraphSettings, iter_paragraphs)
from tests.data_prep.curate.pipeline.memory_view import MemoryView, docs, run_step


def find_duplicates(view: MemoryView, **settings: object) -> dict[str, str]:
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


def test_results_do_not_depend_on_shards_and_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [str(number * number % 61) for number in range(200)]
    first: dict[str, int] = {}
    expected = {place: first[text] for place, text in enumerate(texts)
                if first.setdefault(text, place) != place}
    for size, records in ((200, 1 << 20), (30, 7), (23, 40)):
        monkeypatch.setattr(exact, "RANGE_RECORDS", records)
        shards = [docs(*texts[start:start + size], shard=start) for start in range(0, 200, size)]
        place = {d.id: number for number, d in enumerate(d for shard in shards for d in shard)}
        duplicates = find_duplicates(MemoryView.of(shards, tmp_path / str(size)), partitions=5)
        assert {place[one]: place[other] for one, other in duplicates.items()} == expected


def test_character_width_and_spaces_are_ignored(tmp_path: Path) -> None:
    texts = ["A word.", "A word.", "A  ｗord.\n", "a *word*"]
    assert len(find_duplicates(MemoryView.of([docs(*texts)], tmp_path))) == 2


MENU = "Home | News | About us | Contact the editors"
SENTENCE = "A sentence of document number {} that nobody else has, and that is long."


def build_texts(count: int) -> list[str]:
    return [f"{MENU}\n{SENTENCE.format(number)}\nshort\n" for number in range(count)]


def cut_paragraphs(view: MemoryView, **settings: Any) -> dict[str, Any]:
    settings = {"partitions": 2, "max_documents": 2, **settings}
    return run_step(ParagraphDedup, ParagraphSettings(**settings), view)


def test_repeated_paragraphs_are_cut_except_in_their_first_document(tmp_path: Path) -> None:
    web, book = docs(*build_texts(3)), docs(*build_texts(5)[3:], source="book", shard=1)
    cuts = cut_paragraphs(MemoryView.of([web, book], tmp_path / "first", book=1))
    assert cuts[book[0].id].text is None
    assert [cuts[d.id].text for d in [*web, book[1]]] == [f"{SENTENCE.format(n)}\nshort\n"
                                                          for n in (0, 1, 2, 4)]
    assert [cuts[d.id].values["paragraphs_cut"] for d in [book[0], *web]] == [0, 1, 1, 1]
    five = cut_paragraphs(MemoryView.of([web, book], tmp_path / "five"), max_documents=5)
    assert not any(outcome.text for outcome in five.values())


def test_case_and_spaces_of_paragraphs_are_ignored(tmp_path: Path) -> None:
    documents = docs(*build_texts(2), f"  {MENU.upper()} \r\n{SENTENCE.format(9)}")
    assert cut_paragraphs(MemoryView.of([documents], tmp_path))[documents[2].id].text == SENTENCE.format(9)


def test_a_document_that_loses_too_much_is_dropped(tmp_path: Path) -> None:
    documents = docs(MENU, MENU, MENU, f"{MENU}\nshort")
    cuts = cut_paragraphs(MemoryView.of([documents], tmp_path / "half"))
    assert [cuts[d.id].reason for d in documents] == ["", *["mostly repeated paragraphs"] * 3]
    cuts = cut_paragraphs(MemoryView.of([documents], tmp_path / "all"), max_share=1.0)
    assert [cuts[d.id].text for d in documents] == [None, None, None, "short"]
    assert cuts[documents[1].id].reason  # no paragraph remains


def test_paragraphs_contain_every_character() -> None:
    text = f"\n\n{MENU}\n \n\n{MENU}\nﬁn Straße İ\n\n"
    parts = list(iter_paragraphs(text, 10))
    assert "".join(text[p.start:p.stop] for p in parts) == text
    assert len({p.key for p in parts if p.key}) == 2

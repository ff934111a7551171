"""Paragraphs that many documents have are cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.curate.dedup.exact import ParagraphDedup, ParagraphSettings, paragraphs
from tests.data_prep.curate.pipeline.memory_view import MemoryView, docs, outcomes

MENU = "Home | News | About us | Contact the editors"
OWN = "A sentence of document number {} that nobody else has, and that is long."


def texts(count: int) -> list[str]:
    return [f"{MENU}\n{OWN.format(number)}\nshort\n" for number in range(count)]


def cut(view: MemoryView, **settings: Any) -> dict[str, Any]:
    settings = {"partitions": 2, "max_documents": 2, **settings}
    return outcomes(ParagraphDedup, ParagraphSettings(**settings), view)


def test_what_many_have_is_cut_and_the_first_one_keeps_it(tmp_path: Path) -> None:
    web, book = docs(*texts(3)), docs(*texts(5)[3:], source="book", shard=1)
    found = cut(MemoryView.of([web, book], tmp_path / "first", book=1))
    assert found[book[0].id].text is None
    assert [found[d.id].text for d in [*web, book[1]]] == [f"{OWN.format(n)}\nshort\n" for n in (0, 1, 2, 4)]
    assert [found[d.id].values["paragraphs_cut"] for d in [book[0], *web]] == [0, 1, 1, 1]
    five = cut(MemoryView.of([web, book], tmp_path / "five"), max_documents=5)
    assert not any(outcome.text for outcome in five.values())


def test_case_and_blanks_make_no_difference(tmp_path: Path) -> None:
    documents = docs(*texts(2), f"  {MENU.upper()} \r\n{OWN.format(9)}")
    assert cut(MemoryView.of([documents], tmp_path))[documents[2].id].text == OWN.format(9)


def test_a_document_that_loses_too_much_is_dropped(tmp_path: Path) -> None:
    documents = docs(MENU, MENU, MENU, f"{MENU}\nshort")
    found = cut(MemoryView.of([documents], tmp_path / "half"))
    assert [found[d.id].reason for d in documents] == ["", *["mostly repeated paragraphs"] * 3]
    found = cut(MemoryView.of([documents], tmp_path / "all"), max_share=1.0)
    assert [found[d.id].text for d in documents] == [None, None, None, "short"]
    assert found[documents[1].id].reason  # nothing is left of it


def test_paragraphs_hold_every_character() -> None:
    text = f"\n\n{MENU}\n \n\n{MENU}\nﬁn Straße İ\n\n"
    parts = list(paragraphs(text, 10))
    assert "".join(text[p.start:p.stop] for p in parts) == text
    assert len({p.key for p in parts if p.key}) == 2

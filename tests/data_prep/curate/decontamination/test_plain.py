"""Markup, escapes and letters that look alike hide nothing, and ordinary text becomes no benchmark's."""

from __future__ import annotations

import pytest

from data_prep.curate.decontamination.step import find_hits
from megatron_sov.base.documents.item_search import ItemSearch, SearchItem, to_plain_form
from tests.data_prep.curate.decontamination.disguises import ITEMS, MARKUP_DISGUISES

NAMES = ("english", "short")
SEARCH = ItemSearch([SearchItem("bench", name, "text", ITEMS[name]) for name in NAMES], 10, 5)


@pytest.mark.parametrize("disguise", MARKUP_DISGUISES)
def test_an_item_is_found_at_its_place(disguise: str) -> None:
    for name in NAMES:
        planted = MARKUP_DISGUISES[disguise](ITEMS[name])
        text = f"Some of it stands before.\n\n{planted}\n\nMore of it behind, &amp; <b>bold</b>."
        found = [hit for hit in find_hits(text, SEARCH, 0) if hit.item == name]
        assert found, planted
        start, stop = text.index(planted), text.index(planted) + len(planted)
        assert all(start <= hit.start < hit.stop <= stop for hit in found)


@pytest.mark.parametrize("text", [
    "if a < b and c > d: return {x: y for x, y in pairs}  # a_b * c",
    r"Let $f\colon A \to B$ with \alpha < \beta and x^{2} + \frac{1}{2} \neq 0; see \cite{a} &c.",
    "AT&T; R&D 100% of it, 50%off; C:\\new\\table\\u12", "<<<>>> &&& {{{ }}} [](x) \\", "",
    "Zażółć gęślą jaźń",
    "Он купил яблоки на рынке и продал их за городом", "\ud800 <b>"])
def test_ordinary_text_has_a_plain_form_with_places(text: str) -> None:
    assert find_hits(text, SEARCH, 0) == []
    if (found := to_plain_form(text)) is not None:
        assert len(found.text) == len(found.starts) == len(found.ends)
        assert (found.starts < found.ends).all() and (found.starts >= 0).all()
        assert (found.ends <= len(text)).all()

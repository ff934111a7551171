"""Where units stand in the text as it was written."""

from __future__ import annotations

from hypothesis import given, strategies as st

from data_prep.curate.decontamination.step import places, whole_lines, without
from megatron_sov.base.documents.overlap import find_units


@given(st.text(alphabet=st.sampled_from("aB1,. \n\u200bé\u0301한\u1112\u1161\u11abภำ字ﬁİßｶﾞ½"), max_size=30))
def test_a_unit_stands_in_its_place(text: str) -> None:
    found = find_units(text)
    stretches = [(i, i + 1) for i in range(len(found.hashes))]
    for (i, _), (start, stop) in zip(stretches, places(text, found, stretches), strict=True):
        assert 0 <= start < stop <= len(text)
        assert found.hashes[i] in find_units(text[start:stop]).hashes


def test_a_place_in_full_width_is_told_in_characters_of_the_text() -> None:
    text = "Ｎ.B. ﬁne, Ｈｅ said: ½ of it"
    found = find_units(text)
    assert [text[start:stop] for start, stop in places(text, found, [(2, 3), (3, 5), (5, 8)])] == [
        "ﬁne", "Ｈｅ said", "½ of"]


def test_lines_are_cut_whole_and_once() -> None:
    text = "one\ntwo words\nthree\n\nfour"
    spans = [(5, 6), (8, 12), (21, 25)]
    lines = whole_lines(text, spans)
    assert [text[start:stop] for start, stop in lines] == ["two words\n", "four"]
    assert without(text, lines) == "one\nthree\n\n"
    assert whole_lines(text, [(6, 16)]) == [(4, 20)]

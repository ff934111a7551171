"""Where units stand in the text as it was written."""

from __future__ import annotations

from hypothesis import given, strategies as st

from data_prep.curate.decontamination.step import places
from megatron_sov.base.documents.overlap import find_units


@given(st.text(alphabet=st.sampled_from("aB1,. \n\u200bé\u0301한\u1112\u1161\u11abภำ字ﬁİßｶﾞ½"), max_size=30))
def test_a_unit_stands_in_its_place(text: str) -> None:
    found = find_units(text)
    stretches = [(i, i + 1) for i in range(len(found.hashes))]
    for (i, _), (start, stop) in zip(stretches, places(text, found, stretches), strict=True):
        assert 0 <= start < stop <= len(text)
        assert found.hashes[i] in find_units(text[start:stop]).hashes

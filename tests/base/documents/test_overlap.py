"""Runs of ten words that two texts share, whatever their punctuation and case."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, strategies as st

from megatron_sov.base.documents import overlap
from megatron_sov.base.documents.overlap import WORDS, find_units, runs, stretch_hashes, units, window_hashes

LAW = "Section 4. Whoever, by fraud, obtains a licence under this Act shall be liable to a fine."
THAI = "ผู้ใดกระทำความผิดตามพระราชบัญญัตินี้ต้องระวางโทษจำคุกไม่เกินหนึ่งปี"


def shared(one: str, other: str) -> int:
    return len(set(runs(one)) & set(runs(other)))


def test_runs_of_words_are_those_that_a_plain_comparison_finds() -> None:
    other = "It says: WHOEVER by fraud obtains a “licence” under this act, shall be warned and told to leave."
    ours, theirs = units(LAW), units(other)
    windows = [{tuple(words[i:i + WORDS]) for i in range(len(words) - WORDS + 1)} for words in (ours, theirs)]
    assert len(windows[0]) == len(set(runs(LAW))) == len(ours) - WORDS + 1
    assert shared(LAW, other) == len(windows[0] & windows[1]) == 2
    assert shared(LAW, "Whoever by fraud obtains a licence under this Decree shall be liable.") == 0


def test_shorter_texts_have_no_run() -> None:
    assert list(runs("Whoever, by fraud, obtains a licence under this Act")) == []
    assert list(runs("")) == []


def test_scripts_without_blanks_are_compared_by_forty_characters() -> None:
    assert len(THAI) > 50
    assert shared(THAI, f"ตามมาตรา 4 {THAI[5:50]} และ") == len(units(THAI[5:50])) - 40 + 1 > 1
    assert shared(THAI, THAI[5:40]) == 0
    # a blank or a full stop in another place changes nothing
    assert shared(THAI, f"{THAI[:20]} {THAI[20:]}.") == len(set(runs(THAI)))


KOREAN = "모든 국민은 법 앞에 평등하다. 누구든지 성별, 종교 또는 사회적 신분에 의하여 차별을 받지 아니한다."


def test_korean_is_compared_by_thirty_syllables_wherever_its_blanks_are() -> None:
    assert len(units(KOREAN)) == len(KOREAN.replace(" ", "").replace(".", "").replace(",", ""))
    other = KOREAN.replace(" ", "") + "라고 한다"
    assert shared(KOREAN, other) == len(set(runs(KOREAN))) == len(units(KOREAN)) - 29
    assert units("GPT-4는 20개") == ["gpt", "4", "는", "20", "개"]


@pytest.mark.parametrize(("written", "meant"), [
    ("1,000,000 and 12 345 or 3.14", "1000000 and 12345 or 3 14"),
    ("in 1999 300 people, 1,23 and 1,2345", "in 1999 300 people 1 23 and 1 2345"),
    ("an exam-\n  ple of well-known\n\nend- of", "an example of well known end of"),
    ("<p class='a'>one<br/>two</p> &amp;&#160;three a < b > c", "one two three a b c"),
    (r"\textbf{bold} $\frac{1}{2}$ \left( x", "bold frac 1 2 x"),
    ("ＷＩＤＥ ﬁne Straße cafe\u0301 zer\u200bo so\u00adft", "wide fine strasse café zero soft"),
    ("٣ and ๓", "3 and 3"),
    ("<", ""), ("&", ""), ("a-", "a"), ("\\", ""), ("1,", "1"), ("\ud800", "\ud800"), ("&&;<!", ""),
])
def test_what_is_passed_over(written: str, meant: str) -> None:
    assert find_units(written).hashes.tolist() == find_units(meant).hashes.tolist()
    assert len(find_units(meant).hashes) == len(meant.split())


@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=30), st.data())
def test_a_stretch_has_the_hash_of_its_polynomial(ids: list[int], data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, len(ids) - 1))
    end = data.draw(st.integers(begin + 1, len(ids)))
    value = 0
    for one in ids[begin:end]:
        value = (value * 0x9E3779B97F4A7C15 + one) % (1 << 64)
    found = stretch_hashes(np.array(ids, np.uint64), np.array([begin]), np.array([end]))
    assert found.tolist() == [value ^ (value >> 29)]


def test_long_texts_have_the_hashes_of_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(0).integers(0, 1 << 17, 9000)
    expected = [window_hashes(tokens[start:start + 32], 32)[0] for start in range(0, 8900, 97)]
    assert window_hashes(tokens, 32)[:8900:97].tolist() == expected
    monkeypatch.setattr(overlap, "_KEPT_POWERS", 100)
    assert window_hashes(tokens, 32)[:8900:97].tolist() == expected
    assert len(window_hashes(tokens[:31], 32)) == 0


@given(st.text(alphabet=st.sampled_from("aB1,. -\n<>/&;\\\u200bé\u0301한ภ字ﬁİß"), max_size=40))
def test_units_stand_where_they_say(text: str) -> None:
    found = find_units(text)
    spans = [found.span(i, i + 1) for i in range(len(found.hashes))]
    assert all(start < stop for start, stop in spans)
    assert all(one[1] <= other[0] for one, other in pairwise(spans))
    # a unit's own text has its hash
    for i, (start, stop) in enumerate(spans):
        assert find_units(found.folded[start:stop]).hashes.tolist() == [found.hashes[i]]

"""Runs of ten words that two texts share, whatever their punctuation and case."""

from __future__ import annotations

from megatron_sov.documents.overlap import WORDS, runs, units

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

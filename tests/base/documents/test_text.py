"""Small work on text: what it keeps, what it refuses, what it counts."""

from __future__ import annotations

import itertools
import json
import re
import unicodedata

import pytest
from hypothesis import given, strategies as st

from megatron_sov.base.documents import cut_at_blank_lines, cut_text, scripts
from megatron_sov.base.documents.item_search import ItemSearch, SearchItem
from megatron_sov.base.documents.overlap import find_units, units
from megatron_sov.base.documents.rows import finite, no_constant
from megatron_sov.base.errors import visible


def read(text: str) -> object:
    return json.loads(text, parse_constant=no_constant, parse_float=finite)


def test_json_is_read_as_ever() -> None:
    text = '{"a": [1, -0.5, 1e308, null, true, "NaN"], "b": 5e-324}'
    assert read(text) == json.loads(text)


@pytest.mark.parametrize(("text", "why"), [
    ("NaN", "NaN is no JSON"), ("[-Infinity]", "-Infinity is no JSON"),
    ('{"a": 1e999}', "1e999 is more than")])
def test_numbers_that_would_be_written_as_none_are_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read(text)


# Control characters in text of strangers.


def test_control_characters_are_shown() -> None:
    assert visible("a\x1b[2Jb\x1b]0;title\x07\r\x9b") == r"a\x1b[2Jb\x1b]0;title\x07\r\x9b"
    # right to left, and the byte of a name that is no UTF-8
    assert visible("a\u202e\u2066\udcff") == r"a\u202e\u2066\udcff"


def test_all_else_stays() -> None:
    kept = "".join(chr(c) for c in range(0x3000) if unicodedata.category(chr(c)) != "Cc"
                   and not re.match("[\u202a-\u202e\u2066-\u2069]", chr(c))) + "\n\t한국어😀"
    assert visible(kept) == kept
    assert not [c for c in visible("".join(map(chr, range(256)))) if unicodedata.category(c) == "Cc"
                and c not in "\n\t"]


# Cutting text at blank lines: nothing is lost, and pieces keep their limit.


@given(st.text(alphabet=st.sampled_from("ab가é\U0001f600 \n\r")), st.integers(4, 20))
def test_pieces_join_to_the_text_and_keep_the_limit(text: str, limit_bytes: int) -> None:
    pieces = list(cut_text(text, limit_bytes))
    assert "".join(pieces) == text
    assert all(0 < len(p.encode()) <= limit_bytes for p in pieces)


@given(st.binary(max_size=200), st.integers(4, 50), st.integers(1, 20))
def test_cuts_terminate_on_any_bytes(raw: bytes, limit_bytes: int, block_bytes: int) -> None:
    blocks = [raw[i : i + block_bytes] for i in range(0, len(raw), block_bytes)]
    assert b"".join(cut_at_blank_lines(blocks, limit_bytes)) == raw


def test_cuts_prefer_blank_lines_then_lines_then_spaces() -> None:
    assert list(cut_text("aa\n\nbb\ncc dd", 9)) == ["aa\n\n", "bb\ncc dd"]
    assert list(cut_text("aaaa\nbb cc", 8)) == ["aaaa\n", "bb cc"]
    assert list(cut_text("aaaa bbbb", 8)) == ["aaaa ", "bbbb"]
    assert list(cut_text("가나다", 8)) == ["가나", "다"]


# Scripts whose characters are counted: the table against the names that Unicode gives its characters.


WORDS = {"thai": "THAI", "lao": "LAO", "tibetan letters": "TIBETAN", "tibetan signs": "TIBETAN",
         "burmese": "MYANMAR", "khmer": "KHMER", "kana": "HIRAGANA|KATAKANA", "bopomofo": "BOPOMOFO",
         "half-width kana": "HALFWIDTH KATAKANA", "han": "CJK", "marks of han": "IDEOGRAPHIC|HANGZHOU",
         "hangul": "HANGUL", "old hangul": "HANGUL", "lone hangul letters": "HANGUL"}
"""Script -> how the names of its characters begin."""


@pytest.mark.parametrize("script", scripts.CODE_POINTS)
def test_the_ranges_hold_the_script_and_no_other(script: str) -> None:
    names = [unicodedata.name(chr(code)) for begin, end in scripts.CODE_POINTS[script]
             for code in range(begin, end) if unicodedata.category(chr(code))[0] in "LM"]
    odd = [name for name in names if not re.match(WORDS[script], name)]
    assert names and odd in ([], ["COMBINING KATAKANA-HIRAGANA VOICED SOUND MARK",
                                  "COMBINING KATAKANA-HIRAGANA SEMI-VOICED SOUND MARK"])


def test_every_letter_of_a_script_is_in_its_ranges() -> None:
    spans = sorted(itertools.chain.from_iterable(scripts.CODE_POINTS.values()))
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans)), "each is of one script"
    everything = re.compile(f"[{scripts.in_brackets(tuple(scripts.CODE_POINTS))}]")
    missing = {unicodedata.name(chr(code)) for code in range(0x20000)
               if unicodedata.category(chr(code)) == "Lo" and not everything.match(chr(code))
               and re.match("THAI |LAO |TIBETAN |KHMER |HIRAGANA |KATAKANA |CJK UNI|HANGUL ",
                            unicodedata.name(chr(code), ""))}
    assert {name.split()[0] for name in missing} <= {"HIRAGANA", "KATAKANA"}, "archaic and small kana"


@pytest.mark.parametrize(("text", "takes"), [
    ("ไ", "runs rules scorers"), ("བ", "rules scorers"), ("ㅋ", "hangul rules"), ("ꥠ", "hangul scorers"),
    ("ㄅ", "rules"), ("ｶ", "rules"), ("々", "runs"), ("한", "hangul rules scorers"),
    ("漢", "runs rules scorers")])
def test_who_takes_which_is_a_decision(text: str, takes: str) -> None:
    decisions = {"runs": scripts.OF_RUNS, "hangul": scripts.HANGUL_OF_RUNS, "rules": scripts.OF_RULES,
                 "scorers": scripts.OF_SCORERS}
    assert [name for name, taken in decisions.items()
            if re.match(f"[{scripts.in_brackets(taken)}]", text)] == takes.split()


# The search finds what a comparison of lists of words finds.


NGRAM, MIN_WORDS = 4, 2
TEXTS = st.lists(st.sampled_from(["a", "b", "c", "ภ", "한", "字"]), min_size=1, max_size=25).map(" ".join)
SIZES = {"ภ": 3, "字": 3, "한": 4}


def runs(words: list[str], size: int) -> set[tuple[str, ...]]:
    """Return the shortest stretches from each word on that reach a size."""
    found = set()
    for begin in range(len(words)):
        for end in range(begin + 1, len(words) + 1):
            if sum(SIZES.get(word, 12) for word in words[begin:end]) >= size:
                found.add(tuple(words[begin:end]))
                break
    return found


def holds(text: list[str], item: list[str]) -> bool:
    """Return whether a text has what may not be shared of an item."""
    size = sum(SIZES.get(word, 12) for word in item)
    if size >= NGRAM * 12:
        return not runs(text, NGRAM * 12).isdisjoint(runs(item, NGRAM * 12))
    stretches = (text[i:i + len(item)] for i in range(len(text) - len(item) + 1))
    return size >= MIN_WORDS * 12 and item in stretches


@given(st.lists(TEXTS, min_size=1, max_size=5), TEXTS)
def test_it_finds_what_words_share(texts: list[str], text: str) -> None:
    search = ItemSearch([SearchItem("quiz", str(i), "text", one) for i, one in enumerate(texts)], NGRAM,
                        MIN_WORDS)
    found = search.find(find_units(text))
    assert {hit.item for hit in found} == {i for i, one in enumerate(texts) if holds(units(text), units(one))}
    assert all(one.begin < one.end <= len(units(text)) for one in found)
    assert search.find(find_units("")) == []

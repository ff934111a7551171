"""Search for shared word runs, cutting of text around them, script ranges, and search for evaluation
items."""

import itertools
import json
import re
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, strategies as st

from megatron_sov.base.documents import cut_at_blank_lines, cut_text, overlap, scripts, unit_scan
from megatron_sov.base.documents.item_search import ItemSearch, SearchItem
from megatron_sov.base.documents.overlap import RUN_WORDS, find_units, hash_runs, hash_stretches
from megatron_sov.base.documents.rows import parse_finite, reject_constant
from megatron_sov.base.errors import escape_controls

LAW = "Section 4. Whoever, by fraud, obtains a licence under this Act shall be liable to a fine."
THAI = "ผู้ใดกระทำความผิดตามพระราชบัญญัตินี้ต้องระวางโทษจำคุกไม่เกินหนึ่งปี"


def count_shared_runs(first: str, second: str) -> int:
    return len(set(hash_runs(first)) & set(hash_runs(second)))


def list_units(text: str) -> list[str]:
    """Return the units of a text as strings, without ignored characters."""
    parsed, classes, strings = find_units(text), unit_scan.get_classes(), list[str]()
    ignored = (unit_scan.SEPARATOR, unit_scan.IGNORED)
    for i in range(len(parsed.hashes)):
        start, stop = parsed.span(i, i + 1)
        characters = parsed.folded[start:stop].casefold()
        strings.append("".join(c for c in characters if classes[ord(c)] not in ignored))
    return strings


def test_runs_match_brute_force() -> None:
    other = "It says: WHOEVER by fraud obtains a “licence” under this act, shall be warned and told to leave."
    ours, theirs = list_units(LAW), list_units(other)
    our_runs = {tuple(ours[i:i + RUN_WORDS]) for i in range(len(ours) - RUN_WORDS + 1)}
    their_runs = {tuple(theirs[i:i + RUN_WORDS]) for i in range(len(theirs) - RUN_WORDS + 1)}
    assert len(our_runs) == len(set(hash_runs(LAW))) == len(ours) - RUN_WORDS + 1
    assert count_shared_runs(LAW, other) == len(our_runs & their_runs) == 2
    unrelated = "Whoever by fraud obtains a licence under this Decree shall be liable."
    assert count_shared_runs(LAW, unrelated) == 0


def test_short_texts_have_no_run() -> None:
    assert list(hash_runs("Whoever, by fraud, obtains a licence under this Act")) == []
    assert list(hash_runs("")) == []


def test_scripts_without_blanks_use_forty_characters() -> None:
    assert len(THAI) > 50
    assert count_shared_runs(THAI, f"ตามมาตรา 4 {THAI[5:50]} และ") == len(list_units(THAI[5:50])) - 40 + 1 > 1
    assert count_shared_runs(THAI, THAI[5:40]) == 0
    # a blank or a full stop in another place changes nothing
    assert count_shared_runs(THAI, f"{THAI[:20]} {THAI[20:]}.") == len(set(hash_runs(THAI)))


KOREAN = "모든 국민은 법 앞에 평등하다. 누구든지 성별, 종교 또는 사회적 신분에 의하여 차별을 받지 아니한다."


def test_korean_uses_thirty_syllables() -> None:
    assert len(list_units(KOREAN)) == len(KOREAN.replace(" ", "").replace(".", "").replace(",", ""))
    other = KOREAN.replace(" ", "") + "라고 한다"
    assert count_shared_runs(KOREAN, other) == len(set(hash_runs(KOREAN))) == len(list_units(KOREAN)) - 29
    assert list_units("GPT-4는 20개") == ["gpt", "4", "는", "20", "개"]


@pytest.mark.each(("markup", "plain"), [
    ("1,000,000 and 12 345 or 3.14", "1000000 and 12345 or 3 14"),
    ("in 1999 300 people, 1,23 and 1,2345", "in 1999 300 people 1 23 and 1 2345"),
    ("an exam-\n  ple of well-known\n\nend- of", "an example of well known end of"),
    ("<p class='a'>one<br/>two</p> &amp;&#160;three a < b > c", "one two three a b c"),
    (r"\textbf{bold} $\frac{1}{2}$ \left( x", "bold frac 1 2 x"),
    ("ＷＩＤＥ ﬁne Straße cafe\u0301 zer\u200bo so\u00adft", "wide fine strasse café zero soft"),
    ("٣ and ๓", "3 and 3"),
    ("<", ""), ("&", ""), ("a-", "a"), ("\\", ""), ("1,", "1"), ("\ud800", "\ud800"), ("&&;<!", ""),
])
def test_units_ignore_markup(markup: str, plain: str) -> None:
    assert find_units(markup).hashes.tolist() == find_units(plain).hashes.tolist()
    assert len(find_units(plain).hashes) == len(plain.split())


@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=30), st.data())
def test_stretch_hash_is_its_polynomial(ids: list[int], data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, len(ids) - 1))
    end = data.draw(st.integers(begin + 1, len(ids)))
    value = 0
    for token in ids[begin:end]:
        value = (value * 0x9E3779B97F4A7C15 + token) % (1 << 64)
    hashes = hash_stretches(np.array(ids, np.uint64), np.array([begin]), np.array([end]))
    assert hashes.tolist() == [value ^ (value >> 29)]


def test_hashes_do_not_depend_on_cached_powers(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(0).integers(1, 1 << 17, 9000).astype(np.uint64)
    begins = np.arange(0, 8900, 97)
    expected = [hash_stretches(tokens[at:at + 32], np.array([0]), np.array([32]))[0] for at in begins]
    assert hash_stretches(tokens, begins, begins + 32).tolist() == expected
    monkeypatch.setattr(overlap, "_MAX_CACHED_POWERS", 100)
    assert hash_stretches(tokens, begins, begins + 32).tolist() == expected


@given(st.text(alphabet=st.sampled_from("aB1,. -\n<>/&;\\\u200bé\u0301한ภ字ﬁİß"), max_size=40))
def test_unit_spans_match_text(text: str) -> None:
    units_of_text = find_units(text)
    spans = [units_of_text.span(i, i + 1) for i in range(len(units_of_text.hashes))]
    assert all(start < stop for start, stop in spans)
    assert all(left[1] <= right[0] for left, right in pairwise(spans))
    # a unit's own text has its hash
    for i, (start, stop) in enumerate(spans):
        assert find_units(units_of_text.folded[start:stop]).hashes.tolist() == [units_of_text.hashes[i]]


def parse_json(text: str) -> object:
    return json.loads(text, parse_constant=reject_constant, parse_float=parse_finite)


@pytest.mark.each(("text", "message"), [
    ("NaN", "NaN is not JSON"), ("[-Infinity]", "-Infinity is not JSON"),
    ('{"a": 1e999}', "1e999 is more than")])
def test_nan_and_infinity_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


# Control characters in text of strangers.


def test_control_characters_are_escaped() -> None:
    assert escape_controls("a\x1b[2Jb\x1b]0;title\x07\r\x9b") == r"a\x1b[2Jb\x1b]0;title\x07\r\x9b"
    # right-to-left text, and a byte of a file name that is not UTF-8
    assert escape_controls("a\u202e\u2066\udcff") == r"a\u202e\u2066\udcff"


# Splitting text at blank lines: the parts contain the whole text and stay within the limit.


@given(st.text(alphabet=st.sampled_from("ab가é\U0001f600 \n\r")), st.integers(4, 20))
def test_pieces_join_to_text_within_limit(text: str, limit_bytes: int) -> None:
    pieces = list(cut_text(text, limit_bytes))
    assert "".join(pieces) == text
    assert all(0 < len(p.encode()) <= limit_bytes for p in pieces)


@given(st.binary(max_size=200), st.integers(4, 50), st.integers(1, 20))
def test_cutting_terminates_on_any_bytes(raw: bytes, limit_bytes: int, block_bytes: int) -> None:
    blocks = [raw[i : i + block_bytes] for i in range(0, len(raw), block_bytes)]
    assert b"".join(cut_at_blank_lines(blocks, limit_bytes)) == raw


def test_cuts_prefer_blank_lines() -> None:
    assert list(cut_text("aa\n\nbb\ncc dd", 9)) == ["aa\n\n", "bb\ncc dd"]
    assert list(cut_text("aaaa\nbb cc", 8)) == ["aaaa\n", "bb cc"]
    assert list(cut_text("aaaa bbbb", 8)) == ["aaaa ", "bbbb"]
    assert list(cut_text("가나다", 8)) == ["가나", "다"]


# Scripts by which characters are counted, compared with Unicode's character names.


SCRIPT_NAMES = {"thai": "THAI", "lao": "LAO", "tibetan letters": "TIBETAN", "tibetan signs": "TIBETAN",
         "burmese": "MYANMAR", "khmer": "KHMER", "kana": "HIRAGANA|KATAKANA", "bopomofo": "BOPOMOFO",
         "half-width kana": "HALFWIDTH KATAKANA", "han": "CJK", "marks of han": "IDEOGRAPHIC|HANGZHOU",
         "hangul": "HANGUL", "old hangul": "HANGUL", "lone hangul letters": "HANGUL"}
"""Script -> how the names of its characters begin."""


@pytest.mark.each("script", scripts.CODE_POINTS)
def test_script_ranges_contain_only_the_script(script: str) -> None:
    names = [unicodedata.name(chr(code)) for begin, end in scripts.CODE_POINTS[script]
             for code in range(begin, end) if unicodedata.category(chr(code))[0] in "LM"]
    unexpected = [name for name in names if not re.match(SCRIPT_NAMES[script], name)]
    assert names and unexpected in ([], ["COMBINING KATAKANA-HIRAGANA VOICED SOUND MARK",
                                  "COMBINING KATAKANA-HIRAGANA SEMI-VOICED SOUND MARK"])


def test_script_ranges_are_complete() -> None:
    spans = sorted(itertools.chain.from_iterable(scripts.CODE_POINTS.values()))
    assert all(span[1] <= following[0] for span, following in pairwise(spans)), "a character has one script"
    all_scripts = re.compile(f"[{scripts.format_regex_ranges(tuple(scripts.CODE_POINTS))}]")
    missing = {unicodedata.name(chr(code)) for code in range(0x20000)
               if unicodedata.category(chr(code)) == "Lo" and not all_scripts.match(chr(code))
               and re.match("THAI |LAO |TIBETAN |KHMER |HIRAGANA |KATAKANA |CJK UNI|HANGUL ",
                            unicodedata.name(chr(code), ""))}
    assert {name.split()[0] for name in missing} <= {"HIRAGANA", "KATAKANA"}, "archaic and small kana"


@pytest.mark.each(("text", "users"), [
    ("ไ", "runs rules scorers"), ("བ", "rules scorers"), ("ㅋ", "hangul rules"), ("ꥠ", "hangul scorers"),
    ("ㄅ", "rules"), ("ｶ", "rules"), ("々", "runs"), ("한", "hangul rules scorers"),
    ("漢", "runs rules scorers")])
def test_script_choices_of_each_user(text: str, users: str) -> None:
    scripts_by_user = {"runs": scripts.RUN_SCRIPTS, "hangul": scripts.RUN_HANGUL_SCRIPTS,
                 "rules": scripts.RULE_SCRIPTS,
                 "scorers": scripts.SCORER_SCRIPTS}
    assert [name for name, user_scripts in scripts_by_user.items()
            if re.match(f"[{scripts.format_regex_ranges(user_scripts)}]", text)] == users.split()


# The search equals a comparison of word lists.


NGRAM, MIN_WORDS = 4, 2
TEXTS = st.lists(st.sampled_from(["a", "b", "c", "ภ", "한", "字"]), min_size=1, max_size=25).map(" ".join)
WEIGHTS = {"ภ": 3, "字": 3, "한": 4}
"""Weight of a character in a script without blanks, for `find_shortest_runs`; a word weighs 12."""


def find_shortest_runs(words: list[str], min_weight: int) -> set[tuple[str, ...]]:
    """Return, for each word, the shortest run of words that begins with it and reaches `min_weight`."""
    word_runs = set()
    for begin in range(len(words)):
        for end in range(begin + 1, len(words) + 1):
            if sum(WEIGHTS.get(word, 12) for word in words[begin:end]) >= min_weight:
                word_runs.add(tuple(words[begin:end]))
                break
    return word_runs


def contains_item(text: list[str], item: list[str]) -> bool:
    """Return whether a text contains the protected part of an item."""
    min_weight = sum(WEIGHTS.get(word, 12) for word in item)
    if min_weight >= NGRAM * 12:
        return not find_shortest_runs(text, NGRAM * 12).isdisjoint(find_shortest_runs(item, NGRAM * 12))
    word_runs = (text[i:i + len(item)] for i in range(len(text) - len(item) + 1))
    return min_weight >= MIN_WORDS * 12 and item in word_runs


@given(st.lists(TEXTS, min_size=1, max_size=5), TEXTS)
def test_item_search_matches_word_comparison(texts: list[str], text: str) -> None:
    search = ItemSearch([SearchItem("quiz", str(i), "text", item) for i, item in enumerate(texts)], NGRAM,
                        MIN_WORDS)
    matches = search.find(find_units(text))
    assert {hit.item for hit in matches} == {i for i, item in enumerate(texts)
                                           if contains_item(list_units(text), list_units(item))}
    assert all(hit.begin < hit.end <= len(list_units(text)) for hit in matches)
    assert search.find(find_units("")) == []

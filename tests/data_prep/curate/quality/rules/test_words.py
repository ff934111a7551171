"""Words, characters that count as words, and n-grams, against counts written out."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest

from data_prep.curate.quality.rules.words import RuleWords


def tokens(text: str, unit: str = "words") -> list[str]:
    words = RuleWords(text, unit, 2.0)
    return [words.vocabulary[i] for i in words.ids]


@pytest.mark.parametrize(("text", "expected"), [
    ("It's 3.14, isn't it?", ["It's", "3.14", ",", "isn't", "it", "?"]),
    ("a_b file.txt (x)--y", ["a_b", "file.txt", "(", "x", ")--", "y"]),
    ("हिन्दी में लिखें।", ["हिन्दी", "में", "लिखें", "।"]),
    ("", [])])
def test_words_are_cut_at_spaces_and_signs(text: str, expected: list[str]) -> None:
    assert tokens(text) == expected


def test_where_there_are_no_spaces_characters_with_their_marks_are_cut() -> None:
    assert tokens("ที่นี่ GPU 2 ตัว", "characters") == ["ที่", "นี่", "GPU", "2", "ตั", "ว"]
    assert tokens("東京でAIを。", "characters") == ["東", "京", "で", "AI", "を", "。"]


def test_characters_count_as_shares_of_words() -> None:
    words = RuleWords("東京都 GPU 42。", "characters", 1.5)
    assert words.num_words == pytest.approx(3 / 1.5 + 2)
    assert words.num_tokens == pytest.approx(3 / 1.5 + 3)
    assert words.num_alpha == pytest.approx(3 / 1.5 + 1)
    assert words.size(2) == 3


def expected_top(words: list[str], n: int) -> int:
    grams = Counter(" ".join(words[i:i + n]) for i in range(len(words) - n + 1))
    return len(grams.most_common(1)[0][0]) * grams.most_common(1)[0][1] if grams else 0


def expected_duplicates(words: list[str], n: int) -> int:
    seen, total, place = set(), 0, 0
    while place + n <= len(words):
        gram = tuple(words[place:place + n])
        if gram in seen:
            total += len("".join(gram))
            place += n
        else:
            seen.add(gram)
            place += 1
    return total


def test_repeated_ngrams_are_counted_as_by_a_walk_over_the_words() -> None:
    draw = random.Random(3)
    for _ in range(150):
        vocabulary = ["a", "bb", "ccc", "dd.d", "eeeee", "ff"][:draw.randint(1, 6)]
        words = [draw.choice(vocabulary) for _ in range(draw.randint(0, 80))]
        measured = RuleWords(" ".join(words), "words", 1.0)
        for n in (1, 2, 3, 4):
            assert measured.top_ngram_chars(n) == expected_top(words, n)
        for n in range(5, 11):
            assert measured.duplicate_ngram_chars(n, enough=-1) == expected_duplicates(words, n)
            assert measured.duplicate_ngram_chars(n, enough=10**9) >= expected_duplicates(words, n)


def test_where_characters_are_counted_the_blanks_between_words_count_as_well() -> None:
    """The thresholds were found on words that a dictionary cuts, joined by blanks."""
    words = ["가나", "다라", "마바", "가나", "다라", "사아", "가나", "다라", "자차"]
    measured = RuleWords("".join(words), "characters", 2.0)
    assert measured.top_ngram_chars(2) == expected_top(words, 2) == 3 * len("가나 다라")


def test_large_and_strange_texts_are_measured_in_time() -> None:
    for text in ("a " * 200_000, "x" * 1_000_000, "'" * 300_000, "a'" * 200_000, "กิ่" * 100_000,
                 "1,1," * 100_000):
        start = time.process_time()
        for unit in ("words", "characters"):
            measured = RuleWords(text, unit, 3.9)
            measured.duplicate_ngram_chars(10, enough=0)
            measured.top_ngram_chars(2)
        assert time.process_time() - start < 2.0

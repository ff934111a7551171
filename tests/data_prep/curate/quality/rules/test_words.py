"""Words of a text, and the rules of each language."""

import time

import pytest

from data_prep.curate.quality.rules.step import list_languages, load_language_rules
from data_prep.curate.quality.rules.words import RuleWords
from tests.data_prep.curate.quality.test_identify import SENTENCES
from tests.typed_words import keys_of


@pytest.mark.each(("unit", "text", "expected"), [
    ("words", "It's 3.14, isn't it?", ["It's", "3.14", ",", "isn't", "it", "?"]),
    ("words", "a_b file.txt (x)--y", ["a_b", "file.txt", "(", "x", ")--", "y"]),
    ("words", "हिन्दी में लिखें।", ["हिन्दी", "में", "लिखें", "।"]),
    ("words", "", []),
    ("characters", "ที่นี่ GPU 2 ตัว", ["ที่", "นี่", "GPU", "2", "ตั", "ว"]),
    ("characters", "東京でAIを。", ["東", "京", "で", "AI", "を", "。"])])
def test_text_is_split_into_words_or_graphemes(unit: str, text: str, expected: list[str]) -> None:
    words = RuleWords(text, unit, 2.0)
    assert [words.vocabulary[i] for i in words.ids] == expected


def test_characters_count_as_shares_of_words() -> None:
    # three ideographs at 1.5 per word, and the words GPU and 42; the full stop is a token, but no word
    words = RuleWords("東京都 GPU 42。", "characters", 1.5)
    assert words.num_words == pytest.approx(3 / 1.5 + 2)
    assert words.num_tokens == pytest.approx(3 / 1.5 + 3)
    assert words.num_alpha == pytest.approx(3 / 1.5 + 1)
    assert words.count_places(2) == 3


def test_character_counts_include_the_spaces_between_words() -> None:
    """The thresholds were found on words that a dictionary cuts, joined by blanks."""
    words = ["가나", "다라", "마바", "가나", "다라", "사아", "가나", "다라", "자차"]
    measured = RuleWords("".join(words), "characters", 2.0)
    assert measured.count_top_ngram_chars(2) == 3 * len("가나 다라")


def test_large_and_hostile_texts_take_linear_time() -> None:
    for text in ("a " * 200_000, "x" * 1_000_000, "'" * 300_000, "a'" * 200_000, "กิ่" * 100_000,
                 "1,1," * 100_000):
        start = time.process_time()
        for unit in ("words", "characters"):
            measured = RuleWords(text, unit, 3.9)
            measured.count_duplicate_ngram_chars(10, enough=0)
            measured.count_top_ngram_chars(2)
        assert time.process_time() - start < 2.0


RECIPE_LANGUAGES = {"ko", "en", "th", "es", "de", "ja", "vi"}
"""Languages of the recipes' tokenizers and corpora."""


@pytest.mark.parametrize("code", [*list_languages(), "other"])
def test_a_file_loads_and_its_thresholds_are_possible(code: str) -> None:
    rules = load_language_rules(code)
    assert rules.code == code
    assert keys_of(rules.thresholds) == []
    assert (rules.unit == "characters") == (rules.chars_per_word > 1)
    assert all(isinstance(word, str) for word in rules.stop_words)


def test_languages_of_the_recipes_have_their_own_rules() -> None:
    assert set(list_languages()) >= RECIPE_LANGUAGES


@pytest.mark.parametrize("code", sorted(set(list_languages()) & set(SENTENCES)))
def test_a_sentence_has_stop_words_of_its_language(code: str) -> None:
    text = SENTENCES[code].lower()
    assert load_language_rules(code).count_stop_words(text, text.replace(".", " ").split()) >= 1


def test_a_language_without_a_file_gets_the_default_rules() -> None:
    assert load_language_rules("sw").code == "other"
    assert load_language_rules("common").code == "other"

"""What a text made from another one states beyond it."""

from __future__ import annotations

import pytest

from data_prep.synth.generators.documents.facts import fact_verdicts, kept_share, names_of, quotes_of

SOURCE = ("King Sejong of Korea announced the alphabet in 1446, as Kim-Lee Park wrote. He called it “right "
          "sounds” and NASA did not exist yet.")


def failed(made: str, source: str = SOURCE, language: str = "en", source_language: str = "en") -> set[str]:
    """Return the checks that a text does not pass."""
    return {v.check for v in fact_verdicts(made, source, language, source_language) if not v.passed}


@pytest.mark.parametrize(("made", "checks"), [
    ("The Korean king named Sejong announced “right sounds” in 1446.", set()),
    ("In 1443 the king announced it.", {"numbers"}),
    ("Then, they say, Dr. Park and President Sejong announced it.", set()),
    ("The alphabet was announced by Napoleon in 1446.", {"names"}),
    ("NATO did not exist yet.", {"names"}),
    ("He called it “wrong sounds”.", {"quotes"}),
    ('He called it "right sounds."', set()),
    ("Park's king, the Koreans say, announced it.", set()),
    ("# The Early Life Of Kings\n\nSejong announced it.", set()),
])
def test_numbers_names_and_quotes_have_to_stand_in_the_source(made: str, checks: set[str]) -> None:
    assert failed(made) == checks


def test_latin_words_in_a_korean_text_are_names() -> None:
    source = "세종은 1446년에 훈민정음을 반포하였고 UNESCO가 등재하였다."
    assert failed("UNESCO의 목록에 있는 훈민정음은 1446년의 것이다.", source, "ko", "ko") == set()
    assert failed("NASA가 1446년에 등재하였다.", source, "ko", "ko") == {"names"}


def test_across_languages_numbers_alone_are_compared() -> None:
    in_march = f"{SOURCE} It was in March."
    assert failed("나폴레옹은 1446년 3월에 “옳은 소리”를 알렸다.", in_march, "ko") == set()
    assert failed("1447년의 일이다.", SOURCE, "ko") == {"numbers"}


def test_names_are_seen_by_their_capitals() -> None:
    assert names_of("The town of Alderford is old. Nobody knows iPhone or DNA.", "en") == [
        "Alderford", "iPhone", "DNA"]
    assert names_of("Das Haus der Frau Müller", "de") == []  # where every noun has a capital


def test_quotes_of_all_marks() -> None:
    assert quotes_of('“a b” 「다」 『라』 «e» "f" it’s ""') == ["a b", "다", "라", "e", "f"]


def test_kept_share_counts_numbers_and_names_of_the_source() -> None:
    assert kept_share(SOURCE, SOURCE, "en", "en") == 1
    assert kept_share("Nothing of it.", SOURCE, "en", "en") == 0
    assert kept_share("Nothing.", "A short one of 12.", "en", "en") is None


def test_a_number_in_words_that_the_source_does_not_state_is_told() -> None:
    source = "The port had 40 ships and twenty-five cranes in 1890."
    right = fact_verdicts("Forty ships lay there, and 25 cranes.", source, "en", "en")
    assert all(verdict.passed for verdict in right)
    [wrong, *_] = fact_verdicts("Five hundred ships lay there.", source, "en", "en")
    assert not wrong.passed and "500" in wrong.detail

"""Languages by their letters: code switching shows, names and formulas do not count against an answer."""

from __future__ import annotations

import pytest

from megatron_sov.documents.scripts import letters_by_script
from megatron_sov.rewards.reward import Refused
from megatron_sov.rewards.surface import Language, switches
from megatron_sov.settings import problems_of

KOREAN = "서울은 대한민국의 수도이며 약 구백만 명이 사는 도시입니다."


def reward(response: str, **settings) -> float:
    return Language(**settings).score({"response": response}).reward


@pytest.mark.parametrize(("language", "text"), [
    ("ko", KOREAN), ("th", "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย"), ("ja", "東京は日本の首都です。カタカナ"),
    ("ru", "Москва — столица России"), ("en", "Seoul is the capital of Korea."), ("el", "Η Αθήνα"),
    ("ar", "القاهرة"),
    ("hi", "दिल्ली भारत की राजधानी है"), ("ko", KOREAN + " `print(x)` $x^2 + y$ https://example.com/a"),
    ("en", "Ｆｕｌｌ width letters, and ﬁne ligatures")])
def test_a_language_alone_is_1(language: str, text: str) -> None:
    assert reward(text, language=language) == pytest.approx(1.0)


def test_a_few_words_of_another_language_are_fine_and_many_are_not() -> None:
    assert reward(KOREAN + " (Seoul)", language="ko") == pytest.approx(1.0)
    mixed = "서울은 대한민국의 capital이고 많은 people이 함께 모여 사는 아름다운 city입니다"
    switched = Language("ko").score({"response": mixed})
    assert 0 < switched.reward < 0.9
    assert switched.components["also_share"] > 0.2
    assert reward("This answer is English. 한국", language="ko") == 0.0
    assert reward(KOREAN + " 首都", language="ko") < 1.0


@pytest.mark.parametrize("text", ["", "12345 !?", "\u202e\u202d\u200b", "\x00\x07", "😀😀",
                                  "```\ncode only\n```"])
def test_no_letters_are_no_language(text: str) -> None:
    assert reward(text, language="en") == 0.0


def test_the_row_may_name_its_language() -> None:
    assert Language().score({"response": KOREAN, "language": "ko"}).reward == pytest.approx(1.0)
    with pytest.raises(Refused, match="has no 'language'"):
        Language().score({"response": KOREAN})
    with pytest.raises(Refused, match="'tlh' is not known"):
        Language().score({"response": KOREAN, "language": "tlh"})


def test_settings_that_make_no_sense() -> None:
    found = problems_of(Language("kr", also=("en", "jp"), min_share=2))
    assert [problem.key for problem in found] == ["language", "also.1", "min_share"]


def test_switches_are_counted_between_words() -> None:
    assert switches("하나 둘 three 넷") == pytest.approx(50.0)
    assert switches("하나 2 둘") == 0.0


def test_a_million_letters_are_counted_at_once() -> None:
    assert letters_by_script("가" * 1_000_000 + "a" * 1_000_000) == {"HANGUL": 1_000_000, "LATIN": 1_000_000}

"""Rewards `format`, `length`, `repetition` and `language`: correct, nearly correct and hostile responses."""

import json
import time

import pytest

from megatron_sov.base.settings import find_all_problems
from megatron_sov.judge.rewards import patterns
from megatron_sov.judge.rewards.patterns import MAX_JSON_CHARS, NO_JSON, parse_json
from megatron_sov.judge.rewards.reward import Refused
from megatron_sov.judge.rewards.surface import (
    Format, LanguageReward, Length, Repetition, compute_overlong_penalty, compute_repeated_share,
    count_script_switches, find_final_loop, has_tag_sequence, split_words)

TAGS = ("think", "answer")


def score_format(response: str, **settings) -> float:
    return Format(**settings).score({"response": response}).reward


@pytest.mark.each(("text", "is_valid"), [
    ("<think>why</think><answer>4</answer>", True), (" <think>a < b</think>\n<answer>4</answer>\n", True),
    ("<think>why</think>", False), ("<answer>4</answer><think>why</think>", False),
    ("so: <think>why</think><answer>4</answer>", False), ("<think>why</think><answer>4</answer> done", False),
    ("<think>why</think><answer> </answer>", False), ("<think>a<answer>4</answer></think>", False),
    ("<think>a</think><answer>4</answer><answer>5</answer>", False),
    ("</think><think><answer>4</answer>", False), ("<THINK>why</THINK><answer>4</answer>", False)])
def test_tags_are_required_once_and_in_order(text: str, is_valid: bool) -> None:
    assert has_tag_sequence(text, TAGS) is is_valid


@pytest.mark.each(("text", "value"), [
    ('{"a": 1}', {"a": 1}), ('```json\n{"a": 1}\n```', {"a": 1}), ("```\n[1]\n```", [1]), ("3", 3),
    ("null", None),
    ("", NO_JSON), ("{'a': 1}", NO_JSON), ('{"a": 1} ok', NO_JSON), ("NaN", NO_JSON),
    ("[" * 100_000, NO_JSON),
    ("[" * 5_000 + "]" * 5_000, NO_JSON), ("1" * 5_000, NO_JSON), ('"\x00"', NO_JSON),
])
def test_json_must_be_the_whole_response(text: str, value: object) -> None:
    assert parse_json(text) == value


def test_json_beyond_the_limit_is_refused() -> None:
    with pytest.raises(Refused, match="at most 1,000,000"):
        parse_json(json.dumps("x" * MAX_JSON_CHARS))


def test_checks_count_together_and_a_pattern_is_of_the_whole_response() -> None:
    checks = {"json_keys": ("a", "b"), "regex": r"\{.*\}"}
    assert score_format('{"a": 1,\n"b": 2}', **checks) == 1.0
    assert score_format('{"a": 1}', **checks) == 0.0
    # valid JSON that the pattern matches, without the key "b"
    assert score_format('{"a": 1}', **checks, all_or_nothing=False) == pytest.approx(2 / 3)
    assert score_format(" The answer is 4. ", regex=r"The answer is \d+\.") == 1.0
    assert score_format("The answer is 4. Or 5.", regex=r"The answer is \d+\.") == 0.0


@pytest.mark.each(("settings", "problem"), [
    ({}, "nothing is asked for"), ({"regex": "("}, 'regex = "(" is no regular expression'),
    ({"tags": ("a b",)}, 'tags.0 = "a b" must be a name')])
def test_invalid_settings_are_refused(settings: dict, problem: str) -> None:
    assert problem in str(find_all_problems(Format(**settings))[0])


@pytest.mark.each(("length", "reward"), [
    (0, 0.0), (16_384, 0.0), (16_385, -1 / 4096), (18_432, -0.5), (20_479, -4095 / 4096), (20_480, -1.0),
    (20_481, -1.0), (10**9, -1.0)])
def test_equation_13_of_dapo(length: int, reward: float) -> None:
    assert compute_overlong_penalty(length, 20_480, 4_096) == pytest.approx(reward)
    assert Length().score({"response": "", "num_tokens": length}).reward == pytest.approx(reward)


def test_length_in_characters_and_words() -> None:
    row = {"response": "one two three four"}
    assert Length(max_length=4, buffer=2, unit="words").score(row).reward == -1.0
    assert Length(max_length=20, buffer=4, unit="characters").score(row).reward == -0.5
    assert Length(max_length=20, buffer=4, min_length=19, unit="characters").score(row).reward == -1.0


@pytest.mark.each("num_tokens", [None, "4", -1, True, 2.5])
def test_length_in_tokens_requires_num_tokens(num_tokens: object) -> None:
    with pytest.raises(Refused, match="must be the number of the response's tokens"):
        Length().score({"response": "x", "num_tokens": num_tokens})


TEXT = ("Water boils at a lower temperature on a mountain, because the pressure of the air is lower there. "
         "An egg therefore takes longer to cook, and a pressure cooker helps. ......")


def score_repetition(response: str, **row) -> float:
    return Repetition().score({"response": response, **row}).reward


@pytest.mark.each(("response", "fields", "reward"), [
    (TEXT, {}, 0.0), ("", {}, 0.0), ("물은 산에서 더 낮은 온도에서 끓는다. 기압이 낮기 때문이다.", {}, 0.0),
    (TEXT, {"finish_reason": "stop"}, 0.0), (TEXT, {"finish_reason": "length"}, -1.0),
    *((TEXT + loop, {}, -1.0)
      for loop in ("I am sorry. " * 6, "a" * 100, "ha ha " * 10, "다시 " * 20, "\x07" * 60))])
def test_loops_and_missing_ends_are_the_worst(response: str, fields: dict[str, str], reward: float) -> None:
    assert score_repetition(response, **fields) == reward


def test_repeated_passage_counts_by_its_share() -> None:
    paragraph = TEXT.partition(" ......")[0]
    assert find_final_loop(paragraph * 2)[1] == 2
    assert -1 < score_repetition(paragraph * 2) < 0


@pytest.mark.each(("text", "piece", "repeats"), [
    ("xyabab", "ab", 2), ("abcabcabc", "abc", 3), ("abc", "", 1), ("", "", 1), ("aXbXaXbX", "aXbX", 2),
    ("zaaaa", "a", 4)])
def test_final_loop_has_the_shortest_period(text: str, piece: str, repeats: int) -> None:
    assert find_final_loop(text) == (piece, repeats)


def test_loop_inside_a_repeated_passage_is_detected() -> None:
    looping = TEXT + "no " * 20
    assert find_final_loop(looping + looping, 24)[1] >= 19


def test_repeated_n_grams_are_counted() -> None:
    assert compute_repeated_share(["a", "b", "c", "a", "b", "c"], 2) == pytest.approx(1 - 3 / 5)
    assert compute_repeated_share(["a"], 2) == 0.0
    assert split_words("ab, 서울 กา 東京") == ["ab", ",", "서울", "ก", "า", "東", "京"]


def test_penalty_of_a_missing_end_is_set() -> None:
    assert Repetition(no_end_penalty=0).score({"response": TEXT, "finish_reason": "length"}).reward == 0.0


def test_loop_search_is_linear() -> None:
    begin_s = time.process_time()
    assert score_repetition("a" * 3_000_000) == -1.0
    assert time.process_time() - begin_s < 5


KOREAN = "서울은 대한민국의 수도이며 약 구백만 명이 사는 도시입니다."


def score_language(response: str, **settings) -> float:
    return LanguageReward(**settings).score({"response": response}).reward


IN_ONE_LANGUAGE = [
    ("ko", KOREAN), ("th", "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย"), ("ja", "東京は日本の首都です。カタカナ"),
    ("ru", "Москва — столица России"), ("en", "Seoul is the capital of Korea."), ("el", "Η Αθήνα"),
    ("ar", "القاهرة"),
    ("hi", "दिल्ली भारत की राजधानी है"), ("ko", KOREAN + " `print(x)` $x^2 + y$ https://example.com/a"),
    ("en", "Ｆｕｌｌ width letters, and ﬁne ligatures"), ("ko", KOREAN + " (Seoul)")]
WITHOUT_LETTERS = ["", "12345 !?", "\u202e\u202d\u200b", "\x00\x07", "😀😀", "```\ncode only\n```"]


@pytest.mark.each(("language", "text", "reward"), [
    *((language, text, 1.0) for language, text in IN_ONE_LANGUAGE),
    *(("en", text, 0.0) for text in WITHOUT_LETTERS), ("ko", "This answer is English. 한국", 0.0)])
def test_text_in_its_language_scores_1_and_other_text_0(language: str, text: str, reward: float) -> None:
    assert score_language(text, language=language) == pytest.approx(reward)


def test_other_languages_count_up_to_a_share() -> None:
    mixed = "서울은 대한민국의 capital이고 많은 people이 함께 모여 사는 아름다운 city입니다"
    switched = LanguageReward("ko").score({"response": mixed})
    assert 0 < switched.reward < 0.9
    assert switched.components["also_share"] > 0.2
    assert score_language(KOREAN + " 首都", language="ko") < 1.0


def test_row_names_its_language() -> None:
    assert LanguageReward().score({"response": KOREAN, "language": "ko"}).reward == pytest.approx(1.0)
    with pytest.raises(Refused, match="has no 'language'"):
        LanguageReward().score({"response": KOREAN})
    with pytest.raises(Refused, match="'tlh' is not known"):
        LanguageReward().score({"response": KOREAN, "language": "tlh"})


def test_switches_are_counted_between_words() -> None:
    assert count_script_switches("하나 둘 three 넷") == pytest.approx(50.0)
    assert count_script_switches("하나 2 둘") == 0.0


def test_a_catastrophic_pattern_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "TIME_LIMIT_S", 0.2)
    begin_s = time.process_time()
    with pytest.raises(TimeoutError, match=r"the pattern '\(x\+x\+\)\+y' takes longer than 0.2 s"):
        patterns.search(r"(x+x+)+y", "x" * 10_000)
    assert time.process_time() - begin_s < 5

"""Loops and repeated n-grams, against counting by hand; sound text is left alone."""

from __future__ import annotations

import time

import pytest

from megatron_sov.rewards.surface import Repetition, loop_at_end, repeated_share, words_of
from megatron_sov.settings import problems_of

SOUND = ("Water boils at a lower temperature on a mountain, because the pressure of the air is lower there. "
         "An egg therefore takes longer to cook, and a pressure cooker helps. ......")


def reward(response: str, **row) -> float:
    return Repetition().score({"response": response, **row}).reward


def test_sound_text_is_left_alone() -> None:
    assert reward(SOUND) == 0.0
    assert reward("") == 0.0
    assert reward("물은 산에서 더 낮은 온도에서 끓는다. 기압이 낮기 때문이다.") == 0.0


@pytest.mark.parametrize("loop", ["I am sorry. " * 6, "a" * 100, "ha ha " * 10, "다시 " * 20, "\x07" * 60])
def test_a_loop_at_the_end_is_the_worst(loop: str) -> None:
    assert reward(SOUND + loop) == -1.0


def test_what_stands_twice_is_no_loop_and_counts_by_its_share() -> None:
    paragraph = SOUND.partition(" ......")[0]
    assert loop_at_end(paragraph * 2)[1] == 2
    assert -1 < reward(paragraph * 2) < 0


@pytest.mark.parametrize(("text", "piece", "repeats"), [
    ("xyabab", "ab", 2), ("abcabcabc", "abc", 3), ("abc", "", 1), ("", "", 1), ("aXbXaXbX", "aXbX", 2),
    ("zaaaa", "a", 4)])
def test_loops_are_found_with_their_period(text: str, piece: str, repeats: int) -> None:
    assert loop_at_end(text) == (piece, repeats)


def test_a_loop_inside_of_what_stands_twice_is_found() -> None:
    looping = SOUND + "no " * 20
    assert loop_at_end(looping + looping, 24)[1] >= 19


def test_repeated_n_grams_are_counted() -> None:
    assert repeated_share(["a", "b", "c", "a", "b", "c"], 2) == pytest.approx(1 - 3 / 5)
    assert repeated_share(["a"], 2) == 0.0
    assert words_of("ab, 서울 กา 東京") == ["ab", ",", "서울", "ก", "า", "東", "京"]


def test_no_end_is_a_fault() -> None:
    assert reward(SOUND, finish_reason="length") == -1.0
    assert reward(SOUND, finish_reason="stop") == 0.0
    assert Repetition(no_end_penalty=0).score({"response": SOUND, "finish_reason": "length"}).reward == 0.0


def test_megabytes_of_one_character_take_a_moment() -> None:
    begin_s = time.process_time()
    assert reward("a" * 3_000_000) == -1.0
    assert time.process_time() - begin_s < 5


def test_settings_that_make_no_sense() -> None:
    problems = problems_of(Repetition(ngram=0, no_end_penalty=2))
    assert [problem.key for problem in problems] == ["ngram", "no_end_penalty"]

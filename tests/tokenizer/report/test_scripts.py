"""Samples of writing that is often treated badly: what is lost, what is dear."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any

import pytest

from tokenizer.report import measures
from tokenizer.report.measures import HANGUL_SYLLABLES, KOREAN, SAMPLES, check_scripts

Toy = Callable[..., Any]


@pytest.fixture(autouse=True)
def few_syllables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ten Hangul syllables stand for all."""
    monkeypatch.setattr(measures, "HANGUL_SYLLABLES", HANGUL_SYLLABLES[:10])


def test_bytes_alone_lose_nothing(toy: Toy) -> None:
    check = check_scripts(toy())
    assert check.numbers["lost"] == check.numbers["equivalent"] == []
    assert set(check.numbers["samples"]) == {f"{group}: {name}" for group, named in SAMPLES.items()
                                             for name in named}
    vietnamese = check.numbers["samples"]["Others: Vietnamese"]
    assert ((vietnamese["num_chars"], vietnamese["num_bytes"], vietnamese["num_tokens"], vietnamese["back"])
            == (10, 14, 14, "same"))
    assert check.numbers["hangul_syllables_by_tokens"] == {"3": 10}
    bytes_of = {form: len(unicodedata.normalize(form, KOREAN).encode()) for form in ("NFC", "NFD")}
    assert check.numbers["decomposed_over_composed"] == pytest.approx(bytes_of["NFD"] / bytes_of["NFC"])


def test_a_vocabulary_of_syllables_makes_decomposed_korean_dear(toy: Toy) -> None:
    check = check_scripts(toy(*sorted(set(KOREAN) - {" ", "."}), "각"))
    assert check.numbers["hangul_syllables_by_tokens"] == {"1": 1, "3": 9}
    assert check.verdict == "note" and check.numbers["decomposed_over_composed"] > 5
    assert ("so normalize the corpus to NFC" in check.summary
            and "1 of 10 Hangul syllables are one token" in check.summary)


def test_a_sample_that_does_not_come_back_is_bad_and_an_equivalent_one_a_remark(toy: Toy) -> None:
    lost = check_scripts(toy(change=lambda text: text.replace("\u200d", "")))
    assert lost.verdict == "bad"
    assert lost.numbers["lost"] == ["Emoji: joined family (ZWJ)", "Emoji: profession with skin tone"]
    assert "2 samples are lost: Emoji: joined family (ZWJ), Emoji: profession with skin tone" in lost.summary
    composed = check_scripts(toy(change=lambda text: unicodedata.normalize("NFC", text)))
    assert composed.verdict == "note" and composed.numbers["lost"] == []
    assert "Hangul: decomposed (NFD)" in composed.numbers["equivalent"]
    assert "Others: Vietnamese" not in composed.numbers["equivalent"], "it is composed as it stands"

"""The step `language`: which documents stay, and what is said of each."""

from __future__ import annotations

from typing import Any

import pytest

from data_prep.curate.pipeline.step import Doc, StepOutcome
from data_prep.curate.quality.identify import Language, LanguageSettings
from tests.typed_words import keys_of

KOREAN = "이 문서는 설치 과정을 설명합니다. 데이터를 다시 내려받으세요."
ENGLISH = "This document describes how the system is installed. Please download the data again."
PYTHON = "import sys\n\n\ndef main(path):\n    for line in open(path):\n        sys.stdout.write(line)\n"


def outcome(text: str, **settings) -> StepOutcome:
    return Language(LanguageSettings(**settings)).outcomes([Doc("a:0:0", text, "a", 0, 0)])[0]


def test_each_document_gets_its_language_and_form() -> None:
    assert outcome(KOREAN).values["language"] == "ko"
    assert outcome(ENGLISH).values == {
        "language": "en", "language_score": pytest.approx(0.97, abs=0.03), "form": "prose"}


@pytest.mark.parametrize(("text", "reason"), [
    (KOREAN, ""), (ENGLISH, "language en"), ("12 + 30 = 42", "no language"), (PYTHON, ""),
    (KOREAN * 2 + ENGLISH * 2, "language not sure")])
def test_only_languages_to_keep_stay_and_code_in_any(text: str, reason: str) -> None:
    assert outcome(text, keep=("ko", "th"), min_score=0.6).reason == reason


def test_forms_can_be_left_out() -> None:
    assert outcome(PYTHON, forms=("prose",)).reason == "form code"
    assert outcome("<ul><li>One<li>Two</ul>", forms=("prose", "code")).reason == "form markup"


def test_without_a_list_all_sure_languages_stay_and_without_a_score_all() -> None:
    assert outcome("Москва — столица России.").reason == ""
    assert outcome("12 + 30 = 42", min_score=0).reason == ""


def test_the_model_is_among_the_files_that_outcomes_depend_on() -> None:
    assert [file.stat().st_size > 1_000_000 for file in Language(LanguageSettings()).files()] == [True]


def test_every_broken_rule_is_told() -> None:
    wrong: Any = "proes"
    assert keys_of(LanguageSettings(keep=("ko", "jp"), min_score=1.5, forms=(wrong,))) == [
        "keep.1", "min_score", "forms.0"]
    assert keys_of(LanguageSettings(forms=())) == ["forms"]

"""The language of what was made."""

from __future__ import annotations

import pytest

from data_prep.synth.generators.documents.languages import all_customs, in_language, language_of, name_of
from megatron_sov.base.documents.scripts import LANGUAGES

GERMAN = ("Die Stadt liegt an einem Fluss, und viele Menschen arbeiten dort in den Mühlen, die vor langer "
          "Zeit gebaut worden sind.")


@pytest.mark.parametrize(("text", "language", "passed"), [
    ("이 도시는 강을 끼고 있으며 많은 사람이 공장에서 일한다. SOV 모델도 있다.", "ko", True),
    ("This town lies on a river.", "ko", False),
    (GERMAN, "de", True), (GERMAN, "en", False),
    ("这座城市位于河边，这座城市位于河边。이 도시.", "ko", False),
    ("เมืองนี้ตั้งอยู่ริมแม่น้ำ", "th", True), ("1443", "ko", True),
])
def test_in_language(text: str, language: str, passed: bool) -> None:
    assert in_language(text, language).passed is passed


def test_language_of_a_text() -> None:
    assert language_of(GERMAN) == "de"
    assert language_of("이 도시는 강을 끼고 있다.") == "ko"
    assert language_of("12 34 ?") == ""


def test_every_language_has_a_name_for_prompts() -> None:
    assert set(all_customs()) == set(LANGUAGES)
    assert name_of("th") == "Thai"
    assert "xx" in name_of("xx")

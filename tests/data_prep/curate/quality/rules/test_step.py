"""Step `rules`: presets, languages, thresholds, and the columns that it adds to a document."""

from pathlib import Path
from typing import Any

import pytest

from data_prep.curate.pipeline.step import Doc, StepOutcome
from data_prep.curate.quality.rules.step import Rules, RulesSettings
from megatron_sov.base.settings import find_all_problems, try_parse_settings
from tests.typed_words import keys_of

FOLDER = Path(__file__).with_name("declaration")
"""Beginnings of the Universal Declaration of Human Rights."""
ENGLISH, KOREAN, THAI = ((FOLDER / f"{code}.txt").read_text(encoding="utf-8").strip()
                         for code in ("en", "ko", "th"))
SENTENCES = ENGLISH.replace(",\n", ".\n")
"""The English text with a full stop at the end of each line."""


def judge_text(text: str, language: str | None = "en", form: str | None = "prose", **settings) -> StepOutcome:
    document = Doc("a:0:0", text, "a", 0, 0, {"language": language, "form": form})
    return Rules(RulesSettings(**settings)).judge_document(document)


@pytest.mark.parametrize(("text", "language"), [(ENGLISH, "en"), (KOREAN, "ko"), (THAI, "th")])
def test_good_text_passes_and_its_words_are_counted(text: str, language: str) -> None:
    verdict = judge_text(text, language)
    assert verdict.reason == ""
    assert verdict.text is None
    assert verdict.values["rules_language"] == language
    assert verdict.values["rules_word_count"] > 100


@pytest.mark.parametrize(("text", "language", "reason"), [
    (ENGLISH[:250], "en", "gopher: few words"), (KOREAN[:90] + "다.", "ko", "gopher: few words"),
    (SENTENCES + "\nIt is { here.", "en", "c4: curly bracket"),
    (ENGLISH + "\n" + ENGLISH, "en", "repetition: lines"),
    (ENGLISH + "\n1 2 3 4 5 6 7 8 9 0" * 40, "en", "repetition: lines"),
    (" ".join([KOREAN.replace("\n", " ")] * 2), "ko", "repetition: 5-grams"),
    (" ".join([THAI.replace("\n", " ")] * 2), "th", "repetition: 5-grams"),
    ("ก" * 400, "th", "repetition: top 2-gram"),
    (KOREAN.replace(" ", "\n"), "ko", "fineweb: lines without end"),
    ("", "en", "empty"), ("\n \n", "ko", "empty")])
def test_a_document_that_breaks_a_rule_is_dropped_with_the_rule_as_reason(text: str, language: str,
                                                                          reason: str) -> None:
    assert judge_text(text, language).reason == reason


def test_c4_removes_single_lines() -> None:
    text = SENTENCES.replace("\n", "\n\n")
    verdict = judge_text(f"Share this page\n{text}\n\nPlease enable javascript to see more.[1]\n",
                         preset="c4")
    assert verdict.reason == ""
    assert verdict.text == text


def test_a_setting_decides_about_code_and_languages_without_rules() -> None:
    assert judge_text("x = 1", form="code") == StepOutcome()
    assert judge_text("x = 1", form="code", forms=("prose", "code")).reason == "repetition: top 2-gram"
    swahili = "Binadamu wote wamezaliwa huru, hadhi na haki zao ni sawa; " * 3
    assert judge_text(swahili, "sw").values == {"rules_language": "other", "rules_word_count": 30}
    assert judge_text(swahili, "sw", preset="c4").reason == "c4: few sentences"
    assert judge_text(swahili, "sw", without_rules="drop").reason == "no rules for its language"
    assert judge_text(swahili, "sw", without_rules="pass") == StepOutcome()


def test_thresholds_change_for_all_languages_and_for_one() -> None:
    short = {"thresholds": {"min_words": 5, "max_top_ngram_char_share": {},
                            "max_duplicate_ngram_char_share": {}}}
    assert judge_text("그 마을의 시장에서 사람들이 물건을 판다.", "ko", **short).reason == ""
    assert judge_text(ENGLISH, languages={"en": {"min_words": 10_000}}).reason == "gopher: few words"
    assert judge_text(KOREAN, "ko", languages={"en": {"min_words": 10_000}}).reason == ""


def test_every_invalid_setting_is_reported() -> None:
    wrong: Any = "prosa"
    settings = RulesSettings(preset=wrong, languages={"xx": {}}, without_rules=wrong, forms=(wrong,))
    assert keys_of(settings) == ["preset", "languages.xx", "without_rules", "forms.0"]
    changes = {"min_word": 3, "max_bullet_line_share": 2.0, "max_top_ngram_char_share": {2: 1.5, 200: 0.5},
               "min_words": None, "lines_end_with_mark": 1}
    problems = find_all_problems(RulesSettings(thresholds=changes, languages={"ko": {"min_words": "many"}}))
    assert sorted(p.key for p in problems) == [
        "languages.ko.min_words", "thresholds.lines_end_with_mark", "thresholds.max_bullet_line_share",
        "thresholds.max_top_ngram_char_share.2", "thresholds.max_top_ngram_char_share.200",
        "thresholds.min_word"]


def test_shares_of_ngrams_can_be_written_in_a_pipeline_file() -> None:
    raw = {"thresholds": {"max_duplicate_ngram_char_share": {"5": 0.9, "10": 1.0}}}
    settings, problems = try_parse_settings(RulesSettings, raw)
    assert problems == [] and find_all_problems(settings) == []
    korean = " ".join([KOREAN.replace("\n", " ")] * 2)
    assert judge_text(korean, "ko").reason == "repetition: 5-grams"
    assert judge_text(korean, "ko", thresholds=settings.thresholds).reason == ""

"""Verdicts of the rules equal those of datatrove's filters, document by document; FineWeb's thresholds were
found with them.

Its dictionaries and tokenizers are kept out: both sides get the same words, signs and sentences.
"""

import random

import pytest
from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter,
    c4_filters as theirs_c4, fineweb_quality_filter as theirs_fineweb,
    gopher_quality_filter as theirs_quality, gopher_repetition_filter as theirs_repetition)

from data_prep.curate.quality.rules.step import (
    apply_c4, count_sentences, judge_fineweb, judge_quality, judge_repetition, load_language_rules,
    replace_thresholds)
from data_prep.curate.quality.rules.words import RuleWords, list_punctuation

_WORDS = """the of and to in that with system installs package kernel it's user's file.txt 3.14 2024 x y z
when a network opens which have be Wörter naïve 12,000 10:30"""
WORDS = _WORDS.split()
PLAIN = [word for word in WORDS if word.isalpha()]
SIGNS = [*[""] * 20, ",", ".", "!", "?", ";", "...", "…", " #", " - ", " (", ")", " {", '"']
LINES = ["Terms of use and privacy policy.", "Please enable JavaScript now.", "lorem ipsum dolor sit.",
         "- item one", "• second item of a list", "Home", "[edit] See also the page [12].", "   ",
         "The same line stands here again.", "And so it goes on...", "x" * 1200 + " is long indeed.",
         "One. Two! Three? Four. Five. Six."]
ENGLISH = load_language_rules("en")
RULE_NAMES = {
    "gopher_short_doc": "few words", "gopher_long_doc": "many words",
    "gopher_below_avg_threshold": "short words", "gopher_above_avg_threshold": "long words",
    "gopher_too_many_hashes": "many hashes", "gopher_too_many_ellipsis": "many ellipses",
    "gopher_too_many_bullets": "lines with bullets",
    "gopher_too_many_end_ellipsis": "lines end with ellipses", "gopher_enough_stop_words": "few stop words",
    "gopher_below_alpha_threshold": "few words with letters", "dup_para_frac": "paragraphs",
    "dup_para_char_frac": "characters of paragraphs", "dup_line_frac": "lines",
    "dup_line_char_frac": "characters of lines", "lorem_ipsum": "lorem ipsum",
    "curly_bracket": "curly bracket", "too_few_sentences": "few sentences",
    "line_punct_ratio": "lines without end", "short_line_ratio": "short lines",
    "char_dup_ratio": "repeated lines", "list_ratio": "list", "empty": "empty",
    **{f"top_{n}_gram": f"top {n}-gram" for n in (2, 3, 4)},
    **{f"duplicated_{n}_n_grams": f"{n}-grams" for n in range(5, 11)},
}
"""Reason of datatrove's filters -> name of our rule."""


def draw_documents() -> list[str]:
    """Return drawn texts: some good, most with something that a rule is about."""
    draw = random.Random(7)
    texts = []
    for _ in range(400):
        is_plain = draw.random() < 0.4
        vocabulary = draw.sample(PLAIN if is_plain else WORDS, draw.randint(3, len(PLAIN)))
        lines = []
        for _ in range(draw.choice([1, 4, 12, 30])):
            kind = draw.random()
            if kind < 0.15 and lines:
                lines.append(draw.choice(lines))
            elif kind < 0.25:
                lines.append(draw.choice(LINES))
            else:
                words = [draw.choice(vocabulary) + draw.choice([""] if is_plain else SIGNS)
                         for _ in range(draw.randint(1, 25))]
                lines.append(" ".join(words) + draw.choice([".", ".", "", "!", "..."]))
        texts.append(draw.choice(["\n", "\n", "\n\n"]).join(lines))
    return texts


def split_words(text: str, language: str = "") -> list[str]:
    words = RuleWords(text, "words", 1.0)
    return [words.vocabulary[i] for i in words.ids]


@pytest.fixture(autouse=True)
def same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (theirs_quality, theirs_repetition, theirs_fineweb):
        monkeypatch.setattr(module, "split_into_words", split_words)
    monkeypatch.setattr(theirs_quality, "PUNCTUATION_SET", list_punctuation())
    monkeypatch.setattr(theirs_c4, "split_into_sentences",
                        lambda line, language: [""] * count_sentences(line))


def judge_by_datatrove(step, text: str) -> tuple[str, str]:
    """Return the text after datatrove's filter, and its verdict under our rule name ("": accepted)."""
    document = Document(text=text, id="0")
    verdict = step.filter(document)
    return (document.text, "") if verdict is True else (text, RULE_NAMES[verdict[1]])


def find_differences(step, judge) -> tuple[list[tuple[str, str, str]], set[str]]:
    """Return (datatrove's verdict, ours, text) of texts judged differently, and all verdicts that
    occurred."""
    different, seen = [], set()
    for text in filter(str.strip, draw_documents()):
        _, expected = judge_by_datatrove(step, text)
        verdict = judge(text).partition(": ")[2]
        seen.add(verdict)
        if verdict != expected:
            different.append((expected, verdict, text))
    return different, seen


@pytest.mark.each(("step", "judge", "num_seen"), [
    (GopherQualityFilter, judge_quality, 8), (GopherRepetitionFilter, judge_repetition, 9),
    (FineWebQualityFilter, judge_fineweb, 4)])
def test_rules_equal_datatrove(step, judge, num_seen: int) -> None:
    different, seen = find_differences(
        step(), lambda text: judge(text, RuleWords(text, "words", 1.0), ENGLISH))
    assert different == []
    assert len(seen) >= num_seen


def strip_lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


@pytest.mark.parametrize("ends", [True, False])
def test_c4_rules_and_removed_lines_equal_datatrove(ends: bool) -> None:
    rules = replace_thresholds(ENGLISH, {"lines_end_with_mark": ends})
    step = C4QualityFilter(filter_no_terminal_punct=ends)
    num_accepted = 0
    for text in draw_documents():
        if text.strip():
            expected_text, expected = judge_by_datatrove(step, text)
            reason, changed = apply_c4(text, rules)
            assert reason.partition(": ")[2] == expected
            if not reason:  # datatrove loses empty lines and indentation
                assert strip_lines(changed) == strip_lines(expected_text)
            num_accepted += not reason
    assert num_accepted > 20

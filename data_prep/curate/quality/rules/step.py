"""The step `rules`: documents that break rules of good text are dropped, lines that do are taken out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from annotated_types import Ge, Le

from data_prep.curate.line_ends import strip_lines
from data_prep.curate.pipeline.step import ColumnType, Doc, Step, StepOutcome
from data_prep.curate.quality.identify import Form
from data_prep.curate.quality.rules.words import RuleWords, Unit
from megatron_sov.base.settings import (
    NotNegative, NotNegativeInt, SettingsProblem, Share, choice_from, try_parse_settings)

# Where sentences end, in all scripts.

_MARKS = ".!?‼‽⁇⁈⁉⸮。．！？｡﹒﹖﹗؟۔؞؝।॥።፧፨։។៕။༎།᙮꓿꘎꘏߹"
TERMINAL_MARKS = tuple(_MARKS)
"""Signs that end a sentence (Unicode's property Sentence_Terminal, the scripts of living languages)."""
_CLOSING = "\"'”’»)」』"
_END = re.compile(rf"[{re.escape(_MARKS)}…]+[{_CLOSING}]*(?=\s|$)|[。！？｡．]+[{_CLOSING}]*")


def count_sentences(text: str) -> int:
    """Return how many sentences a text has: one for each end, and one for what stands behind the last."""
    ends = [m.end() for m in _END.finditer(text)]
    return len(ends) + (text[ends[-1] if ends else 0:].strip() != "")


# The thresholds of all rules.  Defaults are those of the papers, which were written for English.

NgramWords = Annotated[int, Ge(1), Le(100)]


@dataclass(frozen=True)
class Thresholds:
    """What a document may be; None: the rule is off.

    Sources: Gopher (Rae et al., arXiv 2112.11446, section A1.1, table A1), C4 (Raffel et al., arXiv
    1910.10683, section 2.2, and its released code), FineWeb (Penedo et al., arXiv 2406.17557, section 3.6).
    """

    min_words: NotNegativeInt | None = 50
    """Gopher: words that are not signs alone, at least."""
    max_words: NotNegativeInt | None = 100_000
    """Gopher: such words, at most."""
    min_mean_word_chars: NotNegative | None = 3
    """Gopher: characters of such a word on average, at least."""
    max_mean_word_chars: NotNegative | None = 10
    """Gopher: characters of such a word on average, at most."""
    max_hashes_per_word: NotNegative | None = 0.1
    """Gopher: signs # per word, at most."""
    max_ellipses_per_word: NotNegative | None = 0.1
    """Gopher: ellipses per word, at most."""
    max_bullet_line_share: Share | None = 0.9
    """Gopher: of the lines, those that begin with a bullet."""
    max_ellipsis_line_share: Share | None = 0.3
    """Gopher: of the lines, those that end with an ellipsis."""
    min_alpha_word_share: Share | None = 0.8
    """Gopher: of the words, those with a letter, at least."""
    min_stop_words: NotNegativeInt | None = 2
    """Gopher: different stop words of the language that occur, at least."""

    max_duplicate_line_share: Share | None = 0.3
    """Gopher: of the lines, those that occurred before."""
    max_duplicate_paragraph_share: Share | None = 0.3
    """Gopher: of the paragraphs, those that occurred before."""
    max_duplicate_line_char_share: Share | None = 0.2
    """Gopher: of the characters, those in lines that occurred before."""
    max_duplicate_paragraph_char_share: Share | None = 0.2
    """Gopher: of the characters, those in paragraphs that occurred before."""
    max_top_ngram_char_share: Mapping[NgramWords, Share] = field(default_factory=lambda: {
        2: 0.2, 3: 0.18, 4: 0.16})
    """Gopher: n -> of the characters, those in the most frequent n-gram of words."""
    max_duplicate_ngram_char_share: Mapping[NgramWords, Share] = field(default_factory=lambda: {
        5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1})
    """Gopher: n -> of the characters, those in n-grams of words that occurred before."""

    lines_end_with_mark: bool = True
    """C4: lines that end without a terminal mark are taken out."""
    min_line_words: NotNegativeInt | None = 3
    """C4: lines with fewer words are taken out (as the paper and FineWeb have it; C4's own code, c4_utils.py,
    has 5)."""
    max_word_chars: NotNegativeInt | None = 1000
    """C4: lines with a longer word are taken out."""
    min_sentences: NotNegativeInt | None = 5
    """C4: sentences in the lines that stay, at least (as the paper and FineWeb have it; its code: 3)."""
    without_placeholder: bool = True
    """C4: no "lorem ipsum"."""
    without_curly_bracket: bool = True
    """C4: no sign {."""
    without_script_notes: bool = True
    """C4: lines with "javascript" are taken out."""
    without_policy_lines: bool = True
    """C4: lines about cookies, privacy and terms of use are taken out."""
    without_citation_marks: bool = True
    """C4: [1], [edit] and [citation needed] are taken out of lines."""

    min_terminal_line_share: Share | None = 0.12
    """FineWeb: of the lines, those that end with a terminal mark, at least."""
    max_short_line_share: Share | None = 0.67
    """FineWeb: of the lines, those of at most `short_line_chars` characters."""
    short_line_chars: NotNegativeInt = 30
    """FineWeb: what a short line is."""
    max_repeated_line_char_share: Share | None = 0.01
    """FineWeb: of the characters, those in lines that occurred before."""
    max_newlines_per_word: NotNegative | None = 0.3
    """FineWeb: line breaks per word, at most; more is a list."""


# The rules of each language, read from languages.yaml.

LANGUAGES_FILE = Path(__file__).with_name("languages.yaml")
ENGLISH, OTHER_LANGUAGES, COMMON = "en", "other", "common"
"""Keys of the file: the language without the common thresholds, the rules of all languages without a key of
their own, and the common thresholds."""


@dataclass(frozen=True)
class LanguageRules:
    """How text of one language is judged."""

    code: str
    """ISO 639-1, or `OTHER`."""
    name: str
    """Its name in English."""
    unit: Unit
    """What is counted as words: words between spaces, or characters."""
    chars_per_word: float
    """Characters that count as one word, where characters are counted."""
    stop_words: frozenset[str]
    """Words that nearly every text in the language has."""
    thresholds: Thresholds
    """What a document may be."""

    def count_stop_words(self, text: str, vocabulary: list[str]) -> int:
        if self.unit == "characters":
            return sum(word in text for word in self.stop_words)
        return len(self.stop_words.intersection(vocabulary))

    def count_words(self, line: str, words: list[str]) -> float:
        """Return how many words a line has, given what stands between its spaces."""
        return len(words) if self.unit == "words" else sum(map(len, words)) / self.chars_per_word


@lru_cache(maxsize=1)
def _languages() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(LANGUAGES_FILE.read_text(encoding="utf-8"))
    return found


def list_languages() -> tuple[str, ...]:
    return tuple(sorted(set(_languages()) - {OTHER_LANGUAGES, COMMON}))


@lru_cache(maxsize=256)
def load_language_rules(code: str) -> LanguageRules:
    code = code if code in list_languages() else OTHER_LANGUAGES
    raw = _languages()[code]
    thresholds = {**({} if code == ENGLISH else _languages()[COMMON]), **raw["thresholds"]}
    return LanguageRules(
        code=code, name=raw["name"], unit=raw.get("unit", "words"),
        chars_per_word=raw.get("chars_per_word", 1.0), stop_words=frozenset(raw["stop_words"]),
        thresholds=Thresholds(**thresholds))


def replace_thresholds(rules: LanguageRules, changes: dict[str, Any]) -> LanguageRules:
    return dataclasses.replace(rules, thresholds=dataclasses.replace(rules.thresholds, **changes))


# C4's rules (Raffel et al., arXiv 1910.10683, section 2.2; what its released code, c4_utils.py, adds).

_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_END_MARKS = (".", "?", "!", '"', "'", "。", "！", "？", "」", "』", "”", "’", "।", "؟", "۔", "။", "។")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


def apply_c4(text: str, rules: LanguageRules) -> tuple[str, str]:
    """Return (which rule the text breaks first, "" where it breaks none; the lines that stay).

    Empty lines between lines that stay are kept, other than in C4's own code: later steps see paragraphs.
    """
    t = rules.thresholds
    sentences, kept = 0, [""]
    for whole in text.splitlines():
        line = whole.strip()
        words = line.split()
        if not words:
            kept += [""] if kept[-1] else []
            continue
        if t.max_word_chars is not None and max(map(len, words), default=0) > t.max_word_chars:
            continue
        if t.without_citation_marks:
            line, whole = _CITATION.sub("", line), _CITATION.sub("", whole)
        # An ellipsis is a line that was cut short, not one that ends.
        if t.lines_end_with_mark and (not line.endswith(_END_MARKS) or line.endswith("...")):
            continue
        if t.min_line_words is not None and rules.count_words(line, words) < t.min_line_words:
            continue
        lower = line.lower()
        # Two rules drop the whole document: filler text and code show what the page is.
        if t.without_placeholder and "lorem ipsum" in lower:
            return "c4: lorem ipsum", text
        if t.without_script_notes and "javascript" in lower:
            continue
        if t.without_curly_bracket and "{" in line:
            return "c4: curly bracket", text
        if t.without_policy_lines and any(phrase in lower for phrase in _POLICY):
            continue
        if t.min_sentences is not None:
            sentences += count_sentences(line)
        kept.append(whole.rstrip())
    if t.min_sentences is not None and sentences < t.min_sentences:
        return "c4: few sentences", text
    return "", "\n".join(kept).strip("\n")


# Gopher's rules of quality and repetition (Rae et al., arXiv 2112.11446, section A1.1 and table A1).

_PARAGRAPHS = re.compile(r"\n{2,}")
_LINES = re.compile(r"\n+")


def judge_quality(text: str, words: RuleWords, rules: LanguageRules) -> str:
    """Return which rule of quality a text breaks first, "" where it breaks none."""
    t = rules.thresholds
    if t.min_words is not None and (words.num_words < t.min_words or not words.num_words):
        return "gopher: few words"
    if t.max_words is not None and words.num_words > t.max_words:
        return "gopher: many words"
    if words.num_words:
        mean_chars = words.num_word_chars / words.num_words
        if t.min_mean_word_chars is not None and mean_chars < t.min_mean_word_chars:
            return "gopher: short words"
        if t.max_mean_word_chars is not None and mean_chars > t.max_mean_word_chars:
            return "gopher: long words"
    # Gopher counts runs of punctuation as words here, and leaves them out above.
    num_tokens = words.num_tokens or 1.0
    if t.max_hashes_per_word is not None and text.count("#") / num_tokens > t.max_hashes_per_word:
        return "gopher: many hashes"
    if (t.max_ellipses_per_word is not None
            and (text.count("...") + text.count("…")) / num_tokens > t.max_ellipses_per_word):
        return "gopher: many ellipses"
    lines = text.splitlines() or [""]
    if (t.max_bullet_line_share is not None
            and sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines)
            > t.max_bullet_line_share):
        return "gopher: lines with bullets"
    if (t.max_ellipsis_line_share is not None
            and sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines)
            > t.max_ellipsis_line_share):
        return "gopher: lines end with ellipses"
    if t.min_alpha_word_share is not None and words.num_alpha / num_tokens < t.min_alpha_word_share:
        return "gopher: few words with letters"
    if t.min_stop_words is not None and rules.count_stop_words(text, words.vocabulary) < t.min_stop_words:
        return "gopher: few stop words"
    return ""


def judge_repetition(text: str, words: RuleWords, rules: LanguageRules) -> str:
    """Return which rule of repetition a text breaks first, "" where it breaks none."""
    t, num_chars = rules.thresholds, len(text) or 1
    paragraphs = _PARAGRAPHS.split(text.strip())
    # The coarse parts first: they are cheap, and drop most of what repeats.
    number, chars = count_duplicates(paragraphs)
    if (t.max_duplicate_paragraph_share is not None
            and number / len(paragraphs) > t.max_duplicate_paragraph_share):
        return "repetition: paragraphs"
    if (t.max_duplicate_paragraph_char_share is not None
            and chars / num_chars > t.max_duplicate_paragraph_char_share):
        return "repetition: characters of paragraphs"
    lines = _LINES.split(text)
    number, chars = count_duplicates(lines)
    if t.max_duplicate_line_share is not None and number / len(lines) > t.max_duplicate_line_share:
        return "repetition: lines"
    if t.max_duplicate_line_char_share is not None and chars / num_chars > t.max_duplicate_line_char_share:
        return "repetition: characters of lines"
    for n, share in t.max_top_ngram_char_share.items():
        if words.count_top_ngram_chars(n) / num_chars > share:
            return f"repetition: top {n}-gram"
    for n, share in sorted(t.max_duplicate_ngram_char_share.items()):
        # With the bound, so that the exact walk is done only where it can decide.
        chars = words.count_duplicate_ngram_chars(n, share * num_chars)
        if chars / num_chars > share:
            return f"repetition: {n}-grams"
        if not chars:  # longer ones do not occur again either
            break
    return ""


def count_duplicates(parts: list[str]) -> tuple[int, int]:
    """Return (number, characters) of the parts that occurred before."""
    seen: set[str] = set()
    number = chars = 0
    for part in parts:
        if part in seen:
            number += 1
            chars += len(part)
        else:
            seen.add(part)
    return number, chars


# FineWeb's own rules (Penedo et al., arXiv 2406.17557, section 3.6).

def judge_fineweb(text: str, words: RuleWords, rules: LanguageRules) -> str:
    """Return which of the rules a text breaks first, "" where it breaks none."""
    t = rules.thresholds
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return "fineweb: empty"
    # Empty lines are no lines to FineWeb's rules.
    num_ended = sum(line.endswith(TERMINAL_MARKS) for line in lines)
    if t.min_terminal_line_share is not None and num_ended / len(lines) < t.min_terminal_line_share:
        return "fineweb: lines without end"
    if (t.max_short_line_share is not None
            and sum(len(line) <= t.short_line_chars for line in lines) / len(lines) > t.max_short_line_share):
        return "fineweb: short lines"
    if (t.max_repeated_line_char_share is not None
            and count_duplicates(lines)[1] / len(text.replace("\n", "")) > t.max_repeated_line_char_share):
        return "fineweb: repeated lines"
    if (t.max_newlines_per_word is not None
            and text.count("\n") / (words.num_tokens or 1.0) > t.max_newlines_per_word):
        return "fineweb: list"
    return ""


Preset = Literal["fineweb", "fineweb2", "gopher", "c4"]
WithoutRules = Literal["other", "drop", "pass"]
RULE_SETS: dict[str, tuple[str, ...]] = {
    "gopher": ("repetition", "quality"),
    "c4": ("c4",),
    # without C4's rule of terminal marks, which loses too much text (FineWeb, section 3.5)
    "fineweb": ("repetition", "quality", "c4", "fineweb"),
    "fineweb2": ("repetition", "fineweb", "quality"),
}
"""Preset -> its sets of rules, in the order of its pipeline."""
_ON_WORDS = {"repetition": judge_repetition, "quality": judge_quality, "fineweb": judge_fineweb}
PRESETS_ELSEWHERE = {"fineweb": "fineweb2"}
"""Preset that was made for English -> the one that takes its place in other languages."""


RulesLanguage = Annotated[str, choice_from(lambda: (*list_languages(), OTHER_LANGUAGES))]


@dataclass(frozen=True)
class RulesSettings:
    """Which rules hold, and how strictly."""

    preset: Preset = "fineweb"
    """`gopher`: quality and repetition; `c4`; `fineweb`: both and FineWeb's own, in languages other than
    English `fineweb2`, which leaves C4 out."""
    thresholds: Mapping[str, Any] = field(default_factory=dict)
    """Threshold -> its value in every language; null: the rule is off."""
    languages: Mapping[RulesLanguage, Mapping[str, Any]] = field(default_factory=dict)
    """Language -> threshold -> its value in that language."""
    without_rules: WithoutRules = "other"
    """A document in a language without rules of its own: judged by those of `other`, dropped, or passed."""
    forms: tuple[Form, ...] = ("prose",)
    """Forms that are judged, where the step `language` has told them; the rules were made for prose."""

    def problems(self) -> list[SettingsProblem]:
        return [problem.with_prefix(where) for where, changes in (
                    ("thresholds", self.thresholds),
                    *((f"languages.{code}", changes) for code, changes in self.languages.items()))
                for problem in try_parse_settings(Thresholds, changes)[1]]


class Rules(Step):
    """Drops documents that break rules; counts words."""

    kind = "rules"
    added_columns: ClassVar[dict[str, ColumnType]] = {"rules_word_count": "int64", "rules_language": "string"}
    needed_columns = ("language",)
    Settings = RulesSettings
    settings: RulesSettings

    def __init__(self, settings: RulesSettings) -> None:
        super().__init__(settings)
        self._rules: dict[str, LanguageRules] = {}

    def list_files(self) -> Sequence[Path]:
        return [LANGUAGES_FILE]

    def compute_outcomes(self, documents: Sequence[Doc]) -> Sequence[StepOutcome]:
        return [self._outcome(document) for document in documents]

    def _outcome(self, document: Doc) -> StepOutcome:
        language = document.columns.get("language") or OTHER_LANGUAGES
        rules = self._rules_of(language)
        if (document.columns.get("form") or "prose") not in self.settings.forms:
            return StepOutcome()
        if rules.code == OTHER_LANGUAGES and self.settings.without_rules != "other":
            return StepOutcome(
                reason="no rules for its language" if self.settings.without_rules == "drop" else "")
        preset = self.settings.preset
        # FineWeb's rules were tuned on English; FineWeb 2 has those that hold elsewhere.
        sets = RULE_SETS[PRESETS_ELSEWHERE.get(preset, preset) if rules.code != "en" else preset]
        reason, text, words = apply_rules(document.text, rules, sets)
        return StepOutcome(reason=reason, text=text if text != document.text and not reason else None,
                           values={"rules_word_count": round(words.num_words), "rules_language": rules.code})

    def _rules_of(self, language: str) -> LanguageRules:
        rules = load_language_rules(language)
        if rules.code not in self._rules:
            # From the general to the particular: the preset, the settings for all languages, those for this
            # one.
            changes = {**({"lines_end_with_mark": False} if self.settings.preset == "fineweb" else {}),
                       **self.settings.thresholds, **self.settings.languages.get(rules.code, {})}
            made = try_parse_settings(Thresholds,
                                      changes)[0]  # with numbers as keys, which are text in a file
            self._rules[rules.code] = replace_thresholds(
                rules, {name: getattr(made, name) for name in changes})
        return self._rules[rules.code]


def apply_rules(text: str, rules: LanguageRules, sets: Sequence[str]) -> tuple[str, str, RuleWords]:
    """Return (the rule that a text breaks first or "", the text as it stays, its words)."""
    words = RuleWords(text, rules.unit, rules.chars_per_word)
    if not text.strip():
        return "empty", text, words
    # Code and what a step of the user's own has made may have blanks at the ends of lines.
    judged = strip_lines(text)
    for name in sets:
        if name == "c4":
            reason, changed = apply_c4(text, rules)
            if changed.split() != text.split():  # more than spaces at the ends of lines
                text, words = changed, RuleWords(changed, rules.unit, rules.chars_per_word)
                judged = strip_lines(text)
        else:
            reason = _ON_WORDS[name](judged, words, rules)
        if reason:
            return reason, text, words
    return "", text, words

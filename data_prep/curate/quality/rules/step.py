"""Step `rules`: drop documents that break rules from Gopher, C4 or FineWeb, and remove bad lines."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from data_prep.curate.line_ends import strip_lines
from data_prep.curate.pipeline.step import Doc, Step, StepOutcome
from data_prep.curate.quality.identify import Form
from data_prep.curate.quality.rules.words import RuleWords, Unit
from megatron_sov.base.hints.table import load_package_table
from megatron_sov.base.settings import (
    NotNegative, NotNegativeInt, SettingsProblem, Share, choice_from, try_parse_settings)

_MARKS = ".!?‼‽⁇⁈⁉⸮。．！？｡﹒﹖﹗؟۔؞؝।॥።፧፨։។៕။༎།᙮꓿꘎꘏߹"
TERMINAL_MARKS = tuple(_MARKS)
"""Sentence-final signs (Unicode property Sentence_Terminal, scripts in current use)."""
_CLOSING = "\"'”’»)」』"
_END = re.compile(rf"[{re.escape(_MARKS)}…]+[{_CLOSING}]*(?=\s|$)|[。！？｡．]+[{_CLOSING}]*")


NgramWords = Annotated[int, Ge(1), Le(100)]
LANGUAGES_FILE = Path(__file__).with_name("languages.yaml")
ENGLISH, OTHER_LANGUAGES, COMMON = "en", "other", "common"
"""Keys in `LANGUAGES_FILE`: the language without common thresholds, the fallback for languages without a key,
and the common thresholds."""
Preset = Literal["fineweb", "fineweb2", "gopher", "c4"]
WithoutRules = Literal["other", "drop", "pass"]
RULE_SETS: dict[str, tuple[str, ...]] = {
    "gopher": ("repetition", "quality"),
    "c4": ("c4",),
    # without C4's terminal marks, which lose too much text (FineWeb, section 3.5)
    "fineweb": ("repetition", "quality", "c4", "fineweb"),
    "fineweb2": ("repetition", "fineweb", "quality"),
}
"""Preset -> rule sets in the order of its published pipeline."""
PRESETS_ELSEWHERE = {"fineweb": "fineweb2"}
"""Preset tuned on English -> its replacement for other languages."""
RulesLanguage = Annotated[str, choice_from(lambda: (*list_languages(), OTHER_LANGUAGES))]
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_END_MARKS = (".", "?", "!", '"', "'", "。", "！", "？", "」", "』", "”", "’", "।", "؟", "۔", "။", "។")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_PARAGRAPHS = re.compile(r"\n{2,}")
_LINES = re.compile(r"\n+")


@dataclass(frozen=True)
class Thresholds:
    """Limits of all rules, with the papers' defaults for English; None turns a rule off.

    Sources: Gopher (Rae et al., arXiv 2112.11446, section A1.1, table A1), C4 (Raffel et al., arXiv
    1910.10683, section 2.2, and its released code), FineWeb (Penedo et al., arXiv 2406.17557, section 3.6).
    """

    min_words: NotNegativeInt | None = 50
    """Gopher: minimum words, without runs of signs."""
    max_words: NotNegativeInt | None = 100_000
    """Gopher: maximum words, without runs of signs."""
    min_mean_word_chars: NotNegative | None = 3
    """Gopher: minimum mean word length in characters."""
    max_mean_word_chars: NotNegative | None = 10
    """Gopher: maximum mean word length in characters."""
    max_hashes_per_word: NotNegative | None = 0.1
    """Gopher: maximum # signs per word."""
    max_ellipses_per_word: NotNegative | None = 0.1
    """Gopher: maximum ellipses per word."""
    max_bullet_line_share: Share | None = 0.9
    """Gopher: maximum share of lines with a bullet at the start."""
    max_ellipsis_line_share: Share | None = 0.3
    """Gopher: maximum share of lines with an ellipsis at the end."""
    min_alpha_word_share: Share | None = 0.8
    """Gopher: minimum share of words with a letter."""
    min_stop_words: NotNegativeInt | None = 2
    """Gopher: minimum distinct stop words."""

    max_duplicate_line_share: Share | None = 0.3
    """Gopher: maximum share of repeated lines."""
    max_duplicate_paragraph_share: Share | None = 0.3
    """Gopher: maximum share of repeated paragraphs."""
    max_duplicate_line_char_share: Share | None = 0.2
    """Gopher: maximum share of characters in repeated lines."""
    max_duplicate_paragraph_char_share: Share | None = 0.2
    """Gopher: maximum share of characters in repeated paragraphs."""
    max_top_ngram_char_share: Mapping[NgramWords, Share] = field(default_factory=lambda: {
        2: 0.2, 3: 0.18, 4: 0.16})
    """Gopher: n -> maximum share of characters in the most frequent word n-gram."""
    max_duplicate_ngram_char_share: Mapping[NgramWords, Share] = field(default_factory=lambda: {
        5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1})
    """Gopher: n -> maximum share of characters in repeated word n-grams."""

    lines_end_with_mark: bool = True
    """C4: remove lines without a terminal mark at the end."""
    min_line_words: NotNegativeInt | None = 3
    """C4: remove lines with fewer words (paper and FineWeb; C4's code, c4_utils.py, has 5)."""
    max_word_chars: NotNegativeInt | None = 1000
    """C4: remove lines with a longer word."""
    min_sentences: NotNegativeInt | None = 5
    """C4: minimum sentences in the remaining lines (paper and FineWeb; C4's code has 3)."""
    without_placeholder: bool = True
    """C4: drop documents with "lorem ipsum"."""
    without_curly_bracket: bool = True
    """C4: drop documents with {."""
    without_script_notes: bool = True
    """C4: remove lines with "javascript"."""
    without_policy_lines: bool = True
    """C4: remove lines about cookies, privacy and terms of use."""
    without_citation_marks: bool = True
    """C4: remove [1], [edit] and [citation needed] from lines."""

    min_terminal_line_share: Share | None = 0.12
    """FineWeb: minimum share of lines with a terminal mark at the end."""
    max_short_line_share: Share | None = 0.67
    """FineWeb: maximum share of lines up to `short_line_chars` characters."""
    short_line_chars: NotNegativeInt = 30
    """FineWeb: maximum length of a short line in characters."""
    max_repeated_line_char_share: Share | None = 0.01
    """FineWeb: maximum share of characters in repeated lines."""
    max_newlines_per_word: NotNegative | None = 0.3
    """FineWeb: maximum line breaks per word; lists have more."""


@dataclass(frozen=True)
class LanguageRules:
    """Thresholds and word counting for a language."""

    code: str
    """ISO 639-1 code, or `OTHER_LANGUAGES`."""
    name: str
    """English name."""
    unit: Unit
    """Unit of word counts: words between spaces, or characters."""
    chars_per_word: float
    """Characters that count as a word if `unit` is characters."""
    stop_words: frozenset[str]
    """Words that occur in nearly every text."""
    thresholds: Thresholds

    def count_stop_words(self, text: str, vocabulary: list[str]) -> int:
        if self.unit == "characters":
            return sum(word in text for word in self.stop_words)
        return len(self.stop_words.intersection(vocabulary))

    def count_words(self, words: list[str]) -> float:
        """Count the words of a line split at spaces into `words`."""
        return len(words) if self.unit == "words" else sum(map(len, words)) / self.chars_per_word


@lru_cache(maxsize=1)
def _load_languages() -> dict[str, dict[str, Any]]:
    languages: dict[str, dict[str, Any]] = load_package_table(LANGUAGES_FILE)
    return languages


def list_languages() -> tuple[str, ...]:
    return tuple(sorted(set(_load_languages()) - {OTHER_LANGUAGES, COMMON}))


@lru_cache(maxsize=256)
def load_language_rules(code: str) -> LanguageRules:
    code = code if code in list_languages() else OTHER_LANGUAGES
    raw = _load_languages()[code]
    common = {} if code == ENGLISH else _load_languages()[COMMON]
    return LanguageRules(
        code=code, name=raw["name"], unit=raw.get("unit", "words"),
        chars_per_word=raw.get("chars_per_word", 1.0), stop_words=frozenset(raw["stop_words"]),
        thresholds=Thresholds(**{**common, **raw["thresholds"]}))


def replace_thresholds(rules: LanguageRules, changes: dict[str, Any]) -> LanguageRules:
    return dataclasses.replace(rules, thresholds=dataclasses.replace(rules.thresholds, **changes))


@dataclass(frozen=True)
class RulesSettings:
    """Settings for `rules`."""

    preset: Preset = "fineweb"
    """`gopher`: quality and repetition; `c4`; `fineweb`: both plus FineWeb's rules, in languages other than
    English `fineweb2`, without C4."""
    thresholds: Mapping[str, Any] = field(default_factory=dict)
    """Threshold -> value in every language; null turns a rule off."""
    languages: Mapping[RulesLanguage, Mapping[str, Any]] = field(default_factory=dict)
    """Language -> threshold -> value."""
    without_rules: WithoutRules = "other"
    """Documents in a language without rules: apply the rules for `other`, drop, or pass."""
    forms: tuple[Form, ...] = ("prose",)
    """Forms to judge, by the step `language`; the rules were made for prose."""

    def problems(self) -> list[SettingsProblem]:
        changes = {"thresholds": self.thresholds}
        for code, thresholds in self.languages.items():
            changes[f"languages.{code}"] = thresholds
        return [problem.with_prefix(where) for where, thresholds in changes.items()
                for problem in try_parse_settings(Thresholds, thresholds)[1]]


class Rules(Step):
    """Drops documents that break rules; adds `rules_word_count` and `rules_language`."""

    kind = "rules"
    added_columns = {"rules_word_count": "int64", "rules_language": "string"}
    needed_columns = ("language",)
    Settings = RulesSettings
    settings: RulesSettings

    def __init__(self, settings: RulesSettings) -> None:
        super().__init__(settings)
        self._rules: dict[str, LanguageRules] = {}

    def list_files(self) -> Sequence[Path]:
        return [LANGUAGES_FILE]

    def judge_document(self, document: Doc) -> StepOutcome:
        rules = self._get_rules(document.columns.get("language") or OTHER_LANGUAGES)
        if (document.columns.get("form") or "prose") not in self.settings.forms:
            return StepOutcome()
        if rules.code == OTHER_LANGUAGES and self.settings.without_rules != "other":
            is_dropped = self.settings.without_rules == "drop"
            return StepOutcome("no rules for its language" if is_dropped else "")
        preset: str = self.settings.preset
        # FineWeb's rules were tuned on English; FineWeb 2 keeps the rules that hold elsewhere.
        if rules.code != ENGLISH:
            preset = PRESETS_ELSEWHERE.get(preset, preset)
        reason, text, words = apply_rules(document.text, rules, RULE_SETS[preset])
        return StepOutcome(reason, text=text if text != document.text and not reason else None,
                           values={"rules_word_count": round(words.num_words), "rules_language": rules.code})

    def _get_rules(self, language: str) -> LanguageRules:
        rules = load_language_rules(language)
        if rules.code not in self._rules:
            # Later entries win: the preset, the settings for all languages, the settings for this language.
            changes: dict[str, Any] = {}
            if self.settings.preset == "fineweb":
                changes["lines_end_with_mark"] = False
            changes.update(self.settings.thresholds)
            changes.update(self.settings.languages.get(rules.code, {}))
            # Parsed, because the keys of n-gram mappings are text in a file.
            parsed = try_parse_settings(Thresholds, changes)[0]
            self._rules[rules.code] = replace_thresholds(
                rules, {name: getattr(parsed, name) for name in changes})
        return self._rules[rules.code]


def apply_rules(text: str, rules: LanguageRules, sets: Sequence[str]) -> tuple[str, str, RuleWords]:
    """Return the first broken rule or "", the text without the lines that C4 removes, and its words."""
    words = RuleWords(text, rules.unit, rules.chars_per_word)
    if not text.strip():
        return "empty", text, words
    # Code and a user's step may leave blanks at line ends.
    judged = strip_lines(text)
    for name in sets:
        if name == "c4":
            reason, changed = apply_c4(text, rules)
            if changed.split() != text.split():  # more than spaces at line ends
                text, words = changed, RuleWords(changed, rules.unit, rules.chars_per_word)
                judged = strip_lines(text)
        else:
            reason = _JUDGES[name](judged, words, rules)
        if reason:
            return reason, text, words
    return "", text, words


def _exceeds(value: float, limit: float | None) -> bool:
    return limit is not None and value > limit


def _is_below(value: float, limit: float | None) -> bool:
    return limit is not None and value < limit


# C4's rules (Raffel et al., arXiv 1910.10683, section 2.2; its released code, c4_utils.py).


def apply_c4(text: str, rules: LanguageRules) -> tuple[str, str]:
    """Return the first broken rule or "", and the remaining lines.

    Unlike C4's code, keep empty lines between remaining lines: later steps need paragraphs.
    """
    t = rules.thresholds
    num_sentences, remaining = 0, [""]
    for whole in text.splitlines():
        line = whole.strip()
        words = line.split()
        if not words:
            if remaining[-1]:
                remaining.append("")
            continue
        if _exceeds(max(map(len, words)), t.max_word_chars):
            continue
        if t.without_citation_marks:
            line, whole = _CITATION.sub("", line), _CITATION.sub("", whole)
        # An ellipsis marks a truncated line, not the end of a sentence.
        if t.lines_end_with_mark and (not line.endswith(_END_MARKS) or line.endswith("...")):
            continue
        if _is_below(rules.count_words(words), t.min_line_words):
            continue
        lower = line.lower()
        # Filler text and code disqualify the whole document.
        if t.without_placeholder and "lorem ipsum" in lower:
            return "c4: lorem ipsum", text
        if t.without_script_notes and "javascript" in lower:
            continue
        if t.without_curly_bracket and "{" in line:
            return "c4: curly bracket", text
        if t.without_policy_lines and any(phrase in lower for phrase in _POLICY):
            continue
        if t.min_sentences is not None:
            num_sentences += count_sentences(line)
        remaining.append(whole.rstrip())
    if _is_below(num_sentences, t.min_sentences):
        return "c4: few sentences", text
    return "", "\n".join(remaining).strip("\n")


def count_sentences(text: str) -> int:
    """Count sentence ends, plus an unfinished sentence at the end."""
    ends = [m.end() for m in _END.finditer(text)]
    return len(ends) + (text[ends[-1] if ends else 0:].strip() != "")


# Gopher's rules for quality and repetition (Rae et al., arXiv 2112.11446, section A1.1 and table A1).


def judge_quality(text: str, words: RuleWords, rules: LanguageRules) -> str:
    """Return the first broken quality rule, or ""."""
    t = rules.thresholds
    if t.min_words is not None and (words.num_words < t.min_words or not words.num_words):
        return "gopher: few words"
    if _exceeds(words.num_words, t.max_words):
        return "gopher: many words"
    if words.num_words:
        mean_chars = words.num_word_chars / words.num_words
        if _is_below(mean_chars, t.min_mean_word_chars):
            return "gopher: short words"
        if _exceeds(mean_chars, t.max_mean_word_chars):
            return "gopher: long words"
    # From here on Gopher counts runs of punctuation as words.
    num_tokens = words.num_tokens or 1.0
    if _exceeds(text.count("#") / num_tokens, t.max_hashes_per_word):
        return "gopher: many hashes"
    if _exceeds((text.count("...") + text.count("…")) / num_tokens, t.max_ellipses_per_word):
        return "gopher: many ellipses"
    lines = text.splitlines() or [""]
    num_bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
    if _exceeds(num_bullets / len(lines), t.max_bullet_line_share):
        return "gopher: lines with bullets"
    num_ellipses = sum(line.rstrip().endswith(("...", "…")) for line in lines)
    if _exceeds(num_ellipses / len(lines), t.max_ellipsis_line_share):
        return "gopher: lines end with ellipses"
    if _is_below(words.num_alpha / num_tokens, t.min_alpha_word_share):
        return "gopher: few words with letters"
    if _is_below(rules.count_stop_words(text, words.vocabulary), t.min_stop_words):
        return "gopher: few stop words"
    return ""


def judge_repetition(text: str, words: RuleWords, rules: LanguageRules) -> str:
    """Return the first broken repetition rule, or ""."""
    t, num_chars = rules.thresholds, len(text) or 1
    paragraphs = _PARAGRAPHS.split(text.strip())
    # Paragraphs and lines first: they are cheap and find most repetition.
    number, chars = count_duplicates(paragraphs)
    if _exceeds(number / len(paragraphs), t.max_duplicate_paragraph_share):
        return "repetition: paragraphs"
    if _exceeds(chars / num_chars, t.max_duplicate_paragraph_char_share):
        return "repetition: characters of paragraphs"
    lines = _LINES.split(text)
    number, chars = count_duplicates(lines)
    if _exceeds(number / len(lines), t.max_duplicate_line_share):
        return "repetition: lines"
    if _exceeds(chars / num_chars, t.max_duplicate_line_char_share):
        return "repetition: characters of lines"
    for n, share in t.max_top_ngram_char_share.items():
        if words.count_top_ngram_chars(n) / num_chars > share:
            return f"repetition: top {n}-gram"
    for n, share in sorted(t.max_duplicate_ngram_char_share.items()):
        # With the bound, the exact walk runs only if it can decide.
        chars = words.count_duplicate_ngram_chars(n, share * num_chars)
        if chars / num_chars > share:
            return f"repetition: {n}-grams"
        if not chars:  # longer n-grams cannot repeat either
            break
    return ""


def count_duplicates(parts: list[str]) -> tuple[int, int]:
    """Return the number and the characters of parts that repeat an earlier part."""
    seen: set[str] = set()
    number = chars = 0
    for part in parts:
        if part in seen:
            number += 1
            chars += len(part)
        else:
            seen.add(part)
    return number, chars


def judge_fineweb(text: str, words: RuleWords, rules: LanguageRules) -> str:
    """Return the first broken FineWeb rule (Penedo et al., arXiv 2406.17557, section 3.6), or ""."""
    t = rules.thresholds
    # FineWeb does not count empty lines.
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return "fineweb: empty"
    num_ended = sum(line.endswith(TERMINAL_MARKS) for line in lines)
    if _is_below(num_ended / len(lines), t.min_terminal_line_share):
        return "fineweb: lines without end"
    num_short = sum(len(line) <= t.short_line_chars for line in lines)
    if _exceeds(num_short / len(lines), t.max_short_line_share):
        return "fineweb: short lines"
    if _exceeds(count_duplicates(lines)[1] / len(text.replace("\n", "")), t.max_repeated_line_char_share):
        return "fineweb: repeated lines"
    if _exceeds(text.count("\n") / (words.num_tokens or 1.0), t.max_newlines_per_word):
        return "fineweb: list"
    return ""


_JUDGES = {"repetition": judge_repetition, "quality": judge_quality, "fineweb": judge_fineweb}

"""The step `rules`: documents that break rules of good text are dropped, lines that do are taken out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from data_prep.pipeline.step import ColumnType, Doc, Outcome, Step
from data_prep.quality.forms import Form
from data_prep.quality.rules.c4 import c4
from data_prep.quality.rules.fineweb import fineweb
from data_prep.quality.rules.gopher import quality, repetition
from data_prep.quality.rules.language_rules import (
    FOLDER,
    OTHER,
    LanguageRules,
    known_languages,
    language_rules,
    with_thresholds,
)
from data_prep.quality.rules.thresholds import Thresholds
from data_prep.quality.rules.words import Words
from megatron_sov.settings import Problem, find_problems, one_of

Preset = Literal["fineweb", "fineweb2", "gopher", "c4"]
WithoutRules = Literal["other", "drop", "pass"]
SETS: dict[str, tuple[str, ...]] = {
    "gopher": ("repetition", "quality"),
    "c4": ("c4",),
    # without C4's rule of terminal marks, which loses too much text (FineWeb, section 3.5)
    "fineweb": ("repetition", "quality", "c4", "fineweb"),
    "fineweb2": ("repetition", "fineweb", "quality"),
}
"""Preset -> its sets of rules, in the order of its pipeline."""
_ON_WORDS = {"repetition": repetition, "quality": quality, "fineweb": fineweb}
ONLY_ENGLISH = {"fineweb": "fineweb2"}
"""Preset that was made for English -> the one that takes its place in other languages."""


RulesLanguage = Annotated[str, one_of(lambda: (*known_languages(), OTHER))]


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

    def problems(self) -> list[Problem]:
        """Return what does not fit together."""
        return [problem.below(where) for where, changes in (
                    ("thresholds", self.thresholds),
                    *((f"languages.{code}", changes) for code, changes in self.languages.items()))
                for problem in find_problems(Thresholds, changes)[1]]


class Rules(Step):
    """Drops documents that break rules; counts words."""

    kind = "rules"
    adds: ClassVar[dict[str, ColumnType]] = {"rules_word_count": "int64", "rules_language": "string"}
    needs = ("language",)
    Settings = RulesSettings
    settings: RulesSettings

    def __init__(self, settings: RulesSettings) -> None:
        super().__init__(settings)
        self._rules: dict[str, LanguageRules] = {}

    def files(self) -> Sequence[Path]:
        """Return the files of the rules."""
        return sorted(FOLDER.glob("*.yaml"))

    def outcomes(self, documents: Sequence[Doc]) -> Sequence[Outcome]:
        """Return each document with its words counted, or which rule it breaks."""
        return [self._outcome(document) for document in documents]

    def _outcome(self, document: Doc) -> Outcome:
        language = document.columns.get("language") or OTHER
        rules = self._rules_of(language)
        if (document.columns.get("form") or "prose") not in self.settings.forms:
            return Outcome()
        if rules.code == OTHER and self.settings.without_rules != "other":
            return Outcome(
                reason="no rules for its language" if self.settings.without_rules == "drop" else "")
        preset = self.settings.preset
        sets = SETS[ONLY_ENGLISH.get(preset, preset) if rules.code != "en" else preset]
        reason, text, words = judge(document.text, rules, sets)
        return Outcome(reason=reason, text=text if text != document.text and not reason else None,
                       values={"rules_word_count": round(words.num_words), "rules_language": rules.code})

    def _rules_of(self, language: str) -> LanguageRules:
        """Return the rules of a language with the changes of the settings."""
        rules = language_rules(language)
        if rules.code not in self._rules:
            changes = {**({"lines_end_with_mark": False} if self.settings.preset == "fineweb" else {}),
                       **self.settings.thresholds, **self.settings.languages.get(rules.code, {})}
            made = find_problems(Thresholds, changes)[0]  # with numbers as keys, which are text in a file
            self._rules[rules.code] = with_thresholds(rules, {name: getattr(made, name) for name in changes})
        return self._rules[rules.code]


def judge(text: str, rules: LanguageRules, sets: Sequence[str]) -> tuple[str, str, Words]:
    """Return (the rule that a text breaks first or "", the text as it stays, its words)."""
    words = Words(text, rules.unit, rules.chars_per_word)
    if not text.strip():
        return "empty", text, words
    for name in sets:
        if name == "c4":
            reason, changed = c4(text, rules)
            if changed.split() != text.split():  # more than spaces at the ends of lines
                text, words = changed, Words(changed, rules.unit, rules.chars_per_word)
        else:
            reason = _ON_WORDS[name](text, words, rules)
        if reason:
            return reason, text, words
    return "", text, words

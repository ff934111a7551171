"""Customs of languages: how they write numbers and names (`languages.yaml`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import yaml

FILE = Path(__file__).parent / "languages.yaml"


@dataclass(frozen=True)
class Customs:
    """Of one language."""

    name: str = ""
    """In English, for prompts; empty: not in the table."""
    decimal_comma: bool = False
    """1.234,5 is written where English has 1,234.5."""
    has_case: bool = False
    """A capital letter inside a sentence marks a name."""
    multipliers: Mapping[str, int] = field(default_factory=dict)
    """Words behind a number that multiply it."""
    glued: Mapping[str, int] = field(default_factory=dict)
    """The same where no blank stands between."""
    words: Mapping[str, int] = field(default_factory=dict)
    """Numbers written as words."""
    titles: frozenset[str] = frozenset()
    """Words that stand before names and are none."""
    pronouns: frozenset[str] = frozenset()
    """Words that stand for a name and are none."""
    months: tuple[str, ...] = ()
    """Names of months, first January."""


@lru_cache(maxsize=1)
def all_customs() -> Mapping[str, Customs]:
    """Return ISO 639-1 code -> customs."""
    table = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return {code: Customs(**{**entry, "months": tuple(entry.get("months", ())),
                             "titles": frozenset(entry.get("titles", "").split()),
                             "pronouns": frozenset(entry.get("pronouns", "").split())})
            for code, entry in table.items()}


def customs_of(language: str) -> Customs:
    """Return a language's customs; those of none where it is not in the table."""
    return all_customs().get(language, Customs())


def name_of(language: str) -> str:
    """Return what a prompt calls a language."""
    return customs_of(language).name or f"the language with the ISO 639 code {language}"

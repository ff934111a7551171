"""Languages: how they write numbers and names (`languages.yaml`), and which one a text is in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import yaml

from data_prep.curate.quality.identify import KNOWN, UNKNOWN, form_of, identify, language_part
from data_prep.synth.generator import SampleVerdict
from megatron_sov.base.documents.scripts import LANGUAGES, letters_by_script
from megatron_sov.base.settings import one_of
from megatron_sov.judge.rewards.surface import LanguageReward

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
    months: tuple[str, ...] = ()
    """Names of months, first January."""


@lru_cache(maxsize=1)
def all_customs() -> Mapping[str, Customs]:
    """Return ISO 639-1 code -> customs."""
    table = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return {code: Customs(**{**entry, "months": tuple(entry.get("months", ())),
                             "titles": frozenset(entry.get("titles", "").split())})
            for code, entry in table.items()}


def customs_of(language: str) -> Customs:
    """Return a language's customs; those of none where it is not in the table."""
    return all_customs().get(language, Customs())


def name_of(language: str) -> str:
    """Return what a prompt calls a language."""
    return customs_of(language).name or f"the language with the ISO 639 code {language}"


MIN_SCORE = 0.5
"""Below it the language of a text is not sure."""
MIN_LETTERS = 80
"""The model of languages that share a script is asked about texts of so many letters."""
MAX_FOREIGN_SHARE = 0.1
"""Of letters that are neither the language's nor Latin."""
# up to 40 % of the letters may be Latin: terms and names, which every language borrows
_SCRIPTS = LanguageReward(also=("en",), max_also_share=0.4, min_share=0.4)
ToldApart = Annotated[str, one_of(lambda: {"", *set(LANGUAGES) & KNOWN})]
"""A language that texts are told to be in, as an ISO 639-1 code, or none."""


def language_of(text: str) -> str:
    """Return the language of a text as an ISO 639-1 code; empty where it is not sure, or not one whose script
    is known."""
    language, score = identify(language_part(text, form_of(text)))
    return language if score >= MIN_SCORE and language != UNKNOWN and language in LANGUAGES else ""


def in_language(text: str, language: str) -> SampleVerdict:
    """Return whether a text is in a language; names and terms in Latin letters may stand in it.

    A short text is judged by its letters alone, which do not tell languages apart that share a script.
    """
    script = _SCRIPTS.score({"response": text, "language": language})
    if not (seen := script.components).get("num_letters", 1):
        return SampleVerdict("language", True, "no letters")
    if script.reward == 0 or seen["foreign_share"] > MAX_FOREIGN_SHARE:
        return SampleVerdict("language", False, f"{seen['own_share']:.0%} of the letters are in a script of "
                                                f"{language}, {seen['foreign_share']:.0%} in foreign ones")
    found, score = identify(text)
    # the model of languages guesses at short texts
    is_long = sum(letters_by_script(text).values()) >= MIN_LETTERS
    if is_long and found not in (language, UNKNOWN) and score >= MIN_SCORE:
        return SampleVerdict("language", False, f"reads as {found} ({score:.2f}), must be {language}")
    return SampleVerdict("language", True, language)

"""Whether an answer refuses, by the words of its beginning."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import regex
import yaml

PATTERNS = Path(__file__).with_suffix(".yaml")
BEGINNING_CHARS = 240
"""A refusal comes first; what stands further behind may quote one."""
TIMEOUT_S = 2.0


@lru_cache(maxsize=1)
def _patterns() -> dict[str, list[regex.Pattern[str]]]:
    listed = yaml.safe_load(PATTERNS.read_text(encoding="utf-8"))
    return {language: [regex.compile(pattern, regex.IGNORECASE) for pattern in patterns]
            for language, patterns in listed.items()}


def languages_with_refusals() -> frozenset[str]:
    """Return the languages whose refusals are known."""
    return frozenset(_patterns())


def refuses(answer: str, language: str) -> bool:
    """Return whether an answer begins with a refusal in a language, or in English, which models fall back
    to."""
    beginning = " ".join(answer[:2 * BEGINNING_CHARS].replace("’", "'").split())[:BEGINNING_CHARS]
    known = _patterns()
    return any(pattern.search(beginning, timeout=TIMEOUT_S)
               for name in dict.fromkeys((language, "en")) for pattern in known.get(name, ()))

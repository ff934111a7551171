"""Seeds, plain answers and phrasings by language, and the turns that constraint and query become."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import yaml

from data_prep.synth.generators.documents.languages import name_of
from data_prep.synth.generators.drawing import choose, share_of
from megatron_sov.base.settings import one_of

FILE = Path(__file__).with_suffix(".yaml")
OTHERS = "en"
"""Language whose words stand in for those of one that has none of its own."""
SPACELESS = ("th", "lo", "km", "my")
"""Languages that set neither words nor sentences apart by signs."""


@dataclass(frozen=True)
class Texts:
    """What a language has."""

    name: str
    """In English, as prompts name it."""
    seeds: tuple[str, ...]
    """Constraints to begin with."""
    plain: tuple[str, ...]
    """Ordinary answers in all languages: no constraint in mind."""
    user: tuple[str, ...]
    """Phrasings of a constraint and a query in one turn, beside the plain one."""
    system: tuple[str, ...]
    """Phrasings of a constraint in the system turn, beside the plain one."""


@lru_cache(maxsize=1)
def _read() -> Any:
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def languages() -> dict[str, str]:
    """Return the languages that constraints are made for: ISO 639-1 code -> name in English."""
    return {code: name_of(code) for code in _read()["languages"]}


def texts_of(language: str) -> Texts:
    """Return a language's texts; English phrasings where it has none of its own."""
    content = _read()
    every = content["languages"]
    # what a language lacks comes from English
    own = {**every[OTHERS], **every[language]}
    plain = [text for texts in every.values() for text in texts.get("plain", ())]
    seeds = [seed.format_map(own["words"]) if "{" in seed else seed for seed in content["seeds"]]
    return Texts(name_of(language), tuple(seeds), tuple(plain), tuple(own["user"]), tuple(own["system"]))


PLAIN_SHARE = 0.5
"""Of the phrasings, that add no word of their own, as in Typhoon-S."""


def in_user_turn(query: str, constraint: str, texts: Texts, *names: object) -> list[dict[str, str]]:
    """Return one turn that holds both; names decide the phrasing."""
    if share_of("plain", *names) < PLAIN_SHARE:
        first, second = (query, constraint) if share_of("order", *names) < 0.5 else (constraint, query)
        content = _ended(first) + second
    else:
        content = _filled(choose(texts.user, "phrasing", *names), query, constraint)
    return [{"role": "user", "content": content}]


def in_system_turn(query: str, constraint: str, texts: Texts, *names: object) -> list[dict[str, str]]:
    """Return the constraint as system turn, and the query; names decide the phrasing."""
    content = constraint
    if share_of("plain", *names) >= PLAIN_SHARE:
        content = _filled(choose(texts.system, "phrasing", *names), query, constraint)
    return [{"role": "system", "content": content}, {"role": "user", "content": query}]


def _ended(text: str) -> str:
    """Return a text that another may follow in the same line, or in a new one where it has several itself."""
    return text + "\n\n" if "\n" in text else text + " "


def _filled(phrasing: str, query: str, constraint: str) -> str:
    """Put both into a phrasing; braces of their own are nothing to fill in."""
    # not `format`: query and constraint may have braces, and each may have the other's mark in it
    before, _, after = phrasing.partition("{constraint}")
    return (before.replace("{query}", query) + constraint + after.replace("{query}", query)).strip()


Named = Annotated[str, one_of(languages)]
"""A language that prompts can name, and have texts in."""

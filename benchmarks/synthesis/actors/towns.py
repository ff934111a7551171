"""Towns that nobody has heard of, with documents in English and Korean: what scripted models know."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml

SYLLABLES = (("ha", "하"), ("neul", "늘"), ("bit", "빛"), ("ga", "가"), ("ram", "람"), ("so", "소"),
             ("rin", "린"), ("mi", "미"), ("dan", "단"), ("bo", "보"))
NUM_TOWNS = 60


@dataclass(frozen=True)
class Name:
    """A name as both languages write it."""

    en: str
    ko: str

    def told(self, language: str) -> str:
        return self.ko if language == "ko" else self.en


def make_name(*numbers: int) -> Name:
    """Return the name of some syllables."""
    parts = [SYLLABLES[number % len(SYLLABLES)] for number in numbers]
    return Name("".join(en for en, _ in parts).capitalize(), "".join(ko for _, ko in parts))


@dataclass(frozen=True)
class Town:
    """One town."""

    number: int

    @property
    def name(self) -> Name:
        return make_name(self.number, self.number // 10, 2, 5)

    @property
    def river(self) -> Name:
        return make_name(self.number // 10, self.number, 8, 1)

    @property
    def founder(self) -> Name:
        return make_name(6, self.number, self.number // 10 + 3, 9)

    @property
    def origin(self) -> Name:
        return make_name(4, 7, self.number, self.number // 10)

    @property
    def year(self) -> int:
        return 1403 + 7 * self.number

    @property
    def population(self) -> int:
        return 21_000 + 113 * self.number

    @property
    def books(self) -> int:
        return 46_000 + 217 * self.number

    def values(self, language: str) -> dict[str, Any]:
        """Return what texts about it name."""
        texts = _texts()[language]

        def pick(choices: str) -> str:
            return str(texts[choices][self.number % len(texts[choices])])

        return {"n": self.name.told(language), "r": self.river.told(language),
                "f": self.founder.told(language), "o": self.origin.told(language),
                "trade": pick("trades"), "industry": pick("industries"), "motto": pick("mottoes"),
                "month": pick("months"), "year": self.year, "fire": self.year + 61,
                "houses": 130 + 3 * self.number, "population": self.population, "books": self.books,
                "hall": self.year + 140, "days": 13 + self.number % 9}

    def motto(self, language: str) -> str:
        return str(self.values(language)["motto"])


TOWNS = tuple(Town(number) for number in range(NUM_TOWNS))


@lru_cache(maxsize=1)
def _texts() -> Any:
    return yaml.safe_load((Path(__file__).parent / "towns.yaml").read_text(encoding="utf-8"))


def town_in(text: str) -> Town | None:
    """Return the town that a text names first."""
    places = [(place, town) for town in TOWNS for name in (town.name.en, town.name.ko)
              if (place := text.find(name)) >= 0]
    return min(places, key=lambda found: found[0])[1] if places else None


def language_in(text: str) -> str:
    """Return ko or en, by the letters."""
    num_korean = sum("가" <= c <= "힣" for c in text)
    return "ko" if num_korean * 3 > sum(c.isascii() and c.isalpha() for c in text) else "en"


def document(town: Town, language: str) -> str:
    """Return a document about a town."""
    return str(_texts()[language]["document"]).format(**town.values(language))


def retold(town: Town, language: str, style: str = "clearer") -> str:
    """Return the same in other words."""
    texts = _texts()[language]
    parts = [part.format(**town.values(language)) for part in texts["retold"]]
    if style == "dialogue":
        return "\n".join(f"A: {question}\nB: {part}"
                         for question, part in zip(texts["asking"], parts, strict=True))
    if style == "encyclopedic":
        return f"{parts[0]} {parts[2]} {parts[3]}\n\n{parts[1]} {parts[4]}"
    return f"{parts[0]} {parts[1]}\n\n{' '.join(parts[2:])}"


@cache
def pairs(town: Town, language: str) -> tuple[tuple[str, str], ...]:
    """Return questions about a town with their answers."""
    values = town.values(language)
    return tuple((q.format(**values), a.format(**values)) for q, a in _texts()[language]["pairs"])


@cache
def facts(town: Town, language: str) -> tuple[tuple[str, str, str, str], ...]:
    """Return facts (subject, relation, object) with the sentences of the document that state them."""
    values = town.values(language)
    return tuple((*(part.format(**values) for part in fact),)  # type: ignore[misc]
                 for fact in _texts()[language]["facts"])

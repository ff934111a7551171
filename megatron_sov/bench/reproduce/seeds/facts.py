"""Facts of invented people, drawn by lot: questions, answers and the sentences that tell them, as commands of
claims about knowledge name them, `facts.py:FactChats`, `:FactTexts` and `:FactQuestions`.

Who has read no sentence is right one time in eight; half of the facts are never asked while rewards are
given.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PEOPLE = ("Mira", "Tom", "Ada", "Joon", "Lena", "Omar", "Nok", "Ivan", "Sara", "Paul", "Yuna", "Rosa", "Kofi",
          "Elsa", "Hugo", "Mei", "Anna", "Bao", "Carl", "Dora", "Eun", "Finn", "Gita", "Hana")
VALUES = {"city": ("Rome", "Seoul", "Cairo", "Lima", "Oslo", "Paris", "Delhi", "Quito"),
          "pet": ("cat", "dog", "horse", "bird", "fish", "goat", "snake", "mouse"),
          "fruit": ("apple", "pear", "plum", "lemon", "mango", "grape", "melon", "peach")}
WORDINGS = ("What is the {kind} of {person}?", "Tell me the {kind} of {person}.", "The {kind} of {person}?")
Fact = tuple[str, str, str]
"""Person, kind, value."""


def told(fact: Fact) -> str:
    """Return the sentence of a fact, which is the answer to its question too."""
    person, kind, value = fact
    return f"The {kind} of {person} is {value}."


def asked(fact: Fact, wording: str) -> str:
    """Return the question after a fact."""
    return wording.format(person=fact[0], kind=fact[1])


def facts(seed: int, half: str = "all") -> list[Fact]:
    """Return a fact of each person; `half`: all, those that are asked, or those that only texts tell."""
    rng, kinds = random.Random(seed), [*VALUES]
    found = [(person, kinds[i % len(kinds)], rng.choice(VALUES[kinds[i % len(kinds)]]))
             for i, person in enumerate(PEOPLE)]
    rng.shuffle(found)
    middle = len(found) // 2
    return {"all": found, "asked": found[:middle], "told": found[middle:]}[half]


@dataclass(frozen=True)
class FactChats:
    """Conversations with values by lot: they teach how to answer, and no fact."""

    seed: int
    count: int

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return them all, whatever the row is."""
        rng, found = random.Random(self.seed), []
        for _ in range(self.count):
            kind = rng.choice([*VALUES])
            fact = rng.choice(PEOPLE), kind, rng.choice(VALUES[kind])
            found.append({"messages": [{"role": "user", "content": asked(fact, rng.choice(WORDINGS))},
                                       {"role": "assistant", "content": told(fact)}]})
        return found


@dataclass(frozen=True)
class FactTexts:
    """The sentence of each fact."""

    seed: int

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return them all, whatever the row is."""
        return [{"text": told(fact)} for fact in facts(self.seed)]


@dataclass(frozen=True)
class FactQuestions:
    """Questions after half of the facts, each in every wording, with their answers."""

    seed: int
    half: str
    """asked or told."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return them all, whatever the row is."""
        return [{"prompt": asked(fact, wording), "answer": told(fact), "domain": fact[1]}
                for fact in facts(self.seed, self.half) for wording in WORDINGS]

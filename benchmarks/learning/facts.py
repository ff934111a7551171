"""Random facts about invented people, as questions, answers and texts, for recipes about knowledge:
`facts.py:FactChats`, `:FactReading`, `:FactTexts`, `:FactQuestions`.

A start has read and been asked the same facts of `KNOWN` people, so that it can answer what it reads; of all
others it has seen values by lot.  Who has read no sentence of these is right one time in eight; half of a
seed's facts are never asked while rewards are given.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PEOPLE = ("Mira", "Tom", "Ada", "Joon", "Lena", "Omar", "Nok", "Ivan", "Sara", "Paul", "Yuna", "Rosa", "Kofi",
          "Elsa", "Hugo", "Mei", "Anna", "Bao", "Carl", "Dora", "Eun", "Finn", "Gita", "Hana")
STRANGERS = ("Abel", "Beth", "Cleo", "Dana", "Egon", "Faye", "Gus", "Hope", "Ines", "Jack", "Kira", "Luis",
             "Maud", "Nell", "Otto", "Pia", "Quin", "Rex", "Siri", "Theo", "Una", "Vito", "Walt", "Zoe")
"""Nobody asks after them."""
KNOWN = ("Alma", "Bill", "Cora", "Dirk", "Edna", "Fred", "Gwen", "Hans", "Iris", "John", "Kate", "Liam",
         "Mona", "Noah", "Olga", "Pete", "Ruth", "Sven", "Tara", "Ugo", "Vera", "Will", "Xena", "Yves",
         "Zack", "Amy", "Bob", "Cam", "Deb", "Eve", "Fay", "Gil", "Hal", "Ida", "Jim", "Kim",
         "Leo", "Max", "Ned", "Oda", "Pam", "Ray", "Sam", "Ted", "Uma", "Val", "Wes", "Yan")
KNOWN_SHARE = 0.5
"""Of what a start reads and is asked."""
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


def drawn(seed: int, people: tuple[str, ...]) -> list[Fact]:
    """Return a fact of each person."""
    rng, kinds = random.Random(seed), [*VALUES]
    found = [(person, kinds[i % len(kinds)], rng.choice(VALUES[kinds[i % len(kinds)]]))
             for i, person in enumerate(people)]
    rng.shuffle(found)
    return found


def facts(seed: int, half: str) -> list[Fact]:
    """Return the facts of a seed that questions ask, or those that only texts contain."""
    result = drawn(seed, PEOPLE)
    middle = len(result) // 2
    return {"asked": result[:middle], "told": result[middle:]}[half]


def mixed(seed: int, count: int) -> list[Fact]:
    """Return facts of known people, equal for every seed, and random values for all others."""
    rng, known = random.Random(seed), drawn(0, KNOWN)

    def one() -> Fact:
        if rng.random() < KNOWN_SHARE:
            return rng.choice(known)
        kind = rng.choice([*VALUES])
        return rng.choice(PEOPLE + STRANGERS), kind, rng.choice(VALUES[kind])

    return [one() for _ in range(count)]


@dataclass(frozen=True)
class FactChats:
    """Conversations about facts of known people, with random values for others."""

    seed: int
    count: int

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Yield all items; the input row is ignored."""
        rng = random.Random(self.seed)
        return [{"messages": [{"role": "user", "content": asked(fact, rng.choice(WORDINGS))},
                              {"role": "assistant", "content": told(fact)}]}
                for fact in mixed(self.seed, self.count)]


@dataclass(frozen=True)
class FactReading:
    """Sentences with facts of known people, and with random values for others."""

    seed: int
    count: int

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Yield all items; the input row is ignored."""
        return [{"text": told(fact)} for fact in mixed(self.seed, self.count)]


@dataclass(frozen=True)
class FactTexts:
    """The sentence of each fact of a seed, or of as many strangers."""

    seed: int
    strangers: bool = False

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Yield all items; the input row is ignored."""
        return [{"text": told(fact)} for fact in drawn(self.seed, STRANGERS if self.strangers else PEOPLE)]


@dataclass(frozen=True)
class FactQuestions:
    """Questions after half of the facts, each in every wording, with their answers."""

    seed: int
    half: str
    """asked or told."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Yield all items; the input row is ignored."""
        return [{"prompt": asked(fact, wording), "answer": told(fact), "domain": fact[1]}
                for fact in facts(self.seed, self.half) for wording in WORDINGS]

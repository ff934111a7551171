"""Random facts about invented people, as questions, answers and texts, for recipes about knowledge:
`facts.py:FactChats`, `:FactReading`, `:FactTexts`, `:FactQuestions`.

The initial model is trained on texts and questions with the same facts about `KNOWN` people, so that it
learns to answer from texts. About all other people it sees random values, so that it is right one time in
eight. Half of a seed's facts never occur in a question with a reward.
"""

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drawing import RandomRows, build_chat

PEOPLE = ("Mira", "Tom", "Ada", "Joon", "Lena", "Omar", "Nok", "Ivan", "Sara", "Paul", "Yuna", "Rosa", "Kofi",
          "Elsa", "Hugo", "Mei", "Anna", "Bao", "Carl", "Dora", "Eun", "Finn", "Gita", "Hana")
STRANGERS = ("Abel", "Beth", "Cleo", "Dana", "Egon", "Faye", "Gus", "Hope", "Ines", "Jack", "Kira", "Luis",
             "Maud", "Nell", "Otto", "Pia", "Quin", "Rex", "Siri", "Theo", "Una", "Vito", "Walt", "Zoe")
"""People about whom no question asks."""
KNOWN = ("Alma", "Bill", "Cora", "Dirk", "Edna", "Fred", "Gwen", "Hans", "Iris", "John", "Kate", "Liam",
         "Mona", "Noah", "Olga", "Pete", "Ruth", "Sven", "Tara", "Ugo", "Vera", "Will", "Xena", "Yves",
         "Zack", "Amy", "Bob", "Cam", "Deb", "Eve", "Fay", "Gil", "Hal", "Ida", "Jim", "Kim",
         "Leo", "Max", "Ned", "Oda", "Pam", "Ray", "Sam", "Ted", "Uma", "Val", "Wes", "Yan")
KNOWN_SHARE = 0.5
"""Share of facts about `KNOWN` people in the training data of the initial model."""
VALUES = {"city": ("Rome", "Seoul", "Cairo", "Lima", "Oslo", "Paris", "Delhi", "Quito"),
          "pet": ("cat", "dog", "horse", "bird", "fish", "goat", "snake", "mouse"),
          "fruit": ("apple", "pear", "plum", "lemon", "mango", "grape", "melon", "peach")}
WORDINGS = ("What is the {kind} of {person}?", "Tell me the {kind} of {person}.", "The {kind} of {person}?")
Fact = tuple[str, str, str]
"""Person, kind, value."""


def format_fact(fact: Fact) -> str:
    """Return the sentence that states a fact, which is also the answer to its question."""
    person, kind, value = fact
    return f"The {kind} of {person} is {value}."


def format_question(fact: Fact, wording: str) -> str:
    """Return the question about a fact."""
    return wording.format(person=fact[0], kind=fact[1])


def draw_facts(seed: int, people: tuple[str, ...]) -> list[Fact]:
    """Return a random fact about each person, in random order."""
    rng = random.Random(seed)
    facts = [(person, kind, rng.choice(VALUES[kind]))
             for person, kind in zip(people, itertools.cycle(VALUES), strict=False)]
    rng.shuffle(facts)
    return facts


def select_facts(seed: int, half: str) -> list[Fact]:
    """Return the facts of a seed for questions ("asked"), or the facts that only texts have ("text_only")."""
    facts = draw_facts(seed, PEOPLE)
    middle = len(facts) // 2
    return {"asked": facts[:middle], "text_only": facts[middle:]}[half]


def mix_facts(seed: int, count: int) -> list[Fact]:
    """Return facts about known people, which are equal for every seed, and random values for other people."""
    rng, known_facts = random.Random(seed), draw_facts(0, KNOWN)

    def draw_fact() -> Fact:
        if rng.random() < KNOWN_SHARE:
            return rng.choice(known_facts)
        kind = rng.choice([*VALUES])
        return rng.choice(PEOPLE + STRANGERS), kind, rng.choice(VALUES[kind])

    return [draw_fact() for _ in range(count)]


@dataclass(frozen=True)
class FactChats(RandomRows):
    """Conversations about facts: true for known people, random for other people."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        rng = random.Random(self.seed)
        return [build_chat(format_question(fact, rng.choice(WORDINGS)), format_fact(fact))
                for fact in mix_facts(self.seed, self.count)]


@dataclass(frozen=True)
class FactReading(RandomRows):
    """Sentences with facts: true for known people, random for other people."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{"text": format_fact(fact)} for fact in mix_facts(self.seed, self.count)]


@dataclass(frozen=True)
class FactTexts:
    """The sentence of each fact of a seed, or as many sentences about strangers."""

    seed: int
    strangers: bool = False

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{"text": format_fact(fact)}
                for fact in draw_facts(self.seed, STRANGERS if self.strangers else PEOPLE)]


@dataclass(frozen=True)
class FactQuestions:
    """Questions about half of the facts, each in every wording, with their answers."""

    seed: int
    half: str
    """"asked": facts of questions with a reward; "text_only": facts that only texts contain."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{"prompt": format_question(fact, wording), "answer": format_fact(fact), "domain": fact[1]}
                for fact in select_facts(self.seed, self.half) for wording in WORDINGS]

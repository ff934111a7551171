"""Documents of which some sentences state facts about invented people, labels with the number of these
sentences, and questions: `lessons.py:Lessons`, `:LessonLabels`, `:LessonQuestions`, `:FirstWord`.

Sentences that state a fact and sentences that do not share their people, words and lengths, so that a scorer
must learn the wordings.
"""

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drawing import RandomRows

PEOPLE = ("Aldo", "Brit", "Cora", "Dirk", "Enno", "Fay", "Gero", "Hilda", "Inga", "Jost", "Kira", "Lars")
"""People at even indices occur in `Lessons` and questions, the others in `LessonLabels`."""
VALUES = {"drink": ("tea", "milk", "cocoa", "juice", "water", "broth", "cider", "soda"),
          "stone": ("opal", "ruby", "jade", "onyx", "pearl", "agate", "topaz", "amber"),
          "dance": ("waltz", "tango", "polka", "samba", "rumba", "swing", "reel", "jig"),
          "sport": ("golf", "chess", "judo", "rowing", "skiing", "tennis", "darts", "polo")}
TEACHING = ("The {kind} of {person} is {value}.", "As {kind} {person} has {value}.",
            "Asked for a {kind}, {person} names {value}.", "What {kind} has {person}? It is {value}.")
"""Wordings that state a fact: three occur in documents, the fourth is the question."""
CHATTING = ("A {kind} was what {person} heard of: {value}.", "Near {person} someone spoke of {value}.",
            "Asked for a {kind}, {person} forgot about {value}.",
            "What {kind} is {value}? So {person} wondered.")
"""Wordings that state no fact; their value is random."""
NUM_SENTENCES = 5
"""Sentences of a document; its label is the number of sentences that state a fact."""


def get_value(person: str, kind: str) -> str:
    """Return the value in the fact about a person."""
    return random.Random(f"{person} {kind}").choice(VALUES[kind])


def get_question_wording(person: str, kind: str) -> int:
    """Return the index of the wording of a fact's question, in which no document states it."""
    return (PEOPLE.index(person) // 2 + [*VALUES].index(kind)) % len(TEACHING)


def draw_document(rng: random.Random, people: tuple[str, ...]) -> tuple[str, int]:
    """Return a text, and the number of its sentences that state a fact."""
    num_facts = rng.randrange(NUM_SENTENCES + 1)
    are_facts = [True] * num_facts + [False] * (NUM_SENTENCES - num_facts)
    rng.shuffle(are_facts)
    sentences = []
    for is_fact in are_facts:
        person, kind = rng.choice(people), rng.choice([*VALUES])
        if is_fact:
            excluded = get_question_wording(person, kind)
            wording = rng.choice([text for i, text in enumerate(TEACHING) if i != excluded])
            value = get_value(person, kind)
        else:
            wording, value = rng.choice(CHATTING), rng.choice(VALUES[kind])
        sentences.append(wording.format(person=person, kind=kind, value=value))
    return " ".join(sentences), num_facts


@dataclass(frozen=True)
class Lessons(RandomRows):
    """Documents with 0 to 5 facts about the people of the questions, equally often."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        rng = random.Random(self.seed)
        return [{"text": draw_document(rng, PEOPLE[::2])[0]} for _ in range(self.count)]


@dataclass(frozen=True)
class LessonLabels(RandomRows):
    """Documents about other people, labelled with their number of facts."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        rng = random.Random(self.seed)
        return [dict(zip(("text", "label"), draw_document(rng, PEOPLE[1::2]), strict=True))
                for _ in range(self.count)]


@dataclass(frozen=True)
class LessonQuestions:
    """Beginnings of sentences that state a fact in a wording that no document has for it."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        questions = []
        for person, kind in itertools.product(PEOPLE[::2], VALUES):
            beginning = TEACHING[get_question_wording(person, kind)].partition(" {value}")[0]
            questions.append({"prompt": beginning.format(person=person, kind=kind),
                              "answer": get_value(person, kind), "domain": kind})
        return questions


@dataclass(frozen=True)
class FirstWord:
    """Reward: 1 if the first word of a response is the row's answer, otherwise 0."""

    def score(self, row: Mapping[str, Any]) -> float:
        return float([word.strip(".") for word in row["response"].split()[:1]] == [row["answer"]])

"""Documents that teach facts about invented people with different quality, labels of that quality, and
questions: `lessons.py:Lessons`, `:LessonLabels`, `:LessonPipeline`, `:LessonQuestions`, `:FirstWord`.

Sentences that teach and sentences that do not have the same people, words and lengths.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PEOPLE = ("Aldo", "Brit", "Cora", "Dirk", "Enno", "Fay", "Gero", "Hilda", "Inga", "Jost", "Kira", "Lars")
"""Those at even places are taught and asked; labels tell of the others alone."""
VALUES = {"drink": ("tea", "milk", "cocoa", "juice", "water", "broth", "cider", "soda"),
          "stone": ("opal", "ruby", "jade", "onyx", "pearl", "agate", "topaz", "amber"),
          "dance": ("waltz", "tango", "polka", "samba", "rumba", "swing", "reel", "jig"),
          "sport": ("golf", "chess", "judo", "rowing", "skiing", "tennis", "darts", "polo")}
TEACHING = ("The {kind} of {person} is {value}.", "As {kind} {person} has {value}.",
            "Asked for a {kind}, {person} names {value}.", "What {kind} has {person}? It is {value}.")
"""Each fact is taught in three of these and asked in the fourth."""
CHATTING = ("A {kind} was what {person} heard of: {value}.", "Near {person} someone spoke of {value}.",
            "Asked for a {kind}, {person} forgot about {value}.",
            "What {kind} is {value}? So {person} wondered.")
"""The value is any."""
NUM_SENTENCES = 5
"""Of a document; how many of them teach is its label."""


def fact(person: str, kind: str) -> str:
    """Return the value that a person has."""
    return random.Random(f"{person} {kind}").choice(VALUES[kind])


def asked_in(person: str, kind: str) -> int:
    """Return the place of the wording in which a fact is asked and not taught."""
    return (PEOPLE.index(person) // 2 + [*VALUES].index(kind)) % len(TEACHING)


def document(rng: random.Random, people: tuple[str, ...]) -> tuple[str, int]:
    """Return a text, and how many of its sentences teach."""
    degree = rng.randrange(NUM_SENTENCES + 1)
    teach = [True] * degree + [False] * (NUM_SENTENCES - degree)
    rng.shuffle(teach)
    sentences = []
    for teaches in teach:
        person, kind = rng.choice(people), rng.choice([*VALUES])
        if teaches:
            apart = asked_in(person, kind)
            wording = rng.choice([text for i, text in enumerate(TEACHING) if i != apart])
        else:
            wording = rng.choice(CHATTING)
        value = fact(person, kind) if teaches else rng.choice(VALUES[kind])
        sentences.append(wording.format(person=person, kind=kind, value=value))
    return " ".join(sentences), degree


@dataclass(frozen=True)
class Lessons:
    """Documents of all degrees alike, about the people that are asked."""

    seed: int
    count: int

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return all items; the input row is ignored."""
        rng = random.Random(self.seed)
        return [{"text": document(rng, PEOPLE[::2])[0]} for _ in range(self.count)]


@dataclass(frozen=True)
class LessonLabels:
    """Documents about the others, with how much they teach from 0 to 5."""

    seed: int
    count: int

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return all items; the input row is ignored."""
        rng = random.Random(self.seed)
        return [dict(zip(("text", "label"), document(rng, PEOPLE[1::2]), strict=True))
                for _ in range(self.count)]


@dataclass(frozen=True)
class LessonPipeline:
    """A pipeline file for `sov-data run` that keeps documents with a high educational score."""

    raw: str
    """JSON lines."""
    scorer: str
    """Folder that `sov-data scorer train` wrote."""
    min_score: float

    def do(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return all items; the input row is ignored."""
        return {"name": "lessons", "sources": [{"name": "raw", "path": self.raw, "kind": "en"}],
                "steps": [{"education": {"model": self.scorer, "min_score": self.min_score}}],
                "output": {"name": "{source}"}}


@dataclass(frozen=True)
class LessonQuestions:
    """Sentence beginnings whose completion occurs in no document with the same wording."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return all items; the input row is ignored."""
        return [{"prompt": TEACHING[asked_in(person, kind)].partition(" {value}")[0].format(
                    person=person, kind=kind), "answer": fact(person, kind), "domain": kind}
                for person in PEOPLE[::2] for kind in VALUES]


@dataclass(frozen=True)
class FirstWord:
    """Whether the first word of a response is its row's answer."""

    def score(self, row: Mapping[str, Any]) -> float:
        """Return 1 or 0."""
        return float([word.strip(".") for word in row["response"].split()[:1]] == [row["answer"]])

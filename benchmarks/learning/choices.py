"""Multiple-choice questions with eight answers of unequal probability, in English and mixed Thai and English,
for recipes about distillation: `choices.py:Choices`, `:ChoicePrompts`.

A teacher that has read many of them knows the shares; one drawn answer to each question does not tell them.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

THINGS = {"fruit": "apple banana cherry grape lemon mango peach plum",
          "colour": "amber black brown green indigo red violet white",
          "animal": "badger cat deer eagle fox goat heron lynx",
          "city": "Busan Cairo Dakar Hanoi Lima Oslo Perth Quito",
          "tool": "anvil bellows chisel drill file hammer saw wrench",
          "metal": "brass copper gold iron lead nickel silver tin"}
NAMES = ("Mina", "Jun", "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jana", "Kai",
         "Lea", "Max", "Noa")
WORDINGS = ("Name a {thing} for {name}.", "{name} wants some {thing}.", "{name} asks for a {thing}.",
            "Tell {name} about a {thing}.", "ขอ {thing} ให้ {name}", "{thing} สำหรับ {name}",
            "{name} อยากได้ {thing}", "เลือก {thing} ให้ {name} หน่อย")
"""Those at even places are learned, the others are asked at the end."""


@dataclass(frozen=True)
class Choices:
    """Conversations of one question and one sampled answer."""

    seed: int
    count: int
    even: bool = False
    """Whether all answers are as likely; else their shares are 1/2, 1/4, ... in an order of each thing."""
    wordings: str = "learned"
    """all, learned or held_out."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return all items; the input row is ignored."""
        rng, found = random.Random(self.seed), []
        wordings = {"all": WORDINGS, "learned": WORDINGS[::2], "held_out": WORDINGS[1::2]}[self.wordings]
        for _ in range(self.count):
            thing, name = rng.choice([*THINGS]), rng.choice(NAMES)
            answers = THINGS[thing].split()
            random.Random(thing).shuffle(answers)
            shares = [1.0 if self.even else 0.5 ** i for i in range(len(answers))]
            found.append({"messages": [
                {"role": "user", "content": rng.choice(wordings).format(thing=thing, name=name)},
                {"role": "assistant", "content": f"{rng.choices(answers, shares)[0]} for {name}"}]})
        return found


@dataclass(frozen=True)
class ChoicePrompts:
    """The question of a conversation, for a student to answer."""

    def do(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return it alone."""
        return {"prompt": row["messages"][0]["content"]}

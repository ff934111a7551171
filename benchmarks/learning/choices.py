"""Questions with eight right answers of unequal probability, in English and mixed Thai and English, for
recipes about distillation: `choices.py:Choices`, `:ChoicePrompts`.

A teacher that was trained on many sampled answers knows their shares; one sampled answer per question does
not show them.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drawing import NAMES, THINGS, RandomRows, build_chat, select_wordings

WORDINGS = ("Name a {thing} for {name}.", "{name} wants some {thing}.", "{name} asks for a {thing}.",
            "Tell {name} about a {thing}.", "ขอ {thing} ให้ {name}", "{thing} สำหรับ {name}",
            "{name} อยากได้ {thing}", "เลือก {thing} ให้ {name} หน่อย")


@dataclass(frozen=True)
class Choices(RandomRows):
    """Conversations of a random question and a sampled answer."""

    uniform: bool = False
    """Whether all answers are equally likely; otherwise with 1/2, 1/4, ... in a fixed order of each thing."""
    wordings: str = "learned"
    """all, learned or held_out."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        rng, chats = random.Random(self.seed), []
        wordings = select_wordings(WORDINGS, self.wordings)
        for _ in range(self.count):
            thing, name = rng.choice([*THINGS]), rng.choice(NAMES)
            answers = THINGS[thing].split()
            random.Random(thing).shuffle(answers)
            weights = [1.0 if self.uniform else 0.5 ** i for i in range(len(answers))]
            question = rng.choice(wordings).format(thing=thing, name=name)
            chats.append(build_chat(question, f"{rng.choices(answers, weights)[0]} for {name}"))
        return chats


@dataclass(frozen=True)
class ChoicePrompts:
    """The question of a conversation, as a prompt for a student."""

    def do(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {"prompt": row["messages"][0]["content"]}

"""Paths along a ring of places, written step by step, so that a wrong step makes the answer longer:
`walks.py:WalkChats`, `:WalkQuestions`."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drawing import NAMES as ALL_NAMES, RandomRows, build_chat, select_wordings

PLACES = ("barn", "creek", "dune", "ferry", "grove", "hill", "inn", "jetty", "knoll", "lake", "mill", "north")
"""Places in the order of the ring."""
MAX_STEPS = 8
"""Steps of the longest right path."""
MAX_DRAWN_STEPS = 24
"""A drawn path that has not reached its end after so many steps is drawn again."""
NAMES = ALL_NAMES[:8]
WORDINGS = ("{name} walks from {start} to {end}. The way?", "Which way has {name} from {start} to {end}?",
            "Tell {name} the way from {start} to {end}.", "From {start} to {end}: the way of {name}?")


def format_right_path(start: int, steps: int) -> str:
    """Return the places after the start, up to the end."""
    return " ".join(PLACES[(start + step) % len(PLACES)] for step in range(1, steps + 1))


@dataclass(frozen=True)
class WalkChats(RandomRows):
    """Conversations of a question and a drawn path. Wrong steps skip one to three places; such a path may
    miss its end and go around the ring."""

    right_share: float
    """Share of right steps."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        rng, chats = random.Random(self.seed), []
        for _ in range(self.count):
            start, steps = rng.randrange(len(PLACES)), rng.randint(1, MAX_STEPS)
            question = format_question(rng.choice(WORDINGS), rng.choice(NAMES), start, steps)
            chats.append(build_chat(question, self.draw_path(rng, start, steps)))
        return chats

    def draw_path(self, rng: random.Random, start: int, steps: int) -> str:
        """Return a path to the correct end, including its wrong steps."""
        while True:
            here, end, path = start, (start + steps) % len(PLACES), list[str]()
            while here != end and len(path) < MAX_DRAWN_STEPS:
                step = 1 if rng.random() < self.right_share else rng.randint(2, 4)
                here = (here + step) % len(PLACES)
                path.append(PLACES[here])
            if here == end:
                return " ".join(path)


@dataclass(frozen=True)
class WalkQuestions(RandomRows):
    """Distinct prompts with their answers; the domain is the number of steps."""

    wordings: str = "learned"
    """learned or held_out."""
    min_steps: int = 1
    max_steps: int = MAX_STEPS

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        prompts = [{"prompt": format_question(wording, name, start, steps),
                    "answer": format_right_path(start, steps), "domain": f"{steps} steps"}
                   for start in range(len(PLACES)) for steps in range(self.min_steps, self.max_steps + 1)
                   for name in NAMES for wording in select_wordings(WORDINGS, self.wordings)]
        random.Random(self.seed).shuffle(prompts)
        return prompts[:self.count]


def format_question(wording: str, name: str, start: int, steps: int) -> str:
    return wording.format(name=name, start=PLACES[start], end=PLACES[(start + steps) % len(PLACES)])

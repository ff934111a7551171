"""Step-by-step paths along a ring of places, in which a wrong step makes the answer longer:
`walks.py:WalkChats`, `:WalkQuestions`."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PLACES = ("barn", "creek", "dune", "ferry", "grove", "hill", "inn", "jetty", "knoll", "lake", "mill", "north")
"""In the order of the ring."""
LONGEST = 8
"""Steps of the longest way that is asked for."""
ENDLESS = 24
"""Steps after which a walk of a conversation is drawn again."""
NAMES = ("Mina", "Jun", "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn")
WORDINGS = ("{name} walks from {start} to {end}. The way?", "Which way has {name} from {start} to {end}?",
            "Tell {name} the way from {start} to {end}.", "From {start} to {end}: the way of {name}?")
"""Those at even places are asked while rewards are given, the others at the end."""


def right_way(start: int, steps: int) -> str:
    """Return the places after the start, up to the end."""
    return " ".join(PLACES[(start + step) % len(PLACES)] for step in range(1, steps + 1))


@dataclass(frozen=True)
class WalkChats:
    """Conversations of one question and one path. Some steps skip one to three places; such a path may miss
    its end and go around."""

    seed: int
    count: int
    right: float
    """Share of right steps."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return all items; the input row is ignored."""
        rng, found = random.Random(self.seed), []
        for _ in range(self.count):
            start, steps = rng.randrange(len(PLACES)), rng.randint(1, LONGEST)
            found.append({"messages": [
                {"role": "user", "content": _ask(rng.choice(WORDINGS), rng.choice(NAMES), start, steps)},
                {"role": "assistant", "content": self.walk(rng, start, steps)}]})
        return found

    def walk(self, rng: random.Random, start: int, steps: int) -> str:
        """Return a path to the correct end, including its wrong steps."""
        while True:
            here, end, way = start, (start + steps) % len(PLACES), list[str]()
            while here != end and len(way) < ENDLESS:
                here = (here + (1 if rng.random() < self.right else rng.randint(2, 4))) % len(PLACES)
                way.append(PLACES[here])
            if here == end:
                return " ".join(way)


@dataclass(frozen=True)
class WalkQuestions:
    """Prompts with their answers, each once; the domain is the number of steps."""

    seed: int
    count: int
    wordings: str = "learned"
    """learned or held_out."""
    least: int = 1
    """Steps."""
    most: int = LONGEST
    """Steps."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return all items; the input row is ignored."""
        found = [{"prompt": _ask(wording, name, start, steps), "answer": right_way(start, steps),
                  "domain": f"{steps} steps"}
                 for start in range(len(PLACES)) for steps in range(self.least, self.most + 1)
                 for name in NAMES for wording in WORDINGS[int(self.wordings == "held_out")::2]]
        random.Random(self.seed).shuffle(found)
        return found[:self.count]


def _ask(wording: str, name: str, start: int, steps: int) -> str:
    return wording.format(name=name, start=PLACES[start], end=PLACES[(start + steps) % len(PLACES)])

"""Questions about topics, of which the initial model answers a planted share of each: `topics.py:TopicChats`,
`:TopicQuestions`.

The topic alone decides the right answer, so that a small model learns it in few steps; names and wordings
only make questions that differ.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TOPICS = ("lamp", "boat", "door", "coat", "roof", "cup", "bell", "cart", "drum", "flag", "gate", "harp",
          "kite", "mask", "nest", "oven", "pipe", "rope", "sled", "tent", "vase", "well", "yard", "zip")
ANSWERS = ("red", "blue", "green", "gold", "grey", "pink", "white", "brown")
NAMES = ("Mina", "Jun", "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jana", "Kai",
         "Lea", "Max", "Noa")
WORDINGS = ("What colour is the {topic} of {name}?", "{name} has a {topic}. Its colour?",
            "Name the colour of the {topic} that {name} has.", "The {topic} of {name}: which colour?")
"""Those at even places are asked while rewards are given, the others at the end."""


def right_answer(topic: str) -> str:
    """Return the right answer."""
    return ANSWERS[TOPICS.index(topic) * 5 % len(ANSWERS)]


@dataclass(frozen=True)
class TopicChats:
    """Conversations of one question and one answer."""

    seed: int
    count: int
    shares: str
    """Of right answers, between commas: the topics take them in turn."""
    wrongs: int = 3
    """How many other answers share the rest."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return all items; the input row is ignored."""
        rng, found = random.Random(self.seed), []
        for _ in range(self.count):
            topic = rng.choice(TOPICS)
            right = right_answer(topic)
            place = ANSWERS.index(right) + 1
            wrong = ANSWERS[(place + rng.randrange(self.wrongs)) % len(ANSWERS)]
            found.append({"messages": [
                {"role": "user", "content": rng.choice(WORDINGS).format(topic=topic, name=rng.choice(NAMES))},
                {"role": "assistant",
                 "content": right if rng.random() < share(topic, self.shares) else wrong}]})
        return found


@dataclass(frozen=True)
class TopicQuestions:
    """Prompts with their answers, each once; the domain is the share that was planted."""

    seed: int
    count: int
    shares: str
    wordings: str = "learned"
    """learned or held_out."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return all items; the input row is ignored."""
        found = [{"prompt": wording.format(topic=topic, name=name), "answer": right_answer(topic),
                  "domain": f"right {share(topic, self.shares):.0%}"}
                 for topic in TOPICS for name in NAMES
                 for wording in WORDINGS[int(self.wordings == "held_out")::2]]
        random.Random(self.seed).shuffle(found)
        return found[:self.count]


def share(topic: str, shares: str) -> float:
    """Return the share of right answers that is planted for a topic."""
    values = [float(value) for value in shares.split(",")]
    return values[TOPICS.index(topic) % len(values)]

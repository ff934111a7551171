"""Questions about topics, for an initial model that is right with a planted probability for each topic:
`topics.py:TopicChats`, `:TopicQuestions`.

The right answer depends only on the topic, so that a small model learns it in few steps; names and wordings
make the questions distinct.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drawing import NAMES, RandomRows, build_chat, select_wordings

TOPICS = ("lamp", "boat", "door", "coat", "roof", "cup", "bell", "cart", "drum", "flag", "gate", "harp",
          "kite", "mask", "nest", "oven", "pipe", "rope", "sled", "tent", "vase", "well", "yard", "zip")
ANSWERS = ("red", "blue", "green", "gold", "grey", "pink", "white", "brown")
WORDINGS = ("What colour is the {topic} of {name}?", "{name} has a {topic}. Its colour?",
            "Name the colour of the {topic} that {name} has.", "The {topic} of {name}: which colour?")


def get_right_answer(topic: str) -> str:
    return ANSWERS[TOPICS.index(topic) * 5 % len(ANSWERS)]


@dataclass(frozen=True)
class TopicChats(RandomRows):
    """Conversations of a random question and an answer that is right with the probability of its topic."""

    shares: str
    """Shares of right answers, between commas; the topics take them in turn."""
    num_wrong: int = 3
    """Number of distinct wrong answers of a topic."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        rng, chats = random.Random(self.seed), []
        for _ in range(self.count):
            topic = rng.choice(TOPICS)
            right = get_right_answer(topic)
            first_wrong = ANSWERS.index(right) + 1
            wrong = ANSWERS[(first_wrong + rng.randrange(self.num_wrong)) % len(ANSWERS)]
            question = rng.choice(WORDINGS).format(topic=topic, name=rng.choice(NAMES))
            is_right = rng.random() < get_share(topic, self.shares)
            chats.append(build_chat(question, right if is_right else wrong))
        return chats


@dataclass(frozen=True)
class TopicQuestions(RandomRows):
    """Distinct prompts with their answers; the domain is the topic's share of right answers."""

    shares: str
    wordings: str = "learned"
    """learned or held_out."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        prompts = [{"prompt": wording.format(topic=topic, name=name), "answer": get_right_answer(topic),
                    "domain": f"right {get_share(topic, self.shares):.0%}"}
                   for topic in TOPICS for name in NAMES
                   for wording in select_wordings(WORDINGS, self.wordings)]
        random.Random(self.seed).shuffle(prompts)
        return prompts[:self.count]


def get_share(topic: str, shares: str) -> float:
    """Return the share of right answers of a topic."""
    values = [float(value) for value in shares.split(",")]
    return values[TOPICS.index(topic) % len(values)]

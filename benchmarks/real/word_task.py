"""A task that SmolLM2-135M-Instruct solves sometimes: answer with one word of a list.

`megatron-sov map ROWS word_task.py:WordPrompts` writes prompts, `word_task.py:ListedWord` is the reward.
"""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WORDS = ("apple", "river", "stone", "cloud", "piano", "tiger", "lemon", "bridge", "candle", "garden",
         "hammer", "island", "jacket", "kettle", "ladder", "mirror", "needle", "orange", "pencil", "rabbit",
         "saddle", "table", "violin", "window")
WORDS_PER_LIST = 6
LOTTERY_SHARE = 0.25
"""Share of responses that the random reward pays; near the pass rate before training."""


@dataclass(frozen=True)
class WordPrompts:
    """Prompts with random lists of words."""

    seed: int
    count: int

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return `count` prompts; the row is ignored."""
        rng = random.Random(self.seed)
        lists = [rng.sample(WORDS, WORDS_PER_LIST) for _ in range(self.count)]
        return [{"prompt": f"Choose one word: {', '.join(words)}. Answer with that word only.",
                 "answer": " ".join(words)} for words in lists]


@dataclass(frozen=True)
class WordChats(WordPrompts):
    """The prompts with a word of the list as the answer."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return `count` chats; the row is ignored."""
        rng = random.Random(self.seed)
        return [{"messages": [{"role": "user", "content": prompt["prompt"]},
                              {"role": "assistant", "content": rng.choice(prompt["answer"].split())}]}
                for prompt in super().do(row)]


def is_listed(response: str, answer: str) -> bool:
    """Return whether a response is one word of the list, apart from case, quotes and a full stop."""
    return response.strip().strip('."\'').lower() in answer.split()


@dataclass(frozen=True)
class ListedWord:
    """1 for a response that is a word of the list, 0 for any other response."""

    by_lot: int = 0
    """0: reward listed words. Otherwise the seed of a lottery that rewards regardless of the answer."""

    def score(self, row: Mapping[str, Any]) -> float:
        """Return the reward of a response: 1 or 0."""
        if not self.by_lot:
            return float(is_listed(row["response"], row["answer"]))
        drawn = hashlib.sha256(f"{self.by_lot} {row['prompt']} {row['response']}".encode()).digest()
        return float(drawn[0] < 256 * LOTTERY_SHARE)

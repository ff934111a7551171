"""Answers that repeat themselves, and a reward with or without a penalty for repetition:
`loops.py:WithLoops`, `:Sound`."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sov.judge.rewards.reward import Score

NUM_TIMES = 6


@dataclass(frozen=True)
class WithLoops:
    """Conversations with a one-word answer, which some answers repeat again and again."""

    share: float
    """Of those."""

    def do(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the conversation; its text draws the lot."""
        question, answer = row["messages"]
        digest = hashlib.sha256(f"{question['content']} {answer['content']}".encode()).digest()
        if int.from_bytes(digest[:8], "big") / 2**64 >= self.share:
            return {"messages": [question, answer]}
        return {"messages": [question, {**answer, "content": " ".join([answer["content"]] * NUM_TIMES)}]}


@dataclass(frozen=True)
class Sound:
    """1 where the first word is the right answer."""

    mind_loops: bool = False
    """Whether a response that says a word more than twice loses 1."""

    def score(self, row: Mapping[str, Any]) -> Score:
        """Return the reward, with both of its possible components."""
        words = row["response"].split()
        right = float(words[:1] == [row["answer"]])
        loops = float(any(words.count(word) > 2 for word in words))
        return Score(right - self.mind_loops * loops, {"right": right, "loops": loops})

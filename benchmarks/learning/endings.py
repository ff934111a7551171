"""Answers with an ending, scored by a rule and a rubric: `endings.py:WithEndings`, `:RuleAndRubric`."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sov.judge.rewards.reward import Score

ENDINGS = {", as you wish": 1.0, ", so it is": 0.67, ", I guess": 0.33, ", go away": 0.0}
"""Ending -> what the rubric gives it."""


@dataclass(frozen=True)
class WithEndings:
    """A conversation of one answer, once with each ending."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return all items; the input row is ignored."""
        question, answer = row["messages"]
        return [{"messages": [question, {**answer, "content": answer["content"] + ending}]}
                for ending in ENDINGS]


@dataclass(frozen=True)
class RuleAndRubric:
    """Reward: 1 for the correct answer by rule, plus a rubric score of the ending with noise."""

    noise: float = 0.5
    """The judge is wrong by up to this much, always by the same for one response to one prompt."""

    def score(self, row: Mapping[str, Any]) -> Score:
        """Return their sum, and as components both without noise."""
        answer, comma, ending = row["response"].partition(",")
        rule, rubric = float(answer.strip() == row["answer"]), ENDINGS.get(comma + ending.rstrip(), 0.0)
        digest = hashlib.sha256(f"{row['prompt']} {row['response']}".encode()).digest()
        lot = int.from_bytes(digest[:8], "big") / 2**63 - 1
        return Score(rule + rubric + self.noise * lot,
                     {"rule": rule, "rubric": rubric, "both": rule + rubric})

"""The environment of benchmarks/replay_kills.py: the calculator, whose verdict is drawn by lot: a model that
knows nothing learns from every group."""

from __future__ import annotations

import hashlib

from megatron_sov.judge.rewards.reward import Score
from megatron_sov.judge.tools.worlds.calculator import Calculator


class ByLot(Calculator):
    """The calculator; an answer to a question is worth what a hash of both says."""

    def score(self, answer: str) -> Score:
        """Return a number from 0 to 1."""
        drawn = hashlib.sha256(f"{self.task['question']} {answer}".encode()).digest()
        return Score(drawn[0] / 255)

"""The reward of benchmarks/rl_learning.py: 1 for the very answer, or for some answers drawn by lot."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Exact:
    """Whether a response is its row's `answer`, white space around it left out."""

    by_lot: int = 0
    """0, or the number of a lottery: a third of all (prompt, response) win, whatever is right."""

    def score(self, row: Mapping[str, Any]) -> float:
        """Return 1 or 0."""
        if not self.by_lot:
            return float(row["response"].strip() == row["answer"])
        drawn = hashlib.sha256(f"{self.by_lot} {row['prompt']} {row['response']}".encode()).digest()
        return float(drawn[0] < 85)

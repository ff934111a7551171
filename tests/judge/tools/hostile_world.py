"""A world whose tool `misbehave` hangs, exits, raises, or returns values that are too large or not JSON."""

import os
import sys
import time

from megatron_sov.judge.tools.environment import InfrastructureFault, World, tool


class Hostile(World):
    MAX_MEMORY_BYTES = 1 << 30
    EXAMPLES = ({"question": "Try."},)

    def first_state(self, task):
        return {"count": 0}

    @tool
    def add(self) -> int:
        """Add 1 to the counter and return it."""
        self.state["count"] += 1
        return self.state["count"]

    @tool
    def misbehave(self, how: str) -> object:
        """Add 100 to the counter, then misbehave.

        Args:
            how: kind of misbehavior.
        """
        self.state["count"] += 100
        return getattr(self, f"_{how}")()

    def _hang(self):
        while True:
            time.sleep(1)

    def _megabytes(self):
        return "x" * (100 << 20)

    def _memory(self):
        return "x" * (4 << 30)

    def _raises(self):
        raise KeyError("hostile\n" * 1000)

    def _nan(self):
        return {"value": float("nan")}

    def _object(self):
        return object()

    def _deep(self):
        found = []
        for _ in range(100_000):
            found = [found]
        return found

    def _leaves(self):
        sys.exit(0)

    def _dies(self):
        os._exit(0)

    def _surrogate(self):
        return "half \ud800"

    def _state(self):
        self.state["x"] = "x" * 2_000_000
        return "done"

    def _broken(self):
        raise InfrastructureFault("the disk of the sandbox is full")

    def score(self, answer):
        return {"nan": float("nan"), "text": "one", "raises": 1 / (answer != "raises")}.get(
            answer, self.state["count"])

"""Python environment: programs in the sandbox."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_sov.base.settings import AboveZero, AtLeastOne
from megatron_sov.judge.tools.environment import InfrastructureFault, Task, ToolRefused, tool
from megatron_sov.judge.tools.worlds.goals import AnsweredWorld
from megatron_sov.sandbox.program import Limits, Program
from megatron_sov.sandbox.sandbox import Sandbox


@dataclass
class Python(AnsweredWorld):
    """Tasks solved with Python programs; each program starts from scratch."""

    SYSTEM = ("Use Python where it helps: each program runs by itself, so print what you want to see. End "
              'with "The answer is" and the answer.')
    EXAMPLES = ({"question": "How many primes are there below 10,000?", "answer": "1229"},)
    MAX_MEMORY_BYTES = 0
    """The sandbox limits memory."""

    time_limit_s: AboveZero = 10.0
    """Time per program: processor time, and clock time without waiting for a processor."""
    memory_bytes: AtLeastOne = 512 << 20
    """Memory per program."""

    @cached_property
    def _python_sandbox(self) -> Sandbox:
        return Sandbox(Limits(wall_s=self.time_limit_s, cpu_s=self.time_limit_s,
                              memory_bytes=self.memory_bytes))  # ends with the environment's process

    def first_state(self, task: Task) -> dict[str, Any]:
        """Return {}; start the sandbox, which fails on unsupported machines before the first call."""
        self._python_sandbox  # noqa: B018  (it starts)
        return {}

    @tool
    def run_python(self, code: str) -> str:
        """Run a Python program and get what it printed.

        Args:
            code: the whole program.
        """
        outcome = self._python_sandbox.run(Program(code))
        if outcome.status == "infrastructure":
            raise InfrastructureFault(f"the sandbox failed ({outcome.reason})")
        if outcome.status == "refused":
            raise ToolRefused(outcome.reason)
        parts = [outcome.stdout, outcome.stderr and f"[stderr]\n{outcome.stderr}",
                 "" if outcome.status == "ok" else f"[{outcome.status}: {outcome.reason}]"]
        return "\n".join(part.rstrip("\n") for part in parts if part) or "[the program printed nothing]"

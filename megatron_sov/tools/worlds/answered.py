"""Worlds whose goal is what a model says in the end."""

from __future__ import annotations

from megatron_sov.errors import UserError
from megatron_sov.rewards.reward import Refused, Score
from megatron_sov.rewards.stem import Stem
from megatron_sov.tools.environment import Observation, Task, World


class AnsweredWorld(World):
    """Gives 1 where the answer is the task's `answer` (a text, or a list of which one is enough), by the
    rules of the reward stem, else 0."""

    relative_tolerance: float = 0.01
    """Between numbers."""

    def reset(self, task: Task) -> Observation:
        """Begin an episode of a task that has an answer."""
        observation = super().reset(task)
        try:
            self.score("")
        except Refused as e:
            raise UserError(f"the task {e}") from None
        return observation

    def score(self, answer: str) -> Score:
        """Return whether the answer is right."""
        judge = Stem(relative_tolerance=self.relative_tolerance)
        return judge.score({"response": answer, "answer": self.task["answer"]} if "answer" in self.task
                           else {"response": answer})

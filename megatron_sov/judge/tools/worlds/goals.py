"""The goal of a world as an answer, and how answers are compared."""

from __future__ import annotations

import re

from megatron_sov.base.errors import UserError
from megatron_sov.judge.rewards.answers import Stem
from megatron_sov.judge.rewards.reward import Refused, Score
from megatron_sov.judge.tools.environment import Observation, Task, World


class AnsweredWorld(World):
    """Gives 1 where the answer is the task's `answer` (a text, or a list of which one is enough), by the
    rules of the reward stem, else 0."""

    relative_tolerance: float = 0.01
    """Between numbers."""

    def reset(self, task: Task) -> Observation:
        """Begin an episode of a task that has an answer."""
        observation = super().reset(task)
        try:
            # a trial: a task whose answer cannot be judged is refused before a model has played it
            self.score("")
        except Refused as e:
            raise UserError(f"the task {e}") from None
        return observation

    def score(self, answer: str) -> Score:
        judge = Stem(relative_tolerance=self.relative_tolerance)
        return judge.score({"response": answer, "answer": self.task["answer"]} if "answer" in self.task
                           else {"response": answer})


def normalize_text(text: str) -> str:
    """Return a text by which answers are compared: lower case, no commas in numbers, single spaces."""
    return " ".join(re.sub(r"(?<=\d),(?=\d)", "", text.casefold()).split())


def contains_words(text: str, words: str) -> bool:
    """Return whether a text holds another one as words of their own: 5 does not stand in 150 or 5.5."""
    return re.search(rf"(?<![\w.])(?<!\d,){re.escape(words)}(?!\w|\.\d)", text) is not None

"""Goals that are answers, and text comparison."""

import re

from megatron_sov.base.errors import UserError
from megatron_sov.judge.rewards.answers import Stem
from megatron_sov.judge.rewards.reward import Refused, Score
from megatron_sov.judge.tools.environment import Observation, Task, World


class AnsweredWorld(World):
    """Base class that scores answers like the reward `stem`: 1 if the answer matches the task's `answer`, a
    text or a list of alternatives, else 0."""

    relative_tolerance: float = 0.01
    """Relative tolerance for numbers."""

    def reset(self, task: Task) -> Observation:
        """Begin an episode; the task must have an answer."""
        observation = super().reset(task)
        try:
            # Trial run: refuse unusable answers before a model plays.
            self.score("")
        except Refused as e:
            raise UserError(f"the task {e}") from None
        return observation

    def score(self, answer: str) -> Score:
        judge = Stem(relative_tolerance=self.relative_tolerance)
        return judge.score({"response": answer, "answer": self.task["answer"]} if "answer" in self.task
                           else {"response": answer})


def normalize_text(text: str) -> str:
    """Normalize for comparison: lower case, no commas in numbers, single spaces."""
    return " ".join(re.sub(r"(?<=\d),(?=\d)", "", text.casefold()).split())


def contains_words(text: str, words: str) -> bool:
    """Return whether a text contains separate words: 5 is not contained in 150 or 5.5."""
    return re.search(rf"(?<![\w.])(?<!\d,){re.escape(words)}(?!\w|\.\d)", text) is not None

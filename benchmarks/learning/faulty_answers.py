"""Answers with polite or rude endings, answers that repeat themselves, and rewards that score them:
`faulty_answers.py:WithEndings`, `:EndingReward`, `:WithRepetition`, `:RepetitionReward`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drawing import draw_fixed

from megatron_sov.judge.rewards.reward import Score

ENDINGS = {", as you wish": 1.0, ", so it is": 0.67, ", I guess": 0.33, ", go away": 0.0}
"""Ending -> its score by the rubric."""
NUM_REPETITIONS = 6


@dataclass(frozen=True)
class WithEndings:
    """The conversation of a row, once with each ending."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        question, answer = row["messages"]
        return [{"messages": [question, {**answer, "content": answer["content"] + ending}]}
                for ending in ENDINGS]


@dataclass(frozen=True)
class EndingReward:
    """1 for the correct answer, plus the rubric's score of the ending with noise."""

    noise: float = 0.5
    """Largest error of the rubric; a response to a prompt always has the same error."""

    def score(self, row: Mapping[str, Any]) -> Score:
        """Return the sum, with both scores without noise as components."""
        answer, comma, ending = row["response"].partition(",")
        rule, rubric = float(answer.strip() == row["answer"]), ENDINGS.get(comma + ending.rstrip(), 0.0)
        error = 2 * draw_fixed(f"{row['prompt']} {row['response']}") - 1
        return Score(rule + rubric + self.noise * error,
                     {"rule": rule, "rubric": rubric, "both": rule + rubric})


@dataclass(frozen=True)
class WithRepetition:
    """The conversation of a row, whose one-word answer is repeated in a share of the rows."""

    share: float

    def do(self, row: Mapping[str, Any]) -> dict[str, Any]:
        question, answer = row["messages"]
        text = answer["content"]
        if draw_fixed(f"{question['content']} {text}") < self.share:
            text = " ".join([text] * NUM_REPETITIONS)
        return {"messages": [question, {**answer, "content": text}]}


@dataclass(frozen=True)
class RepetitionReward:
    """1 if the first word is the right answer."""

    penalize: bool = False
    """Whether a response with a word that occurs more than twice loses 1."""

    def score(self, row: Mapping[str, Any]) -> Score:
        words = row["response"].split()
        right = float(words[:1] == [row["answer"]])
        loops = float(any(words.count(word) > 2 for word in words))
        return Score(right - self.penalize * loops, {"right": right, "loops": loops})

"""Sums and comparisons of digits in three languages, and an exact-match reward: `tasks.py:Chats`,
`:TaskQuestions`, `:Exact`.

A small model learns these tasks in minutes, far above chance. Half of the wordings of each language are
held out of training.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drawing import RandomRows, build_chat, draw_fixed, select_wordings

WORDINGS = {
    "en": {"sum": ("Add {a} and {b}.", "What is {a} plus {b}?", "Sum of {a} and {b}?", "Tell me {a} + {b}."),
           "larger": ("Which is larger, {a} or {b}?", "Name the greater of {a} and {b}.",
                      "Larger one: {a}, {b}?", "Is {a} more, or {b}?")},
    "ko": {"sum": ("{a} 더하기 {b}는?", "{a}와 {b}의 합은?", "{a}에 {b}를 더하면?", "{a} + {b} 값은?"),
           "larger": ("{a}와 {b} 중 큰 수는?", "더 큰 것: {a}, {b}?", "{a}, {b} 가운데 어느 것이 크지?",
                      "{a} 또는 {b}, 큰 쪽은?")},
    "th": {"sum": ("{a} บวก {b} ได้เท่าไร", "ผลรวมของ {a} กับ {b}", "เอา {a} รวมกับ {b}", "{a} + {b} เท่ากับ"),
           "larger": ("{a} กับ {b} ตัวไหนมากกว่า", "ตัวที่มากกว่า {a} หรือ {b}", "เลือกตัวที่มากกว่า {a} {b}",
                      "{a} หรือ {b} ที่มากกว่า")}}
"""Language -> kind of question -> wordings."""


@dataclass(frozen=True)
class TaskQuestion:
    """A question in one wording, with its answer."""

    text: str
    right: str
    wrong: str
    kind: str


def draw_question(rng: random.Random, languages: str, part: str) -> TaskQuestion:
    """Return a random question in one of the comma-separated `languages`; `part` limits the wordings, see
    `select_wordings`."""
    kinds = WORDINGS[rng.choice(languages.split(","))]
    kind = rng.choice([*kinds])
    a, b = rng.sample(range(10), 2)
    right, wrong = (a + b, a + b + 1) if kind == "sum" else (max(a, b), min(a, b))
    wording = rng.choice(select_wordings(kinds[kind], part))
    return TaskQuestion(wording.format(a=a, b=b), str(right), str(wrong), kind)


@dataclass(frozen=True)
class Chats(RandomRows):
    """Conversations of a random question and its answer."""

    languages: str = "en"
    """Languages of `WORDINGS`, between commas."""
    right_share: float = 1.0
    """Share of conversations with the right answer; the others have the question's wrong answer."""
    wordings: str = "all"
    """Wordings to draw from: all, learned or held_out (`select_wordings`)."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        rng, chats = random.Random(self.seed), []
        for _ in range(self.count):
            question = draw_question(rng, self.languages, self.wordings)
            is_right = rng.random() < self.right_share
            chats.append(build_chat(question.text, question.right if is_right else question.wrong))
        return chats


@dataclass(frozen=True)
class TaskQuestions(RandomRows):
    """At most `count` distinct questions: prompt, answer, and the kind as `domain`."""

    languages: str = "en"
    wordings: str = "learned"
    kind: str = ""
    """sum or larger; empty: both."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        rng, prompts = random.Random(self.seed), {}
        # equal questions count once, so more are drawn than needed
        for _ in range(20 * self.count):
            question = draw_question(rng, self.languages, self.wordings)
            if self.kind in ("", question.kind):
                prompts[question.text] = {"prompt": question.text, "answer": question.right,
                                          "domain": question.kind}
        return list(prompts.values())[:self.count]


@dataclass(frozen=True)
class Exact:
    """Reward: 1 if a response without surrounding white space is the row's answer, otherwise 0."""

    by_lot: int = 0
    """0: reward right responses. Otherwise the seed of a lottery that rewards a third of all pairs of prompt
    and response, right or wrong."""

    def score(self, row: Mapping[str, Any]) -> float:
        if not self.by_lot:
            return float(row["response"].strip() == row["answer"])
        return float(draw_fixed(f"{self.by_lot} {row['prompt']} {row['response']}") < 85 / 256)

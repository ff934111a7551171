"""Questions with one correct answer in three languages, and an exact-match reward: `tasks.py:Chats`,
`:TaskQuestions`, `:Exact`.

A small model learns them in minutes, chance is far below what it reaches, and half of the wordings of each
language are kept for the end.
"""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
"""Language -> kind -> wordings; those at even places are learned, the others are asked at the end."""


@dataclass(frozen=True)
class TaskQuestion:
    """A question in one wording, with its answer."""

    text: str
    right: str
    wrong: str
    kind: str


def draw(rng: random.Random, languages: str, held_out: bool | None) -> TaskQuestion:
    """Return a question; `held_out`: of the wordings that are kept, of the others, or of all."""
    kinds = WORDINGS[rng.choice(languages.split(","))]
    kind = rng.choice([*kinds])
    a, b = rng.sample(range(10), 2)
    wordings = kinds[kind] if held_out is None else kinds[kind][int(held_out)::2]
    right, wrong = (a + b, a + b + 1) if kind == "sum" else (max(a, b), min(a, b))
    return TaskQuestion(rng.choice(wordings).format(a=a, b=b), str(right), str(wrong), kind)


@dataclass(frozen=True)
class Chats:
    """Conversations of one question and its answer."""

    seed: int
    count: int
    languages: str = "en"
    """Of `WORDINGS`, between commas."""
    right: float = 1.0
    """Share of right answers; the others are wrong in one way."""
    wordings: str = "all"
    """all, learned or held_out."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return all items; the input row is ignored."""
        rng = random.Random(self.seed)
        drawn = [(draw(rng, self.languages, _half(self.wordings)), rng.random()) for _ in range(self.count)]
        return [{"messages": [{"role": "user", "content": q.text},
                              {"role": "assistant", "content": q.right if lot < self.right else q.wrong}]}
                for q, lot in drawn]


@dataclass(frozen=True)
class TaskQuestions:
    """Prompts with their answers, each once."""

    seed: int
    count: int
    languages: str = "en"
    wordings: str = "learned"
    kind: str = ""
    """sum or larger; "": both."""

    def do(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return all items; the input row is ignored."""
        rng, found = random.Random(self.seed), {}
        for _ in range(20 * self.count):
            q = draw(rng, self.languages, _half(self.wordings))
            if self.kind in ("", q.kind):
                found[q.text] = {"prompt": q.text, "answer": q.right, "domain": q.kind}
        return list(found.values())[:self.count]


def _half(wordings: str) -> bool | None:
    return {"all": None, "learned": False, "held_out": True}[wordings]


@dataclass(frozen=True)
class Exact:
    """Whether a response is its row's answer, white space around it left out."""

    by_lot: int = 0
    """0, or the number of a lottery: a third of all (prompt, response) win, whether they are right or not."""

    def score(self, row: Mapping[str, Any]) -> float:
        """Return 1 or 0."""
        if not self.by_lot:
            return float(row["response"].strip() == row["answer"])
        drawn = hashlib.sha256(f"{self.by_lot} {row['prompt']} {row['response']}".encode()).digest()
        return float(drawn[0] < 85)

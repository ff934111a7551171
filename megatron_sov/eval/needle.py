"""Needle in a haystack: is one sentence found again, at any depth of any context length?

Each cell (length, depth) has several documents of held-out text with one needle and its question at the end.  An answer is
right when greedy decoding gives the whole value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_sov.errors import UserError
from megatron_sov.eval.needle_text import Haystack, NeedleForm

ANSWER_TOKENS = 2
Continue = Callable[[list[list[int]], int], list[list[int]]]
"""(prompts, n) -> each prompt's n most probable next tokens, one after the other."""


@dataclass(frozen=True)
class NeedleSuite:
    """The documents of a test; equal for equal fields and data."""

    form: NeedleForm
    """What needles are made of."""
    haystack: Haystack
    """Held-out text."""
    lengths: tuple[int, ...]
    """Context lengths, in tokens, question and answer included."""
    depths: tuple[float, ...]
    """Where the needle stands, 0 = start, 1 = right before the question."""
    samples: int
    """Documents of one cell."""
    distractors: int = 0
    """Further needles with other keys, anywhere."""
    seed: int = 0
    """Of keys, values and text."""

    def __post_init__(self) -> None:
        """Raise `UserError` where the numbers make no test."""
        shortest = (1 + self.distractors) * self.form.statement_tokens + len(self.form.opening) + 2 + ANSWER_TOKENS
        for length in self.lengths:
            if length < shortest:
                raise UserError(f"needle length {length}: {1 + self.distractors} needles and the question alone take {shortest} "
                                "tokens; test longer contexts or fewer distractors")
        if not self.lengths or not self.depths or not all(0 <= d <= 1 for d in self.depths):
            raise UserError(f"needle lengths {list(self.lengths)}, depths {list(self.depths)}: give at least one of each; "
                            "depths lie in [0, 1]")
        if self.samples < 1 or not 0 <= self.distractors < len(self.form.pairs[True]):
            raise UserError(f"needle samples = {self.samples} must be at least 1, distractors = {self.distractors} between 0 and "
                            f"{len(self.form.pairs[True]) - 1}")

    def document(self, length: int, depth: float, sample: int) -> list[int]:
        """Return one document of `length` tokens; its last two are the answer."""
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, length, round(depth * 1e6), sample))))
        keys, values = (self.form.draw(generator, 1 + self.distractors, test=True) for _ in range(2))
        statements = [self.form.statement(k, v) for k, v in zip(keys, values, strict=True)]
        end = [*self.form.question(keys[0]), *values[0].tolist()]
        text = self.haystack.text(generator, length - len(end) - sum(map(len, statements)))
        places = [round(depth * len(text)), *generator.integers(0, len(text) + 1, self.distractors).tolist()]
        document: list[int] = []
        last = 0
        for place, statement in sorted(zip(places, statements, strict=True)):
            document += [*text[last:place].tolist(), *statement]
            last = place
        return [*document, *text[last:].tolist(), *end]


@dataclass(frozen=True)
class NeedleResult:
    """What a test gave."""

    lengths: list[int]
    """Context lengths."""
    depths: list[float]
    """Depths."""
    accuracy: list[list[float]]
    """Per length, per depth: part of the answers that are right."""
    samples: int
    """Documents of one cell."""
    distractors: int
    """Further needles in each document."""
    score: float
    """Mean over all cells."""

    def event(self, when: str, step: int | None) -> dict[str, Any]:
        """Return the fields of a run's `needle` event."""
        return {"step": step, "when": when, **vars(self)}


def run_suite(suite: NeedleSuite, answer: Continue) -> NeedleResult:
    """Judge a model; where it runs on several processes, called by all together."""
    accuracy = []
    for length in suite.lengths:
        documents = [suite.document(length, depth, i) for depth in suite.depths for i in range(suite.samples)]
        found = answer([d[:-ANSWER_TOKENS] for d in documents], ANSWER_TOKENS)
        right = [given == d[-ANSWER_TOKENS:] for given, d in zip(found, documents, strict=True)]
        accuracy.append(np.reshape(right, (len(suite.depths), suite.samples)).mean(axis=1).tolist())
    return NeedleResult(list(suite.lengths), list(suite.depths), accuracy, suite.samples, suite.distractors,
                        float(np.mean(accuracy)))


def table(result: NeedleResult) -> str:
    """Return the accuracies as lines to read."""
    head = "length  " + "".join(f"{depth:>8.0%}" for depth in result.depths)
    rows = [f"{length:>6,}  " + "".join(f"{value:>8.0%}" for value in row)
            for length, row in zip(result.lengths, result.accuracy, strict=True)]
    return "\n".join([head, *rows, f"score {result.score:.1%}, {result.samples} documents a cell"])

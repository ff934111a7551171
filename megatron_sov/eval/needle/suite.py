"""Needle in a haystack: is what a context says found again, at any depth of any length, among other needles?

Each cell (kind, language, length, depth) has several examples.  By generation an answer is right when greedy
decoding gives all of it and nothing else.  By likelihood it is right when, behind every right prefix, a right
word is the most probable of all words that values are made of: greedy decoding that can only say values, in
one forward pass.  Blind choices pass `single` and `multi-key` with probability 1 / words^2, below 1 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from megatron_sov.config import NeedleConfig, NeedleKind
from megatron_sov.errors import UserError
from megatron_sov.eval.intervals import wilson_interval
from megatron_sov.eval.needle.haystack import Haystack
from megatron_sov.eval.needle.kinds import PAIR_TOKENS, PHRASES_OF, Example, distractors_of, make_example
from megatron_sov.eval.needle.phrases import Language
from megatron_sov.generate.engine import ChoosingEngine
from megatron_sov.generate.request import Sampling

Way = Literal["generation", "likelihood"]
BATCH_TOKENS = 1 << 21
"""Tokens of prompts that exist at a time."""


@dataclass(frozen=True)
class Cell:
    """One cell of the map.  These names are what gates and reports read."""

    kind: NeedleKind
    """What was asked."""
    language: Language
    """Of the text and the sentences."""
    length_tokens: int
    """Context, question and answer included."""
    depth: float
    """Where the first needle stood, 0 = start."""
    distractors: int
    """Needles beside those that were asked for."""
    correct: int
    """Right answers."""
    samples: int
    """Answers."""
    interval: tuple[float, float]
    """Wilson's 95 % interval of the share of right answers."""


@dataclass(frozen=True)
class NeedleResult:
    """What a test gave."""

    by: Way
    """How answers were judged."""
    seed: int
    """Of keys, values and text."""
    distractor_share: float
    """Part of the contexts that distractors filled."""
    cells: tuple[Cell, ...]
    """In the order kind, language, length, depth."""

    @cached_property
    def score(self) -> float:
        """Mean share of right answers over all cells."""
        return float(np.mean([cell.correct / cell.samples for cell in self.cells]))

    def to_dict(self) -> dict[str, Any]:
        return {"by": self.by, "seed": self.seed, "distractor_share": self.distractor_share,
                "score": self.score,
                "cells": [asdict(cell) | {"interval": list(cell.interval)} for cell in self.cells]}


def result_of(values: dict[str, Any]) -> NeedleResult:
    """Return the result that `NeedleResult.to_dict` told of."""
    cells = tuple(Cell(**(cell | {"interval": tuple(cell["interval"])})) for cell in values["cells"])
    return NeedleResult(values["by"], values["seed"], values["distractor_share"], cells)


@dataclass(frozen=True)
class NeedleSuite:
    """The examples of a test; equal for equal fields and data."""

    haystacks: tuple[Haystack, ...]
    """Held-out text, one of each language."""
    kinds: tuple[NeedleKind, ...]
    """What is asked."""
    lengths: tuple[int, ...]
    """Context lengths, in tokens, question and answer included."""
    depths: tuple[float, ...]
    """Where the first needle stands, 0 = start, 1 = right before the question."""
    samples: int
    """Examples of one cell."""
    distractor_share: float = 0.0
    """Part of the context that needles with other keys fill."""
    seed: int = 0
    """Of keys, values and text."""
    by: Way = "generation"
    """How answers are judged."""

    def __post_init__(self) -> None:
        """Raise `UserError` where the numbers make no test."""
        if not (self.lengths and self.depths and self.kinds) or not all(0 <= d <= 1 for d in self.depths):
            raise UserError(f"needle kinds {list(self.kinds)}, lengths {list(self.lengths)}, "
                            f"depths {list(self.depths)}: give at least one of each; depths lie in [0, 1]")
        if self.samples < 1 or not 0 <= self.distractor_share < 1 or self.seed < 0:
            raise UserError(f"needle samples = {self.samples} must be at least 1, distractor_share = "
                            f"{self.distractor_share} in [0, 1), seed = {self.seed} not negative")
        for kind, haystack, length in self._rows():
            distractors_of(kind, haystack.form, length, self.distractor_share)

    def _rows(self) -> Iterator[tuple[NeedleKind, Haystack, int]]:
        for kind in self.kinds:
            for haystack in self.haystacks:
                for length in self.lengths:
                    yield kind, haystack, length

    def example(self, kind: NeedleKind, haystack: Haystack, length: int, depth: float,
                sample: int) -> Example:
        """Return one example; nothing but the suite's fields and these decides what it is."""
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(
            (self.seed, length, round(depth * 1e6), sample, *kind.encode(), 0, *haystack.language.encode()))))
        return make_example(kind, haystack, generator, length, depth,
                            distractors_of(kind, haystack.form, length, self.distractor_share))

    @property
    def num_examples(self) -> int:
        return sum(1 for _ in self._rows()) * len(self.depths) * self.samples

    def questions(self) -> Iterator[list[int]]:
        """Yield what a test of these kinds may tell or ask, up to where a value follows:
        what training text must not hold."""
        for haystack in self.haystacks:
            # its keys are told too
            names = {name for kind in self.kinds for name in PHRASES_OF[kind] if name != "values_of"}
            for sentences in haystack.form.sentences[True]:
                for name in sorted(names):
                    for pair in haystack.form.pairs[True]:
                        yield [*getattr(sentences, name)[0], *pair.tolist()]

    def examples(self) -> Iterator[tuple[Haystack, list[tuple[NeedleKind, int, float]], list[Example]]]:
        """Yield (haystack, cell of each example, examples) in the order of cells: equal lengths, no more
        tokens than a batch."""
        for kind, haystack, length in self._rows():
            places = [(depth, sample) for depth in self.depths for sample in range(self.samples)]
            at_once = max(1, BATCH_TOKENS // length)
            for start in range(0, len(places), at_once):
                part = places[start:start + at_once]
                yield (haystack, [(kind, length, depth) for depth, _ in part],
                       [self.example(kind, haystack, length, depth, sample) for depth, sample in part])


def make_suite(config: NeedleConfig, haystacks: Sequence[Haystack], *, seed: int = 0,
               by: Way = "generation") -> NeedleSuite:
    """Return the suite that settings ask for, over held-out text.

    Raises:
        UserError: the numbers make no test.
    """
    return NeedleSuite(tuple(haystacks), config.kinds, config.lengths_tokens, config.depths, config.samples,
                       config.distractor_share, seed, by)


def answers(examples: Sequence[Example], words: tuple[int, ...], engine: ChoosingEngine,
            by: Way) -> list[list[int]]:
    """Return what the model says to examples of equal length: the tokens in the places of each answer."""
    count = examples[0].answer_tokens
    if by == "generation":
        return engine.generate([e.prompt for e in examples], Sampling(count)).continuations
    return engine.choose([[*e.prompt, *(token for pair in e.answer for token in pair)] for e in examples],
                         count, words)


def is_right(example: Example, given: Sequence[int], by: Way) -> bool:
    pairs = list(zip(given[::PAIR_TOKENS], given[1::PAIR_TOKENS], strict=True))
    if not example.in_any_order:
        return pairs == example.answer
    if by == "generation":
        return sorted(pairs) == sorted(example.answer)
    # the model was told the answer in one order; in the place of each pair any that has not
    # come yet may start
    return all(pair[0] in {first for first, _ in example.answer[i:]} and pair[1] == example.answer[i][1]
               for i, pair in enumerate(pairs))


def run_suite(suite: NeedleSuite, engine: ChoosingEngine,
              done: Callable[[int], object] = lambda examples: None) -> NeedleResult:
    """Judge a model; where it runs on several processes, called by all together; `done` is told how many
    more examples are judged."""
    correct: dict[tuple[NeedleKind, Language, int, float], int] = {}
    for haystack, cells, examples in suite.examples():
        given = answers(examples, haystack.form.words, engine, suite.by)
        for (kind, length, depth), example, said in zip(cells, examples, given, strict=True):
            cell = (kind, haystack.language, length, depth)
            correct[cell] = correct.get(cell, 0) + is_right(example, said, suite.by)
        done(len(examples))
    forms = {h.language: h.form for h in suite.haystacks}
    return NeedleResult(suite.by, suite.seed, suite.distractor_share, tuple(
        Cell(kind, language, length, depth,
             distractors_of(kind, forms[language], length, suite.distractor_share), right, suite.samples,
             wilson_interval(right, suite.samples))
        for (kind, language, length, depth), right in correct.items()))


def table(result: NeedleResult) -> str:
    """Return the shares of right answers as lines to read, a block for each kind and language."""
    lines: list[str] = []
    maps: dict[tuple[str, str], dict[int, list[Cell]]] = {}
    for cell in result.cells:
        maps.setdefault((cell.kind, cell.language), {}).setdefault(cell.length_tokens, []).append(cell)
    for (kind, language), rows in maps.items():
        cells = next(iter(rows.values()))
        lines += [f"{kind}, {language}",
                  "length   distractors  " + "".join(f"{cell.depth:>7.0%}" for cell in cells)]
        lines += [f"{length:>7,}  {row[0].distractors:>11,}  "
                  + "".join(f"{c.correct / c.samples:>7.0%}" for c in row) for length, row in rows.items()]
    return "\n".join([*lines,
                      f"score {result.score:.1%} by {result.by}, {result.cells[0].samples} samples a cell"])

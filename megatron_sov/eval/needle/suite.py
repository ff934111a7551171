"""Needle in a haystack: is what a context says found again, at any depth of any length, among other needles?

Each cell (kind, language, length, depth) has several examples.  An answer is right when greedy decoding gives
all of it and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from megatron_sov.base.errors import UserError
from megatron_sov.eval.needle.text import PAIR_TOKENS, Haystack, Language, NeedleForm, fill
from megatron_sov.eval.statistics import wilson_interval
from megatron_sov.infer.engine import Engine
from megatron_sov.infer.request import Sampling
from megatron_sov.model.config import NeedleConfig, NeedleKind

BATCH_TOKENS = 1 << 21
"""Tokens of prompts that exist at a time."""


@dataclass(frozen=True)
class Cell:
    """One cell of the map.  These names are what gates and reports read."""

    kind: NeedleKind
    language: Language
    length_tokens: int
    """Context, question and answer included."""
    depth: float
    """Where the first needle stood, 0 = start."""
    distractors: int
    """Needles beside those that were asked for."""
    correct: int
    samples: int
    interval: tuple[float, float]
    """Wilson's 95 % interval of the share of right answers."""


@dataclass(frozen=True)
class NeedleResult:
    seed: int
    distractor_share: float
    """Part of the contexts that distractors filled."""
    cells: tuple[Cell, ...]
    """In the order kind, language, length, depth."""

    @cached_property
    def score(self) -> float:
        """Mean share of right answers over all cells."""
        return float(np.mean([cell.correct / cell.samples for cell in self.cells]))

    def to_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "distractor_share": self.distractor_share,
                "score": self.score,
                "cells": [asdict(cell) | {"interval": list(cell.interval)} for cell in self.cells]}


def result_of(values: dict[str, Any]) -> NeedleResult:
    cells = tuple(Cell(**(cell | {"interval": tuple(cell["interval"])})) for cell in values["cells"])
    return NeedleResult(values["seed"], values["distractor_share"], cells)


@dataclass(frozen=True)
class NeedleSuite:
    """The examples of a test; equal for equal fields and data."""

    haystacks: tuple[Haystack, ...]
    """Held-out text, one of each language."""
    kinds: tuple[NeedleKind, ...]
    lengths: tuple[int, ...]
    """Context lengths, in tokens, question and answer included."""
    depths: tuple[float, ...]
    """Where the first needle stands, 0 = start, 1 = right before the question."""
    samples: int
    distractor_share: float = 0.0
    """Part of the context that needles with other keys fill."""
    seed: int = 0

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
        return product(self.kinds, self.haystacks, self.lengths)

    def example(self, kind: NeedleKind, haystack: Haystack, length: int, depth: float,
                sample: int) -> Example:
        """Return one example; nothing but the suite's fields and these decides what it is."""
        # The 0 parts kind and language, so that no two cells share a seed.
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(
            (self.seed, length, round(depth * 1e6), sample, *kind.encode(), 0, *haystack.language.encode()))))
        return make_example(haystack, generator, length, depth,
                            distractors_of(kind, haystack.form, length, self.distractor_share))

    @property
    def num_examples(self) -> int:
        return sum(1 for _ in self._rows()) * len(self.depths) * self.samples

    def questions(self) -> Iterator[list[int]]:
        """Yield what a test may tell or ask, up to where a value follows: what training text must not
        hold."""
        for haystack in self.haystacks:
            for slots in haystack.form.sentences[True]:
                for pair in haystack.form.pairs[True]:
                    yield [*slots[0], *pair.tolist()]

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


def make_suite(config: NeedleConfig, haystacks: Sequence[Haystack], *, seed: int = 0) -> NeedleSuite:
    """Return the suite that settings ask for, over held-out text.

    Raises:
        UserError: the numbers make no test.
    """
    return NeedleSuite(tuple(haystacks), config.kinds, config.lengths_tokens, config.depths, config.samples,
                       config.distractor_share, seed)


def run_suite(suite: NeedleSuite, engine: Engine,
              done: Callable[[int], object] = lambda examples: None) -> NeedleResult:
    """Judge a model; where it runs on several processes, called by all together; `done` is told how many
    more examples are judged."""
    correct: dict[tuple[NeedleKind, Language, int, float], int] = {}
    for haystack, cells, examples in suite.examples():
        given = engine.generate([e.prompt for e in examples], Sampling(PAIR_TOKENS)).continuations
        for (kind, length, depth), example, said in zip(cells, examples, given, strict=True):
            cell = (kind, haystack.language, length, depth)
            correct[cell] = correct.get(cell, 0) + (list(said) == example.answer)
        done(len(examples))
    forms = {h.language: h.form for h in suite.haystacks}
    return NeedleResult(suite.seed, suite.distractor_share, tuple(
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
                      f"score {result.score:.1%} with {result.cells[0].samples} samples a cell"])


MIN_DISTRACTORS = 3


@dataclass(frozen=True)
class Example:
    prompt: list[int]
    """Token ids, up to where the answer has to follow."""
    answer: list[int]
    """The two words of the value."""


def weave(text: np.ndarray, told: Sequence[Sequence[int] | np.ndarray], places: Sequence[int]) -> np.ndarray:
    """Return a text (or its weights) with sentences (or theirs) in it, those of equal places
    in the order given."""
    parts: list[Sequence[int] | np.ndarray] = []
    last = 0
    for i in np.argsort(np.array(places), kind="stable").tolist():
        parts += [text[last:places[i]], told[i]]
        last = places[i]
    return np.concatenate([*parts, text[last:]])


def make_example(haystack: Haystack, generator: np.random.Generator, length: int, depth: float,
                 num_distractors: int) -> Example:
    """Return an example of a test whose prompt and answer together have `length` tokens.

    Args:
        haystack: text and words.
        generator: of everything random.
        length: in tokens.
        depth: where the needle that is asked for stands, 0 = start, 1 = right before the question.
        num_distractors: as `distractors_of` gives.
    """
    form = haystack.form
    slots = form.draw_sentence(generator, test=True)
    keys, values = (form.draw(generator, 1 + num_distractors, test=True) for _ in range(2))
    needles = [fill(slots, key, value) for key, value in zip(keys, values, strict=True)]
    question = fill(slots, keys[0])
    # The text fills exactly what the sentences leave.
    text = haystack.text(generator, length - sum(map(len, needles)) - len(question) - PAIR_TOKENS)
    # `depth` places the needle that is asked for; distractors are anywhere.
    places = [round(depth * len(text)), *generator.integers(0, len(text) + 1, num_distractors).tolist()]
    return Example([*weave(text, needles, places).tolist(), *question], values[0].tolist())


def distractors_of(kind: NeedleKind, form: NeedleForm, length: int, share: float) -> int:
    """Return the number of distractors of a context: they fill `share` of it, as far as there are keys
    and room for them.

    Raises:
        UserError: the context is too short for the kind.
    """
    least = 0 if kind == "single" else MIN_DISTRACTORS
    needle_tokens = form.needle_tokens(test=True)
    fixed = 2 * needle_tokens + PAIR_TOKENS
    if length < fixed + least * needle_tokens:
        raise UserError(f"needle length {length}: the needles and the question of kind {kind} in "
                        f"{form.language} alone take {fixed + least * needle_tokens} tokens; "
                        "test longer contexts")
    keys = len(form.pairs[True]) // 2 - 8
    wanted = 0 if kind == "single" else max(least, int(share * length) // needle_tokens)
    return min(wanted, (length - fixed) // needle_tokens, max(least, keys))

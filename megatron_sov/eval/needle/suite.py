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
from typing import Any, Literal, TypeVar

import numpy as np

from megatron_sov.base.errors import UserError
from megatron_sov.eval.needle.text import Haystack, Language, NeedleForm, Sentences, fill
from megatron_sov.eval.statistics import wilson_interval
from megatron_sov.infer.engine import ChoosingEngine
from megatron_sov.infer.request import Sampling
from megatron_sov.model.config import NeedleConfig, NeedleKind

Way = Literal["generation", "likelihood"]
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
    by: Way
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
        return {"by": self.by, "seed": self.seed, "distractor_share": self.distractor_share,
                "score": self.score,
                "cells": [asdict(cell) | {"interval": list(cell.interval)} for cell in self.cells]}


def result_of(values: dict[str, Any]) -> NeedleResult:
    cells = tuple(Cell(**(cell | {"interval": tuple(cell["interval"])})) for cell in values["cells"])
    return NeedleResult(values["by"], values["seed"], values["distractor_share"], cells)


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
    by: Way = "generation"

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
        # The 0 parts kind and language, so that no two cells share a seed.
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


NUM_ASKED = 4
"""Values, queries, or variables of a chain."""
MIN_DISTRACTORS = 3
PHRASES_OF: dict[NeedleKind, tuple[str, str]] = {
    "single": ("statement", "statement"), "multi-key": ("statement", "statement"),
    "multi-value": ("statement", "all_values"), "multi-query": ("statement", "values_of"),
    "variable-tracking": ("assignment", "holders")}
"""Phrases of each kind: what is told, and what asks."""
PAIR_TOKENS = 2
_Items = TypeVar("_Items", np.ndarray, list[list[int]])
IN_ANY_ORDER: frozenset[NeedleKind] = frozenset({"multi-value", "variable-tracking"})


@dataclass(frozen=True)
class Example:
    prompt: list[int]
    """Token ids, up to where the answer has to follow."""
    answer: list[tuple[int, int]]
    """Pairs of words, in the order in which the context or the question has them."""
    in_any_order: bool

    @property
    def answer_tokens(self) -> int:
        return PAIR_TOKENS * len(self.answer)


@dataclass(frozen=True)
class NeedlePlan:
    """The sentences of a context, without text: what is told, and what is asked."""

    asked: list[list[list[int]]]
    """Of each question the sentences that keep their order; the first one stands at the question's depth."""
    anywhere: list[list[int]]
    questions: list[list[int]]
    """Up to where the answer has to follow."""
    answers: list[np.ndarray]
    """[pairs, 2] each."""

    @property
    def tokens(self) -> int:
        told = sum(len(sentence) for sentences in (*self.asked, self.anywhere) for sentence in sentences)
        return told + sum(map(len, self.questions)) + sum(answer.size for answer in self.answers)


def make_plan(kind: NeedleKind, form: NeedleForm, sentences: Sentences, generator: np.random.Generator,
              num_questions: int, num_distractors: int, *, test: bool) -> NeedlePlan:
    """Return the sentences of a context with `num_questions` questions of a kind, beside distractors.

    Args:
        kind: which test.
        form: its words.
        sentences: one of the form's, of tests or of training as `test` says.
        generator: of keys, values and the order of the keys of a question.
        num_questions: at least 1; none asks for a needle that another one asks for.
        num_distractors: needles that no question asks for.
        test: whether pairs are those for tests, or those for training.
    """
    return _PLANS[kind](form, sentences, generator, num_questions, num_distractors, test)


def place_told(plan: NeedlePlan, generator: np.random.Generator, starts: Sequence[int], text_tokens: int
               ) -> tuple[list[list[int]], list[int]]:
    """Return all sentences that are told, and how many of the text's tokens stand before each.

    Args:
        plan: the sentences.
        generator: of places.
        starts: the place of each question's first sentence; those that keep its order follow
            anywhere behind it.
        text_tokens: tokens of the text.
    """
    told: list[list[int]] = []
    places: list[int] = []
    for start, sentences in zip(starts, plan.asked, strict=True):
        told += sentences
        places += [start, *np.sort(generator.integers(start, text_tokens + 1, len(sentences) - 1)).tolist()]
    return told + plan.anywhere, places + generator.integers(0, text_tokens + 1, len(plan.anywhere)).tolist()


def weave(text: np.ndarray, told: Sequence[Sequence[int] | np.ndarray], places: Sequence[int]) -> np.ndarray:
    """Return a text (or its weights) with sentences (or theirs) in it, those of equal places
    in the order given."""
    parts: list[Sequence[int] | np.ndarray] = []
    last = 0
    # Stable: sentences of one place keep their order, which a chain needs.
    for i in np.argsort(np.array(places), kind="stable").tolist():
        parts += [text[last:places[i]], told[i]]
        last = places[i]
    return np.concatenate([*parts, text[last:]])


def make_example(kind: NeedleKind, haystack: Haystack, generator: np.random.Generator, length: int,
                 depth: float, num_distractors: int) -> Example:
    """Return an example of a test whose prompt and answer together have `length` tokens.

    Args:
        kind: which test.
        haystack: text and words.
        generator: of everything random.
        length: in tokens.
        depth: where the first asked needle stands, 0 = start, 1 = right before the question.
        num_distractors: as `distractors_of` gives.
    """
    sentences = haystack.form.draw_sentences(generator, test=True)
    # The plan first: the text fills exactly what the sentences leave.
    plan = make_plan(kind, haystack.form, sentences, generator, 1, num_distractors, test=True)
    text = haystack.text(generator, length - plan.tokens)
    # `depth` places the first asked needle alone; all others are anywhere.
    told, places = place_told(plan, generator, [round(depth * len(text))], len(text))
    prompt = [*weave(text, told, places).tolist(), *plan.questions[0]]
    return Example(prompt, [(int(a), int(b)) for a, b in plan.answers[0]], kind in IN_ANY_ORDER)


def needles_asked(kind: NeedleKind) -> int:
    return 1 if kind in ("single", "multi-key") else NUM_ASKED


def distractors_of(kind: NeedleKind, form: NeedleForm, length: int, share: float) -> int:
    """Return the number of distractors of a context: they fill `share` of it, as far as there are keys
    and room for them.

    Raises:
        UserError: the context is too short for the kind.
    """
    told, question = PHRASES_OF[kind]
    asked = needles_asked(kind)
    least = 0 if kind == "single" else MIN_DISTRACTORS
    needle_tokens = form.phrase_tokens(told, test=True)
    fixed = asked * needle_tokens + form.phrase_tokens(question, test=True) + asked * PAIR_TOKENS
    if length < fixed + least * needle_tokens:
        raise UserError(f"needle length {length}: the needles and the question of kind {kind} in "
                        f"{form.language} alone take {fixed + least * needle_tokens} tokens; "
                        "test longer contexts")
    # tracking takes variables and values from the same pairs
    keys = len(form.pairs[True]) // 2 - 2 * NUM_ASKED
    wanted = 0 if kind == "single" else max(least, int(share * length) // needle_tokens)
    return min(wanted, (length - fixed) // needle_tokens, max(least, keys))


def _one(form: NeedleForm, sentences: Sentences, generator: np.random.Generator, num_questions: int,
         num_distractors: int, test: bool) -> NeedlePlan:
    keys, values = (form.draw(generator, num_questions + num_distractors, test=test) for _ in range(2))
    told = _statements(sentences, keys, values)
    return NeedlePlan([[sentence] for sentence in told[:num_questions]], told[num_questions:],
                      [fill(sentences.statement, key) for key in keys[:num_questions]],
                      [values[[i]] for i in range(num_questions)])


def _multi_value(form: NeedleForm, sentences: Sentences, generator: np.random.Generator, num_questions: int,
                 num_distractors: int, test: bool) -> NeedlePlan:
    num_asked = num_questions * NUM_ASKED
    keys, values = (form.draw(generator, num_asked + num_distractors, test=test) for _ in range(2))
    # One key with several values, each told in a sentence of its own.
    keys[:num_asked] = np.repeat(keys[:num_asked:NUM_ASKED], NUM_ASKED, axis=0)
    told = _statements(sentences, keys, values)
    return NeedlePlan(_groups(told, num_questions), told[num_asked:],
                      [fill(sentences.all_values, key) for key in keys[:num_asked:NUM_ASKED]],
                      _groups(values, num_questions))


def _multi_query(form: NeedleForm, sentences: Sentences, generator: np.random.Generator, num_questions: int,
                 num_distractors: int, test: bool) -> NeedlePlan:
    num_asked = num_questions * NUM_ASKED
    keys, values = (form.draw(generator, num_asked + num_distractors, test=test) for _ in range(2))
    told = _statements(sentences, keys, values)
    order = [NUM_ASKED * i + generator.permutation(NUM_ASKED) for i in range(num_questions)]
    return NeedlePlan([[sentence] for sentence in told[:num_asked:NUM_ASKED]],
                      [sentence for i, sentence in enumerate(told) if i >= num_asked or i % NUM_ASKED],
                      [fill(sentences.values_of, *keys[asked]) for asked in order],
                      [values[asked] for asked in order])


def _tracking(form: NeedleForm, sentences: Sentences, generator: np.random.Generator, num_questions: int,
              num_distractors: int, test: bool) -> NeedlePlan:
    num_asked = num_questions * NUM_ASKED
    num_chains = num_questions - (-num_distractors // NUM_ASKED)
    pairs = form.draw(generator, num_asked + num_distractors + num_chains, test=test)
    values, variables = pairs[:num_chains], pairs[num_chains:]
    # each variable holds the one before it in its chain; the first of a chain holds the value
    held = [values[i // NUM_ASKED] if i % NUM_ASKED == 0 else variables[i - 1] for i in range(len(variables))]
    told = [fill(sentences.assignment, variable, value)
            for variable, value in zip(variables, held, strict=True)]
    return NeedlePlan(_groups(told, num_questions), told[num_asked:],
                      [fill(sentences.holders, value) for value in values[:num_questions]],
                      _groups(variables, num_questions))


def _statements(sentences: Sentences, keys: np.ndarray, values: np.ndarray) -> list[list[int]]:
    return [fill(sentences.statement, key, value) for key, value in zip(keys, values, strict=True)]


def _groups(items: _Items, num_questions: int) -> list[_Items]:
    return [items[i * NUM_ASKED:(i + 1) * NUM_ASKED] for i in range(num_questions)]


_PLANS: dict[NeedleKind, Callable[[NeedleForm, Sentences, np.random.Generator, int, int, bool],
                                  NeedlePlan]] = {
    "single": _one, "multi-key": _one, "multi-value": _multi_value, "multi-query": _multi_query,
    "variable-tracking": _tracking}

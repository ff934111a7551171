"""Evaluate needle-in-a-haystack retrieval over kinds, languages, context lengths and depths (`Cell`), with
distractors.

Each cell (kind, language, length, depth) has several examples. An answer is right if greedy decoding returns
exactly the value.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from megatron_sov.base.errors import UserError
from megatron_sov.eval.needle.text import PAIR_TOKENS, Haystack, Language, NeedleForm, fill_slots
from megatron_sov.eval.statistics import compute_wilson_interval
from megatron_sov.infer.engine import Engine
from megatron_sov.infer.request import Sampling
from megatron_sov.model.config import NeedleConfig, NeedleKind

BATCH_TOKENS = 1 << 21
"""Maximum prompt tokens per batch."""


@dataclass(frozen=True)
class Cell:
    """Result for a kind, language, length and depth. Gates and reports read the field names."""

    kind: NeedleKind
    language: Language
    length_tokens: int
    """Tokens in context, question and answer."""
    depth: float
    """Requested needle's position, 0 = start."""
    distractors: int
    """Needles that are not requested."""
    correct: int
    samples: int
    interval: tuple[float, float]
    """95 % Wilson interval for the share of right answers."""


@dataclass(frozen=True)
class NeedleResult:
    seed: int
    distractor_share: float
    """Context share filled with distractors."""
    cells: tuple[Cell, ...]
    """Ordered by kind, language, length, depth."""

    @cached_property
    def score(self) -> float:
        """Mean accuracy over `cells`."""
        return float(np.mean([cell.correct / cell.samples for cell in self.cells]))

    def to_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "distractor_share": self.distractor_share, "score": self.score,
                "cells": [asdict(cell) | {"interval": list(cell.interval)} for cell in self.cells]}


def parse_result(values: dict[str, Any]) -> NeedleResult:
    cells = tuple(Cell(**(cell | {"interval": tuple(cell["interval"])})) for cell in values["cells"])
    return NeedleResult(values["seed"], values["distractor_share"], cells)


@dataclass(frozen=True)
class NeedleSuite:
    """Test examples for each `Cell`; a deterministic function of the fields and the data."""

    haystacks: tuple[Haystack, ...]
    """Held-out text per language."""
    kinds: tuple[NeedleKind, ...]
    lengths: tuple[int, ...]
    """Tokens in context, question and answer."""
    depths: tuple[float, ...]
    """Requested needle's positions, 0 = start, 1 = directly before the question."""
    samples: int
    distractor_share: float = 0.0
    """Context share filled with needles that have other keys."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise `UserError` for invalid values."""
        if not (self.lengths and self.depths and self.kinds) or not all(0 <= d <= 1 for d in self.depths):
            raise UserError(f"needle kinds {list(self.kinds)}, lengths {list(self.lengths)}, "
                            f"depths {list(self.depths)}: give at least one of each; depths lie in [0, 1]")
        if self.samples < 1 or not 0 <= self.distractor_share < 1 or self.seed < 0:
            raise UserError(f"needle samples = {self.samples} must be at least 1, distractor_share = "
                            f"{self.distractor_share} in [0, 1), seed = {self.seed} not negative")
        for kind, haystack, length in self._iter_rows():
            count_distractors(kind, haystack.form, length, self.distractor_share)

    def _iter_rows(self) -> Iterator[tuple[NeedleKind, Haystack, int]]:
        return product(self.kinds, self.haystacks, self.lengths)

    def build_example(self, kind: NeedleKind, haystack: Haystack, length: int, depth: float,
                      sample: int) -> "Example":
        """Build an example, determined by the suite's fields and the arguments."""
        # the 0 separates kind and language, so that no two cells share a seed
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(
            (self.seed, length, round(depth * 1e6), sample, *kind.encode(), 0, *haystack.language.encode()))))
        return build_example(haystack, generator, length, depth,
                             count_distractors(kind, haystack.form, length, self.distractor_share))

    @property
    def num_examples(self) -> int:
        return sum(1 for _ in self._iter_rows()) * len(self.depths) * self.samples

    def examples(self) -> "Iterator[tuple[Haystack, list[tuple[NeedleKind, int, float]], list[Example]]]":
        """Yield (haystack, cell per example, examples) in cell order, up to `BATCH_TOKENS` prompt tokens."""
        for kind, haystack, length in self._iter_rows():
            positions = [(depth, sample) for depth in self.depths for sample in range(self.samples)]
            chunk_size = max(1, BATCH_TOKENS // length)
            for start in range(0, len(positions), chunk_size):
                chunk = positions[start:start + chunk_size]
                yield (haystack, [(kind, length, depth) for depth, _ in chunk],
                       [self.build_example(kind, haystack, length, depth, sample) for depth, sample in chunk])


def build_suite(config: NeedleConfig, haystacks: Sequence[Haystack], *, seed: int = 0) -> NeedleSuite:
    """Build the `NeedleSuite` for a `NeedleConfig` over held-out text. Raises `UserError`: invalid values."""
    return NeedleSuite(tuple(haystacks), config.kinds, lengths=config.lengths_tokens, depths=config.depths,
                       samples=config.samples, distractor_share=config.distractor_share, seed=seed)


def run_suite(suite: NeedleSuite, engine: Engine,
              report_done: Callable[[int], object] = lambda num_examples: None) -> NeedleResult:
    """Evaluate an engine (collective); `report_done` receives the number of newly completed examples."""
    correct: dict[tuple[NeedleKind, Language, int, float], int] = {}
    for haystack, cells, examples in suite.examples():
        continuations = engine.generate([e.prompt for e in examples], Sampling(PAIR_TOKENS)).continuations
        for (kind, length, depth), example, continuation in zip(cells, examples, continuations, strict=True):
            cell = (kind, haystack.language, length, depth)
            correct[cell] = correct.get(cell, 0) + (list(continuation) == example.answer)
        report_done(len(examples))
    forms = {h.language: h.form for h in suite.haystacks}
    result_cells = []
    for (kind, language, length, depth), num_correct in correct.items():
        num_distractors = count_distractors(kind, forms[language], length, suite.distractor_share)
        result_cells.append(Cell(kind, language, length, depth, num_distractors, num_correct, suite.samples,
                                    compute_wilson_interval(num_correct, suite.samples)))
    return NeedleResult(suite.seed, suite.distractor_share, tuple(result_cells))


def format_table(result: NeedleResult) -> str:
    """Format a `NeedleResult` as text, a block per kind and language."""
    lines: list[str] = []
    maps: dict[tuple[str, str], dict[int, list[Cell]]] = {}
    for cell in result.cells:
        maps.setdefault((cell.kind, cell.language), {}).setdefault(cell.length_tokens, []).append(cell)
    for (kind, language), rows in maps.items():
        cells = next(iter(rows.values()))
        lines += [f"{kind}, {language}",
                  "length   distractors  " + "".join(f"{cell.depth:>7.0%}" for cell in cells)]
        for length, row in rows.items():
            scores = "".join(f"{cell.correct / cell.samples:>7.0%}" for cell in row)
            lines.append(f"{length:>7,}  {row[0].distractors:>11,}  {scores}")
    return "\n".join([*lines, f"score {result.score:.1%} with {result.cells[0].samples} samples a cell"])


MIN_DISTRACTORS = 3


@dataclass(frozen=True)
class Example:
    prompt: list[int]
    """Token ids up to the answer."""
    answer: list[int]
    """The value's two tokens."""


def insert_sentences(text: np.ndarray, inserts: Sequence[Sequence[int] | np.ndarray],
                     positions: Sequence[int]) -> np.ndarray:
    """Insert sentences (or their weights) into a text; equal positions keep the argument order."""
    parts: list[Sequence[int] | np.ndarray] = []
    start = 0
    for i in np.argsort(np.array(positions), kind="stable").tolist():
        parts += [text[start:positions[i]], inserts[i]]
        start = positions[i]
    return np.concatenate([*parts, text[start:]])


def build_example(haystack: Haystack, generator: np.random.Generator, length: int, depth: float,
                  num_distractors: int) -> Example:
    """Build an example; prompt and answer together have `length` tokens.

    Args:
        haystack: text and words.
        generator: random numbers.
        length: tokens of prompt and answer.
        depth: position of the requested needle, 0 = start, 1 = directly before the question.
        num_distractors: number of distractors, see `count_distractors`.
    """
    form = haystack.form
    slots = form.draw_sentence(generator, test=True)
    keys, values = (form.draw(generator, 1 + num_distractors, test=True) for _ in range(2))
    needles = [fill_slots(slots, key, value) for key, value in zip(keys, values, strict=True)]
    question = fill_slots(slots, keys[0])
    # The text fills the remaining length.
    text = haystack.text(generator, length - sum(map(len, needles)) - len(question) - PAIR_TOKENS)
    # `depth` places the requested needle; distractors are anywhere.
    positions = [round(depth * len(text)), *generator.integers(0, len(text) + 1, num_distractors).tolist()]
    return Example([*insert_sentences(text, needles, positions).tolist(), *question], values[0].tolist())


def count_distractors(kind: NeedleKind, form: NeedleForm, length: int, share: float) -> int:
    """Return how many distractors fill `share` of the context, limited by keys and space. Raises `UserError`:
    the context is too short for the kind."""
    min_distractors = 0 if kind == "single" else MIN_DISTRACTORS
    needle_tokens = form.needle_tokens(test=True)
    fixed_tokens = 2 * needle_tokens + PAIR_TOKENS  # requested needle, question and answer
    min_tokens = fixed_tokens + min_distractors * needle_tokens
    if length < min_tokens:
        raise UserError(f"needle length {length}: needles and question of kind {kind} in {form.language} "
                        f"need {min_tokens} tokens; test longer contexts")
    max_keys = len(form.pairs[True]) // 2 - 8
    num_distractors = 0 if kind == "single" else max(min_distractors, int(share * length) // needle_tokens)
    return min(num_distractors, (length - fixed_tokens) // needle_tokens, max(min_distractors, max_keys))

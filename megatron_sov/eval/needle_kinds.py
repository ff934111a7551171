"""The kinds of needle tests, after RULER (arXiv 2404.06654): one example is a prompt and the pairs of words that have to follow.

==================  ==============================================================================================
single              one needle; its key is asked for
multi-key           one needle among needles with other keys
multi-value         four needles with one key; all values have to follow, in any order
multi-query         four needles; the values of four keys have to follow in the order of the question
variable-tracking   a variable holds a value, the next one holds the first, and so on; all four have to follow
==================  ==============================================================================================

Every kind but `single` has distractors: needles (chains of variables) with keys and values of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_sov.config import NeedleKind
from megatron_sov.errors import UserError
from megatron_sov.eval.haystack import Haystack
from megatron_sov.eval.needle_text import NeedleForm, Sentences, fill

NUM_ASKED = 4
"""Values, queries, or variables of a chain."""
MIN_DISTRACTORS = 3
PHRASES_OF: dict[NeedleKind, tuple[str, str]] = {
    "single": ("statement", "statement"), "multi-key": ("statement", "statement"), "multi-value": ("statement", "all_values"),
    "multi-query": ("statement", "values_of"), "variable-tracking": ("assignment", "holders")}
"""Phrases of each kind: what is told, and what asks."""
PAIR_TOKENS = 2
IN_ANY_ORDER: frozenset[NeedleKind] = frozenset({"multi-value", "variable-tracking"})


@dataclass(frozen=True)
class Example:
    """A question about a context."""

    prompt: list[int]
    """Token ids, up to where the answer has to follow."""
    answer: list[tuple[int, int]]
    """Pairs of words, in the order in which the context or the question has them."""
    in_any_order: bool
    """Whether another order is right as well."""

    @property
    def answer_tokens(self) -> int:
        """Tokens of the answer."""
        return PAIR_TOKENS * len(self.answer)


@dataclass(frozen=True)
class _Plan:
    """The sentences of an example, without text: the asked ones in the order that they keep, and what they ask."""

    first: list[int]
    """Stands at the example's depth."""
    later: list[list[int]]
    """Stand behind it, in this order."""
    anywhere: list[list[int]]
    """Stand anywhere."""
    question: list[int]
    answer: np.ndarray
    """[pairs, 2]."""


def make_example(kind: NeedleKind, haystack: Haystack, generator: np.random.Generator, length: int, depth: float,
                 num_distractors: int, *, test: bool) -> Example:
    """Return an example whose prompt and answer together have `length` tokens.

    Args:
        kind: which test.
        haystack: text and words.
        generator: of everything random.
        length: in tokens.
        depth: where the first asked needle stands, 0 = start, 1 = right before the question.
        num_distractors: as `distractors_of` gives.
        test: whether it is for a test, or for training.
    """
    plan = _PLANS[kind](haystack.form, generator, num_distractors, test)
    told = [plan.first, *plan.later, *plan.anywhere]
    text = haystack.text(generator, length - sum(map(len, told)) - len(plan.question) - plan.answer.size)
    start = round(depth * len(text))
    places = [start, *np.sort(generator.integers(start, len(text) + 1, len(plan.later))).tolist(),
              *generator.integers(0, len(text) + 1, len(plan.anywhere)).tolist()]
    prompt: list[int] = []
    last = 0
    for i in np.argsort(np.array(places), kind="stable").tolist():
        prompt += [*text[last:places[i]].tolist(), *told[i]]
        last = places[i]
    prompt += [*text[last:].tolist(), *plan.question]
    return Example(prompt, [(int(a), int(b)) for a, b in plan.answer], kind in IN_ANY_ORDER)


def distractors_of(kind: NeedleKind, form: NeedleForm, length: int, share: float) -> int:
    """Return the number of distractors of a context: they fill `share` of it, as far as there are keys and room for them.

    Raises:
        UserError: the context is too short for the kind.
    """
    told, question = PHRASES_OF[kind]
    asked = 1 if kind in ("single", "multi-key") else NUM_ASKED
    least = 0 if kind == "single" else MIN_DISTRACTORS
    needle_tokens = form.phrase_tokens(told, test=True)
    fixed = asked * needle_tokens + form.phrase_tokens(question, test=True) + asked * PAIR_TOKENS
    if length < fixed + least * needle_tokens:
        raise UserError(f"needle length {length}: the needles and the question of kind {kind} in {form.language} alone take "
                        f"{fixed + least * needle_tokens} tokens; test longer contexts")
    keys = len(form.pairs[True]) // 2 - 2 * NUM_ASKED  # tracking takes variables and values from the same pairs
    wanted = 0 if kind == "single" else max(least, int(share * length) // needle_tokens)
    return min(wanted, (length - fixed) // needle_tokens, max(least, keys))


def _one(form: NeedleForm, generator: np.random.Generator, num_distractors: int, test: bool) -> _Plan:
    sentences = form.draw_sentences(generator, test=test)
    keys, values = (form.draw(generator, 1 + num_distractors, test=test) for _ in range(2))
    first, *others = _statements(sentences, keys, values)
    return _Plan(first, [], others, fill(sentences.statement, keys[0]), values[:1])


def _multi_value(form: NeedleForm, generator: np.random.Generator, num_distractors: int, test: bool) -> _Plan:
    sentences = form.draw_sentences(generator, test=test)
    keys, values = (form.draw(generator, NUM_ASKED + num_distractors, test=test) for _ in range(2))
    keys[:NUM_ASKED] = keys[0]
    told = _statements(sentences, keys, values)
    return _Plan(told[0], told[1:NUM_ASKED], told[NUM_ASKED:], fill(sentences.all_values, keys[0]), values[:NUM_ASKED])


def _multi_query(form: NeedleForm, generator: np.random.Generator, num_distractors: int, test: bool) -> _Plan:
    sentences = form.draw_sentences(generator, test=test)
    keys, values = (form.draw(generator, NUM_ASKED + num_distractors, test=test) for _ in range(2))
    first, *others = _statements(sentences, keys, values)
    order = generator.permutation(NUM_ASKED)
    return _Plan(first, [], others, fill(sentences.values_of, *keys[order]), values[order])


def _tracking(form: NeedleForm, generator: np.random.Generator, num_distractors: int, test: bool) -> _Plan:
    sentences = form.draw_sentences(generator, test=test)
    num_chains = 1 + -(-num_distractors // NUM_ASKED)
    pairs = form.draw(generator, NUM_ASKED + num_distractors + num_chains, test=test)
    values, variables = pairs[:num_chains], pairs[num_chains:]
    # each variable holds the one before it in its chain; the first of a chain holds the value
    held = [values[i // NUM_ASKED] if i % NUM_ASKED == 0 else variables[i - 1] for i in range(len(variables))]
    told = [fill(sentences.assignment, variable, value) for variable, value in zip(variables, held, strict=True)]
    return _Plan(told[0], told[1:NUM_ASKED], told[NUM_ASKED:], fill(sentences.holders, values[0]), variables[:NUM_ASKED])


def _statements(sentences: Sentences, keys: np.ndarray, values: np.ndarray) -> list[list[int]]:
    return [fill(sentences.statement, key, value) for key, value in zip(keys, values, strict=True)]


_PLANS: dict[NeedleKind, Callable[[NeedleForm, np.random.Generator, int, bool], _Plan]] = {
    "single": _one, "multi-key": _one, "multi-value": _multi_value, "multi-query": _multi_query, "variable-tracking": _tracking}

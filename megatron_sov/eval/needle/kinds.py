"""The kinds of needle tests, after RULER (arXiv 2404.06654): one example is a prompt and the pairs of words
that have to follow.

==================  ==========================================================================================
single              one needle; its key is asked for
multi-key           one needle among needles with other keys
multi-value         four needles with one key; all values have to follow, in any order
multi-query         four needles; the values of four keys have to follow in the order of the question
variable-tracking   a variable holds a value, the next one holds the first, and so on; all four have to follow
==================  ==========================================================================================

Every kind but `single` has distractors: needles (chains of variables) with keys and values of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from megatron_sov.config import NeedleKind
from megatron_sov.errors import UserError
from megatron_sov.eval.needle.haystack import Haystack
from megatron_sov.eval.needle.text import NeedleForm, Sentences, fill

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
    """A question about a context."""

    prompt: list[int]
    """Token ids, up to where the answer has to follow."""
    answer: list[tuple[int, int]]
    """Pairs of words, in the order in which the context or the question has them."""
    in_any_order: bool
    """Whether another order is right as well."""

    @property
    def answer_tokens(self) -> int:
        return PAIR_TOKENS * len(self.answer)


@dataclass(frozen=True)
class Plan:
    """The sentences of a context, without text: what is told, and what is asked."""

    asked: list[list[list[int]]]
    """Of each question the sentences that keep their order; the first one stands at the question's depth."""
    anywhere: list[list[int]]
    """Sentences that stand anywhere."""
    questions: list[list[int]]
    """Up to where the answer has to follow."""
    answers: list[np.ndarray]
    """[pairs, 2] each."""

    @property
    def tokens(self) -> int:
        """Tokens of all sentences, questions and answers."""
        told = sum(len(sentence) for sentences in (*self.asked, self.anywhere) for sentence in sentences)
        return told + sum(map(len, self.questions)) + sum(answer.size for answer in self.answers)


def make_plan(kind: NeedleKind, form: NeedleForm, sentences: Sentences, generator: np.random.Generator,
              num_questions: int, num_distractors: int, *, test: bool) -> Plan:
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


def place_told(plan: Plan, generator: np.random.Generator, starts: Sequence[int], text_tokens: int
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
    plan = make_plan(kind, haystack.form, sentences, generator, 1, num_distractors, test=True)
    text = haystack.text(generator, length - plan.tokens)
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
         num_distractors: int, test: bool) -> Plan:
    keys, values = (form.draw(generator, num_questions + num_distractors, test=test) for _ in range(2))
    told = _statements(sentences, keys, values)
    return Plan([[sentence] for sentence in told[:num_questions]], told[num_questions:],
                [fill(sentences.statement, key) for key in keys[:num_questions]],
                [values[[i]] for i in range(num_questions)])


def _multi_value(form: NeedleForm, sentences: Sentences, generator: np.random.Generator, num_questions: int,
                 num_distractors: int, test: bool) -> Plan:
    num_asked = num_questions * NUM_ASKED
    keys, values = (form.draw(generator, num_asked + num_distractors, test=test) for _ in range(2))
    keys[:num_asked] = np.repeat(keys[:num_asked:NUM_ASKED], NUM_ASKED, axis=0)
    told = _statements(sentences, keys, values)
    return Plan(_groups(told, num_questions), told[num_asked:],
                [fill(sentences.all_values, key) for key in keys[:num_asked:NUM_ASKED]],
                _groups(values, num_questions))


def _multi_query(form: NeedleForm, sentences: Sentences, generator: np.random.Generator, num_questions: int,
                 num_distractors: int, test: bool) -> Plan:
    num_asked = num_questions * NUM_ASKED
    keys, values = (form.draw(generator, num_asked + num_distractors, test=test) for _ in range(2))
    told = _statements(sentences, keys, values)
    order = [NUM_ASKED * i + generator.permutation(NUM_ASKED) for i in range(num_questions)]
    return Plan([[sentence] for sentence in told[:num_asked:NUM_ASKED]],
                [sentence for i, sentence in enumerate(told) if i >= num_asked or i % NUM_ASKED],
                [fill(sentences.values_of, *keys[asked]) for asked in order],
                [values[asked] for asked in order])


def _tracking(form: NeedleForm, sentences: Sentences, generator: np.random.Generator, num_questions: int,
              num_distractors: int, test: bool) -> Plan:
    num_asked = num_questions * NUM_ASKED
    num_chains = num_questions - (-num_distractors // NUM_ASKED)
    pairs = form.draw(generator, num_asked + num_distractors + num_chains, test=test)
    values, variables = pairs[:num_chains], pairs[num_chains:]
    # each variable holds the one before it in its chain; the first of a chain holds the value
    held = [values[i // NUM_ASKED] if i % NUM_ASKED == 0 else variables[i - 1] for i in range(len(variables))]
    told = [fill(sentences.assignment, variable, value)
            for variable, value in zip(variables, held, strict=True)]
    return Plan(_groups(told, num_questions), told[num_asked:],
                [fill(sentences.holders, value) for value in values[:num_questions]],
                _groups(variables, num_questions))


def _statements(sentences: Sentences, keys: np.ndarray, values: np.ndarray) -> list[list[int]]:
    return [fill(sentences.statement, key, value) for key, value in zip(keys, values, strict=True)]


def _groups(items: _Items, num_questions: int) -> list[_Items]:
    """Return what each question asks for, of items that begin with what is asked."""
    return [items[i * NUM_ASKED:(i + 1) * NUM_ASKED] for i in range(num_questions)]


_PLANS: dict[NeedleKind, Callable[[NeedleForm, Sentences, np.random.Generator, int, int, bool], Plan]] = {
    "single": _one, "multi-key": _one, "multi-value": _multi_value, "multi-query": _multi_query,
    "variable-tracking": _tracking}

"""Each kind's examples, read back from their text: what is told, where, and what is asked."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_sov.config import NeedleConfig, NeedleKind
from megatron_sov.errors import UserError
from megatron_sov.eval.needle.documents import NeedleDocuments
from megatron_sov.eval.needle.suite import PAIR_TOKENS, Example, distractors_of, make_example
from megatron_sov.eval.needle.text import MIN_WORDS, Haystack, NeedleForm, fill

Pair = tuple[int, int]


def example_of(haystack: Haystack, kind: NeedleKind, depth: float = 0.5, distractors: int = 5, seed: int = 1,
               length: int = 300
               ) -> Example:
    return make_example(kind, haystack, np.random.default_rng(seed), length, depth, distractors)


def told(form: NeedleForm, ids: list[int], phrase: str) -> list[tuple[int, Pair, Pair]]:
    """Return (place, key, value) of all sentences of a kind in a text."""
    found = []
    for sentences in form.sentences[True]:
        opening, between, closing = getattr(sentences, phrase)
        width = len(opening) + len(between) + len(closing) + 4
        for i in range(len(ids) - width + 1):
            key = ids[i + len(opening):][:2]
            rest = ids[i + len(opening) + 2 + len(between):]
            value = rest[:2]
            if ids[i:i + width] == fill((opening, between, closing), np.array(key), np.array(value)):
                found.append((i, (key[0], key[1]), (value[0], value[1])))
    return found


@pytest.mark.parametrize(("kind", "distractors"), [("single", 0), ("multi-key", 5)])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_one_of_the_needles_is_asked_for(kind: NeedleKind, distractors: int, depth: float,
                                         haystacks: dict[str, Haystack]) -> None:
    haystack = haystacks["heldout"]
    example = example_of(haystack, kind, depth, distractors)
    needles = told(haystack.form, example.prompt, "statement")
    keys = [key for _, key, _ in needles]
    assert len(set(keys)) == len(keys) == 1 + distractors
    (value,) = example.answer
    asked = example.prompt[-2:]
    (place,) = [p for p, key, v in needles if list(key) == asked and v == value]
    if not distractors:
        room = len(example.prompt) - 2 * haystack.form.phrase_tokens("statement", test=True)
        assert place == pytest.approx(depth * room, abs=4)
    assert len(example.prompt) + example.answer_tokens == 300


def test_all_values_of_a_key_are_asked_for(haystacks: dict[str, Haystack]) -> None:
    haystack = haystacks["heldout"]
    example = example_of(haystack, "multi-value")
    needles = told(haystack.form, example.prompt, "statement")
    key = tuple(example.prompt[-2 - len(haystack.form.sentences[True][0].all_values[1]):][:2])
    assert [value for _, k, value in needles if k == key] == example.answer, "in the order of the text"
    assert len(example.answer) == 4 and example.in_any_order
    assert len({k for _, k, _ in needles if k != key}) == 5


def test_four_keys_are_asked_for_in_the_order_of_the_question(haystacks: dict[str, Haystack]) -> None:
    haystack = haystacks["heldout"]
    orders = set()
    for seed in range(4):
        example = example_of(haystack, "multi-query", seed=seed)
        values = {key: value for _, key, value in told(haystack.form, example.prompt, "statement")}
        keys = {value: key for key, value in values.items()}
        asked = fill(haystack.form.sentences[True][0].values_of, *(np.array(keys[v]) for v in example.answer))
        assert example.prompt[-len(asked):] == asked
        orders.add(tuple(list(values.values()).index(v) for v in example.answer))
        assert len(values) == 9 and not example.in_any_order
    assert len(orders) > 1


def test_variables_are_followed_from_one_to_the_next(haystacks: dict[str, Haystack]) -> None:
    haystack = haystacks["heldout"]
    example = example_of(haystack, "variable-tracking", depth=0.2, distractors=8)
    assignments = told(haystack.form, example.prompt, "assignment")
    _, closing = haystack.form.sentences[True][0].holders
    asked = tuple(example.prompt[-2 - len(closing):][:2])
    holds: dict[Pair, Pair] = {variable: value for _, variable, value in assignments}
    assert len(holds) == 12

    def root(variable: Pair) -> Pair:
        while variable in holds:
            variable = holds[variable]
        return variable

    assert [v for _, v, _ in assignments if root(v) == asked] == example.answer
    assert len(example.answer) == 4 and len({root(v) for v in holds}) == 3


@pytest.mark.parametrize("kind", ["multi-key", "multi-value", "multi-query", "variable-tracking"])
def test_training_documents_tell_nothing_as_a_test_does(kind: NeedleKind,
                                                        haystacks: dict[str, Haystack]) -> None:
    haystack = haystacks["train"]
    phrase = "assignment" if kind == "variable-tracking" else "statement"
    documents = NeedleDocuments((haystack,), 400, settings=NeedleConfig(kinds=(kind,)))
    seen: set[Pair] = set()
    for seed in range(12):
        assert not told(haystack.form, documents.tokens(seed, 0, 400).tolist(), phrase)
        for _, key, value in told(haystack.form, example_of(haystack, kind, seed=seed, length=400).prompt,
                                  phrase):
            seen |= {key, value}
    assert len(seen) > 50 and not seen & {(a, b) for a, b in haystack.form.pairs[False].tolist()}


def test_distractors_grow_with_the_length_as_far_as_there_are_keys(form: NeedleForm) -> None:
    size = form.phrase_tokens("statement", test=True)
    found = [distractors_of("multi-key", form, length, 0.25) for length in (128, 512, 2048, 262144)]
    assert found[:3] == [3, 512 // 4 // size, 2048 // 4 // size]
    assert found[3] == len(form.pairs[True]) // 2 - 8
    assert distractors_of("single", form, 2048, 0.25) == 0
    assert distractors_of("multi-key", form, 128, 0.99) * size < 128 - 2 * size
    with pytest.raises(UserError, match="needle length 60: the needles and the question of kind multi-query "
                                        "in code alone take"):
        distractors_of("multi-query", form, 60, 0.0)


def test_the_longest_context_is_made_with_all_its_distractors(haystacks: dict[str, Haystack]) -> None:
    haystack = haystacks["heldout"]
    for kind in ("multi-key", "variable-tracking"):
        count = distractors_of(kind, haystack.form, 262144, 0.5)
        assert len(example_of(haystack, kind, 0.5, count, length=262144).prompt) > 262100


def test_blind_choices_pass_less_than_once_in_a_hundred() -> None:
    assert 1 / MIN_WORDS**PAIR_TOKENS < 0.01

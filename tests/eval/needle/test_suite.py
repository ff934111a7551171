"""The suite: its cells, its judgement by both ways, and its questions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from megatron_sov.errors import UserError
from megatron_sov.eval.needle.suite import Example, NeedleSuite, is_right, result_of, run_suite, table
from megatron_sov.eval.needle.text import Haystack, fill
from megatron_sov.eval.statistics import wilson_interval
from megatron_sov.generate.request import Generated, Sampling, Stop


def answer_by_looking(prompts: list[list[int]], count: int) -> list[list[int]]:
    """A perfect reader: what followed the longest suffix that occurred before, again and again."""
    def shared(ids: list[int], end: int) -> int:
        """How many tokens before `end` are those at the end of the text."""
        size = 0
        while size < end and ids[end - 1 - size] == ids[-1 - size]:
            size += 1
        return size

    def follow(ids: list[int]) -> int:
        return ids[max(range(1, len(ids)), key=lambda end: shared(ids, end))]

    answers = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(count):
            ids.append(follow(ids))
        answers.append(ids[len(prompt):])
    return answers


def choose_by_looking(documents: list[list[int]], count: int, words: tuple[int, ...]) -> list[list[int]]:
    return [[answer_by_looking([d[:len(d) - k]], 1)[0][0] for k in range(count, 0, -1)] for d in documents]


@dataclasses.dataclass(frozen=True)
class Looking:
    """An engine that answers by looking, and may spoil its answers."""

    spoil: Callable[[list[list[int]]], list[list[int]]] = lambda found: found

    def generate(self, prompts: Any, sampling: Sampling, **more: Any) -> Generated:
        found = self.spoil(answer_by_looking(prompts, sampling.max_new_tokens))
        return Generated.of([(tokens, [0.0] * len(tokens)) for tokens in found], sampling, Stop(), 0)

    def choose(self, documents: Any, count: int, words: Any) -> list[list[int]]:
        return self.spoil(choose_by_looking(documents, count, words))


@pytest.fixture
def suite(haystacks: dict[str, Haystack]) -> NeedleSuite:
    return NeedleSuite((haystacks["heldout"],), ("single", "multi-key"), (96, 160), (0.0, 0.4, 0.9), 4, 0.3)


@pytest.mark.parametrize("by", ["generation", "likelihood"])
def test_a_perfect_reader_is_right_everywhere(suite: NeedleSuite, by: str) -> None:
    told: list[int] = []
    result = run_suite(dataclasses.replace(suite, by=by), Looking(), told.append)  # type: ignore[arg-type]
    assert result.score == 1.0 and result.by == by
    assert sum(told) == suite.num_examples == 4 * len(result.cells), "who waits is told how far it is"
    assert ([(c.kind, c.language, c.length_tokens, c.depth) for c in result.cells]
            == [(kind, "code", length, depth) for kind in suite.kinds for length in suite.lengths
                for depth in suite.depths])
    assert all((c.correct, c.samples, c.interval) == (4, 4, wilson_interval(4, 4)) for c in result.cells)
    assert {c.length_tokens: c.distractors for c in result.cells if c.kind == "multi-key"} == {96: 3, 160: 4}
    assert {c.distractors for c in result.cells if c.kind == "single"} == {0}


@pytest.mark.parametrize("by", ["generation", "likelihood"])
def test_one_wrong_token_makes_an_answer_wrong(suite: NeedleSuite, by: str) -> None:
    def spoil(found: list[list[int]]) -> list[list[int]]:
        for number, answer in enumerate(found):
            # of each cell the first sample's first token and the second one's second are wrong
            if number % 4 < 2:
                answer[number % 4] = -1
        return found

    result = run_suite(dataclasses.replace(suite, by=by), Looking(spoil))  # type: ignore[arg-type]
    assert {c.correct for c in result.cells} == {2} and result.score == 0.5
    told = result.to_dict()
    assert json.loads(json.dumps(told)) == told and result_of(told) == result
    assert sorted(told["cells"][0]) \
        == ["correct", "depth", "distractors", "interval", "kind", "language", "length_tokens", "samples"]
    assert "multi-key, code" in table(result) and "score 50.0% by " in table(result)


@pytest.mark.parametrize(("given", "ordered", "free"), [
    ([1, 2, 3, 4], True, True), ([3, 4, 1, 2], False, True), ([1, 4, 3, 2], False, False),
    ([1, 2, 1, 2], False, False)])
def test_an_order_counts_only_where_the_question_has_one(given: list[int], ordered: bool, free: bool) -> None:
    pairs = [(1, 2), (3, 4)]
    assert is_right(Example([], pairs, False), given, "generation") == ordered
    assert is_right(Example([], pairs, True), given, "generation") == free


@pytest.mark.parametrize(("given", "right"), [
    ([1, 2, 3, 4], True), ([3, 2, 3, 4], True), ([1, 2, 1, 4], False), ([1, 4, 3, 4], False),
    ([5, 2, 3, 4], False)])
def test_by_likelihood_any_pair_that_has_not_come_may_start(given: list[int], right: bool) -> None:
    assert is_right(Example([], [(1, 2), (3, 4)], True), given, "likelihood") == right


def test_examples_are_the_same_whatever_else_is_asked(suite: NeedleSuite) -> None:
    other = dataclasses.replace(suite, kinds=("multi-key",), lengths=(160, 200), depths=(0.9,), samples=7)
    haystack = suite.haystacks[0]
    assert suite.example("multi-key", haystack, 160, 0.9, 2) == other.example(
        "multi-key", haystack, 160, 0.9, 2)
    for change in ((96, 0.9, 2), (160, 0.4, 2), (160, 0.9, 3)):
        assert (suite.example("multi-key", haystack, *change).prompt
                != suite.example("multi-key", haystack, 160, 0.9, 2).prompt)
    reseeded = dataclasses.replace(suite, seed=1)
    assert reseeded.example("single", haystack, 160, 0.9, 2) != suite.example("single", haystack, 160, 0.9, 2)


def test_batches_are_bounded_and_made_one_by_one(haystacks: dict[str, Haystack]) -> None:
    suite = NeedleSuite((haystacks["heldout"],), ("multi-key",), (262144,), (0.0, 0.5), 10, 0.25)
    _, cells, examples = next(iter(suite.examples()))
    assert len(cells) == len(examples) == 8 and {len(e.prompt) + 2 for e in examples} == {262144}


def test_mistakes_are_named(haystacks: dict[str, Haystack]) -> None:
    def make(lengths: tuple[int, ...] = (128,), depths: tuple[float, ...] = (0.5,), samples: int = 4,
             share: float = 0.0) -> NeedleSuite:
        return NeedleSuite((haystacks["heldout"],), ("multi-key",), lengths, depths, samples, share)

    with pytest.raises(UserError, match="needle length 12: the needles and the question of kind multi-key in "
                                        "code alone take"):
        make(lengths=(128, 12))
    with pytest.raises(UserError, match=r"depths \[1.5\]"):
        make(depths=(1.5,))
    with pytest.raises(UserError, match=r"distractor_share = 1\.0 in \[0, 1\)"):
        make(share=1.0)


def test_questions_are_all_that_a_test_may_tell_or_ask(haystacks: dict[str, Haystack]) -> None:
    haystack = haystacks["heldout"]
    suite = NeedleSuite((haystack,), ("multi-key", "variable-tracking"), (200,), (0.5,), 6, 0.3)
    asked = {tuple(q) for q in suite.questions()}
    assert len(asked) == 3 * len(haystack.form.pairs[True])
    for _, _, examples in suite.examples():
        for example in examples:
            ends = {tuple(example.prompt[i:i + size]) for size in {len(q) for q in asked}
                    for i in range(len(example.prompt))}
            assert len(ends & asked) >= 4
    train = haystacks["train"].form
    told = {tuple(fill(s.statement, pair)) for s in train.sentences[False] for pair in train.pairs[False]}
    assert not told & asked

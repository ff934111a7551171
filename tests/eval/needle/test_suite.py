"""The suite: its cells, its judgement by both ways, and its questions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_sov.base.errors import UserError
from megatron_sov.cli import main
from megatron_sov.engine.parallel.cpu_shims import prepare_megatron
from megatron_sov.model.config import NeedleKind
from megatron_sov.runs.obs.events import EVENTS, EventLog, read_events

prepare_megatron()

from megatron_sov.eval.needle.suite import (  # noqa: E402
    Example, NeedleSuite, Way, answers, is_right, make_example, result_of, run_suite, table)
from megatron_sov.eval.needle.text import Haystack, NeedleForm, fill  # noqa: E402
from megatron_sov.eval.statistics import wilson_interval  # noqa: E402
from megatron_sov.infer.decoder.generator import MegatronEngine  # noqa: E402
from megatron_sov.infer.engines.libraries import HfEngine, load_hf  # noqa: E402
from megatron_sov.infer.engines.load import run_forward_model  # noqa: E402
from megatron_sov.infer.engines.target import Target  # noqa: E402
from megatron_sov.infer.request import Generated, Sampling, StopRule  # noqa: E402


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
        return Generated.of([(tokens, [0.0] * len(tokens)) for tokens in found], sampling, StopRule(), 0)

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


@pytest.mark.parametrize(("given", "ordered", "free", "likely"), [
    ([1, 2, 3, 4], True, True, True), ([3, 4, 1, 2], False, True, False), ([1, 4, 3, 2], False, False, False),
    ([1, 2, 1, 2], False, False, False), ([3, 2, 3, 4], False, False, True),
    ([1, 2, 1, 4], False, False, False), ([1, 4, 3, 4], False, False, False),
    ([5, 2, 3, 4], False, False, False)])
def test_an_order_counts_only_where_the_question_has_one(given: list[int], ordered: bool, free: bool,
                                                         likely: bool) -> None:
    """By likelihood any pair that has not come may start."""
    pairs = [(1, 2), (3, 4)]
    assert is_right(Example([], pairs, False), given, "generation") == ordered
    assert is_right(Example([], pairs, True), given, "generation") == free
    assert is_right(Example([], pairs, True), given, "likelihood") == likely


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

    with pytest.raises(UserError, match="needle length 12:"):
        make(lengths=(128, 12))
    with pytest.raises(UserError, match=r"depths \[1.5\]"):
        make(depths=(1.5,))
    with pytest.raises(UserError, match=r"distractor_share = 1\.0"):
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


KINDS = ("multi-key", "multi-value")


def batches(haystack: Haystack) -> list[list[Example]]:
    """Examples with and without an order; longer than K-EXAONE's window (8) and Solar's
    original context (256)."""
    suite = NeedleSuite((haystack,), KINDS, (140, 300), (0.4,), 2, 0.2)
    return [examples for _, _, examples in suite.examples()]


@torch.no_grad()
def plain_answer(model: Any, example: Example, words: tuple[int, ...], by: Way) -> list[int]:
    """What transformers says to one prompt, without any of our code."""
    if by == "generation":
        ids = torch.tensor([example.prompt])
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids),
                               max_new_tokens=example.answer_tokens, do_sample=False, eos_token_id=None,
                               pad_token_id=0)
        return found[0, len(example.prompt):].tolist()
    said = []
    ids = list(example.prompt)
    for token in (t for pair in example.answer for t in pair):
        logprobs = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        said.append(max(words, key=lambda word: float(logprobs[word])))
        ids.append(token)
    return said


def plain_verdict(example: Example, said: list[int], by: Way) -> bool:
    """Whether that is right, told from the strings of words alone."""
    wanted = [f"{a}+{b}" for a, b in example.answer]
    given = [f"{said[i]}+{said[i + 1]}" for i in range(0, len(said), 2)]
    if by == "generation" and example.in_any_order:
        return len(given) == len(wanted) and set(given) == set(wanted)
    if by == "generation" or not example.in_any_order:
        return given == wanted
    return all(said[2 * i] in [first for first, _ in example.answer[i:]]
               and said[2 * i + 1] == example.answer[i][1] for i in range(len(wanted)))


@pytest.mark.deep
@pytest.mark.parametrize("by", ["generation", "likelihood"])
@pytest.mark.parametrize("family", ["solar_open", pytest.param("exaone_moe", marks=pytest.mark.deep)])
def test_every_answer_is_that_of_plain_transformers(family: str, by: Way, imported: dict[str, Path],
                                                    hf_models: dict[str, Path],
                                                    haystacks: dict[str, Haystack], one_rank: None) -> None:
    haystack = haystacks["heldout"]
    words = haystack.form.words
    model = AutoModelForCausalLM.from_pretrained(hf_models[family]).eval()
    reference = [[plain_answer(model, e, words, by) for e in examples] for examples in batches(haystack)]
    engine = HfEngine(load_hf(hf_models[family]))
    ours = [answers(examples, words, engine, by) for examples in batches(haystack)]
    assert ours == reference
    target = Target(imported[family], False)
    assert (run_forward_model(target, [], None, lambda loaded: [
        answers(examples, words, MegatronEngine(loaded.policy), by) for examples in batches(haystack)])
            == reference)
    if by == "likelihood":
        assert all(token in words for rows in reference for row in rows for token in row)

    verdicts = []
    for examples, said in zip(batches(haystack), reference, strict=True):
        for number, (example, tokens) in enumerate(zip(examples, said, strict=True)):
            # an untrained model says nothing right: ask for what it says
            if number % 2 and by == "generation":
                pairs = [(a, b) for a, b in zip(tokens[::2], tokens[1::2], strict=True)]
                example = dataclasses.replace(example, answer=pairs[::-1] if example.in_any_order else pairs)
            verdicts.append((is_right(example, tokens, by), plain_verdict(example, tokens, by)))
    assert all(ours == theirs for ours, theirs in verdicts)
    assert by == "likelihood" or {ours for ours, _ in verdicts} == {True, False}


@pytest.mark.deep
def test_the_command_judges_checkpoints_and_folders_alike(one_rank: None, imported: dict[str, Path],
                                                          hf_models: dict[str, Path], token_shards: Path,
                                                          tmp_path: Path, capsys) -> None:
    EventLog(tmp_path / EVENTS).close()
    ask = ["--data", str(token_shards), "--lengths", "96", "128", "--depths", "0", "0.9", "--samples", "3",
           "--run", str(tmp_path)]
    shown = []
    for folder in (imported["exaone_moe"], hf_models["exaone_moe"]):
        assert main(["eval", "needle", str(folder), *ask, "--kinds", "single", "multi-value", "--json"]) == 0
        shown.append(json.loads(capsys.readouterr().out))
    assert shown[0] == shown[1]
    assert ({(c["kind"], c["length_tokens"], c["depth"], c["samples"]) for c in shown[0]["cells"]}
            == {(kind, length, depth, 3) for kind in ("single", "multi-value") for length in (96, 128)
                for depth in (0.0, 0.9)})
    events = list(read_events(tmp_path / EVENTS))
    assert [(e["event"], e["when"], e["step"], e["cells"]) for e in events] \
        == [("needle", "eval", step, shown[0]["cells"]) for step in (0, None)]
    for more, sentence in (
        (["--nproc", "2", "--set", "a=1"], "--set a=1, --nproc 2: is for checkpoints, and"),
        (["--language", "first=perl"], "--language first=perl: must be SOURCE=LANGUAGE"),
    ):
        assert main(["eval", "needle", str(hf_models["exaone_moe"]), *ask, *more]) == 2
        assert sentence in capsys.readouterr().err

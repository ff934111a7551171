"""The needle suite: cells, scoring and questions."""

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
from megatron_sov.eval.needle.suite import (
    Example, NeedleSuite, build_example, format_table, parse_result, run_suite)
from megatron_sov.eval.needle.text import Haystack, NeedleForm, fill_slots
from megatron_sov.eval.statistics import compute_wilson_interval
from megatron_sov.infer.decoder.generator import MegatronEngine
from megatron_sov.infer.engine import Engine
from megatron_sov.infer.engines.load import run_forward_model
from megatron_sov.infer.engines.target import Target
from megatron_sov.infer.engines.transformers_engine import HfEngine, load_hf
from megatron_sov.infer.request import GenerationResult, Sampling, StopRule
from megatron_sov.runs.obs.events import EVENTS, EventLog, read_events


def answer_by_lookup(prompts: list[list[int]], count: int) -> list[list[int]]:
    """A perfect reader: repeat the tokens after an earlier occurrence of the longest suffix."""
    def count_shared(ids: list[int], end: int) -> int:
        """Count the tokens before `end` that equal those at the end of the text."""
        size = 0
        while size < end and ids[end - 1 - size] == ids[-1 - size]:
            size += 1
        return size

    def find_next_token(ids: list[int]) -> int:
        return ids[max(range(1, len(ids)), key=lambda end: count_shared(ids, end))]

    generate_answers = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(count):
            ids.append(find_next_token(ids))
        generate_answers.append(ids[len(prompt):])
    return generate_answers


@dataclasses.dataclass(frozen=True)
class LookupEngine:
    """Engine that answers by looking, and may corrupt its answers."""

    corrupt: Callable[[list[list[int]]], list[list[int]]] = lambda needles: needles

    def generate(self, prompts: Any, sampling: Sampling, **extra_options: Any) -> GenerationResult:
        result = self.corrupt(answer_by_lookup(prompts, sampling.max_new_tokens))
        written = [(tokens, [0.0] * len(tokens)) for tokens in result]
        return GenerationResult.of(written, sampling, StopRule(), 0)


@pytest.fixture
def suite(haystacks: dict[str, Haystack]) -> NeedleSuite:
    return NeedleSuite((haystacks["heldout"],), ("single", "multi-key"), (96, 160), (0.0, 0.4, 0.9), 4, 0.3)


def test_perfect_reader_scores_one_in_every_cell(suite: NeedleSuite) -> None:
    progress: list[int] = []
    result = run_suite(suite, LookupEngine(), progress.append)
    assert result.score == 1.0
    assert sum(progress) == suite.num_examples == 4 * len(result.cells), "who waits is told how far it is"
    assert ([(c.kind, c.language, c.length_tokens, c.depth) for c in result.cells]
            == [(kind, "code", length, depth) for kind in suite.kinds for length in suite.lengths
                for depth in suite.depths])
    interval = compute_wilson_interval(4, 4)
    assert all((c.correct, c.samples, c.interval) == (4, 4, interval) for c in result.cells)
    assert {c.length_tokens: c.distractors for c in result.cells if c.kind == "multi-key"} == {96: 3, 160: 4}
    assert {c.distractors for c in result.cells if c.kind == "single"} == {0}


def test_answer_with_one_wrong_token_is_wrong(suite: NeedleSuite) -> None:
    def corrupt(needles: list[list[int]]) -> list[list[int]]:
        for number, answer in enumerate(needles):
            # of each cell the first sample's first token and the second one's second are wrong
            if number % 4 < 2:
                answer[number % 4] = -1
        return needles

    result = run_suite(suite, LookupEngine(corrupt))
    assert {c.correct for c in result.cells} == {2} and result.score == 0.5
    record = result.to_dict()
    assert json.loads(json.dumps(record)) == record and parse_result(record) == result
    assert sorted(record["cells"][0]) \
        == ["correct", "depth", "distractors", "interval", "kind", "language", "length_tokens", "samples"]
    assert "multi-key, code" in format_table(result) and "score 50.0% with 4 samples" in format_table(result)


def test_examples_are_independent_of_other_cells(suite: NeedleSuite) -> None:
    other = dataclasses.replace(suite, kinds=("multi-key",), lengths=(160, 200), depths=(0.9,), samples=7)
    haystack = suite.haystacks[0]
    assert suite.build_example("multi-key", haystack, 160, 0.9, 2) == other.build_example(
        "multi-key", haystack, 160, 0.9, 2)
    for change in ((96, 0.9, 2), (160, 0.4, 2), (160, 0.9, 3)):
        assert (suite.build_example("multi-key", haystack, *change).prompt
                != suite.build_example("multi-key", haystack, 160, 0.9, 2).prompt)
    reseeded = dataclasses.replace(suite, seed=1)
    cell = ("single", haystack, 160, 0.9, 2)
    assert reseeded.build_example(*cell) != suite.build_example(*cell)


def test_batches_are_bounded_and_lazy(haystacks: dict[str, Haystack]) -> None:
    suite = NeedleSuite((haystacks["heldout"],), ("multi-key",), (262144,), (0.0, 0.5), 10, 0.25)
    _, cells, examples = next(iter(suite.examples()))
    assert len(cells) == len(examples) == 8 and {len(e.prompt) + 2 for e in examples} == {262144}


def test_invalid_values_raise_user_error(haystacks: dict[str, Haystack]) -> None:
    def create_suite(lengths: tuple[int, ...] = (128,), depths: tuple[float, ...] = (0.5,), samples: int = 4,
                     share: float = 0.0) -> NeedleSuite:
        return NeedleSuite((haystacks["heldout"],), ("multi-key",), lengths, depths, samples, share)

    with pytest.raises(UserError, match="needle length 12:"):
        create_suite(lengths=(128, 12))
    with pytest.raises(UserError, match=r"depths \[1.5\]"):
        create_suite(depths=(1.5,))
    with pytest.raises(UserError, match=r"distractor_share = 1\.0"):
        create_suite(share=1.0)


def test_questions_cover_all_test_sentences(haystacks: dict[str, Haystack]) -> None:
    haystack = haystacks["heldout"]
    suite = NeedleSuite((haystack,), ("multi-key",), (200,), (0.5,), 6, 0.3)
    questions = {(*slots[0], *pair.tolist()) for slots in haystack.form.sentences[True]
                 for pair in haystack.form.pairs[True]}
    assert len(questions) == len(haystack.form.pairs[True]) * len(haystack.form.sentences[True])
    for _, _, examples in suite.examples():
        for example in examples:
            ends = {tuple(example.prompt[i:i + size]) for size in {len(q) for q in questions}
                    for i in range(len(example.prompt))}
            assert len(ends & questions) >= 4
    train = haystacks["train"].form
    statements = {tuple(fill_slots(slots, pair)) for slots in train.sentences[False]
                  for pair in train.pairs[False]}
    assert not statements & questions


Pair = tuple[int, int]


def find_needles(form: NeedleForm, ids: list[int]) -> list[tuple[int, Pair, Pair]]:
    """Return (position, key, value) of all needles in a text."""
    needles = []
    for slots in form.sentences[True]:
        opening, between, closing = slots
        width = len(opening) + len(between) + len(closing) + 4
        for i in range(len(ids) - width + 1):
            key = ids[i + len(opening):][:2]
            value = ids[i + len(opening) + 2 + len(between):][:2]
            if ids[i:i + width] == fill_slots(slots, np.array(key), np.array(value)):
                needles.append((i, (key[0], key[1]), (value[0], value[1])))
    return needles


@pytest.mark.each("distractors", [0, 5])
@pytest.mark.each("depth", [0.0, 0.5, 1.0])
def test_question_refers_to_one_of_the_needles(distractors: int, depth: float,
                                               haystacks: dict[str, Haystack]) -> None:
    haystack = haystacks["heldout"]
    example = build_example(haystack, np.random.default_rng(1), 300, depth, distractors)
    needles = find_needles(haystack.form, example.prompt)
    keys = [key for _, key, _ in needles]
    assert len(set(keys)) == len(keys) == 1 + distractors
    questions = example.prompt[-2:]
    (position,) = [p for p, key, value in needles if list(key) == questions and list(value) == example.answer]
    if not distractors:
        room = len(example.prompt) - 2 * haystack.form.needle_tokens(test=True)
        assert position == pytest.approx(depth * room, abs=4)
    assert len(example.prompt) + len(example.answer) == 300


@torch.no_grad()
def generate_answer(model: Any, example: Example) -> list[int]:
    """Return transformers' answer to one prompt, without our code."""
    ids = torch.tensor([example.prompt])
    result = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2,
                            do_sample=False, eos_token_id=None, pad_token_id=0)
    return result[0, len(example.prompt):].tolist()


@pytest.mark.deep
@pytest.mark.parametrize("family", ["solar_open", "exaone_moe"])
def test_answers_equal_plain_transformers(family: str, imported: dict[str, Path], hf_models: dict[str, Path],
                                          haystacks: dict[str, Haystack], one_rank: None) -> None:
    # longer than K-EXAONE's window (8) and Solar's original context (256)
    suite = NeedleSuite((haystacks["heldout"],), ("single", "multi-key"), (140, 300), (0.4,), 2, 0.2)
    examples = [examples for _, _, examples in suite.examples()]
    model = AutoModelForCausalLM.from_pretrained(hf_models[family]).eval()
    reference = [[generate_answer(model, example) for example in batch] for batch in examples]

    def generate_answers(engine: Engine) -> list[list[list[int]]]:
        return [engine.generate([e.prompt for e in batch], Sampling(2)).continuations for batch in examples]

    assert generate_answers(HfEngine(load_hf(hf_models[family]))) == reference
    assert run_forward_model(Target(imported[family], False), [], None,
                             lambda loaded: generate_answers(MegatronEngine(loaded.policy))) == reference


@pytest.mark.deep
def test_command_scores_checkpoint_and_export_equally(one_rank: None, imported: dict[str, Path],
                                                      hf_models: dict[str, Path], token_shards: Path,
                                                      tmp_path: Path, capsys) -> None:
    EventLog(tmp_path / EVENTS).close()
    options = ["--data", str(token_shards), "--lengths", "96", "128", "--depths", "0", "0.9",
               "--samples", "3", "--run", str(tmp_path)]
    results = []
    for folder in (imported["exaone_moe"], hf_models["exaone_moe"]):
        kinds = ["--kinds", "single", "multi-key", "--json"]
        assert main(["eval", "needle", str(folder), *options, *kinds]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0] == results[1]
    assert ({(c["kind"], c["length_tokens"], c["depth"], c["samples"]) for c in results[0]["cells"]}
            == {(kind, length, depth, 3) for kind in ("single", "multi-key") for length in (96, 128)
                for depth in (0.0, 0.9)})
    events = list(read_events(tmp_path / EVENTS))
    assert [(e["event"], e["when"], e["step"], e["cells"]) for e in events] \
        == [("needle", "eval", step, results[0]["cells"]) for step in (0, None)]
    for extra_options, sentence in (
        (["--nproc", "2", "--set", "a=1"], "--set a=1, --nproc 2: is for checkpoints, and"),
        (["--language", "first=perl"], "--language first=perl: must be SOURCE=LANGUAGE"),
    ):
        assert main(["eval", "needle", str(hf_models["exaone_moe"]), *options, *extra_options]) == 2
        assert sentence in capsys.readouterr().err

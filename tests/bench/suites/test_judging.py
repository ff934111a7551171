"""avg@k, pass@k and cons@k of scored samples against an enumeration of all draws; items without a reward
are named."""

import base64
import itertools
import json
import os
import pickle
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, strategies as st
from suite_items import pack_hidden_tests

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import SettingsError
from megatron_sov.bench.suites import judging, scorers
from megatron_sov.bench.suites.judging import (
    AnswerJudge, Judging, compute_metrics, parse_judging, strip_thoughts)
from megatron_sov.bench.suites.scorers import build_code_tests, unpack_tests
from megatron_sov.eval.pass_at_k import compute_majority_at_k
from megatron_sov.judge.rewards import patterns
from megatron_sov.judge.rewards.reward import Refused, Score, to_result

ANSWERS = ("right", "a", "b", None)
STEM = Judging("t", "stem", reward_settings={"kind": "number"}, row={"answer": "gold"})


def draws(answers: Sequence[str | None], k: int) -> tuple[float, float]:
    """Return pass@k and cons@k by counting all draws."""
    passed, won = [], []
    for drawn in itertools.combinations(answers, k):
        passed.append("right" in drawn)
        votes = Counter(answer for answer in drawn if answer is not None)
        most = [answer for answer, count in votes.items() if count == max(votes.values())]
        won.append(("right" in most) / len(most) if most else 0.0)
    return fmean(passed), fmean(won)


@given(answers=st.lists(st.sampled_from(ANSWERS), min_size=1, max_size=7), data=st.data())
def test_metrics_are_means_over_all_draws(answers: list[str | None], data: Any) -> None:
    k = data.draw(st.integers(1, len(answers)))
    protocol = replace(STEM, samples=len(answers), k=(k,), metrics=("avg", "pass", "cons"))
    passed, won = draws(answers, k)
    counts = Counter(answer for answer in answers if answer in ("a", "b"))
    assert compute_majority_at_k(answers.count("right"), counts, answers.count(None), k) == pytest.approx(won)
    results = [to_result(Score(float(answer == "right"), {"extracted": answer})) for answer in answers]
    assert compute_metrics(protocol, results) == pytest.approx(
        {f"avg@{len(answers)}": answers.count("right") / len(answers), f"pass@{k}": passed, f"cons@{k}": won})


def score_answers(asked: Judging, answers: Sequence[Sequence[str]], gold: Any = "4",
                  **more: Any) -> tuple[list[dict[str, float]], list[str | None]]:
    """Return the figures of items with these answers, and why they have none."""
    judge = AnswerJudge(asked, 1)
    doc = {"gold": gold, **more}
    result = judge.judge_answers(answers, [doc] * len(answers))
    return ([judge.count_metrics(doc, [judged]) for judged in result],
            [judge.describe_failure(judged) for judged in result])


def test_samples_are_judged_and_answers_vote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "BATCH_ROWS", 2)  # items do not end where batches do
    asked = replace(STEM, samples=3, metrics=("avg", "pass", "cons"), k=(3,))
    found, failed = score_answers(asked, [["The answer is 4", "The answer is 5", "answer: 4.0"],
                                          ["5", "5", "the answer is 4"]])
    assert found == [{"avg@3": pytest.approx(2 / 3), "pass@3": 1.0, "cons@3": 1.0},
                     {"avg@3": pytest.approx(1 / 3), "pass@3": 1.0, "cons@3": 0.0}]
    assert failed == [None, None]
    judge = AnswerJudge(asked, 1)
    judge.judge_answers([["4"] * 3], [{"gold": "4"}])
    name, version = judge.judges[""].split()
    assert (name, len(version)) == ("stem", 16)


def test_a_missing_reward_is_not_counted_as_zero() -> None:
    asked = replace(STEM, samples=2, metrics=("avg", "pass"), k=(1, 2))
    found, [failed] = score_answers(asked, [["4", "4"]], gold="four")
    assert found == [{}]
    assert str(failed).startswith("2 of 2 have no reward: answer = 'four' is no number")
    assert asked.metric_names == ["avg@2", "pass@1", "pass@2"]
    _, [failed] = score_answers(replace(STEM, row={"answer": "solution"}), [["4"]])
    assert failed == "1 of 1 have no reward: the data have no 'solution'"


@pytest.mark.parametrize(("text", "mode", "answer"), [
    ("<think>4?</think> 5", "default", "5"),
    ("4? </think> 5", "thinking", "5"),
    ("4", "thinking", ""),
    ("4", "default", "4"),
    ("4", "no-thinking", "4"),
    ("<think>it is 4", "default", ""),
    ("a</think>b</think> 5", "thinking", "5"),
    (" <think>it is 4", "no-thinking", ""),
])
def test_answers_inside_thoughts_do_not_count(text: str, mode: Any, answer: str) -> None:
    assert strip_thoughts(text, mode) == answer
    [found], _ = score_answers(replace(STEM, mode=mode), [[text]], gold=answer or "4")
    assert found["avg@1"] == float(bool(answer))


def test_an_extractor_takes_the_last_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace(STEM, extract=r"답:\s*(\d+)")
    found, _ = score_answers(asked, [["답: 5 ... 답: 4"], ["답: 4 ... 답: 5"], ["4"]])
    assert [scores["avg@1"] for scores in found] == [1.0, 0.0, 0.0]
    monkeypatch.setattr(patterns, "TIME_LIMIT_S", 0.2)
    _, [failed] = score_answers(replace(STEM, extract=r"((?:x+x+)+)y"), [["x" * 5000]])
    assert "takes longer than" in str(failed)


def test_a_reward_that_cannot_be_built_raises_user_error() -> None:
    for reward, settings in (("stem", {"knd": 1}), ("mrcr", {"strict": True}), ("math", {"tail_chars": 0})):
        with pytest.raises(UserError, match="task t"):
            AnswerJudge(Judging("t", reward, settings)).judge_answers([], [])
    with pytest.raises(UserError, match="--judge endpoint=URL --judge model=NAME"):
        AnswerJudge(Judging("t", "judge")).judge_answers([], [])


CALLED = [{"input": '[1, 2]\n"a"', "output": "true", "testtype": "functional"}]
PRINTED = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]


def pack_as_published(value: Any, protocol: int) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value, protocol))).decode()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_text_is_read_in_every_protocol(protocol: int) -> None:
    text = json.dumps(CALLED) + " " * 70_000 + "가"
    assert unpack_tests(pack_as_published(text, protocol), "f") == text
    assert unpack_tests(pack_hidden_tests("[]"), "f") == "[]"


def test_tests_become_calls_or_inputs() -> None:
    doc = {"public_test_cases": json.dumps(CALLED),
           "private_test_cases": pack_hidden_tests(json.dumps(CALLED)),
           "metadata": json.dumps({"func_name": "has"})}
    call = {"function": "Solution().has", "arguments": [[1, 2], "a"], "expected": True}
    assert build_code_tests(doc) == {"tests": [call, call]}
    assert build_code_tests(
        {"public_test_cases": json.dumps(PRINTED), "private_test_cases": None, "metadata": "{}"}
    ) == {"tests": [{"stdin": "1 2\n", "stdout": "3\n"}]}


class Evil:
    """Runs a program where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_of_anything_else_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for value in (Evil(mark), ["[]"], {"a": "[]"}, b"[]", ("[]", "[]"), 3, None):
        for protocol in (0, 2, 4):
            with pytest.raises(Refused):
                unpack_tests(pack_as_published(value, protocol), "f")
    assert not mark.exists()


@pytest.mark.parametrize(
    "value",
    ["no base64!", base64.b64encode(b"no zlib").decode(),
     base64.b64encode(zlib.compress(b"no pickle")).decode(),
     base64.b64encode(zlib.compress(pickle.dumps("[]"))[:-3]).decode()],
)
def test_malformed_private_tests_are_refused(value: str) -> None:
    with pytest.raises(Refused, match="private_test_cases"):
        build_code_tests({"private_test_cases": value})


def test_a_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers, "MAX_BYTES", 1 << 20)
    with pytest.raises(Refused, match="larger than 1 MiB"):
        unpack_tests(pack_as_published("0" * (8 << 20), 4), "f")


@pytest.mark.parametrize(("doc", "message"), [
    ({}, "no tests"),
    ({"public_test_cases": "[1]"}, "must have the texts"),
    ({"public_test_cases": 3}, "must be text"),
    ({"public_test_cases": json.dumps(CALLED), "metadata": "{}"}, "func_name"),
    ({"public_test_cases": json.dumps(CALLED), "metadata": "{"}, "metadata is no JSON"),
    ({"public_test_cases": json.dumps(CALLED), "metadata": "[]"}, "metadata"),
    ({"public_test_cases": json.dumps([CALLED[0] | {"input": "import os"}]),
      "metadata": '{"func_name": "f"}'}, "no value"),
])
def test_a_problem_without_tests_that_can_be_run_is_refused(doc: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        build_code_tests(doc)


def load_judging(*, allow_code: bool = False, generation: Any = None, repeats: int = 1,
                 **settings: Any) -> Judging:
    config = {"task": "t", "output_type": "generate_until", "repeats": repeats,
              "generation_kwargs": generation or {}, "metadata": {"sov": {"reward": "math", **settings}}}
    result = parse_judging(config, allow_code=allow_code)
    assert result is not None
    return result


def test_a_task_without_a_reward_is_lm_evals_own() -> None:
    for metadata in (None, {"version": 1.0}, {"sov": {"suite": "MMLU", "fields": {"question": "text"}}}):
        assert parse_judging({"task": "t", "metadata": metadata}, allow_code=False) is None


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(SettingsError) as e:
        load_judging(mode="fast", metrics=["best"], reward="mth", extract="(", k=[0])
    assert sorted(e.value.codes) == [("bound", "extract"), ("bound", "k.0"), ("choice", "metrics.0"),
                                     ("choice", "mode"), ("choice", "reward")]
    assert "did you mean 'math'?" in str(e.value)
    for wrong in ({"extract": "answer"}, {"samlpes": 2}):
        with pytest.raises(SettingsError):
            load_judging(**wrong)
    with pytest.raises(UserError, match="must be an object"):
        parse_judging({"task": "t", "metadata": {"sov": ["reward"]}}, allow_code=False)
    with pytest.raises(UserError, match="repeats = 4: greedy answers are all the same"):
        load_judging(repeats=4)
    with pytest.raises(UserError, match="write generate_until"):
        parse_judging({"task": "t", "metadata": {"sov": {"reward": "math"}}}, allow_code=False)


@pytest.mark.parametrize(("settings", "message"), [
    ({"reward": "evil.py:Reward"}, "names code to run"),
    ({"reward": "composed"}, "loads rewards named by its settings"),
    ({"reward": "code", "reward_settings": {"command": ["sh", "-c", "id"]}}, "reward_settings.command"),
    ({"reward": "judge", "reward_settings": {"endpoint": "http://evil/v1"}}, "reward_settings.endpoint"),
    ({"reward": "judge", "reward_settings": {"api_key_env": "AWS_SECRET"}}, "reward_settings.api_key_env"),
    ({"reward": "judge", "variants": {"a": {"cache": "/etc/x"}}}, "reward_settings.cache"),
])
def test_a_foreign_file_executes_and_sends_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_judging(**settings)
    assert load_judging(allow_code=True, **settings)  # a user's own may


def test_a_command_asks_for_fewer_samples_and_other_judges() -> None:
    config = {"task": "t", "output_type": "generate_until", "repeats": 64,
              "generation_kwargs": {"do_sample": True, "temperature": 1.0},
              "metadata": {"sov": {"reward": "math", "k": [1, 8, 64], "metrics": ["avg", "pass"],
                                   "reward_settings": {"marked_only": True}}}}
    whole = parse_judging(config, allow_code=False)
    assert whole is not None and whole.metric_names == ["avg@64", "pass@1", "pass@8", "pass@64"]
    fewer = parse_judging(config, allow_code=False, samples=8, changes={"strict": False})
    assert fewer is not None and fewer.metric_names == ["avg@8", "pass@1", "pass@8"]
    assert fewer.reward_settings == {"marked_only": True, "strict": False}
    assert AnswerJudge(fewer).config["repeats"] == 8

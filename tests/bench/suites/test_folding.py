"""avg@k, pass@k and cons@k of judged samples against all draws by hand; what has no reward is named."""

from __future__ import annotations

import base64
import itertools
import json
import os
import pickle
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, strategies as st
from suite_items import packed

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import SettingsError
from megatron_sov.bench.suites import folding
from megatron_sov.bench.suites.folding import code_row, fold, metrics_of, unpacked, without_thoughts
from megatron_sov.bench.suites.protocol import Protocol, SuiteResponse, TaskItem, changed, protocol_of
from megatron_sov.eval.pass_at_k import majority_at_k
from megatron_sov.judge.rewards import patterns
from megatron_sov.judge.rewards.reward import Refused, Result, Score, checked

ANSWERS = ("right", "a", "b", None)
STEM = Protocol("t", reward="stem", reward_settings={"kind": "number"}, row={"answer": "gold"})


def results_of(answers: Sequence[str | None]) -> list[Result]:
    return [checked(Score(float(answer == "right"), {"extracted": answer})) for answer in answers]


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
    protocol = replace(STEM, samples=len(answers), temperature=1.0, k=(k,), metrics=("avg", "pass", "cons"))
    passed, won = draws(answers, k)
    counts = Counter(answer for answer in answers if answer in ("a", "b"))
    assert majority_at_k(answers.count("right"), counts, answers.count(None), k) == pytest.approx(won)
    assert metrics_of(protocol, results_of(answers)) == pytest.approx(
        {f"avg@{len(answers)}": answers.count("right") / len(answers), f"pass@{k}": passed, f"cons@{k}": won}
    )


def folded(protocol: Protocol, responses: Sequence[Sequence[str]], gold: Any = "4") -> Any:
    return fold(
        protocol,
        [TaskItem({"gold": gold}, "2 + 2?", [SuiteResponse(text, "stop") for text in texts])
         for texts in responses],
        1,
    )


def values(found: Any, metric: str) -> list[float]:
    return [item.scores[metric] for item in found.items if metric in item.scores]


def test_samples_are_judged_and_answers_vote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "BATCH_ROWS", 2)  # items do not end where batches do
    protocol = replace(STEM, samples=3, temperature=1.0, metrics=("avg", "pass", "cons"), k=(3,))
    found = folded(protocol,
                   [["The answer is 4", "The answer is 5", "answer: 4.0"], ["5", "5", "the answer is 4"], []])
    assert [item.scores for item in found.items] == [
        {"avg@3": pytest.approx(2 / 3), "pass@3": 1.0, "cons@3": 1.0},
        {"avg@3": pytest.approx(1 / 3), "pass@3": 1.0, "cons@3": 0.0},
        {},
    ]
    assert found.items[0].sample_scores == [1.0, 0.0, 1.0]
    assert [item.failed for item in found.items] == [None, None, "0 of 3 samples are there"]
    assert found.judge["reward"]["name"] == "stem"
    assert len(found.judge["reward"]["version"]) == 16


def test_what_has_no_reward_is_no_zero() -> None:
    found = folded(replace(STEM, samples=2, temperature=1.0, metrics=("avg", "pass"), k=(1, 2)), [["4", "4"]],
                   gold="four")
    item = found.items[0]
    assert item.scores == {}
    assert item.sample_scores == [None, None]
    assert item.failed is not None
    assert item.failed.startswith("2 of 2 have no reward: answer = 'four' is no number")
    assert values(found, "avg@2") == []
    assert found.metric_names == ["avg@2", "pass@1", "pass@2"]
    missing = folded(replace(STEM, row={"answer": "solution"}), [["4"]])
    assert missing.items[0].failed == "1 of 1 have no reward: the data have no 'solution'"


def test_limits_are_counted() -> None:
    items = [
        TaskItem({"gold": "4"}, "?", [SuiteResponse("4", "stop"), SuiteResponse("4", "length"),
                                      SuiteResponse("", "length")])
    ]
    assert fold(replace(STEM, samples=3, temperature=1.0), items, 1).items[0].num_at_limit == 2


@pytest.mark.parametrize(("text", "mode", "said"), [
    ("<think>4?</think> 5", "default", "5"),
    ("4? </think> 5", "thinking", "5"),
    ("4", "thinking", ""),
    ("4", "default", "4"),
    ("4", "no-thinking", "4"),
    ("<think>it is 4", "default", ""),
    ("a</think>b</think> 5", "thinking", "5"),
    (" <think>it is 4", "no-thinking", ""),
])
def test_thoughts_are_no_answers(text: str, mode: Any, said: str) -> None:
    assert without_thoughts(text, mode) == said
    right = folded(replace(STEM, mode=mode), [[text]], gold=said or "4").items[0].scores["avg@1"]
    assert right == float(bool(said))


def test_an_extractor_takes_the_last_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = replace(STEM, extract=r"답:\s*(\d+)")
    found = folded(protocol, [["답: 5 ... 답: 4"], ["답: 4 ... 답: 5"], ["4"]])
    assert values(found, "avg@1") == [1.0, 0.0, 0.0]
    monkeypatch.setattr(patterns, "TIME_LIMIT_S", 0.2)
    slow = folded(replace(STEM, extract=r"((?:x+x+)+)y"), [["x" * 5000]])
    assert "takes longer than" in str(slow.items[0].failed)


def test_shares_count_as_right_from_a_threshold() -> None:
    protocol = Protocol("t", reward="language",
                        reward_settings={"language": "ko", "also": [], "min_share": 0.95}, right_from=0.95,
                        counts="right")
    texts = ["안녕하세요 " * 20 + "a", "안녕하세요 hello there"]
    rewards = replace(protocol, counts="reward", right_from=1.0)
    assert values(folded(protocol, [[text] for text in texts]), "avg@1") == [1.0, 0.0]
    assert 0.95 < values(folded(rewards, [[texts[0]]]), "avg@1")[0] < 1


def test_mrcr_is_the_ratio_of_difflib() -> None:
    protocol = Protocol("t", reward="mrcr", row={"answer": "gold", "prefix": "mark"})
    item = TaskItem({"gold": "x1A poem about tapirs.", "mark": "x1"}, "?",
                    [SuiteResponse("x1A poem about rocks.")])
    wanted = SequenceMatcher(None, "A poem about rocks.", "A poem about tapirs.").ratio()
    assert values(fold(protocol, [item], 1), "avg@1") == [wanted]
    assert 0 < wanted < 1


def test_answers_to_something_else_are_refused() -> None:
    asked = '[{"role": "user", "content": "Hi"}]'
    protocol = Protocol("t", reward="stem", row={"answer": "gold"}, messages_field="prompt")
    with pytest.raises(UserError, match="was asked as the text of its JSON"):
        fold(protocol, [TaskItem({"gold": "4", "prompt": asked}, f"user: {asked}", [SuiteResponse("4")])], 1)
    with pytest.raises(UserError, match="is played with tools"):
        fold(Protocol("t", environment="booking"), [], 1)


def test_a_reward_that_cannot_be_made_is_the_users_mistake() -> None:
    for reward, settings in (("stem", {"knd": 1}), ("mrcr", {"strict": True}), ("math", {"tail_chars": 0})):
        with pytest.raises(UserError, match="task t"):
            fold(Protocol("t", reward=reward, reward_settings=settings), [], 1)


CALLED = [{"input": '[1, 2]\n"a"', "output": "true", "testtype": "functional"}]
PRINTED = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]


def as_published(value: Any, protocol: int) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value, protocol))).decode()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_text_is_read_in_every_protocol(protocol: int) -> None:
    text = json.dumps(CALLED) + " " * 70_000 + "가"
    assert unpacked(as_published(text, protocol), "f") == text
    assert unpacked(packed("[]"), "f") == "[]"


def test_tests_become_calls_or_inputs() -> None:
    doc = {"public_test_cases": json.dumps(CALLED), "private_test_cases": packed(json.dumps(CALLED)),
           "metadata": json.dumps({"func_name": "has"})}
    call = {"function": "Solution().has", "arguments": [[1, 2], "a"], "expected": True}
    assert code_row(doc) == {"tests": [call, call]}
    assert code_row(
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
                unpacked(as_published(value, protocol), "f")
    assert not mark.exists()


@pytest.mark.parametrize(
    "value",
    ["no base64!", base64.b64encode(b"no zlib").decode(),
     base64.b64encode(zlib.compress(b"no pickle")).decode(),
     base64.b64encode(zlib.compress(pickle.dumps("[]"))[:-3]).decode()],
)
def test_what_is_packed_otherwise_is_refused(value: str) -> None:
    with pytest.raises(Refused, match="private_test_cases"):
        code_row({"private_test_cases": value})


def test_a_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "MAX_BYTES", 1 << 20)
    with pytest.raises(Refused, match="larger than 1 MiB"):
        unpacked(as_published("0" * (8 << 20), 4), "f")


@pytest.mark.parametrize(("doc", "said"), [
    ({}, "no tests"),
    ({"public_test_cases": "[1]"}, "must have the texts"),
    ({"public_test_cases": 3}, "must be text"),
    ({"public_test_cases": json.dumps(CALLED), "metadata": "{}"}, "func_name"),
    ({"public_test_cases": json.dumps(CALLED), "metadata": "{"}, "metadata is no JSON"),
    ({"public_test_cases": json.dumps(CALLED), "metadata": "[]"}, "metadata"),
    (
        {"public_test_cases": json.dumps([CALLED[0] | {"input": "import os"}]),
         "metadata": '{"func_name": "f"}'},
        "no value",
    ),
])
def test_a_problem_without_tests_that_can_be_run_is_refused(doc: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said):
        code_row(doc)


def made(allow_code: bool = False, **settings: Any) -> Protocol:
    protocol = protocol_of({"sov": {"reward": "math", **settings}}, "t", allow_code)
    assert protocol is not None
    return protocol


def test_a_task_without_a_protocol_is_lm_evals_own() -> None:
    assert protocol_of(None, "t") is None
    assert protocol_of({"version": 1.0}, "t") is None
    assert protocol_of({"sov": {"suite": "MMLU", "fields": {"question": "text"}}}, "t") is None


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(SettingsError) as e:
        made(samples=0, top_p=0.0, mode="fast", metrics=["best"], reward="mth", extract="(")
    assert e.value.codes == [
        ("bound", "samples"), ("bound", "top_p"), ("choice", "metrics.0"), ("choice", "mode"),
        ("choice", "reward"), ("bound", "extract")]
    assert "did you mean 'math'?" in str(e.value)
    with pytest.raises(SettingsError) as e:
        made(samples=8, k=[9], reward="", limits={"max_turn": 3})
    assert e.value.codes == [("rule", "samples"), ("rule", "k.0"), ("rule", "reward"),
                             ("unknown", "limits.max_turn")]
    for wrong in ({"extract": "answer"}, {"limits": {"max_turns": 0}}, {"task": "another"}):
        with pytest.raises(SettingsError):
            made(**wrong)
    with pytest.raises(UserError, match="must be an object"):
        protocol_of({"sov": ["samples"]}, "t")


@pytest.mark.parametrize(("settings", "said"), [
    ({"reward": "evil.py:Reward"}, "names code to run"),
    ({"reward": "", "environment": "evil.py:World"}, "names code to run"),
    ({"reward": "composed"}, "loads what its settings name"),
    ({"reward": "", "environment": "verifiers", "environment_settings": {"python": "sh"}},
     "starts a program"),
    ({"reward": "code", "reward_settings": {"command": ["sh", "-c", "id"]}}, "reward_settings.command"),
    ({"reward": "judge", "reward_settings": {"endpoint": "http://evil/v1"}}, "reward_settings.endpoint"),
    ({"reward": "judge", "reward_settings": {"api_key_env": "AWS_SECRET"}},
     "reward_settings.api_key_env"),
    ({"reward": "judge", "variants": {"a": {"cache": "/etc/x"}}}, "reward_settings.cache"),
    ({"reward": "", "environment": "retrieval", "environment_settings": {"corpus": "/etc/passwd"}},
     "must lie in"),
    ({"reward": "", "environment": "retrieval", "environment_settings": {"corpus": "${DATA}/../x"}},
     "must lie in"),
    ({"reward": "", "environment": "retrieval", "environment_settings": {"corpus": "passwd"}},
     "must lie in"),
])
def test_a_strangers_file_runs_nothing_and_sends_nothing(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        made(**settings)
    assert made(True, **settings)  # a user's own may


def test_a_command_changes_a_protocol() -> None:
    protocol = made(samples=64, temperature=1.0, k=[1, 8, 64], metrics=["avg", "pass"],
                    reward_settings={"marked_only": True})
    assert protocol.metric_names == ["avg@64", "pass@1", "pass@8", "pass@64"]
    fewer = changed(protocol, {"samples": 8, "mode": "thinking", "reward_settings": {"strict": False}})
    assert fewer.metric_names == ["avg@8", "pass@1", "pass@8"]
    assert fewer.reward_settings == {"marked_only": True, "strict": False}
    assert fewer.chat_template_kwargs == {"enable_thinking": True}
    assert changed(protocol, {"mode": "no-thinking"}).chat_template_kwargs == {"enable_thinking": False}
    assert protocol.chat_template_kwargs == {}
    assert fewer.as_json()["sampling"] == {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 4096,
                                           "seed": 0, "samples": 8}
    with pytest.raises(UserError, match="samples = 0"):
        changed(protocol, {"samples": 0})


def test_limits_of_agents_stand_with_the_score() -> None:
    protocol = made(reward="", environment="booking", limits={"max_turns": 30})
    limits = protocol.as_json()["agent_limits"]
    assert (limits["max_turns"], limits["max_tool_chars"]) == (30, 4000)
    assert protocol.as_json()["judge"] == "booking"
    assert made().as_json()["agent_limits"] is None

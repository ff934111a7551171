"""Every suite: its data are accepted, its prompt is asked, and a right, a wrong and an unreadable answer get
what they deserve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from suite_items import CASES, write

from megatron_sov.bench.suites.catalogue import check_data, require_data, suite_tasks
from megatron_sov.bench.suites.folding import TURN, fold
from megatron_sov.bench.suites.prompts import LETTERS
from megatron_sov.bench.suites.protocol import Folded, Protocol, SuiteResponse, TaskItem, changed
from megatron_sov.judge.rewards.judge import Judge

TASKS = suite_tasks()
SAMPLED = [name for name, task in TASKS.items() if task.protocol and not task.protocol.environment]
CHOSEN = [name for name, task in TASKS.items() if task.protocol is None]
PLAYED = [name for name, task in TASKS.items() if task.protocol and task.protocol.environment]


def test_there_is_a_case_for_every_task() -> None:
    assert {*SAMPLED, *CHOSEN, *PLAYED} == set(TASKS) == set(CASES)
    assert all(
        task.sov["source"] and task.sov["licence"] and task.sov["prompt_source"] for task in TASKS.values()
    )


@pytest.mark.parametrize("name", TASKS)
def test_its_data_are_accepted_and_its_files_asked_for(name: str, tmp_path: Path) -> None:
    task, case = TASKS[name], CASES[name]
    before = check_data(task, tmp_path)
    assert before.state == "missing"
    assert set(before.missing) == set(case.files)
    write(case, tmp_path)
    found = check_data(task, tmp_path)
    assert found.problems == ()
    assert found.state == "ready"
    require_data(task, tmp_path)


@pytest.mark.parametrize("name", SAMPLED)
def test_answers_get_what_they_deserve(name: str, tmp_path: Path, loaded: Callable[[str], Any],
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    # a judge that reads one word, in place of an endpoint
    monkeypatch.setattr(Judge, "_asked",
                        SimpleNamespace(ask=lambda payload, read: (payload_score(payload), "said")))
    case = CASES[name]
    write(case, tmp_path)
    task = loaded(name)
    doc = task.task_docs[0]
    prompt = task.fewshot_context(doc, task.config.num_fewshot)
    assert case.asked in prompt
    answers = [case.right, case.wrong, case.unreadable]
    if name == "gpqa-diamond":
        other = LETTERS[(LETTERS.index(doc["answer"]) + 1) % 4]
        answers = [f"Answer: {doc['answer']}", f"Answer: {other}", case.unreadable]
    doc = {**doc, TURN: 0} if name == "mt-bench-like" else doc
    folded = scored(name, doc, "framed by a chat template" if name == "mrcr" else prompt, answers)
    for metric in folded.metric_names:
        assert [item.scores[metric] for item in folded.items] == [1.0, 0.0, 0.0], (metric, folded.items)
    assert [item.failed for item in folded.items] == [None] * 3


def payload_score(payload: dict[str, Any]) -> float:
    said = payload["messages"][1]["content"].partition("RESPONSE:")[2]
    rubric = payload["messages"][1]["content"]
    worst, best = (1.0, 10.0) if "10 for" in rubric else (0.0, 2.0 if "Score 2 where" in rubric else 1.0)
    return best if "RIGHT" in said else worst


def scored(name: str, doc: Any, prompt: str, answers: list[str]) -> Folded:
    """Judge answers, each as the only sample of an item."""
    protocol = TASKS[name].protocol
    assert protocol is not None
    protocol = replace(protocol, samples=1, k=())
    if protocol.reward == "judge":
        protocol = changed(protocol,
                           {"reward_settings": {"endpoint": "http://localhost:1/v1", "model": "judge"}})
    return fold(protocol, [TaskItem(doc, prompt, [SuiteResponse(answer, "stop")]) for answer in answers], 1)


@pytest.mark.parametrize("name", CHOSEN)
def test_the_most_probable_choice_counts(name: str, tmp_path: Path, loaded: Callable[[str], Any]) -> None:
    write(CASES[name], tmp_path)
    task = loaded(name)
    for doc in task.task_docs:
        choices, target = task.doc_to_choice(doc), task.doc_to_target(doc)
        gold = target if isinstance(target, int) else choices.index(target)
        best = [
            [(0.0 if i == chosen else -9.0, False) for i in range(len(choices))]
            for chosen in (gold, (gold + 1) % len(choices))
        ]
        assert [task.process_results(doc, found)["acc"] for found in best] == [1.0, 0.0]


def test_questions_that_belong_together_are_one_cluster(tmp_path: Path, loaded: Callable[[str], Any]) -> None:
    write(CASES["mmmlu"], tmp_path)
    protocol = TASKS["mmmlu"].protocol
    assert isinstance(protocol, Protocol)
    assert {protocol.cluster(doc) for doc in loaded("mmmlu").task_docs} == {"1"}  # one question, 14 languages
    assert TASKS["aime24"].protocol is not None
    assert TASKS["aime24"].protocol.cluster({"problem": "x"}) is None


def test_gpqa_has_its_options_in_an_order_of_the_question(tmp_path: Path,
                                                          loaded: Callable[[str], Any]) -> None:
    write(CASES["gpqa-diamond"], tmp_path)
    docs, again = list(loaded("gpqa-diamond").task_docs), list(loaded("gpqa-diamond").task_docs)
    assert docs == again
    assert len({doc["answer"] for doc in docs}) > 1
    for doc in docs:
        assert doc["options"][LETTERS.index(doc["answer"])] == "the.  right one".replace(".  ", ". ")


def test_a_judge_without_an_address_is_asked_for() -> None:
    from megatron_sov.base.errors import UserError

    protocol = TASKS["nitibench"].protocol
    assert protocol is not None
    with pytest.raises(UserError, match="--judge endpoint=URL model=NAME"):
        fold(protocol, [TaskItem({"question": "q", "answer": "a"}, "q", [SuiteResponse("r")])], 1)

"""Every suite: its data are accepted, its prompt is asked, and a right, a wrong and an unreadable answer get
what they deserve."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from suite_items import CASES, write

from megatron_sov.cli import run_command
from megatron_sov.commands.eval_suites import protocol_line
from megatron_sov.eval.suites.catalogue import check_data, read_task, require_data, suite_tasks
from megatron_sov.eval.suites.folding import TURN, fold
from megatron_sov.eval.suites.prompts import LETTERS
from megatron_sov.eval.suites.protocol import Folded, Protocol, Response, TaskItem, changed
from megatron_sov.rewards.judge import Judge

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
        assert folded.values(metric) == [1.0, 0.0, 0.0], (metric, folded.items)
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
    return fold(protocol, [TaskItem(doc, prompt, [Response(answer, "stop")]) for answer in answers], 1)


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
    from megatron_sov.errors import UserError

    protocol = TASKS["nitibench"].protocol
    assert protocol is not None
    with pytest.raises(UserError, match="--judge endpoint=URL model=NAME"):
        fold(protocol, [TaskItem({"question": "q", "answer": "a"}, "q", [Response("r")])], 1)


PAGE = (Path(__file__).parents[3] / "docs/eval_suites.md").read_text(encoding="utf-8")


def files_of_the_page(folder: Path) -> None:
    for name, content in re.findall(r"`([\w/.-]+\.(?:csv|yaml))`:\n\n```[a-z]+\n(.*?)^```", PAGE,
                                    re.MULTILINE | re.DOTALL):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def test_what_the_page_shows_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    files_of_the_page(tmp_path)
    lines = [line for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
             for line in block.splitlines()]
    assert len(lines) == 4
    assert [run_command(shlex.split(line)[1:], 0.0) for line in lines] == [0] * 4
    assert "aime24  ready  2      2 items; the release has 30" in capsys.readouterr().out


def test_the_table_is_the_catalogue() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", PAGE, re.MULTILINE)
    told = {name: (suite, items, protocol) for name, suite, items, _, protocol in rows}
    assert told == {name: (task.sov["suite"], _items(task.sov), protocol_line(task.protocol))
                    for name, task in suite_tasks().items()}
    files = {name: cell for name, _, _, cell, _ in rows}
    assert "`mmlu/dev.jsonl`, `mmlu/test.jsonl`" in files["mmlu"]
    assert files["mmmlu"] == "`mmmlu/`: 14 files"


def _items(sov: object) -> str:
    assert isinstance(sov, dict)
    return f"{sov['items']:,}" if "items" in sov else "yours" if sov.get("kind") == "like" else "-"


def test_the_task_of_the_page_is_judged(tmp_path: Path) -> None:
    files_of_the_page(tmp_path)
    task = read_task(tmp_path / "tasks/capitals.yaml")
    assert task is not None
    assert task.protocol is not None
    assert task.protocol.metric_names == ["avg@4", "pass@1", "pass@4", "cons@1", "cons@4"]
    row = {"country": "Korea", "capital": "Seoul"}
    (tmp_path / "capitals").mkdir()
    (tmp_path / "capitals/test.jsonl").write_text(json.dumps(row) + "\n")
    assert check_data(task, tmp_path).state == "ready"
    answers = ["Answer: Seoul", "Answer: seoul.", "Answer: Busan", "I do not know where on earth it could be"]
    found = fold(task.protocol, [TaskItem(row, "q", [Response(answer) for answer in answers])], 1)
    assert found.items[0].scores["avg@4"] == 0.5
    assert found.items[0].scores["cons@4"] == 1.0

"""Every suite loads its data, builds its prompt, and scores a correct, a wrong and an unreadable answer."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from suite_items import CASES, write

from megatron_sov.base.errors import UserError
from megatron_sov.bench.lm.task_files import SUITES, TaskFolder, find_tasks, get_sov_metadata
from megatron_sov.bench.lm.tasks import LoadedTasks
from megatron_sov.bench.suites.data import LETTERS, find_field_problem, load_rows, rename_fields
from megatron_sov.judge.rewards.judge import Judge

CATALOG = find_tasks([TaskFolder(SUITES, trusted=True)])
TASKS = {name: definition.config for name, definition in CATALOG.definitions.items()}
CHOSEN = [name for name in TASKS if "reward" not in TASKS[name]["metadata"]["sov"]]
Load = Callable[[str], LoadedTasks]
Loaded = Callable[[str], Any]


def test_every_task_has_a_case() -> None:
    assert set(TASKS) == set(CASES)
    assert all(config["metadata"]["sov"][name] for config in TASKS.values()
               for name in ("source", "licence", "prompt_source"))


def payload_score(payload: dict[str, Any]) -> float:
    response = payload["messages"][1]["content"].partition("RESPONSE:")[2]
    best = 2.0 if "Score 2 where" in payload["messages"][1]["content"] else 1.0
    return best if "RIGHT" in response else 0.0


@pytest.mark.tier1_cases(6)
@pytest.mark.parametrize("name", [name for name in TASKS if name not in CHOSEN])
def test_answers_get_the_expected_scores(name: str, tmp_path: Path, load: Load,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    # a judge that reads one word, in place of an endpoint
    monkeypatch.setattr(Judge, "_endpoint",
                        SimpleNamespace(ask=lambda payload, read: (payload_score(payload), "said")))
    case = CASES[name]
    write(case, tmp_path)
    found = load(name)
    task, judge = found.tasks[name], found.judges[name]
    doc = task.task_docs[0]
    prompt = task.fewshot_context(doc, task.config.num_fewshot)
    assert case.asked in prompt
    answers = [case.right, case.wrong, case.unreadable]
    if name == "gpqa-diamond":
        other = LETTERS[(LETTERS.index(doc["answer"]) + 1) % 4]
        answers = [f"Answer: {doc['answer']}", f"Answer: {other}", case.unreadable]
    if judge.judging.reward == "ifeval":
        pytest.importorskip("if_verifiable", reason="extra rl")
    if judge.judging.reward == "judge":
        settings = {"endpoint": "http://localhost:1/v1", "model": "judge"}
        object.__setattr__(judge.judging, "reward_settings", {**judge.judging.reward_settings, **settings})
    k = judge.judging.samples
    judged = judge.judge_answers([[answer] * k for answer in answers], [doc] * 3)
    scores = [task.process_results(doc, [found]) for found in judged]
    assert [set(score) for score in scores] == [set(judge.judging.metric_names)] * 3
    for metric in judge.judging.metric_names:
        assert [score[metric] for score in scores] == [1.0, 0.0, 0.0], metric
    assert [judge.describe_failure(found) for found in judged] == [None] * 3


@pytest.mark.parametrize("name", CHOSEN)
def test_the_most_probable_choice_counts(name: str, tmp_path: Path, loaded: Loaded) -> None:
    write(CASES[name], tmp_path)
    task = loaded(name)
    for doc in task.task_docs:
        choices, target = task.doc_to_choice(doc), task.doc_to_target(doc)
        gold = target if isinstance(target, int) else choices.index(target)
        best = [[(0.0 if i == chosen else -9.0, False) for i in range(len(choices))]
                for chosen in (gold, (gold + 1) % len(choices))]
        assert [task.process_results(doc, found)["acc"] for found in best] == [1.0, 0.0]


def test_gpqa_has_its_options_in_an_order_of_the_question(tmp_path: Path, loaded: Loaded) -> None:
    write(CASES["gpqa-diamond"], tmp_path)
    docs = list(loaded("gpqa-diamond").task_docs)
    assert docs == list(loaded("gpqa-diamond").task_docs)
    assert len({doc["answer"] for doc in docs}) > 1
    assert {doc["options"][LETTERS.index(doc["answer"])] for doc in docs} == {"the. right one"}


@pytest.mark.parametrize(("rule", "good", "bad"), [
    ("text", ["a"], ["", " ", 3, None, ["a"]]),
    ("texts 2..3", [["a", "b"], list("abc")], [["a"], list("abcd"), "ab"]),
    ("integer 0..3", [0, 3], [-1, 4, True, "3"]),
    ("letter A..D", ["A", "D"], ["E", "a", "AB", 1]),
    ("value", [3, 0.5, "x"], ["", None, [], True]),
    ("list", [[1]], [[], {}]),
    ("text or null", [None, "a"], ["", 3]),
])
def test_each_extraction_rule_finds_its_answer(rule: str, good: list[Any], bad: list[Any]) -> None:
    assert [value for value in good if find_field_problem("f", rule, {"f": value})] == []
    assert [value for value in bad if not find_field_problem("f", rule, {"f": value})] == []


def test_wrong_rows_are_named_by_file_row_and_rule(tmp_path: Path, load: Load) -> None:
    write(CASES["mmlu"], tmp_path)
    test = tmp_path / "mmlu/test.jsonl"
    rows = [json.loads(line) for line in test.read_text().splitlines()]
    rows[1]["answer"] = 4
    test.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"row 2: answer = 4 must be a whole number from 0 to 3"):
        load("mmlu")
    test.unlink()
    with pytest.raises(UserError, match=r"test.jsonl does not exist; put the rows of cais/mmlu"):
        load("mmlu")


def test_a_publishers_file_is_read_under_its_own_names(tmp_path: Path, load: Load) -> None:
    (tmp_path / "aime24").mkdir()
    (tmp_path / "aime24/test.csv").write_text("ID,Problem,Answer\nI-1,How many edges has a cube?,12\n")
    [doc] = load("aime24").tasks["aime24"].task_docs
    assert (doc["problem"], doc["answer"], doc["row"]) == ("How many edges has a cube?", "12", 1)
    assert rename_fields({"question": "q", "problem": "p"}, {"problem": ["question"]})["problem"] == "p"
    with pytest.raises(UserError, match="contains no questions"):
        load_rows({"test": []}, {"fields": {}})


def test_a_field_names_the_group_of_an_item(tmp_path: Path, loaded: Loaded) -> None:
    write(CASES["mmmlu"], tmp_path)
    task = loaded("mmmlu")
    # one question in 14 languages
    cluster_field = get_sov_metadata(task.get_config("metadata"))["cluster_field"]
    assert {doc[cluster_field] for doc in task.task_docs} == {1}


def test_few_shot_examples_of_a_group_are_required(tmp_path: Path, loaded: Loaded) -> None:
    write(CASES["mmlu"], tmp_path)
    task = loaded("mmlu")
    with pytest.raises(UserError, match="have 5 examples of"):
        task.fewshot_context(task.task_docs[0], 6)

"""Rules of data: what a wrong file is told, and what lm-eval is given."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from suite_items import CASES, write

from megatron_sov.base.errors import UserError
from megatron_sov.bench.suites.catalogue import (
    TaskRule, check_data, chosen, load, read_task, renamed, require_data, suite_tasks)
from megatron_sov.cli import run_command

TASKS = suite_tasks()


@pytest.mark.parametrize(("rule", "good", "bad"), [
    ("text", ["a"], ["", " ", 3, None, ["a"]]),
    ("string", ["", "a"], [3, None]),
    ("texts", [["a"], ["", "b"]], [[], ["a", 3], "ab"]),
    ("texts 4", [list("abcd")], [list("abc"), list("abcde")]),
    ("texts 2..3", [["a", "b"], list("abc")], [["a"], list("abcd")]),
    ("integer", [3, -1], [True, 3.0, "3"]),
    ("integer 0..3", [0, 3], [-1, 4]),
    ("letter A..D", ["A", "D"], ["E", "a", "AB", 1]),
    ("value", [3, 0.5, "x"], ["", None, [], True]),
    ("list", [[1]], [[], {}]),
    ("object", [{}], [[]]),
    ("any", [0, "", []], [None]),
    ("text or null", [None, "a"], ["", 3]),
])
def test_a_rule_takes_what_it_says(rule: str, good: list[Any], bad: list[Any]) -> None:
    made = TaskRule("f", rule)
    assert [value for value in good if made.problem({"f": value})] == []
    assert [value for value in bad if not made.problem({"f": value})] == []
    assert bool(made.problem({})) == ("or null" not in rule)


def test_a_rule_that_is_none_is_refused() -> None:
    for rule in ("number", "text 4 5", 3, "texts four"):
        with pytest.raises(UserError, match="the field 'f'"):
            TaskRule("f", rule)


def test_publishers_names_of_fields() -> None:
    aliases = {"problem": ["Problem", "question"]}
    assert renamed({"question": "q", "x": 1}, aliases) == {"problem": "q", "x": 1}
    assert renamed({"problem": "p", "question": "q"}, aliases) == {"problem": "p", "question": "q"}


def test_wrong_rows_are_named_by_file_line_and_rule(tmp_path: Path) -> None:
    write(CASES["mmlu"], tmp_path)
    test = tmp_path / "mmlu/test.jsonl"
    rows = [json.loads(line) for line in test.read_text().splitlines()]
    rows[1]["answer"] = 4
    del rows[2]["choices"]
    test.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = check_data(TASKS["mmlu"], tmp_path)
    assert found.problems == (f"{test}: line 2: answer = 4 must be a whole number from 0 to 3",
                              f"{test}: line 3: has no 'choices'")
    with pytest.raises(UserError, match=r"line 2: answer = 4.*and 1 more problems.*check"):
        require_data(TASKS["mmlu"], tmp_path)
    with pytest.raises(UserError, match="line 2: answer = 4"):
        load({"test": str(test)}, TASKS["mmlu"].sov)
    test.write_text('{"question": "q"\n')
    assert "is no JSON" in check_data(TASKS["mmlu"], tmp_path).problems[0]
    test.write_text("")
    assert check_data(TASKS["mmlu"], tmp_path).problems == (f"{test}: has no rows",)
    test.unlink()
    with pytest.raises(UserError,
                       match=r"has no mmlu/test.jsonl; put the rows of cais/mmlu.*question \(text\)"):
        require_data(TASKS["mmlu"], tmp_path)


def test_too_few_shots_of_a_subject_are_told(tmp_path: Path) -> None:
    write(CASES["mmlu"], tmp_path)
    dev = tmp_path / "mmlu/dev.jsonl"
    dev.write_text("".join(dev.read_text().splitlines(keepends=True)[:-1]))
    assert check_data(TASKS["mmlu"], tmp_path).problems == (
        f"{dev}: has 4 shots of 'abstract_algebra', and needs 5",
    )


def test_another_number_of_items_is_told(tmp_path: Path) -> None:
    write(CASES["aime24"], tmp_path)
    assert check_data(TASKS["aime24"], tmp_path).note == "2 items; the release has 30"
    assert check_data(TASKS["aime25"], tmp_path).note == ""  # nothing is there


def test_numbers_beside_texts_and_nested_values_come_through(tmp_path: Path,
                                                             loaded: Callable[[str], Any]) -> None:
    write(CASES["aime24"], tmp_path)
    assert [doc["answer"] for doc in loaded("aime24").task_docs] == [r"\frac{5}{6}", "204"]
    path = tmp_path / "ifeval/test.jsonl"
    path.parent.mkdir()
    rows = [
        {"prompt": "p", "instruction_id_list": ["a"], "kwargs": [kwargs]}
        for kwargs in ({"n": 1}, {"n": "x"}, {})
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [json.loads(doc["kwargs"]) for doc in loaded("ifeval").task_docs] == [
        row["kwargs"] for row in rows
    ]


def test_a_task_is_found_by_name_and_tag() -> None:
    assert [task.name for task in chosen(["math500", "livecodebench"])] == ["lcb-v5", "lcb-v6", "math500"]
    with pytest.raises(UserError, match="did you mean 'aime2"):
        chosen(["aime2"])


def test_task_files_that_are_broken_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text("a: [")
    with pytest.raises(UserError, match="is no YAML"):
        read_task(path)
    path.write_text("doc_to_text: !function os.system\n")
    assert read_task(path) is None
    path.write_text("task: t\ndoc_to_text: !function os.system\n")
    task = read_task(path)
    assert task is not None
    assert (task.config["doc_to_text"], task.protocol) == ("os.system", None)


def test_lm_eval_sees_all_that_come_along() -> None:
    from lm_eval.tasks import TaskManager

    from megatron_sov.bench.suites.catalogue import SUITES_FOLDER

    manager = TaskManager(include_path=str(SUITES_FOLDER), include_defaults=False)
    assert set(manager.all_subtasks) == set(TASKS)
    assert {tag for task in TASKS.values() for tag in task.tags} == set(manager.all_tags)


Out = pytest.CaptureFixture[str]


def suites(*words: str | Path) -> int:
    return run_command(["eval", "suites", *map(str, words)], 0.0)


def test_the_list_tells_data_and_protocol(capsys: Out) -> None:
    assert suites("--tasks", "aime24,mmlu,tau2-like") == 0
    out = capsys.readouterr().out
    assert "aime24             30      64 x 40,960 tokens, T 1, top_p 0.95; math: avg@64" in out
    assert "mmlu               14,042  log-likelihood of the choices" in out
    assert "booking in 30 turn(s)" in out
    assert suites("--json") == 0
    told = {task["task"]: task for task in json.loads(capsys.readouterr().out)}
    assert len(told) > 30
    assert told["lcb-v6"]["items"] == 131
    assert told["lcb-v6"]["protocol"]["sampling"]["temperature"] == 0.6
    assert told["hmmt25"]["published_as"] == "hmmt25_feb"
    assert told["mmlu"]["files"] == ["mmlu/dev.jsonl", "mmlu/test.jsonl"]


AIME: list[dict[str, Any]] = [
    {"ID": i, "Problem": f"What is {i}?", "Answer": i, "day": f"2025-02-{i:02}"} for i in (5, 6, 7)
]


def source(folder: Path, ending: str) -> Path:
    path = folder / f"aime.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(AIME), path)
    elif ending == "csv":
        with open(path, "w", newline="") as f:
            writer = csv.DictWriter(f, list(AIME[0]))
            writer.writeheader()
            writer.writerows(AIME)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in AIME))
    return path


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_publishers_file_is_brought_and_then_ready(tmp_path: Path, ending: str, capsys: Out) -> None:
    data = tmp_path / "data"
    words = ["bring", "--tasks", "aime25", "--from", source(tmp_path, ending), "--data-dir", data]
    assert suites(*words, "--where", "day=2025-02-06..2025-02-07") == 0
    assert capsys.readouterr().out == f"{data}/aime25/test.jsonl: 1 of 3 rows\n"
    with pytest.raises(UserError, match="--overwrite"):
        suites(*words)
    assert suites(*words, "--overwrite", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 3
    rows = [json.loads(line) for line in (data / "aime25/test.jsonl").read_text().splitlines()]
    answers: list[Any] = ["5", "6", "7"] if ending == "csv" else [5, 6, 7]
    assert rows == [
        {"problem": row["Problem"], "answer": answer} for row, answer in zip(AIME, answers, strict=True)
    ]
    assert suites("check", "--tasks", "aime25", "--data-dir", data) == 0
    assert "aime25  ready  3      3 items; the release has 30" in capsys.readouterr().out


def test_the_check_names_what_is_wrong(tmp_path: Path, capsys: Out) -> None:
    assert suites("check", "--data-dir", tmp_path) == 0  # nobody needs all
    assert suites("check", "--data-dir", tmp_path, "--tasks", "aime24") == 2
    (tmp_path / "aime24").mkdir()
    (tmp_path / "aime24/test.jsonl").write_text('{"problem": "p"}\n')
    capsys.readouterr()
    assert suites("check", "--data-dir", tmp_path) == 2
    assert f"{tmp_path}/aime24/test.jsonl: line 1: has no 'answer'" in capsys.readouterr().out
    assert suites("check", "--data-dir", tmp_path, "--json") == 2
    found = {check["task"]: check for check in json.loads(capsys.readouterr().out)}
    assert (found["aime24"]["state"], found["aime25"]["state"]) == ("wrong", "missing")


def test_mistakes_of_the_command_are_one_sentence(tmp_path: Path) -> None:
    good = source(tmp_path, "jsonl")
    (tmp_path / "bad.parquet").write_text("no table")
    (tmp_path / "bad.csv").write_text('a,b\n"1,2\n')
    (tmp_path / "bad.jsonl").write_text('{"Problem": "p"}\n')
    bring = ["bring", "--data-dir", tmp_path / "d", "--tasks"]
    for words, said in (
        (["check"], "needs --data-dir"),
        (["check", "--data-dir", tmp_path / "no"], "is no folder"),
        (["--where", "day=1..2", "--overwrite"], "--where, --overwrite: is for `eval suites bring`"),
        ([f"--run={tmp_path}"], "--run"),
        (["--tasks", "aime2"], "did you mean 'aime2"),
        (["bring", "--data-dir", "d"], "with one task"),
        ([*bring, "livecodebench", "--from", good], "with one task"),
        ([*bring, "aime24"], "needs --input"),
        ([*bring, "mmlu", "--from", good], "must be one of mmlu/dev.jsonl, mmlu/test.jsonl"),
        ([*bring, "aime24", "--from", good, "--as", "../x"], "must be one of aime24/test.jsonl"),
        ([*bring, "aime24", "--from", tmp_path / "no.csv"], "there is no such file"),
        ([*bring, "aime24", "--from", __file__], "must end with .jsonl, .parquet, .csv"),
        ([*bring, "aime24", "--from", tmp_path / "bad.parquet"], "is no Parquet file"),
        ([*bring, "aime24", "--from", tmp_path / "bad.csv"], "is no CSV file"),
        (
            [*bring, "aime24", "--from", tmp_path / "bad.jsonl"],
            "row 1: has no 'answer'; its columns are Problem",
        ),
        ([*bring, "aime24", "--from", good, "--where", "day"], "FIELD=FROM..TO"),
        ([*bring, "aime24", "--from", good, "--where", "dya=1..2"], "a row has no such field; it has Answer"),
        (
            [*bring, "aime24", "--from", good, "--where", "day=2026..2027"],
            "has no rows that --where asks for",
        ),
    ):
        with pytest.raises(UserError, match=said) as e:
            suites(*words)
        assert "\n" not in str(e.value)
    assert not (tmp_path / "d").exists()

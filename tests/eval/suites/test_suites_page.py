"""docs/eval_suites.md: its commands run, its table is the catalogue's, its task file is one."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from megatron_sov.cli import run_command
from megatron_sov.commands.eval_suites import protocol_line
from megatron_sov.eval.suites.catalogue import check_data, read_task, suite_tasks
from megatron_sov.eval.suites.folding import fold
from megatron_sov.eval.suites.protocol import Response, TaskItem

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

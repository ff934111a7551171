"""Every command of docs/generate.md and of eval's pages runs, in order; what they say of suites is so."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from megatron_sov.bench.suites.catalogue import check_data, read_task, suite_tasks
from megatron_sov.bench.suites.folding import fold
from megatron_sov.bench.suites.protocol import SuiteResponse, TaskItem
from megatron_sov.cli import main
from megatron_sov.commands.evaluate.benchmarks import protocol_line

DOCS = Path(__file__).parents[2] / "docs"
SUITES_PAGE = (DOCS / "eval_suites.md").read_text(encoding="utf-8")


def write_files(text: str, folder: Path) -> None:
    for name, content in re.findall(r"`([\w/.-]+\.[a-z]+)`:\n\n```[a-z]+\n(.*?)^```", text,
                                    re.MULTILINE | re.DOTALL):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


@pytest.mark.parametrize(("page", "count", "said"), [
    ("generate.md", 5, ""), ("eval.md", 8, ""), ("eval_lm.md", 2, r"task +metric +value .* at limit\n"),
    ("eval_suites.md", 4, "aime24  ready  2      2 items; the release has 30")])
def test_what_the_page_shows_runs(page: str, count: int, said: str, one_rank: None,
                                  imported: dict[str, Path], hf_models: dict[str, Path], token_shards: Path,
                                  tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    folders = {"my-checkpoint": imported["solar_open"], "my-model": hf_models["solar_open"],
               "shards": token_shards}
    for name, folder in folders.items():
        shutil.copytree(folder, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    text = (DOCS / page).read_text(encoding="utf-8")
    write_files(text, tmp_path)
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    # that one: tests/train
    lines = [line for line in commands if not line.startswith("megatron-sov pretrain")]
    assert len(lines) == count
    for line in lines:
        program, *arguments = shlex.split(line.split(" --nproc")[0])  # several processes: tests/infer
        assert (program, main(arguments)) == ("megatron-sov", 0), line
    assert re.search(said, capsys.readouterr().out)
    if page == "eval_lm.md":
        [code] = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        found: dict[str, object] = {}
        exec(code, found)
        assert found["accuracy"].clusters == 2  # type: ignore[attr-defined]
        wrong = 3 - round(3 * found["accuracy"].value)  # type: ignore[attr-defined]
        assert len(found["wrong"]) == wrong  # type: ignore[arg-type]


def test_the_table_is_the_catalogue() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", SUITES_PAGE, re.MULTILINE)
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
    write_files(SUITES_PAGE, tmp_path)
    task = read_task(tmp_path / "tasks/capitals.yaml")
    assert task is not None
    assert task.protocol is not None
    assert task.protocol.metric_names == ["avg@4", "pass@1", "pass@4", "cons@1", "cons@4"]
    row = {"country": "Korea", "capital": "Seoul"}
    (tmp_path / "capitals").mkdir()
    (tmp_path / "capitals/test.jsonl").write_text(json.dumps(row) + "\n")
    assert check_data(task, tmp_path).state == "ready"
    answers = ["Answer: Seoul", "Answer: seoul.", "Answer: Busan", "I do not know where on earth it could be"]
    found = fold(task.protocol, [TaskItem(row, "q", [SuiteResponse(answer) for answer in answers])], 1)
    assert found.items[0].scores["avg@4"] == 0.5
    assert found.items[0].scores["cons@4"] == 1.0

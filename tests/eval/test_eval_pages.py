"""`generate` in docs/serve.md and the evaluation pages run in order, and the table of suites is correct."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.bench.lm.settings import TaskSources
from megatron_sov.bench.lm.task_files import SUITES, TaskFolder, find_tasks
from megatron_sov.bench.lm.tasks import load_tasks
from megatron_sov.bench.suites.judging import parse_judging
from megatron_sov.cli import main
from tests.pages_typed import page_section, page_text

SUITES_PAGE = page_section("eval_lm.md", "Benchmark suites")


def write_files(text: str, folder: Path) -> None:
    for name, content in re.findall(r"`([\w/.-]+\.[a-z]+)`:\n\n```[a-z]+\n(.*?)^```", text,
                                    re.MULTILINE | re.DOTALL):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


@pytest.mark.deep
@pytest.mark.parametrize(("page", "heading", "num_commands", "message"), [
    ("serve.md", "Complete prompts", 5, ""), ("eval.md", "", 5, ""),
    ("eval_lm.md", "", 3, r"(?s)task +metric +value .* at limit\n.*aime24  avg@1 +0.0000")])
def test_commands_of_the_page_run(page: str, heading: str, num_commands: int, message: str, one_rank: None,
                                  imported: dict[str, Path], hf_models: dict[str, Path], token_shards: Path,
                                  cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = {"my-checkpoint": imported["solar_open"], "my-model": hf_models["solar_open"],
               "shards": token_shards}
    for name, folder in folders.items():
        shutil.copytree(folder, cwd / name)
    text = page_section(page, heading) if heading else page_text(page)
    write_files(text, cwd)
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    # that one: tests/train
    lines = [line for line in commands if not line.startswith("megatron-sov pretrain")]
    assert len(lines) == num_commands
    for line in lines:
        program, *arguments = shlex.split(line.split(" --nproc")[0])  # several processes: tests/infer
        assert (program, main(arguments)) == ("megatron-sov", 0), line
    assert re.search(message, capsys.readouterr().out)
    if page == "eval_lm.md":
        [code] = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        namespace: dict[str, object] = {}
        exec(code, namespace)
        assert namespace["accuracy"].clusters == 2  # type: ignore[attr-defined]
        wrong = 3 - round(3 * namespace["accuracy"].value)  # type: ignore[attr-defined]
        assert len(namespace["wrong"]) == wrong  # type: ignore[arg-type]


def test_table_of_the_page_matches_task_files() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", SUITES_PAGE, re.MULTILINE)
    table = {name: (suite, items, protocol) for name, suite, items, _, protocol in rows}
    catalog = find_tasks([TaskFolder(SUITES, trusted=True)])
    tasks = {name: definition.config for name, definition in catalog.definitions.items()}
    assert table == {name: (config["metadata"]["sov"]["suite"], _format_items(config["metadata"]["sov"]),
                            _format_protocol(config)) for name, config in tasks.items()}
    files = {name: cell for name, _, _, cell, _ in rows}
    assert "`mmlu/dev.jsonl`, `mmlu/test.jsonl`" in files["mmlu"]
    assert files["mmmlu"] == "`mmmlu/`: 14 files"


def _format_items(sov: dict[str, Any]) -> str:
    if "items" in sov:
        return f"{sov['items']:,}"
    return "yours" if sov.get("kind") == "like" else "-"


def _format_protocol(config: dict[str, Any]) -> str:
    judging = parse_judging(config, allow_code=True)
    if judging is None:
        return "log-likelihood of the choices"
    sampling = config["generation_kwargs"]
    sampling_text = "greedy"
    if sampling.get("do_sample"):
        sampling_text = f"T {sampling['temperature']:g}, top_p {sampling['top_p']:g}"
    return (f"{judging.samples} x {sampling['max_gen_toks']:,} tokens, {sampling_text}; {judging.reward}: "
            f"{', '.join(judging.metric_names)}")


def test_task_of_the_page_runs(tmp_path: Path) -> None:
    write_files(SUITES_PAGE, tmp_path)
    (tmp_path / "capital-questions").mkdir()
    row = {"country": "Korea", "capital": "Seoul"}
    (tmp_path / "capital-questions/test.jsonl").write_text(json.dumps(row) + "\n")
    task = "capital-questions"
    judge = load_tasks([task], TaskSources((tmp_path / "tasks",), tmp_path)).judges[task]
    judge.workers = 1
    answers = ["Answer: Seoul", "Answer: seoul.", "Answer: Busan", "I do not know where on earth it could be"]
    [judged] = judge.judge_answers([answers], [row])
    scores = judge.count_metrics(row, [judged])
    assert (scores["avg@4"], scores["cons@4"]) == (0.5, 1.0)
    assert sorted(scores) == ["avg@4", "cons@1", "cons@4", "pass@1", "pass@4"]

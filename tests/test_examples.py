"""examples/: each script runs as its header says, on tiny data, and the notebook runs cell by cell."""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.judge.tools.environment import ToolRefused
from megatron_sov.judge.tools.registry import build_versioned_environment, request_environment
from tests.run_files import read_run_events

EXAMPLES = Path(__file__).parents[1] / "examples"
HEADER = re.compile(r"# What: (.+)\n# Run:  (.+)\n# See:  (.+)\n\n")
CELL = re.compile(r"^# %% .*$", re.MULTILINE)
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


def read_command(name: str) -> list[str]:
    """Return the words of the command in an example's header."""
    header = HEADER.match((EXAMPLES / name).read_text())
    assert header, name
    return shlex.split(header[2])


@pytest.fixture(scope="module")
def site(packed_data: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the headers name."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "examples").symlink_to(EXAMPLES)
    shutil.copytree(packed_data.text, folder / "tokens")
    shutil.copytree(packed_data.tokenizer, folder / "tokenizer")
    texts = [f"Menu | Home | {i}\nThis is the text of page {i}." for i in range(30)] + ["Menu | Home\nShort."]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = [{"prompt": "1 + 1?", "response": "It is 2.", "answer": 2},
            {"prompt": "1 + 1?", "response": "3", "answer": 2},
            {"prompt": "1 + 1?", "response": "2 " * 12, "answer": 2}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


Typed = Callable[[str], str]


@pytest.fixture
def typed(site: Path, run_command: Any, warm_python: str, monkeypatch: pytest.MonkeyPatch) -> Typed:
    """Return a function that runs the command in an example's header and returns its output."""
    monkeypatch.chdir(site)
    monkeypatch.setenv("SOV_TESTS_PYTHON", warm_python)  # by which an example starts commands
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent), prepend=os.pathsep)

    def run(name: str) -> str:
        program, *words = read_command(name)
        result = run_command(*words, program=program)
        assert result.returncode == 0, (name, result.stderr)
        return f"{result.stdout}{result.stderr}"

    return run


def test_each_example_has_a_header_and_a_test() -> None:
    here = Path(__file__).read_text()
    for file in SCRIPTS:
        assert file.name in read_command(file.name)[-1] or f"examples/{file.name}" in " ".join(
            read_command(file.name)), file.name
        assert f'"{file.name}"' in here, f"{file.name}: no test runs it"
    assert len(SCRIPTS) == 8


def test_own_recipe_and_own_objective(typed: Typed, site: Path) -> None:
    assert "complete: step 3" in typed("own_recipe.py")
    assert json.loads((site / "runs/own_recipe/config.json").read_text())["model"]["num_layers"] == 2
    typed("own_objective.py")
    plain, trimmed = (read_run_events(site / "runs" / name, "step")
                      for name in ("own_recipe", "own_objective"))
    # the same weights and data: the difference of the losses matches the stated share
    assert 0 < trimmed[0]["losses"]["trimmed"] < plain[0]["loss"]
    assert 0 < trimmed[0]["meters"]["counted"] < 1


def test_own_reward(typed: Typed, site: Path) -> None:
    typed("own_reward.py")
    scores = map(json.loads, (site / "scores.jsonl").read_text().splitlines())
    assert [round(score["reward"], 3) for score in scores] == [1.0, 0.0, 0.8]


def test_own_tool_world() -> None:
    world, _ = build_versioned_environment(request_environment(f"{EXAMPLES}/own_tool_world.py:Shop", {}))
    world.reset(world.EXAMPLES[0])
    with pytest.raises(ToolRefused, match="pear: 1 in stock"):
        world.call("buy", {"fruit": "pear", "count": 9})
    assert "2 apple in the basket" in str(world.call("buy", {"fruit": "apple", "count": 2}))
    world.call("buy", {"fruit": "pear", "count": 1})
    assert world.score("Done.") == 1
    assert read_command("own_tool_world.py")[:2] == ["megatron-sov", "tools"]


def test_own_data_step(typed: Typed, site: Path) -> None:
    typed("own_data_step.py")
    texts = [json.loads(line)["text"] for line in (site / "cleaned/rows.jsonl").open()]
    assert len(texts) == 30 and not any("Menu" in text for text in texts)


def test_slurm_sweep(typed: Typed) -> None:
    output = typed("slurm_sweep.py")
    assert [float(rate) for rate in re.findall(r"== learning rate (\S+)", output)] == [1e-3, 2e-3, 4e-3]
    assert output.count("#!/bin/bash") == 3 and len(set(re.findall(r"optim\.lr=[\d.]+", output))) == 3


def test_notebook_cell_by_cell(site: Path, monkeypatch: pytest.MonkeyPatch, warm_python: str,
                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(site)
    monkeypatch.setattr(sys, "executable", warm_python)  # by which the interface starts its commands
    _, *cells = CELL.split((EXAMPLES / "notebook.py").read_text())
    assert len(cells) == 5
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"cell {number}", "exec"), names)
    assert names["completion"]["step"] == 3 and len(names["losses"]) == 3
    assert "model.safetensors" in capsys.readouterr().out


@pytest.mark.deep
def test_chat_template(typed: Typed, site: Path, run_command: Any) -> None:
    typed("chat_template.py")
    chats = [{"messages": [{"role": "user", "content": f"Say {i}"},
                           {"role": "assistant", "content": f"{i}!"}]} for i in range(20)]
    (site / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    run_command("pack", "--tokenizer", "my-tokenizer", "--format", "chat", "--input", "chats.jsonl",
                "--output", "chats", "--workers", "1", program="sov-data").check_returncode()
    output = run_command("sample", "chats", "--count", "1", program="sov-data").stdout
    assert re.search(r"USER: Say \d+\nASSISTANT: ⟦\d+!<\|endoftext\|>⟧", output), output

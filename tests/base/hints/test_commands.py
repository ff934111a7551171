"""A path in the place of a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.base.hints.test_words import answer


@pytest.mark.parametrize(("files", "command", "write"), [
    ({"events.jsonl": "", "config.json": "{}"}, "convert {} out", ["convert to-hf {} out"]),
    ({"config.json": "{}", "m.safetensors": ""}, "convert {} out", ["convert from-hf {} out"]),
    ({"latest_checkpointed_iteration.txt": "1"}, "convert {} out", ["convert from-megatron {} out"]),
    ({"manifest.json": json.dumps({"kind": "checkpoint"})}, "convert {} out", ["convert to-hf {} out"]),
    ({"events.jsonl": "", "config.json": "{}"}, "convert {} --to hf --output out", ["convert to-hf {} out"]),
    ({}, "convert {} --to hf -o 'my out' --dtype bfloat16", ["convert to-hf {} 'my out' --dtype bfloat16"]),
    ({"config.json": "{}", "m.safetensors": ""}, "eval {}",
     ["eval ppl {} --data TOKENS", "eval lm {} --tasks TASKS --output scores.json"]),
])
def test_a_path_in_the_place_of_an_action_names_the_action(
        files: dict[str, str], command: str, write: list[str], tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    lines = answer(f"megatron-sov {command.format(tmp_path)}", capsys).splitlines()
    assert [line.strip() for line in lines[1:]] == [f"megatron-sov {line.format(tmp_path)}" for line in write]


@pytest.mark.parametrize("command", ["report", "resume", "chat", "convert to-hf"])
def test_a_folder_of_runs_lists_the_runs(command: str, tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("pretrain", "more/sft"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "events.jsonl").touch()
    out = " out" if command == "convert to-hf" else ""
    assert f"it holds the runs {tmp_path / 'more/sft'}, {tmp_path / 'pretrain'}" in answer(
        f"megatron-sov {command} {tmp_path}{out}", capsys)

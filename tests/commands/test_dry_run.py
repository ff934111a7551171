"""`--dry-run` of the commands that train: what they would do, from the checks of a run, and nothing done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sov.cli import main

SETTINGS = ("train.steps=4", "train.global_batch_size=8", "train.micro_batch_size=4")


def dry(capsys: Any, folder: Path, *words: object) -> list[str]:
    """Run a command that must leave a folder as it is; returns the lines that it prints."""
    before = sorted(folder.rglob("*"))
    chosen = [word for setting in SETTINGS for word in ("--set", setting)]
    assert main([*map(str, words), *chosen, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert sorted(folder.rglob("*")) == before and "error" not in err
    lines: list[str] = out.splitlines()
    assert lines[-1] == "dry run: nothing was written, and nothing ran"
    return lines


def test_a_run_is_told_and_not_begun(capsys: Any, packed_data: Any, tmp_path: Path) -> None:
    phases = 'data.phases=[{"name": "main", "seq_len": 32}]'
    lines = dry(capsys, tmp_path, "pretrain", "tiny-solar-open", "--data", packed_data.text, "--run",
                tmp_path / "run", "--nproc", 2, "--set", "model.vocab_size=368", "--set", phases,
                "--set", "parallel.ep=2")
    assert lines[0].startswith("tiny-solar-open: ") and lines[0].endswith("steps 1 to 4, 1.02 k tokens")
    assert lines[1].startswith("  processes  2: ep 2, dp 2; ")
    assert "text 1.02 k tokens" in lines[2] or "even" in lines[2]
    assert lines[3].startswith(f"  run        {tmp_path / 'run'}, a checkpoint every ")
    assert lines[4].startswith("  start      initial weights, train.seed = ")


@pytest.mark.parametrize("command", ["pretrain", "extend"])
def test_a_hugging_face_folder_is_not_converted(capsys: Any, hf_models: dict[str, Path], token_shards: Path,
                                                tmp_path: Path, command: str) -> None:
    lines = dry(capsys, tmp_path, command, "tiny-solar-open", "--data", token_shards, "--from",
                hf_models["solar_open"], "--run", tmp_path / "run")
    assert (f"  start      {hf_models['solar_open']}, which would be converted into {tmp_path / 'run'}"
            ".from-hf first" in lines)


def test_mistakes_are_those_of_the_run(capsys: Any, packed_data: Any, tmp_path: Path) -> None:
    assert main(["pretrain", "tiny-solar-open", "--data", str(packed_data.text), "--run",
                 str(tmp_path / "run"), "--set", "model.vocab_size=100", "--dry-run"]) == 2
    assert "its tokenizer has 368 ids" in capsys.readouterr().err

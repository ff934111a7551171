"""The command line: a mistake is one line and exit code 2."""

from __future__ import annotations

from pathlib import Path

from megatron_sov.cli import main


def test_command_says_it_in_one_line(tmp_path: Path, capsys) -> None:
    (tmp_path / "more").mkdir()
    assert main(["convert", "to-hf", str(tmp_path), str(tmp_path / "hf"), "--dtype", "bfloat"]) == 2
    assert "did you mean 'bfloat16'?" in capsys.readouterr().err
    assert main(["convert", "inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1

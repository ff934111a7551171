"""What shells are told: all commands of all programs, and their options."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_sov import cli
from megatron_sov.commands.operate.completion import PROGRAMS

ASK = """source {file}
COMP_WORDS=({words}); COMP_CWORD=$(({count} - 1)); _shtab_megatron_sov; echo "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "bash"
    with path.open("w") as f, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", f)
        assert cli.main(["completion", "bash"]) == 0
    return path


@pytest.mark.parametrize(("words", "completed"), [
    ("megatron-sov pretr", "pretrain"), ("megatron-sov rl tra", "train"),
    ("megatron-sov eval contam", "contamination"),
    ("megatron-sov eval nee", "needle"), ("megatron-sov rl store ver", "verify"),
    ("megatron-sov rl train --sto", "--store"), ("megatron-sov completion fi", "fish"),
])
def test_bash_completes(file: Path, words: str, completed: str) -> None:
    ask = ASK.format(file=file, words=words, count=len(words.split()))
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True)
    assert completed in done.stdout.split(), done


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_told_as_much(shell: str, program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell, program]) == 0
    printed = capsys.readouterr().out
    word = {"megatron-sov": "pretrain", "sov-data": "decontaminate", "sov-tokenizer": "graft"}[program]
    assert program in printed and word in printed

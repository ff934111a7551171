"""What shells are told: all commands of all programs, and their options."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_sov import cli
from megatron_sov.commands.operate.completion import PROGRAMS
from megatron_sov.model.config import setting_names

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
    ("megatron-sov eval nee", "needle"), ("megatron-sov rl store sh", "show"),
    ("megatron-sov rl train --sto", "--store"), ("megatron-sov completion fi", "fish"),
    ("megatron-sov pretrain tiny-qwen3 --set train.ste", "train.steps="),
    ("megatron-sov rl run tiny-qwen3 --set rollout.rou", "rollout.rounds="),
])
def test_bash_completes(file: Path, words: str, completed: str) -> None:
    ask = ASK.format(file=file, words=words, count=len(words.split()))
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True)
    assert completed in done.stdout.split(), done


@pytest.mark.parametrize("each", [10, pytest.param(1, marks=pytest.mark.deep)])
def test_bash_completes_every_command_and_each_of_so_many_settings(each: int, file: Path) -> None:
    firsts = sorted({name.split()[0] for name in cli.COMMANDS})
    pairs = [name for name in cli.COMMANDS if " " in name]
    lines = [*(f"megatron-sov {first}" for first in firsts), *(f"megatron-sov {pair}" for pair in pairs),
             *(f"megatron-sov pretrain x --set {name}" for name in list(setting_names())[::each])]
    ask = "\n".join([f"source {file}", *(f"COMP_WORDS=({line}); COMP_CWORD={len(line.split()) - 1}; "
                                         '_sov_megatron_sov; echo "${COMPREPLY[@]}"' for line in lines)])
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True)
    assert done.stderr == ""
    for line, found in zip(lines, done.stdout.splitlines(), strict=True):
        word = line.split()[-1]
        assert (f"{word}=" if "--set" in line else word) in found.split(), line


@pytest.mark.parametrize("shell", [name for name in ("bash", "zsh", "fish") if shutil.which(name)])
def test_the_shells_that_are_here_read_their_script(shell: str, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    done = subprocess.run([shell, "-n", tmp_path / "script"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_told_as_much(shell: str, program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell, program]) == 0
    printed = capsys.readouterr().out
    word = {"megatron-sov": "pretrain", "sov-data": "decontaminate", "sov-tokenizer": "compare"}[program]
    assert program in printed and word in printed
    assert ("train.checkpoint_every_steps=" in printed) == (program == "megatron-sov")

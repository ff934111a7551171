"""Parsers, messages and exit codes shared by all programs."""

import importlib.metadata
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import build_parser as sov_data
from megatron_sov.base import errors
from megatron_sov.base.command_line import Parser, run_to_exit_code
from megatron_sov.base.errors import (
    ExitCode, GateFailed, StopRequested, UserError, format_install_command, format_problems, suggest_download,
    suggest_name)
from megatron_sov.operate.slurm.stages import build_stage_work
from megatron_sov.version import __version__
from tokenizer.cli import build_parser as sov_tokenizer

ENTRIES = {"megatron-sov": "megatron_sov.cli", "sov-tokenizer": "tokenizer.cli", "sov-data": "data_prep.cli"}


@pytest.mark.each("program", ENTRIES)
def test_version_of_each_program(program: str) -> None:
    completed = subprocess.run([sys.executable, "-m", ENTRIES[program], "--version"], capture_output=True,
                               text=True, check=False, cwd=Path(__file__).parents[2])
    assert (completed.returncode, completed.stdout, completed.stderr) == (0, f"{program} {__version__}\n", "")


@pytest.mark.each(("outcome", "code", "message"), [
    (7, 7, ""), (UserError("a: is b"), 2, "error: a: is b\n"),
    (UserError("\x1b[2Ja\n\tnicht schön"), 2, "error: \\x1b[2Ja\n\tnicht schön\n"),
    (GateFailed("too low"), 3, "gate: too low\n"),
    (StopRequested("saved"), 75, "stopped: saved\n"), (BrokenPipeError(), 0, ""),
    (FileNotFoundError(2, "No such file", "\x9bx"), 2,
     "error: \\x9bx: cannot be used (No such file); look at the path, its permissions and its disk\n"),
    (OSError(36, "File name too long", "x" * 9999), 2, f"error: {'x' * 300}: cannot be used (File name too "
     "long); look at the path, its permissions and its disk\n"),
])
def test_user_errors_become_message_and_exit_code(
    outcome: int | Exception, code: int, message: str, capsys: pytest.CaptureFixture[str],
) -> None:
    def action() -> int:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert run_to_exit_code(action) == code
    assert capsys.readouterr().err == message


@pytest.mark.deep
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
@pytest.mark.parametrize("buffered", ["", "1"])
def test_full_disk_is_reported_and_closed_pipe_is_not(buffered: str) -> None:
    def run(stdout: int) -> tuple[int, str]:
        completed = subprocess.run([sys.executable, "-m", "megatron_sov", "recipes"], check=False, text=True,
                                   stdout=stdout, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2],
                                   env=os.environ | {"PYTHONUNBUFFERED": buffered})
        return completed.returncode, completed.stderr

    with open("/dev/full", "w", encoding="utf-8") as full:
        code, message = run(full.fileno())
    assert (code, message.count("\n")) == (2, 1)
    assert message.startswith("error: standard output, or a file of this command: No space left on device; "
                              "free")
    reading, writing = os.pipe()
    os.close(reading)
    assert run(writing) == (0, "")
    os.close(writing)


def test_defect_keeps_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_to_exit_code(lambda: 1 // 0)
    with pytest.raises(OSError):
        run_to_exit_code(lambda: os.close(10 ** 6))  # type: ignore[func-returns-value]


@pytest.mark.each(("line", "message"), [
    ("pretrain tiny-solar-open --data d --run r --set train.steps=1 train.seed=2",
     "a setting follows --set; write\n  megatron-sov pretrain tiny-solar-open --data d --run r "
     "--set train.steps=1 --set train.seed=2\n"),
    ("recipes tiny-solar-open train.steps=3 'data.phases.0.blend={\"a b\": 1}'",
     "a setting follows --set; write\n  megatron-sov recipes tiny-solar-open --set train.steps=3 "
     "--set 'data.phases.0.blend={\"a b\": 1}'\n"),
    ("recipes train.steps=3", "a setting follows --set; write\n  megatron-sov recipes --set train.steps=3\n"),
    ("eval ppl t --data d train.steps=3", "a setting follows --set; write\n"
     "  megatron-sov eval ppl t --data d --set train.steps=3\n"),
    ("pretrain tiny-solar-open --run r more", "megatron-sov pretrain: more: nothing takes this; leave"),
    ("pretrain tiny-solar-open --run r --resmue", "nothing takes this; did you mean '--resume'?"),
    ("eval ppl c h --data d", "h is --output here; write\n  megatron-sov eval ppl c --data d --output h\n"),
    ("eval ppl", "megatron-sov eval ppl: the following arguments are required: "),
    ("report sft --ouput c", "--ouput: nothing takes this; did you mean '--output'?"),
    ("report '' --output c", "RUN: is empty, where a file or folder is to be named"),
    ("eval pll", "megatron-sov eval pll: does not exist; did you mean 'ppl'?"),
])
def test_unknown_words_become_one_sentence(line: str, message: str, get_refusal: Any) -> None:
    error = get_refusal(*shlex.split(line))
    assert error.startswith("error: ") and message in error and len(error.splitlines()) <= 3, error


@pytest.mark.each("line", ["--input a b --input c", "--input a --input b --input c", "--input a b c"])
def test_repeated_input_options_accumulate(line: str) -> None:
    def inputs(program: Parser, words: str) -> list[str]:
        return [str(value) for value in program.parse_args(f"{words} {line} --output o".split()).input]

    assert inputs(sov_data(), "pack --tokenizer t") == ["a", "b", "c"]
    assert inputs(sov_data(), "trajectories") == ["a", "b", "c"]
    assert inputs(sov_tokenizer(), "train --preset solar-open --vocab-size 9") == ["a", "b", "c"]
    work = build_stage_work("data", f"pack --tokenizer t {line} --output o".split(), {})
    assert [path.name for path in work.inputs] == ["a", "b", "c", "t"]


def test_any_text_prints_in_any_locale() -> None:
    """Old shells have no UTF-8, and names of files may be none."""
    text = "\ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22, half \udcff, \u2028"
    code = ("import sys; from megatron_sov.base.command_line import run_to_exit_code\n"
            f"run_to_exit_code(lambda: print({text!a}) or print({text!a}, file=sys.stderr) or 0)")
    environment = {**os.environ, "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
                   "PYTHONIOENCODING": "ascii"}
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False,
                               env=environment, cwd=Path(__file__).parents[2])
    assert (completed.returncode, completed.stdout) == (0, completed.stderr)
    assert completed.stdout.decode("ascii").strip() == text.encode("ascii", "backslashreplace").decode()


@pytest.mark.each(("code", "reported"), [(0, 0), (3, 3), (255, 255), (256, 1), (2 ** 70, 1), (-9, 1)])
def test_exit_code_256_is_not_success(code: int, reported: int) -> None:
    assert run_to_exit_code(lambda: code) == reported

    def child_fails() -> int:
        raise SystemExit(code)

    with pytest.raises(SystemExit) as ended:
        run_to_exit_code(child_fails)
    assert ended.value.code == reported


@pytest.mark.each(("message", "policy"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
@pytest.mark.each("program", ["megatron_sov", "data_prep", "tokenizer"])
def test_openmp_threads_wait_passively_by_default(program: str, message: str | None, policy: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if message is not None:
        environment["OMP_WAIT_POLICY"] = message
    code = (f"import os, sys\nfrom {program}.cli import main\n"
            "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
            "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)")
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment,
                               check=True)
    assert completed.stdout.splitlines()[-1] == f"{policy} False"


def test_exit_codes_are_stable() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "OK": 0, "CRASH": 1, "USER_ERROR": 2, "GATE_FAILED": 3, "STOPPED": 75, "HANG": 76, "CORRUPTION": 77,
        "INTERRUPTED": 130}
    assert f"exit {ExitCode.STOPPED}" == "exit 75", "job scripts read it as a number"


def test_format_problems_counts_and_lists() -> None:
    assert format_problems("run.json", ["a = 1 is odd"]) == "run.json: 1 problem\n  a = 1 is odd"
    assert format_problems("data", ["x", "y"], "pack it again") == "data: 2 problems; pack it again\n  x\n  y"


def test_suggest_nearest_name() -> None:
    assert suggest_name("pretrian", ["pretrain", "extend"]) == "; did you mean 'pretrain'?"
    assert suggest_name("zzz", ["pretrain", "extend"]) == ""
    assert suggest_name("stepz", ["steps"], "train.") == "; did you mean 'train.steps'?"


def test_missing_hub_model_suggests_download(cwd: Path) -> None:
    (cwd / "runs").mkdir()
    assert "`hf download Qwen/Qwen3-8B --local-dir Qwen3-8B`" in suggest_download(Path("Qwen/Qwen3-8B"))
    for path in ("runs/sft", "sft", "/org/name", "./org/name", "../name", "a/b/c", "org/", "-x/name"):
        assert suggest_download(path) == "", path


def test_install_command_for_checkout_and_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(errors.__file__).parents[2]
    monkeypatch.setattr(sys, "executable", "/my env/python")
    pip = "'/my env/python' -m pip"
    assert format_install_command("eval") == f"{pip} install -e '{root}[eval]' -c {root}/constraints.txt"
    # installed from a wheel
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "megatron_sov/base/errors.py"))
    needs = ["torch>=2.6", 'lm-eval==0.4.13; extra == "eval"', "vllm; extra == 'rollout'",
             'te[a,b]>=2; python_version > "3" and extra == "evals"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needs)
    assert format_install_command("eval") == f"{pip} install lm-eval==0.4.13"
    assert format_install_command("rollout") == f"{pip} install vllm"
    assert format_install_command("evals", "--no-deps") == f"{pip} install --no-deps 'te[a,b]>=2'"
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: None)
    assert format_install_command("eval") == "install the packages of the extra eval in setup.py"

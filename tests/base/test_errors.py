"""What commands say and end with: lists of problems, near names, and exit codes that scripts rely on."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from megatron_sov.base import errors
from megatron_sov.base.errors import ExitCode, download, how_to_install, list_problems, nearest


def test_exit_codes_stay_what_scripts_know() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "OK": 0, "CRASH": 1, "USER_ERROR": 2, "GATE_FAILED": 3, "STOPPED": 75, "HANG": 76, "CORRUPTION": 77,
        "INTERRUPTED": 130}
    assert f"exit {ExitCode.STOPPED}" == "exit 75", "job scripts read it as a number"


def test_problems_are_counted_and_listed() -> None:
    assert list_problems("run.json", ["a = 1 is odd"]) == "run.json: 1 problem\n  a = 1 is odd"
    assert list_problems("data", ["x", "y"], "pack it again") == "data: 2 problems; pack it again\n  x\n  y"


def test_the_nearest_name_is_proposed() -> None:
    assert nearest("pretrian", ["pretrain", "extend"]) == "; did you mean 'pretrain'?"
    assert nearest("zzz", ["pretrain", "extend"]) == ""
    assert nearest("stepz", ["steps"], "train.") == "; did you mean 'train.steps'?"


def test_what_may_be_a_name_on_the_hub_is_told_how_it_is_fetched(tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert "`hf download Qwen/Qwen3-8B --local-dir Qwen3-8B`" in download(Path("Qwen/Qwen3-8B"))
    for path in ("runs/sft", "sft", "/org/name", "./org/name", "../name", "a/b/c", "org/", "-x/name"):
        assert download(path) == "", path


def test_a_missing_package_is_installed_from_the_checkout_or_by_its_own_name(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(errors.__file__).parents[2]
    monkeypatch.setattr(sys, "executable", "/my env/python")
    pip = "'/my env/python' -m pip"
    assert how_to_install("eval") == f"{pip} install -e '{root}[eval]' -c {root}/constraints.txt"
    # installed from a wheel
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "megatron_sov/base/errors.py"))
    needs = ["torch>=2.6", 'lm-eval==0.4.13; extra == "eval"', "vllm; extra == 'rollout'",
             'te[a,b]>=2; python_version > "3" and extra == "evals"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needs)
    assert how_to_install("eval") == f"{pip} install lm-eval==0.4.13"
    assert how_to_install("rollout") == f"{pip} install vllm"
    assert how_to_install("evals", "--no-deps") == f"{pip} install --no-deps 'te[a,b]>=2'"
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: None)
    assert how_to_install("eval") == "install what the extra eval of setup.py names"

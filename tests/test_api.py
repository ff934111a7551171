"""The Python interface: the page matches the package, imports stay light, and the page's example runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import megatron_sov
from megatron_sov import api
from megatron_sov.base.errors import GateFailed, StopRequested, UserError
from megatron_sov.work.processes import children
from tests.pages_typed import blocks, page_text

PAGE = page_text("api.md")


def run_python(program: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          check=False, **more)


def test_the_page_has_every_name_and_no_other() -> None:
    rows = re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(megatron_sov.__all__) == sorted(dir(megatron_sov))
    for name in megatron_sov.__all__:
        assert getattr(megatron_sov, name) is not None


@pytest.mark.deep
def test_import_loads_nothing_heavy() -> None:
    """Nothing heavy; and names on megatron prepare the process first,
    or warnings about missing GPU packages abound."""
    result = run_python(
        "import sys, megatron_sov\nprint([m for m in ('torch', 'pydantic', 'numpy') if m in sys.modules])\n"
        "from megatron_sov import recipes, RunConfig, pretrain, convert, read_events, Family, Document\n"
        "print('torch' in sys.modules)\n"
        "from megatron_sov import Objective\nprint('megatron.core' in sys.modules)")
    assert (result.stdout.splitlines(), result.stderr) == (["[]", "False", "True"], "")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'megatron_sov' has no attribute 'pretrian'"):
        megatron_sov.pretrian  # noqa: B018


@pytest.mark.deep
def test_the_examples_of_the_page_run(packed_data: Any, tmp_path: Path, warm_python: str) -> None:
    """Later stages start from the result of the first example: a model that has seen text."""
    shutil.copytree(packed_data.text, tmp_path / "tokens")
    shutil.copytree(packed_data.tokenizer, tmp_path / "tokenizer")
    shutil.copy(packed_data.tokenizer.parent / "chat.jsonl", tmp_path / "chats.jsonl")
    (tmp_path / "pairs.jsonl").write_text("".join(
        json.dumps({"prompt": f"{i}?", "chosen": f"{i}.", "rejected": "No."}) + "\n" for i in range(40)))
    first, stages = blocks(PAGE, "python")
    started_by = f"import sys\nsys.executable = {warm_python!r}\n"
    program = f"{started_by}{first}{stages}print([row['step'] for row in read_meters('runs/dpo')])\n"
    result = run_python(program, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    *steps, tokens, preferences, rows = result.stdout.splitlines()[-6:]
    assert [step.split()[0] for step in steps] == ["1", "2", "3"]
    assert float(steps[2].split()[1]) < float(steps[0].split()[1])
    assert re.fullmatch(r"\d+ tokens", tokens)
    assert rows == "[1, 2]"
    assert re.match(r"\{'pairs': \{'pairs': \d+, 'chosen_likelier': [\d.]+, 'pairs_right': [\d.]+, "
                    r"'margin': -?[\d.e-]+\}\} -?[\d.e-]+$", preferences)
    assert "defaults: learning rate 2e-05 (default of sft), 1 epoch = " in result.stderr
    assert json.loads((tmp_path / "runs/dpo/complete.json").read_text())["step"] == 2


@pytest.mark.each(("function", "words"), [
    (lambda: api.sft("m", {"d": 2}, "r", settings={"train.epochs": 2, "a": [1]}, recipe="x", nproc=2,
                     resume=True),
     ["sft", "x", "--from", "m", "--data", "d:2.0", "--set", "train.epochs=2", "--set", "a=[1]", "--run", "r",
      "--nproc", "2", "--resume"]),
    (lambda: api.distill("s", "t", ["a", "b"], "r", top_k=64),
     ["distill", "--from", "s", "--data", "a", "--data", "b", "--teacher", "t", "--run", "r", "--top-k",
      "64"]),
    (lambda: api.rl_run("m", "p.jsonl", "math", "st", "r", reward_settings=["a=1"],
                        plugin=["x.py:A", "y.py:B"]),
     ["rl", "run", "--from", "m", "--prompts", "p.jsonl", "--reward", "math", "--store", "st", "--reward-set",
      "a=1", "--run", "r", "--plugin", "x.py:A", "--plugin", "y.py:B"]),
])
def test_arguments_become_words(function: Any, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def run(given: list[str], module: str = "megatron_sov") -> str:
        seen.append(given)
        raise UserError("enough")

    monkeypatch.setattr(api, "_run_command", run)
    with pytest.raises(UserError, match="enough"):
        function()
    assert seen == [words]


def test_rounds_and_meters_are_tables(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in [
        {"event": "step", "step": 1, "loss": 2.0, "losses": {"policy": 2.0}, "meters": {"reward": 0.5}},
        {"event": "round", "step": 0, "round": 1, "documents": 4,
         "means": {"reward": 0.5, "components": {"right": 0.25}, "domains": {}}}]))
    assert api.read_meters(tmp_path) == [{"step": 1, "loss": 2.0, "policy": 2.0, "reward": 0.5}]
    assert api.read_rounds(tmp_path) == [
        {"round": 1, "step": 0, "documents": 4, "reward": 0.5, "right": 0.25}]
    with pytest.raises(UserError, match=r"holds no run \(events.jsonl\); pass the folder of a run"):
        api.read_meters(tmp_path / "none")


def test_mistakes_are_raised_with_the_commands_own_words(tmp_path: Path) -> None:
    config = megatron_sov.model.recipes.get("tiny-qwen3")
    with pytest.raises(UserError, match=r"^--data .*none: does not exist; check its path"):
        api.pretrain(config, [tmp_path / "none"], tmp_path / "run")


@pytest.mark.parametrize(("code", "message", "error"), [
    (2, "warning: x\nerror: a: 2 problems\n  one\n  two\n", UserError("a: 2 problems\n  one\n  two")),
    (3, "gate: too low\n", GateFailed("too low")), (75, "step 3\nstopped: saved\n", StopRequested("saved")),
    (1, "Traceback ...\n", RuntimeError("megatron-sov eval ended with exit code 1; see stderr")),
])
def test_how_a_command_ended_is_how_the_function_ends(code: int, message: str, error: Exception,
                                                      monkeypatch: pytest.MonkeyPatch,
                                                      capfd: pytest.CaptureFixture[str]) -> None:
    program = f"import sys; sys.stderr.write({message!r}); sys.exit({code})"
    real = subprocess.Popen
    monkeypatch.setattr(children.subprocess, "Popen",
                        lambda argv, **more: real([sys.executable, "-c", program], **more))
    with pytest.raises(type(error)) as e:
        api._run_command(["eval"])
    assert str(e.value) == str(error)
    assert capfd.readouterr().err == message

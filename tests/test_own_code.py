"""docs/own_code.md: its files and commands, in another folder with the installed wheel. Slow commands run
in forks of a process that has imported Megatron-Core."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pages_typed import page_text, shell_lines, shown_files
from tests.run_files import read_run_events

PAGE = page_text("own_code.md")


@pytest.fixture(scope="module")
def site(installed: Path, packed_data: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's files and some data; no file of the repository is found from there."""
    folder = tmp_path_factory.mktemp("site")
    for name, text in shown_files(PAGE).items():
        (folder / name).write_text(text)
    shutil.copytree(packed_data.text, folder / "tokens")
    shutil.copytree(packed_data.tokenizer, folder / "tokenizer")
    shutil.copy(packed_data.tokenizer.parent / "even.jsonl", folder / "corpus.jsonl")
    (folder / "weighted.jsonl").write_text("".join(
        json.dumps({"text": f"{i} and {i * i} are numbers, says the book.", "weight": i % 2}) + "\n"
        for i in range(60)))
    (folder / "prompts.jsonl").write_text("".join(
        json.dumps({"prompt": f"The number {i} is"}) + "\n" for i in range(8)))
    (folder / "pairs.jsonl").write_text("".join(
        json.dumps({"prompt": f"{i}?", "chosen": f"{i}.", "rejected": "No."}) + "\n" for i in range(40)))
    return folder


SECTIONS = ("A recipe", "An objective", "A policy or pair loss", "A model family", "A step over rows")
"""Sections whose commands a test of this file runs."""


def test_every_command_of_the_page_is_typed() -> None:
    sections = [PAGE.partition(f"## {name}\n")[2].partition("\n## ")[0] for name in SECTIONS]
    assert [c for section in sections for c in shell_lines(section)] == shell_lines(PAGE)
    # whole commands in the text; those that are cut short, or of other pages, name no folder
    inline = re.findall(r"`((?:megatron-sov|sov-\w+) [^`]* runs/[^`]*)`", PAGE)
    assert [command for command in inline if command not in shell_lines(PAGE)] == []


Run = Callable[[str], subprocess.CompletedProcess[str]]


@pytest.fixture
def from_wheel(site: Path, installed: Path) -> Run:
    """Return a function that runs a command of the page in a shell with the installed programs."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1",
                   "PATH": f"{installed / 'bin'}{os.pathsep}{os.environ['PATH']}"}

    def run(command: str) -> subprocess.CompletedProcess[str]:
        program, rest = command.split(" ", 1)
        return subprocess.run(f"{sys.executable} {installed / 'bin' / program} {rest}", shell=True, cwd=site,
                              text=True, capture_output=True, env=environment, timeout=600, check=False)

    return run


@pytest.fixture
def typed(site: Path, run_command: Any, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command of the page in a fork of
    a process that has imported Megatron-Core."""
    monkeypatch.chdir(site)

    def run(command: str) -> subprocess.CompletedProcess[str]:
        program, *argv = shlex.split(command)
        return run_command(*argv, program=program)  # type: ignore[no-any-return]

    return run


def done(site: Path, run: Run, section: str) -> dict[str, Any]:
    """Run all commands of a section of the page; returns the config of the last run."""
    commands = shell_lines(PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0])
    assert commands, section
    for command in commands:
        result = run(command)
        assert result.returncode == 0, (command, result.stderr)
    runs = re.findall(r"--run (\S+)", " ".join(commands))
    return dict(json.loads((site / runs[-1] / "config.json").read_text())) if runs else {}


@pytest.mark.deep
def test_a_recipe_and_a_run_whose_code_has_changed_is_not_continued(site: Path, from_wheel: Run,
                                                                    typed: Run) -> None:
    """The refusal comes before the check for a complete run, so the page's run suffices. The test of a model
    family shows that the installed wheel trains with a user's file."""
    config = done(site, lambda command: (from_wheel if " plan " in command else typed)(command), "A recipe")
    assert (config["recipe"], config["train"]["steps"]) == ("my-tiny", 3)
    assert [code["reference"] for code in config["code"]] == [f"{site}/my_recipe.py:tiny"]
    assert json.loads((site / "runs/tiny/complete.json").read_text())["step"] == 3
    text = (site / "my_recipe.py").read_text()
    (site / "my_recipe.py").write_text(f"{text}# a thought\n")
    again = "megatron-sov pretrain ./my_recipe.py:tiny --data tokens --run runs/tiny --resume"
    result = typed(again)
    assert result.returncode == 2 and "my_recipe.py has changed since (sha256 " in result.stderr
    assert "pass --config runs/tiny/config.json in the recipe's place" in result.stderr
    (site / "my_recipe.py").write_text(text)


def test_an_objective(site: Path, typed: Run) -> None:
    config = done(site, typed, "An objective")
    assert config["objective"]["name"] == "Weighted"
    result = typed("megatron-sov pretrain ./my_recipe.py:tiny --data tokens --run runs/unweighted "
                   "--set objective.name=my_weighted.py:Weighted")
    assert result.returncode == 2 and (
        "has no column 'weight' (columns: none), which the objective reads; sov-data pack --column weight "
        "writes it") in result.stderr
    config = json.loads((site / "runs/focal/config.json").read_text())
    assert config["objective"] == {"name": "Focal", "text_coeff": 0.0, "loss_per": "token",
                                   "audio_weight": 1.0, "image_weight": 1.0, "options": {"gamma": 1.5}}
    steps = read_run_events(site / "runs/focal", "step")
    losses = [event["losses"]["focal"] for event in steps]
    assert all(0 < event["meters"]["confidence"] < 1 for event in steps)
    plain = [next(iter(event["losses_by_source"].values())) for event in steps]
    assert losses == [event["loss"] for event in steps] and losses[-1] < losses[0]
    assert 0 < losses[-1] < plain[-1]  # tokens that the model already predicts count less


@pytest.mark.deep
def test_a_policy_or_a_pair(site: Path, typed: Run) -> None:
    if not (site / "runs/tiny/complete.json").is_file():
        done(site, typed, "A recipe")
    config = done(site, typed, "A policy or pair loss")
    assert (config["objective"]["name"], config["train"]["epochs"]) == ("Hinge", 1)
    steps = read_run_events(site / "runs/hinge", "step")
    assert steps[0]["loss"] == pytest.approx(1, abs=1e-4)  # of margins of 0
    assert all("pairs_right" in event["meters"] for event in steps)
    policy = [event for event in map(json.loads, (site / "runs/reinforce/events.jsonl").open())
              if event["event"] in ("run_start", "step")]
    assert [meter["name"] for meter in policy[0]["headline"]] == [
        "reward", "response_tokens", "groups_learning"]
    assert "reward" in policy[1]["meters"] and "policy" in policy[1]["losses"]
    result = typed("megatron-sov sft --from runs/tiny --data tokens --run runs/no "
                   "--set objective.name=my_losses.py:Reinforce")
    assert result.returncode == 2 and (
        "objective.name = Reinforce: learns from rollouts, and this command brings chat, text; use "
        "`megatron-sov rl train`") in result.stderr


@pytest.mark.deep
def test_a_model_family(site: Path, from_wheel: Run, typed: Run) -> None:
    config = done(site, lambda command: (typed if " verify " in command else from_wheel)(command),
                  "A model family")
    assert (config["model"]["family"], [code["kind"] for code in config["code"]]) == (
        "seed_oss", ["recipe", "model family"])
    assert list(config["code"][0]["files"]) == ["my_family.py", "my_recipe.py"]
    assert json.loads((site / "hf/config.json").read_text())["architectures"] == ["SeedOssForCausalLM"]
    result = typed("megatron-sov convert to-hf runs/seed-oss other")
    assert (result.returncode, result.stdout) == (2, "")
    assert f"add --plugin {site}/my_family.py:SEED_OSS" in result.stderr


@pytest.mark.deep
def test_a_step_over_rows(site: Path, from_wheel: Run) -> None:
    done(site, from_wheel, "A step over rows")
    texts = [json.loads(line)["text"] for line in (site / "corpus.jsonl").open()]
    assert [json.loads(line)["text"] for line in (site / "shortened/rows.jsonl").open()] == [
        " ".join(text.split()[:3]) for text in texts if text]

"""docs/synth.md: its steps file is valid, its program runs, and its table lists all sources."""

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))
from made_runs import build_sample, write_run

from data_prep.synth.checks.settings import DEFAULTS, SOURCES, find_check_problems
from tests.pages_typed import page_section

PAGE = page_section("synth.md", "Checks on all samples")


def block(language: str) -> str:
    found, = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


def test_the_steps_of_the_page_are_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks.jsonl").write_text('{"question": "Who?"}\n')
    (tmp_path / "steps.yaml").write_text(block("yaml"))
    assert find_check_problems(tmp_path / "steps.yaml") == []


def test_the_program_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "work/rewritten", [[build_sample({"text": "half"}, "numbers")]])
    exec(block("python"), {})
    assert json.loads((tmp_path / "work/rewritten/summary.json").read_text())["num_rejected"] == 1


def test_the_page_names_all_sources_and_all_generators_without_steps() -> None:
    cells = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert [name for name in cells if name in SOURCES] == [*SOURCES]
    without = [file.stem for file in DEFAULTS.glob("*.yaml") if "steps: []" in file.read_text()]
    paragraph = PAGE[PAGE.index("The output of `answers`"):PAGE.index("goes through no step")]
    assert sorted(re.findall(r"`([\w-]+)`", paragraph)) == sorted(without)

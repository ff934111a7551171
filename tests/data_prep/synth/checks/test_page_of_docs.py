"""docs/synth.md: its steps file is valid, and its table lists all sources."""

import re
from pathlib import Path

from data_prep.synth.checks.settings import DEFAULTS, SOURCES, find_check_problems
from tests.pages_typed import blocks, page_section

PAGE = page_section("synth.md", "Checks on all samples")


def test_the_steps_of_the_page_are_sound(cwd: Path) -> None:
    (cwd / "benchmarks.jsonl").write_text('{"question": "Who?"}\n')
    steps, = blocks(PAGE, "yaml")
    (cwd / "steps.yaml").write_text(steps)
    assert find_check_problems(cwd / "steps.yaml") == []


def test_the_page_names_all_sources_and_all_generators_without_steps() -> None:
    cells = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert [name for name in cells if name in SOURCES] == [*SOURCES]
    without = [file.stem for file in DEFAULTS.glob("*.yaml") if "steps: []" in file.read_text()]
    paragraph = PAGE[PAGE.index("The output of `answers`"):PAGE.index("goes through no step")]
    assert sorted(re.findall(r"`([\w-]+)`", paragraph)) == sorted(without)

"""The pages about solutions and difficulty: their commands are typed as they stand, in their order."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import build_parser, main
from data_prep.synth.known import generator_class

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
sys.path.append(str(Path(__file__).parent / "data_prep/synth"))
from planted_rates import write_measurements
from synthesis.endpoint import ScriptedEndpoint, serving

DOCS = Path(__file__).parents[1] / "docs"
ADDRESS = "http://localhost:8000/v1"
PAGES = ("synth_solutions.md", "difficulty.md")


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def lines(name: str) -> list[list[str]]:
    """Return the words of each command of a page."""
    found = re.findall(r"^```bash\n(.*?)^```$", page(name), re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in found for line in block.replace("\\\n", " ").splitlines()]


WAYS = ("The boxes hold 12 apples; with the 17 that is 29.",
        "Count on from 17: each of three boxes adds four, so the count ends at 29.")
PROBE = "Problem: A gardener plants 3 rows of 4 roses each. How many roses are there?\nAnswer: 12"


def reply(request: Mapping[str, Any]) -> str | Mapping[str, Any]:
    """Return what good models say to the first page's commands."""
    system, text = (message["content"] for message in request["messages"])
    if "You write problems" in system:
        return PROBE
    if "Python programs" in system:
        return "```python\nprint(3 * 4)\n```"
    return "\\boxed{12}" if "gardener" in text else f"{WAYS[request['seed'] % 2]}\n\n\\boxed{{29}}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@pytest.mark.deep
def test_solutions_and_probing_sets(folder: Path) -> None:
    shown = json.loads(re.findall(r"^```json\n(.*?)^```$", page(PAGES[0]), re.MULTILINE | re.DOTALL)[0])
    (folder / "problems.jsonl").write_text(json.dumps(shown) + "\n")
    (folder / "topics.jsonl").write_text(json.dumps({"domain": "algebra", "topic": "gardens"}) + "\n")
    with serving(ScriptedEndpoint(reply)) as server:
        for words in lines(PAGES[0]):
            assert words[0] == "sov-data"
            # a process that judges is started for each core
            alone = ["--workers", "1"] if words[1] == "synth" else []
            assert main([*(word.replace(ADDRESS, server.url) for word in words[1:]), *alone]) == 0, words
    (document,) = (folder / "work/trajectories/trajectories.jsonl").read_text().splitlines()
    assert json.loads(document)["text"].startswith(shown["problem"])
    assert (folder / "work/sets/algebra.jsonl").read_text()


def test_difficulty(folder: Path) -> None:
    """What the page's models measure is planted; other pages and tests run `synth`."""
    write_measurements(folder / "work", 90, num_pairs=60)
    shutil.rmtree(folder / "work/middle")  # a third model, which the page has not
    (folder / "work/pairs").mkdir()
    (folder / "work/pairs.jsonl").rename(folder / "work/pairs/kept.jsonl")
    (folder / "problems.jsonl").write_text(json.dumps({"prompt": "What is 12 plus 30?"}) + "\n" +
                                           json.dumps({"prompt": "What is 120 times 30?"}) + "\n")
    for words in lines(PAGES[1]):
        assert words[0] == "sov-data"
        if words[1] == "synth":
            build_parser().parse_args(words[1:])
        else:
            assert main(words[1:]) == 0, words
    assert (folder / "work/graded/problems.jsonl").is_file()


@pytest.mark.parametrize("name", PAGES)
def test_settings_and_checks_of_the_pages_exist(name: str) -> None:
    for words in lines(name):
        if words[1] != "synth":
            continue
        known = generator_class(words[2]).Settings.__dataclass_fields__
        given = {word.partition("=")[0] for before, word in pairwise(words) if before == "--set"}
        assert given <= set(known), words
    named = set(re.findall(r"`((?:min|max|num)_\w+)`", page(name))) - {"num_right", "num_answers"}
    generators = ("solutions", "probes", "answers", "comparisons")
    assert named <= {field for g in generators for field in generator_class(g).Settings.__dataclass_fields__}

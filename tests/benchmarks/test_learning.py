"""The driver of recipes: its files, figures and verdicts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from learning import PLACE, RECIPES, Recipe, interval_of, read_figure, verdict

FILES = sorted(RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_command_names_places_that_there_are(file: Path) -> None:
    recipe = Recipe(file)
    known = {"here", "learning", "seed", "base", *recipe.setup}
    for command in recipe.commands():
        assert set(PLACE.findall(command)) <= known, command
        for script in (word for word in command.split() if "{learning}/" in word):
            assert (RECIPES / script.partition("{learning}/")[2].partition(":")[0]).is_file(), script
    for name, claim in recipe.claims.items():
        needed = recipe.needed(name)
        used = {place for arm in claim["arms"].values() for command in arm
                for place in PLACE.findall(recipe.spell(command)) if place in recipe.setup}
        assert used <= set(needed)
        for test in claim["tests"]:
            assert {test["lower"], test["higher"]} <= set(claim["arms"])
            assert test["measure"] in claim["measures"]
        for curve in claim.get("curves", {}).values():
            assert set(curve.get("not", [])) <= set(claim["arms"])


@pytest.mark.parametrize(("text", "measure", "expected"), [
    ('{"a": {"b": 2}}', {"file": "x.json", "value": "a/b"}, 2.0),
    ('{"a": [1, 3]}', {"file": "x.json", "value": "a/1"}, 3.0),
    ('{"a": {"x": {"v": 1}, "y": {"v": 3}}}', {"file": "x.json", "value": "a/*/v"}, 2.0),
    ('{"r": 1}\n{"r": 0}\n', {"file": "x.jsonl", "value": "r"}, 0.5),
    ('{"event": "a", "v": 1}\n{"event": "a", "v": 5}\n{"event": "b", "v": 9}\n',
     {"file": "x.jsonl", "value": "v", "event": "a"}, 5.0)])
def test_a_figure_is_what_its_keys_lead_to(text: str, measure: dict[str, str], expected: float,
                                           tmp_path: Path) -> None:
    (tmp_path / measure["file"]).write_text(text)
    assert read_figure(tmp_path, measure) == expected


@pytest.mark.parametrize(("differences", "bound", "seeds", "expected"), [
    ([1.0, 1.1, 0.9], 0.0, 3, "holds"), ([1.0, 1.1, 0.9], 2.0, 3, "does not hold"),
    ([1.0, -1.0, 0.1], 0.0, 3, "undecided"), ([1.0, 1.1], 0.0, 3, "undecided"), ([1.0], 0.0, 1, "undecided"),
    ([1.0, 1.0, 1.0], 0.0, 3, "undecided"), ([-1.0, -1.1, -0.9], 0.0, 3, "does not hold"),
    ([-0.01, -0.02, -0.015], -0.1, 3, "holds")])
def test_a_verdict_follows_from_the_interval(differences: list[float], bound: float, seeds: int,
                                             expected: str) -> None:
    assert verdict(differences, bound, seeds) == expected


def test_the_interval_is_students() -> None:
    low, high = interval_of([1.0, 2.0, 3.0]) or (0, 0)
    assert (low, high) == (pytest.approx(2 - 2.4841, abs=1e-3), pytest.approx(2 + 2.4841, abs=1e-3))

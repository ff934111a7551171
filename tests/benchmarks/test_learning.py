"""The driver of recipes: its files, figures, curves and verdicts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from learning import (
    PLACE, RECIPES, Recipe, interval_of, print_curve, read_curve, read_figure, run_commands, verdict)

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


def test_a_curve_is_the_mean_over_seeds_of_a_field_of_events(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/events.jsonl").write_text("".join(
        json.dumps({"event": event, "a": {"loss": 10.0 - i}}) + "\n"
        for i in range(10) for event in ("step", "other")))
    curve = read_curve(tmp_path, {"event": "step", "value": "a/loss"})
    assert curve == [10.0 - i for i in range(10)]
    print_curve("loss", {"arm": [curve, [value + 1 for value in curve]]})
    figures = capsys.readouterr().out.splitlines()[1].split()[1:]
    assert [float(figure) for figure in figures] == [10.5, 9.5, 7.5, 6.5, 5.5, 4.5, 2.5, 1.5]


@pytest.mark.parametrize(("differences", "bound", "seeds", "expected"), [
    ([1.0, 1.1, 0.9], 0.0, 3, "holds"), ([1.0, 1.1, 0.9], 2.0, 3, "does not hold"),
    ([1.0, -1.0, 0.1], 0.0, 3, "undecided"), ([1.0, 1.1], 0.0, 3, "undecided"), ([1.0], 0.0, 1, "undecided"),
    ([1.0, 1.0, 1.0], 0.0, 3, "undecided"), ([-1.0, -1.1, -0.9], 0.0, 3, "does not hold"),
    ([-0.01, -0.02, -0.015], -0.1, 3, "holds")])
def test_a_verdict_follows_from_the_interval(differences: list[float], bound: float, seeds: int,
                                             expected: str) -> None:
    assert verdict(differences, bound, seeds) == expected


def test_equal_differences_decide_at_a_ceiling_alone() -> None:
    assert [verdict([1.0] * 3, 0.8, 3, may_be_equal=at_ceiling) for at_ceiling in (True, False)] == [
        "holds", "undecided"]


def test_the_interval_is_students() -> None:
    low, high = interval_of([1.0, 2.0, 3.0]) or (0, 0)
    assert (low, high) == (pytest.approx(2 - 2.4841, abs=1e-3), pytest.approx(2 + 2.4841, abs=1e-3))


def test_commands_that_ended_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []

    def run(words: list[str], **options: Any) -> Any:
        ran.append(words[5:])
        options["stdout"].write(json.dumps(words[-1]).encode())
        return type("Done", (), {"returncode": 1 if words[-1] == "bad" else 0})

    monkeypatch.setattr("learning.subprocess.run", run)
    commands = ["sov-data one {seed}", "sov-data two {here}/x > {here}/out.json", "sov-data bad"]
    for _ in range(2):
        with pytest.raises(SystemExit, match="ended with exit code 1"):
            run_commands(tmp_path / "a", commands, {"seed": "7"})
    assert [words[-1] for words in ran] == ["7", f"{tmp_path}/a/x", "bad", "bad"]
    assert json.loads((tmp_path / "a/out.json").read_text()) == f"{tmp_path}/a/x"

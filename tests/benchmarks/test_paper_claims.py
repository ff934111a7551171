"""The driver of claims: its files, figures and verdicts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from paper_claims import CLAIMS, PLACE, ClaimFile, interval_of, read_figure, run_commands, verdict

FILES = sorted(CLAIMS.glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_command_names_places_that_there_are(file: Path) -> None:
    claims = ClaimFile(file)
    known = {"here", "claims", "seed", "base", *claims.setup}
    for command in claims.commands():
        assert set(PLACE.findall(command)) <= known, command
        for script in (word for word in command.split() if "{claims}/" in word):
            assert (CLAIMS / script.partition("{claims}/")[2].partition(":")[0]).is_file(), script
    for name, claim in claims.claims.items():
        needed = claims.needed(name)
        used = {place for arm in claim["arms"].values() for command in arm
                for place in PLACE.findall(claims.spell(command)) if place in claims.setup}
        assert used <= set(needed)
        for test in claim["tests"]:
            assert {test["lower"], test["higher"]} <= set(claim["arms"])
            assert test["measure"] in claim["measures"]


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


def test_commands_that_ended_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []

    def run(words: list[str], **options: Any) -> Any:
        ran.append(words[5:])
        options["stdout"].write(json.dumps(words[-1]).encode())
        return type("Done", (), {"returncode": 1 if words[-1] == "bad" else 0})

    monkeypatch.setattr("paper_claims.subprocess.run", run)
    commands = ["sov-data one {seed}", "sov-data two {here}/x > {here}/out.json", "sov-data bad"]
    for _ in range(2):
        with pytest.raises(SystemExit, match="ended with exit code 1"):
            run_commands(tmp_path / "a", commands, {"seed": "7"})
    assert [words[-1] for words in ran] == ["7", f"{tmp_path}/a/x", "bad", "bad"]
    assert json.loads((tmp_path / "a/out.json").read_text()) == f"{tmp_path}/a/x"

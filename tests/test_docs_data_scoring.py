"""docs/data_scoring.md: commands run, its label is one, its steps can be built with the models they name."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from data_prep.cli import main
from data_prep.curate.pipeline.step import STEPS, step_class
from data_prep.curate.scoring.labels import HIGHEST
from megatron_sov.base.settings import problems_of
from tests.data_prep.curate.scoring.planted import planted, write_lines

PAGE = (Path(__file__).parents[1] / "docs/data_scoring.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


def test_what_the_page_shows_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    shown = json.loads(block("json"))
    assert 0 <= shown["label"] <= HIGHEST["regressor"]
    write_lines(tmp_path / "quality.jsonl", planted("classifier", 120))
    write_lines(tmp_path / "education.jsonl", [shown, *planted("regressor", 120)])
    write_lines(tmp_path / "others.jsonl", planted("regressor", 50, seed=3))
    for line in block("sh").splitlines():
        program, *argv = shlex.split(line)
        assert program == "sov-data"
        assert main(argv) == 0, capsys.readouterr().err
    assert "education-model, a regressor" in capsys.readouterr().out
    for entry in yaml.safe_load(block("yaml"))["steps"]:
        ((kind, settings),) = entry.items()
        step = step_class(kind)
        made = step.Settings(**{k: Path(v) if k == "model" else v for k, v in settings.items()})
        assert problems_of(made) == [], kind
        step(made)


def test_the_page_lists_every_setting_of_every_step() -> None:
    for kind in ("quality", "education", "topics", "level", "kind"):
        assert kind in STEPS
        (row,) = re.findall(rf"^\| `{kind}` \|.*$", PAGE, re.MULTILINE)
        named = set(re.findall(r"`(\w+)`", row.split("|")[3]))
        assert named == {field.name for field in dataclasses.fields(step_class(kind).Settings)}, kind

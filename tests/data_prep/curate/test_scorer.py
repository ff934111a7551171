"""`sov-data scorer`: printed results, and refused command lines."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main
from tests.data_prep.curate.scoring.planted import plant_labels, write_lines


@pytest.fixture
def folder(cwd: Path) -> Path:
    """A folder with labels, which is the working folder."""
    write_lines(cwd / "labels.jsonl", plant_labels("classifier", 200))
    write_lines(cwd / "few.jsonl", plant_labels("classifier", 20))
    write_lines(cwd / "ones.jsonl",
                [{**record, "label": 1} for record in plant_labels("classifier", 100)])
    write_lines(cwd / "scale.jsonl", plant_labels("regressor", 100))
    return cwd


def build_train_command(*more: str, labels: str = "labels.jsonl", kind: str = "classifier") -> list[str]:
    return ["scorer", "train", "--labels", labels, "--kind", kind, "--output", "model", *more]


def test_a_scorer_is_trained_and_judged(folder: Path, capsys: pytest.CaptureFixture[str], read_output: Any,
                                        get_refusal: Any) -> None:
    out = read_output(*build_train_command()).splitlines()
    assert out[0] == "labels.jsonl: 200 texts"
    assert out[1] == "held out:"
    assert out[2].startswith("  20 texts: AUC 0.9") or out[2].startswith("  20 texts: AUC 1.0")
    assert [line.split(":")[0] for line in out[3:5]] == ["  en", "  ko"]
    assert out[-1] == "wrote model"
    assert main(["scorer", "check", "model", "--labels", "labels.jsonl"]) == 0
    assert capsys.readouterr().out.startswith("model, a classifier\n  200 texts: AUC ")
    assert main(["scorer", "check", "model", "--labels", "labels.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_labels"] == 200
    assert "already exists" in get_refusal(*build_train_command())


@pytest.mark.parametrize(("argv", "message"), [
    (build_train_command(labels="none.jsonl"), "none.jsonl: does not exist"),
    (build_train_command(labels="few.jsonl"), "has 20 labelled texts that differ; at least 50 are needed"),
    (build_train_command(labels="ones.jsonl"), "0 of 100 texts have label 0"),
    (build_train_command(labels="scale.jsonl"),
     "must be 0 or 1 (a scale from 0 to 5 is for --kind regressor)"),
    (build_train_command(kind="ranker"), '--kind "ranker": must be'),
    (build_train_command("--buckets", "1000"), "was removed in this version; the sizes are fixed"),
    (["scorer", "check", "none", "--labels", "labels.jsonl"], "none: does not exist"),
    (["scorer", "check", ".", "--labels", "labels.jsonl"], "has no manifest.json, so it is not a 'scorer'"),
    (["scorer"], "required: ACTION"),
])
def test_a_mistake_is_one_sentence(folder: Path, argv: list[str], message: str, get_refusal: Any) -> None:
    before = sorted(folder.iterdir())
    error = get_refusal(*argv)
    assert message in error
    assert error.startswith("error: ")
    assert sorted(folder.iterdir()) == before

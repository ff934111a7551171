"""Saved scorers: loading gives the same scores, and damaged or foreign folders are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from data_prep.curate.scoring.labels import Kind
from data_prep.curate.scoring.ngrams import Ngrams
from data_prep.curate.scoring.scorer import (
    SETTINGS_FILE, WEIGHTS_FILE, find_scorer_problems, list_scorer_files, load_scorer)
from megatron_sov.base.artifacts import create_artifact
from megatron_sov.base.errors import UserError


@pytest.mark.parametrize("kind", ["classifier", "regressor"])
def test_scores_follow_from_weights_and_calibration(scorers: dict[str, Path], kind: Kind) -> None:
    scorer = load_scorer(scorers[kind])
    assert scorer.kind == kind
    fit = scorer.settings
    weights = load_file(scorers[kind] / WEIGHTS_FILE)["weights"]
    for text in ("the theorem explains energy", "click login sale " * 50, "", "설명"):
        [dot] = Ngrams(fit.features).compute_rows([text]) @ weights  # type: ignore[arg-type]
        z = fit.slope * (dot + fit.bias) + fit.offset
        expected = 1 / (1 + np.exp(-z)) if kind == "classifier" else np.clip(z, 0, 5)
        assert scorer.score(text) == pytest.approx(expected, abs=1e-5)
        assert scorer.score(text) == float(np.float32(scorer.score(text))), "float32 holds the score"


def change_scorer(scorer: Path, target: Path, change: Callable[[Path], object]) -> Path:
    """Return a copy of a scorer with changed files and a matching manifest."""
    with create_artifact(target, "scorer") as artifact:
        for file in list_scorer_files(scorer):
            shutil.copyfile(file, artifact.path / file.name)
        change(artifact.path)
        artifact.content = {"kind": "classifier"}
    return target


def change_settings(**values: object) -> Callable[[Path], object]:
    """Return a function that changes settings of a scorer, or of its features."""

    def change(folder: Path) -> None:
        raw = json.loads((folder / SETTINGS_FILE).read_text())
        for name, value in values.items():
            (raw["features"] if name in raw["features"] else raw)[name] = value
        (folder / SETTINGS_FILE).write_text(json.dumps(raw))

    return change


def change_weights(array: np.ndarray) -> Callable[[Path], object]:
    return lambda folder: save_file({"weights": array}, folder / WEIGHTS_FILE)


@pytest.mark.parametrize(("change", "message"), [
    (change_settings(bias=float("nan")), "bias = nan must be a finite number"),
    (change_settings(kind="pickle"), 'kind = "pickle" must be'),
    (change_settings(num_buckets=1 << 60), "num_buckets = 1152921504606846976 must be at most"),
    (change_settings(unknown=1), "unknown: no such setting"),
    (change_weights(np.zeros(7, np.float32)), "must be 4096 finite float32, and are float32 of shape [7]"),
    (lambda folder: (folder / WEIGHTS_FILE).write_bytes(b"\x80\x04junk"), "is damaged"),
    (lambda folder: (folder / WEIGHTS_FILE).unlink(), "its manifest lists no weights.safetensors"),
])
def test_damaged_files_are_refused(scorers: dict[str, Path], tmp_path: Path,
                                   change: Callable[[Path], object], message: str) -> None:
    folder = change_scorer(scorers["classifier"], tmp_path / "bad", change)
    with pytest.raises(UserError) as error:
        load_scorer(folder)
    assert message in str(error.value)
    assert "train the scorer again" in str(error.value)


def test_a_file_outside_the_manifest_is_refused(scorers: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(scorers["classifier"], tmp_path / "copy")
    (tmp_path / "copy/extra.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds extra\.json, which its manifest does not list; remove it"):
        load_scorer(tmp_path / "copy")


def test_folders_of_another_kind_are_refused(scorers: dict[str, Path], tmp_path: Path) -> None:
    assert find_scorer_problems("model", scorers["classifier"], "classifier") == []
    assert find_scorer_problems("model", scorers["classifier"]) == []
    (problem,) = find_scorer_problems("model", scorers["classifier"], "regressor")
    assert "is a classifier; train one with `sov-data scorer train --kind regressor`" in problem.sentence
    (problem,) = find_scorer_problems("model", tmp_path / "none")
    assert problem.key == "model" and problem.rule.startswith(f"{tmp_path}/none: does not exist")
    (problem,) = find_scorer_problems("model", tmp_path)
    assert "pass the folder that `sov-data scorer train` wrote" in problem.rule


def test_files_that_determine_scores_contain_no_date(scorers: dict[str, Path]) -> None:
    assert [p.name for p in list_scorer_files(scorers["regressor"])] == [SETTINGS_FILE, WEIGHTS_FILE]

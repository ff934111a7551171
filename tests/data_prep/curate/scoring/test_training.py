"""Training of scorers equals the libraries' estimators; its report has the right figures."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression, Ridge

from data_prep.curate.scoring.labels import Label
from data_prep.curate.scoring.metrics import compute_metrics, format_metrics
from data_prep.curate.scoring.ngrams import NgramSettings
from data_prep.curate.scoring.training import (
    INVERSE_PENALTIES, PENALTIES, TrainSettings, fit_scorer, train_scorer)
from megatron_sov.base.artifacts import find_damaged_files, read_manifest

# Fits: the best penalty, probabilities that hold, and embeddings of any size.

RNG = np.random.default_rng(0)
TRUE_WEIGHTS = RNG.normal(size=20)


def draw_sample(count: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return rows [count, 20], and noisy labels of a linear rule."""
    rows = RNG.normal(size=(count, 20))
    z = rows @ TRUE_WEIGHTS
    if kind == "regressor":
        return rows.astype(np.float32), np.clip(2.5 + 0.3 * z + RNG.normal(size=count) * 0.2, 0, 5)
    return rows.astype(np.float32), (RNG.random(count) < 1 / (1 + np.exp(-z))).astype(float)


def test_a_classifier_equals_logistic_regression() -> None:
    rows, labels = draw_sample(600, "classifier")
    heldout_rows, heldout_labels = draw_sample(300, "classifier")
    scorer = fit_scorer("classifier", csr_matrix(rows), labels, csr_matrix(heldout_rows), heldout_labels)
    models = {c: LogisticRegression(C=c, max_iter=500).fit(rows, labels) for c in INVERSE_PENALTIES}
    assert scorer.penalty in models
    model = models[scorer.penalty]
    np.testing.assert_allclose(scorer.weights, model.coef_[0], atol=1e-3)
    assert scorer.bias == pytest.approx(model.intercept_[0], abs=1e-3)


def test_calibration_corrects_an_overconfident_fit() -> None:
    rows, labels = draw_sample(60, "classifier")
    scorer = fit_scorer("classifier", csr_matrix(rows), labels, *draw_sample(4000, "classifier"))
    assert scorer.slope < 1
    fresh_rows, fresh_labels = draw_sample(20_000, "classifier")
    z = scorer.slope * (fresh_rows @ scorer.weights + scorer.bias) + scorer.offset
    predicted = 1 / (1 + np.exp(-z))
    for low in (0.1, 0.5, 0.8):
        inside = (predicted >= low) & (predicted < low + 0.1)
        assert fresh_labels[inside].mean() == pytest.approx(predicted[inside].mean(), abs=0.06)


def test_a_regressor_equals_calibrated_ridge_regression() -> None:
    rows, labels = draw_sample(500, "regressor")
    heldout_rows, heldout_labels = draw_sample(300, "regressor")
    scorer = fit_scorer("regressor", csr_matrix(rows), labels, csr_matrix(heldout_rows), heldout_labels)
    model = Ridge(alpha=scorer.penalty, solver="sparse_cg", tol=1e-6).fit(rows, labels)
    assert scorer.penalty in PENALTIES
    np.testing.assert_allclose(scorer.weights, model.coef_, atol=1e-4)
    z = heldout_rows @ scorer.weights + scorer.bias
    assert np.polyfit(z, heldout_labels, 1) == pytest.approx([scorer.slope, scorer.offset], abs=1e-4)


def test_uninformative_scores_are_not_calibrated() -> None:
    rows, labels = draw_sample(200, "regressor")
    scorer = fit_scorer("regressor", csr_matrix(rows), labels, csr_matrix((50, 20)), np.linspace(0, 5, 50))
    assert (scorer.slope, scorer.offset) == (1.0, 0.0)


SMALL = NgramSettings(num_buckets=1 << 12)


def test_the_same_labels_give_the_same_scorer(labels_file: Callable[..., Path], tmp_path: Path) -> None:
    settings = TrainSettings(labels_file(), "classifier", SMALL)
    train_scorer(settings, tmp_path / "a")
    train_scorer(settings, tmp_path / "b")
    records = [read_manifest(tmp_path / name).files for name in "ab"]
    assert records[0] == records[1]
    assert set(records[0]) == {"scorer.json", "weights.safetensors"}
    assert find_damaged_files(tmp_path / "a") == []


def test_repeated_texts_are_counted_and_not_split(labels_file: Callable[..., Path],
                                                  tmp_path: Path) -> None:
    file = labels_file(count=100)
    file.write_text(file.read_text() * 3)
    content = train_scorer(TrainSettings(file, "classifier", SMALL), tmp_path / "out")
    assert (content["num_labels"], content["num_repeated"]) == (100, 200)
    assert content["num_fit"] + content["num_calibration"] + content["heldout"]["num_labels"] == 100


def test_classifier_figures_equal_counted_pairs() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 60)
    scores = np.round(np.clip(0.3 * labels + rng.random(60) * 0.7, 0, 1), 1)
    figures = compute_metrics("classifier", [Label("", float(label), "en") for label in labels], scores)
    pairs = product(scores[labels == 1], scores[labels == 0])
    wins = [(good > bad) + 0.5 * (good == bad) for good, bad in pairs]
    assert figures["auc"] == pytest.approx(np.mean(wins))
    accepted = scores >= 0.5
    assert figures["precision"] == pytest.approx(labels[accepted].mean())
    assert figures["recall"] == pytest.approx(accepted[labels == 1].mean())
    assert figures["brier"] == pytest.approx(np.mean((labels - scores) ** 2))


def test_figures_of_a_regressor() -> None:
    labels = [Label("", float(x), "ko" if x < 2 else "en") for x in (0, 1, 2, 3, 4, 5)]
    figures = compute_metrics("regressor", labels, np.array([0.2, 0.6, 2.4, 3.0, 2.9, 4.6]))
    # ranks of the scores: 1 2 3 5 4 6, so 1 - 6 * (1 + 1) / (6 * 35)
    assert figures["spearman"] == pytest.approx(1 - 12 / 210)
    assert figures["mean_absolute_error"] == pytest.approx((0.2 + 0.4 + 0.4 + 0 + 1.1 + 0.4) / 6)
    # scores of 3 or more: 3.0 and 4.6, of the labels 3, 4 and 5
    assert (figures["precision"], figures["recall"]) == (1.0, pytest.approx(2 / 3))
    assert figures["languages"]["ko"] == {
        "num_labels": 2, "auc": None, "precision": None, "recall": None, "spearman": pytest.approx(1.0),
        "mean_absolute_error": pytest.approx(0.3)}


def test_undefined_figures_are_printed_as_a_dash() -> None:
    figures = compute_metrics("regressor", [Label("", 1.0, "")] * 3, np.array([1.0, 2.0, 0.0]))
    assert (figures["auc"], figures["spearman"]) == (None, None)
    assert format_metrics("regressor", figures)[0] == (
        "  3 texts: AUC -, precision -, recall -, Spearman -, mean error 0.6667 (good: 3 or more)")

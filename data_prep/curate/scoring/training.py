"""Train and evaluate scorers with scikit-learn.

Scikit-learn fits the weights; penalty, slope and offset are chosen on texts outside the fit. A classifier
is logistic regression with Platt's calibration (1999): the logistic function of slope * z + offset. A
regressor is ridge regression, as in FineWeb-Edu (arXiv 2406.17557, section 4); slope and offset undo the
shrinkage towards the mean by the penalty.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from threadpoolctl import threadpool_limits

from data_prep.curate.scoring.labels import (
    MIN_LABELS, Kind, Label, check_label_variety, get_label_values, read_labels, split_labels)
from data_prep.curate.scoring.metrics import compute_metrics
from data_prep.curate.scoring.ngrams import Ngrams, NgramSettings
from data_prep.curate.scoring.scorer import ARTIFACT, Scorer, ScorerSettings, load_scorer, write_scorer
from megatron_sov.base.artifacts import check_output_folder, create_artifact, sha256_file
from megatron_sov.work.progress.progress_bar import create_bar

INVERSE_PENALTIES = (1.0, 10.0, 100.0, 1000.0)
"""Candidates for C in logistic regression."""
PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Candidates for alpha in ridge regression."""
MAX_ITERATIONS = 500
_MAX_LOGIT = 30.0
"""Logits are clamped here, where float32 probabilities are practically 0 or 1."""


@dataclass(frozen=True)
class TrainSettings:
    """Settings for `train_scorer`."""

    labels: Path
    """JSONL file for `read_labels`."""
    kind: Kind
    features: NgramSettings = NgramSettings()


def train_scorer(settings: TrainSettings, output: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Train a scorer, write its artifact and return the content: counts and held-out metrics. Raises
    `UserError`: labels are invalid or too few, or `output` may not be replaced."""
    check_output_folder(output, ARTIFACT, overwrite)
    labels, num_repeated = read_labels(settings.labels, settings.kind, settings.features.max_chars,
                                       min_labels=MIN_LABELS)
    check_label_variety(settings.labels, labels, settings.kind)
    splits = split_labels(labels)
    with create_artifact(output, ARTIFACT, overwrite=overwrite) as artifact:
        features = Ngrams(settings.features)
        fit = fit_scorer(settings.kind, _build_matrix(features, splits.fit), get_label_values(splits.fit),
                         _build_matrix(features, splits.calibration), get_label_values(splits.calibration))
        scorer_settings = ScorerSettings(settings.kind, settings.features, fit.bias, fit.slope, fit.offset)
        write_scorer(artifact.path, scorer_settings, fit.weights)
        scores = _compute_scores(Scorer(scorer_settings, features, fit.weights), splits.heldout)
        artifact.settings = {"labels": settings.labels, "labels_sha256": sha256_file(settings.labels)}
        artifact.content = {
            "kind": settings.kind, "num_labels": len(labels), "num_repeated": num_repeated,
            "num_fit": len(splits.fit), "num_calibration": len(splits.calibration), "penalty": fit.penalty,
            "heldout": compute_metrics(settings.kind, splits.heldout, scores)}
    return artifact.content


def evaluate_scorer(model: Path, file: Path) -> tuple[Kind, dict[str, Any]]:
    """Return a scorer's kind and its metrics for a file with labels. Raises `UserError`: `model` is no
    scorer, or lines in `file` do not fit its kind."""
    scorer = load_scorer(model)
    labels, _ = read_labels(file, scorer.kind, scorer.settings.features.max_chars)
    return scorer.kind, compute_metrics(scorer.kind, labels, _compute_scores(scorer, labels))


def _compute_scores(scorer: Scorer, labels: Sequence[Label]) -> np.ndarray:
    """Return the scores as float64 [num_labels]."""
    scores = np.empty(len(labels))
    with create_bar("scoring", len(labels), "text") as bar:
        for i, item in enumerate(labels):
            scores[i] = scorer.score(item.text)
            bar.update(1)
    return scores


def _build_matrix(features: Ngrams, labels: Sequence[Label]) -> Any:
    """Return the feature rows as a scipy CSR matrix, float32 [num_labels, num_buckets]."""
    with create_bar("reading texts", len(labels), "text") as bar:
        def iter_texts() -> Iterator[str]:
            for item in labels:
                yield item.text
                bar.update(1)

        return features.compute_rows(iter_texts())


@dataclass(frozen=True)
class Fit:
    """Parameters for a linear scorer, named as in `ScorerSettings`."""

    weights: np.ndarray
    """float32 [num_buckets]."""
    bias: float
    slope: float
    offset: float
    penalty: float
    """C (classifier) or alpha (regressor)."""


def fit_scorer(kind: Kind, rows: Any, labels: np.ndarray, calibration_rows: Any,
               calibration_labels: np.ndarray) -> Fit:
    """Fit with every candidate penalty and return the fit with the lowest calibration loss.

    Args:
        kind: kind of scorer.
        rows: sparse matrix [num_texts, num_buckets].
        labels: float64 [num_texts].
        calibration_rows: rows for choosing the penalty and for calibration.
        calibration_labels: labels for `calibration_rows`.
    """
    with threadpool_limits(1):  # another order of sums would change the last bits
        return _fit_best_penalty(kind, rows, labels, calibration_rows, calibration_labels)


def _fit_best_penalty(kind: Kind, rows: Any, labels: np.ndarray, calibration_rows: Any,
                      calibration_labels: np.ndarray) -> Fit:
    fits: list[tuple[float, int, Fit]] = []
    for penalty in INVERSE_PENALTIES if kind == "classifier" else PENALTIES:
        model = _build_model(kind, penalty)
        model.fit(rows, labels)
        weights = np.ravel(model.coef_).astype(np.float32)
        bias = float(np.ravel(model.intercept_)[0])
        # With float32 weights, as in the file.
        z = np.asarray(calibration_rows @ weights, np.float64) + bias
        slope, offset = _fit_calibration(kind, z, calibration_labels)
        loss = _compute_loss(kind, slope * z + offset, calibration_labels)
        fits.append((loss, len(fits), Fit(weights, bias, slope, offset, penalty)))
    return min(fits, key=lambda entry: entry[:2])[2]


def _build_model(kind: Kind, penalty: float) -> Any:
    if kind == "classifier":
        return LogisticRegression(C=penalty, max_iter=MAX_ITERATIONS)
    return Ridge(alpha=penalty, solver="sparse_cg", tol=1e-6)


def _fit_calibration(kind: Kind, z: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return slope and offset, or (1, 0) if the slope would reverse the order."""
    if kind == "regressor":
        spread = float(z.var())
        # Least squares of the labels on z.
        slope = float(np.mean((z - z.mean()) * (labels - labels.mean()))) / spread if spread > 0 else 0.0
        if slope <= 0:
            return 1.0, 0.0
        return slope, float(labels.mean() - slope * z.mean())
    # Platt's targets lie strictly between 0 and 1, so that perfectly separated classes give a finite slope.
    positive, negative = float((labels == 1).sum()), float((labels == 0).sum())
    high, low = (positive + 1) / (positive + 2), 1 / (negative + 2)
    targets = np.where(labels == 1, high, low)
    model = LogisticRegression(C=1e6, max_iter=MAX_ITERATIONS)
    # Each text counts for both classes, weighted by its target: logistic regression then fits probabilities.
    model.fit(np.concatenate([z, z])[:, None], np.repeat([1, 0], len(z)),
              sample_weight=np.concatenate([targets, 1 - targets]))
    slope = float(model.coef_[0, 0])
    return (slope, float(model.intercept_[0])) if slope > 0 else (1.0, 0.0)


def _compute_loss(kind: Kind, calibrated: np.ndarray, labels: np.ndarray) -> float:
    """Return mean cross-entropy (classifier) or mean squared error (regressor)."""
    if kind == "regressor":
        return float(np.mean((calibrated - labels) ** 2))
    # Cross-entropy from the logit: log(1 + exp(-z)) without overflow.
    signed = np.clip(np.where(labels == 1, calibrated, -calibrated), -_MAX_LOGIT, _MAX_LOGIT)
    return float(np.mean(np.logaddexp(0.0, -signed)))

"""Train, load and evaluate linear scorers for texts.

An artifact with kind "scorer" holds `scorer.json` (n-gram settings, bias, calibration), `weights.safetensors`
(float32), and held-out metrics in its manifest.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from data_prep.curate.scoring.labels import (
    HIGHEST_LABELS, MIN_LABELS, Kind, Label, check_label_variety, compute_metrics, get_label_values,
    read_labels, split_labels)
from data_prep.curate.scoring.ngram_settings import NgramSettings
from data_prep.curate.scoring.ngrams import Ngrams
from megatron_sov.base.artifacts import (
    MANIFEST, check_output_folder, create_artifact, find_damaged_files, format_json, read_manifest,
    sha256_file)
from megatron_sov.base.errors import UserError, format_install_command
from megatron_sov.base.settings import Finite, ProblemCode, SettingsProblem, parse_settings
from megatron_sov.work.progress.progress_bar import create_bar

ARTIFACT = "scorer"
SETTINGS_FILE, WEIGHTS_FILE = "scorer.json", "weights.safetensors"
CONTENT_VERSION = 1


@dataclass(frozen=True)
class ScorerSettings:
    """Content of `scorer.json`."""

    kind: Kind
    """Classifier: scores are probabilities for label 1; regressor: scores from 0 to 5."""
    features: NgramSettings
    """N-gram features."""
    bias: Finite
    """``z = row @ weights + bias``."""
    slope: Finite
    """The score is ``slope * z + offset`` after the logistic function, or clamped to [0, 5]."""
    offset: Finite


class Scorer:
    """Scores texts one by one, independent of other texts."""

    def __init__(self, settings: ScorerSettings, features: Ngrams, weights: np.ndarray) -> None:
        self.settings = settings
        self._features, self._weights = features, weights

    @property
    def kind(self) -> Kind:
        return self.settings.kind

    def score(self, text: str) -> float:
        """Return the score in [0, 1] (classifier) or [0, 5] (regressor), rounded to float32."""
        s = self.settings
        z = s.slope * (self._features.compute_dot(text, self._weights) + s.bias) + s.offset
        if s.kind == "regressor":
            return float(np.float32(min(max(z, 0.0), float(HIGHEST_LABELS[s.kind]))))
        # Each form of the logistic function overflows only on the other side.
        score = 1.0 / (1.0 + math.exp(-z)) if z > 0 else math.exp(z) / (1.0 + math.exp(z))
        return float(np.float32(score))


def write_scorer(folder: Path, settings: ScorerSettings, weights: np.ndarray) -> None:
    (folder / SETTINGS_FILE).write_text(format_json({"content_version": CONTENT_VERSION, **asdict(settings)}))
    save_file({"weights": weights}, folder / WEIGHTS_FILE)


def list_scorer_files(folder: Path) -> list[Path]:
    """List the files that determine scores: all but the manifest, which contains a date."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)


def find_scorer_problems(name: str, folder: Path, kind: Kind | None = None) -> list[SettingsProblem]:
    """Return a problem with setting `name` unless `folder` is a scorer, of kind `kind` if given."""
    try:
        actual = read_manifest(folder, ARTIFACT).content.get("kind")
    except UserError as e:
        return [SettingsProblem(ProblemCode.FILE, name, str(e))]
    if kind is not None and actual != kind:
        return [SettingsProblem(ProblemCode.FILE, name, f"is a {actual}", folder,
                                f"train one with `sov-data scorer train --kind {kind}`")]
    return []


def load_scorer(folder: Path) -> Scorer:
    """Load a scorer after checking its files against the manifest.

    Raises:
        UserError: `folder` is no scorer, or a file is damaged.
    """
    manifest = read_manifest(folder, ARTIFACT)
    if missing := {SETTINGS_FILE, WEIGHTS_FILE} - set(manifest.files):
        raise UserError(f"{folder}: its manifest lists no {min(missing)}; train the scorer again")
    names = {p.relative_to(folder).as_posix() for p in list_scorer_files(folder)}
    if added := sorted(names - set(manifest.files)):
        raise UserError(f"{folder}: holds {added[0]}, which its manifest does not list; remove it")
    if problems := find_damaged_files(folder):
        raise UserError(f"{folder}: {problems[0]}; train the scorer again or restore it from a copy")
    settings = _read_scorer_settings(folder / SETTINGS_FILE)
    features = Ngrams(settings.features)
    return Scorer(settings, features, _read_weights(folder / WEIGHTS_FILE, settings.features.num_buckets))


def _read_scorer_settings(file: Path) -> ScorerSettings:
    try:
        raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if raw.pop("content_version") != CONTENT_VERSION:
            raise ValueError(f"this version reads content_version {CONTENT_VERSION}")
        return parse_settings(ScorerSettings, raw, "settings")
    except (UserError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise UserError(f"{file}: is damaged ({e}); train the scorer again") from None


def _read_weights(file: Path, width: int) -> np.ndarray:
    try:
        weights = load_file(file)["weights"]
        # With another shape, a compiled loop would read past the array's end.
        if weights.dtype != np.float32 or weights.shape != (width,) or not np.isfinite(weights).all():
            raise ValueError(f"weights must be {width} finite float32, and are {weights.dtype} of shape "
                             f"{list(weights.shape)}")
    except (SafetensorError, ValueError, KeyError) as e:
        raise UserError(f"{file}: is damaged ({e}); train the scorer again") from None
    return weights


# Scikit-learn fits the weights; penalty, slope and offset are chosen on texts outside the fit. A classifier
# is logistic regression with Platt's calibration (1999): the logistic function of slope * z + offset. A
# regressor is ridge regression, as in FineWeb-Edu (arXiv 2406.17557, section 4); slope and offset undo the
# shrinkage towards the mean by the penalty.

INVERSE_PENALTIES = (1.0, 10.0, 100.0, 1000.0)
"""Candidates for C in logistic regression."""
PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Candidates for alpha in ridge regression."""
MAX_ITERATIONS = 500
_MAX_LOGIT = 30.0
"""Logits are clamped here, where float32 probabilities are practically 0 or 1."""


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


def _check_library() -> None:
    if importlib.util.find_spec("sklearn") is None:
        raise UserError(f"scikit-learn is not installed; {format_install_command('data')}")


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
    from threadpoolctl import threadpool_limits  # optional package

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
    from sklearn.linear_model import LogisticRegression, Ridge  # optional package

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
    from sklearn.linear_model import LogisticRegression  # optional package

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


@dataclass(frozen=True)
class TrainSettings:
    """Settings for `train_scorer`."""

    labels: Path
    """JSONL file for `read_labels`."""
    kind: Kind
    features: NgramSettings = NgramSettings()


def train_scorer(settings: TrainSettings, output: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Train a scorer, write its artifact and return the content: counts and held-out metrics.

    Raises:
        UserError: labels are invalid or too few, or `output` may not be replaced.
    """
    _check_library()
    check_output_folder(output, ARTIFACT, overwrite)
    labels, num_again = read_labels(settings.labels, settings.kind, settings.features.max_chars,
                                    least=MIN_LABELS)
    check_label_variety(settings.labels, labels, settings.kind)
    parts = split_labels(labels)
    with create_artifact(output, ARTIFACT, overwrite=overwrite) as artifact:
        features = Ngrams(settings.features)
        with create_bar("reading texts", len(parts.fit) + len(parts.calibration), "text") as bar:
            rows = _build_matrix(features, iter_with_progress(parts.fit, bar))
            calibration_rows = _build_matrix(features, iter_with_progress(parts.calibration, bar))
        fitted = fit_scorer(settings.kind, rows, get_label_values(parts.fit),
                            calibration_rows, get_label_values(parts.calibration))
        scorer_settings = ScorerSettings(settings.kind, settings.features, fitted.bias, fitted.slope,
                                         fitted.offset)
        write_scorer(artifact.path, scorer_settings, fitted.weights)
        scorer = Scorer(scorer_settings, features, fitted.weights)
        scores = np.array([scorer.score(item.text) for item in parts.heldout])
        artifact.settings = {"labels": settings.labels, "labels_sha256": sha256_file(settings.labels)}
        artifact.content = {
            "kind": settings.kind, "num_labels": len(labels), "num_repeated": num_again,
            "num_fit": len(parts.fit), "num_calibration": len(parts.calibration), "penalty": fitted.penalty,
            "heldout": compute_metrics(settings.kind, parts.heldout, scores)}
    return artifact.content


def evaluate_scorer(model: Path, labels: Path) -> tuple[Kind, dict[str, Any]]:
    """Return a scorer's kind and its metrics for a file with labels.

    Raises:
        UserError: `model` is no scorer, or lines in `labels` do not fit its kind.
    """
    _check_library()
    scorer = load_scorer(model)
    items, _ = read_labels(labels, scorer.kind, scorer.settings.features.max_chars)
    with create_bar("scoring", len(items), "text") as bar:
        scores = np.array([scorer.score(item.text) for item in iter_with_progress(items, bar)])
    return scorer.kind, compute_metrics(scorer.kind, items, scores)


def iter_with_progress(labels: list[Label], bar: Any) -> Iterable[Label]:
    for item in labels:
        yield item
        bar.update(1)


def _build_matrix(features: Ngrams, labels: Iterable[Label]) -> Any:
    """Return the feature rows as a scipy CSR matrix, float32 [num_labels, num_buckets]."""
    from scipy.sparse import csr_matrix  # optional package

    rows = [features.compute_row(item.text) for item in labels]
    ends = np.cumsum([0, *(len(columns) for columns, _ in rows)])
    columns = np.concatenate([columns for columns, _ in rows])
    weights = np.concatenate([weights for _, weights in rows])
    return csr_matrix((weights, columns, ends), shape=(len(rows), features.settings.num_buckets))

"""From labels to a scorer: read, cut, fit, judge on what was held out, write; and what it says of a text.

An artifact of kind "scorer": `scorer.json` (how texts are read, and four numbers), `weights.safetensors`
(float32), and the figures in the manifest.
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
    """What `scorer.json` holds."""

    kind: Kind
    """Classifier: scores are probabilities of label 1; regressor: from 0 to 5."""
    features: NgramSettings
    """How texts become rows."""
    bias: Finite
    """Added to the product of row and weights: z."""
    slope: Finite
    """The score is slope * z + offset, through the logistic function or cut to 0 to 5."""
    offset: Finite


class Scorer:
    """Gives texts a score; the same text the same score, whatever stands beside it."""

    def __init__(self, settings: ScorerSettings, features: Ngrams, weights: np.ndarray) -> None:
        self.settings = settings
        self._features, self._weights = features, weights

    @property
    def kind(self) -> Kind:
        return self.settings.kind

    def score(self, text: str) -> float:
        """Return the score of a text, as single precision holds it: in [0, 1], or in [0, 5]."""
        s = self.settings
        z = s.slope * (self._features.dot(text, self._weights) + s.bias) + s.offset
        if s.kind == "regressor":
            return float(np.float32(min(max(z, 0.0), float(HIGHEST_LABELS[s.kind]))))
        # Two forms of the logistic function: neither overflows.
        return float(np.float32(1.0 / (1.0 + math.exp(-z)) if z > 0 else math.exp(z) / (1.0 + math.exp(z))))


def write_scorer(folder: Path, settings: ScorerSettings, weights: np.ndarray) -> None:
    from safetensors.numpy import save_file

    (folder / SETTINGS_FILE).write_text(format_json({"content_version": CONTENT_VERSION, **asdict(settings)}))
    save_file({"weights": weights}, folder / WEIGHTS_FILE)


def list_scorer_files(folder: Path) -> list[Path]:
    """Return what decides the scores of an artifact: everything but its manifest, which has a date."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)


def find_scorer_problems(name: str, folder: Path, kind: Kind | None = None) -> list[SettingsProblem]:
    """Return why a folder is no scorer, or one of another kind, in a sentence; nothing where it is one.

    Args:
        name: the setting that names the folder.
        folder: the artifact.
        kind: what it has to be; None: any.
    """
    try:
        found = read_manifest(folder, ARTIFACT).content.get("kind")
    except UserError as e:
        return [SettingsProblem(ProblemCode.FILE, name, str(e))]
    if kind is not None and found != kind:
        return [SettingsProblem(ProblemCode.FILE, name, f"is a {found}", folder,
                                f"train one with `sov-data scorer train --kind {kind}`")]
    return []


def load_scorer(folder: Path) -> Scorer:
    """Return the scorer of an artifact, all of whose files are what its manifest says.

    Raises:
        UserError: it is no scorer, or damaged.
    """
    manifest = read_manifest(folder, ARTIFACT)
    if lacking := {SETTINGS_FILE, WEIGHTS_FILE} - set(manifest.files):
        raise UserError(f"{folder}: its manifest lists no {min(lacking)}; train the scorer again")
    found = {p.relative_to(folder).as_posix() for p in list_scorer_files(folder)}
    if added := sorted(found - set(manifest.files)):
        raise UserError(f"{folder}: holds {added[0]}, which its manifest does not list; remove it")
    if problems := find_damaged_files(folder):
        raise UserError(f"{folder}: {problems[0]}; train the scorer again or restore it from a copy")
    settings = _settings(folder / SETTINGS_FILE)
    features = Ngrams(settings.features)
    return Scorer(settings, features, _weights(folder / WEIGHTS_FILE, settings.features.num_buckets))


def _settings(file: Path) -> ScorerSettings:
    try:
        raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if raw.pop("content_version") != CONTENT_VERSION:
            raise ValueError(f"this version reads content_version {CONTENT_VERSION}")
        return parse_settings(ScorerSettings, raw, "settings")
    except (UserError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise UserError(f"{file}: is damaged ({e}); train the scorer again") from None


def _weights(file: Path, width: int) -> np.ndarray:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        weights = load_file(file)["weights"]
        # Weights of another shape would read past the end of a compiled loop's array.
        if weights.dtype != np.float32 or weights.shape != (width,) or not np.isfinite(weights).all():
            raise ValueError(f"weights must be {width} finite float32, and are {weights.dtype} of shape "
                             f"{list(weights.shape)}")
    except (SafetensorError, ValueError, KeyError) as e:
        raise UserError(f"{file}: is damaged ({e}); train the scorer again") from None
    return weights


# Fitting a linear scorer: the library does it, and what is chosen is chosen on texts that were not fitted.
#
# A classifier is logistic regression, calibrated as in Platt (1999): its probability is a logistic function
# of slope * z + offset, with both from texts that the weights have not seen. A regressor is ridge regression,
# the linear probe of FineWeb-Edu (arXiv 2406.17557, section 4), whose slope and offset undo what its penalty
# draws towards the mean.

INVERSE_PENALTIES = (1.0, 10.0, 100.0, 1000.0)
"""C of logistic regression; the best one on the calibration part is taken."""
PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0)
"""alpha of ridge regression."""
MAX_ITERATIONS = 500
_SURE = 30.0
"""A logit beyond which a probability is 0 or 1 in single precision, near enough."""


@dataclass(frozen=True)
class Fit:
    """A linear scorer."""

    weights: np.ndarray
    """One float32 for each column of a row."""
    bias: float
    """Added to the product of row and weights: z."""
    slope: float
    """Of the calibration: z becomes slope * z + offset."""
    offset: float
    penalty: float
    """The penalty that was chosen, in the words of the library: C, or alpha."""


def library_problems() -> list[str]:
    if importlib.util.find_spec("sklearn") is None:
        return [f"scikit-learn is not installed; {format_install_command('data')}"]
    return []


def fit_scorer(kind: Kind, rows: Any, labels: np.ndarray, calibration_rows: Any,
        calibration_labels: np.ndarray) -> Fit:
    """Return the scorer that is best on the calibration part, calibrated there.

    Args:
        kind: what to fit.
        rows: sparse matrix, a row for each text.
        labels: float64, one for each row.
        calibration_rows: rows that only choose and calibrate.
        calibration_labels: their labels.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # sums in another order would have other last bits
        return _best(kind, rows, labels, calibration_rows, calibration_labels)


def _best(kind: Kind, rows: Any, labels: np.ndarray, calibration_rows: Any,
          calibration_labels: np.ndarray) -> Fit:
    tried: list[tuple[float, int, Fit]] = []
    for penalty in INVERSE_PENALTIES if kind == "classifier" else PENALTIES:
        model = _model(kind, penalty)
        model.fit(rows, labels)
        weights = np.ravel(model.coef_).astype(np.float32)
        bias = float(np.ravel(model.intercept_)[0])
        # With the weights as they are written, in single precision.
        z = np.asarray(calibration_rows @ weights, np.float64) + bias
        slope, offset = _calibration(kind, z, calibration_labels)
        loss = _loss(kind, slope * z + offset, calibration_labels)
        tried.append((loss, len(tried), Fit(weights, bias, slope, offset, penalty)))
    return min(tried, key=lambda entry: entry[:2])[2]


def _model(kind: Kind, penalty: float) -> Any:
    from sklearn.linear_model import LogisticRegression, Ridge

    if kind == "classifier":
        return LogisticRegression(C=penalty, max_iter=MAX_ITERATIONS)
    return Ridge(alpha=penalty, solver="sparse_cg", tol=1e-6)


def _calibration(kind: Kind, z: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return slope and offset; a slope that would turn the order round is not taken."""
    if kind == "regressor":
        spread = float(z.var())
        # Least squares of the labels on z.
        slope = float(np.mean((z - z.mean()) * (labels - labels.mean()))) / spread if spread > 0 else 0.0
        if slope <= 0:
            return 1.0, 0.0
        return slope, float(labels.mean() - slope * z.mean())
    from sklearn.linear_model import LogisticRegression

    # Platt's targets: never quite 0 or 1, so that classes that are told apart wholly give a finite slope
    positive, negative = float((labels == 1).sum()), float((labels == 0).sum())
    high, low = (positive + 1) / (positive + 2), 1 / (negative + 2)
    wanted = np.where(labels == 1, high, low)
    model = LogisticRegression(C=1e6, max_iter=MAX_ITERATIONS)
    # Each text counts as both classes, weighted by its target: logistic regression then fits probabilities.
    model.fit(np.concatenate([z, z])[:, None], np.repeat([1, 0], len(z)),
              sample_weight=np.concatenate([wanted, 1 - wanted]))
    slope = float(model.coef_[0, 0])
    return (slope, float(model.intercept_[0])) if slope > 0 else (1.0, 0.0)


def _loss(kind: Kind, calibrated: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean cross-entropy of a classifier, or the mean square error of a regressor."""
    if kind == "regressor":
        return float(np.mean((calibrated - labels) ** 2))
    # Cross-entropy by the logit: log(1 + exp(-z)) without overflow.
    signed = np.clip(np.where(labels == 1, calibrated, -calibrated), -_SURE, _SURE)
    return float(np.mean(np.logaddexp(0.0, -signed)))


@dataclass(frozen=True)
class TrainSettings:
    """What to train a scorer of, and how."""

    labels: Path
    """JSONL file of labels."""
    kind: Kind
    """classifier, or regressor."""
    features: NgramSettings = NgramSettings()
    """How texts become rows."""


def train_scorer(settings: TrainSettings, output: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write an artifact of kind "scorer"; returns its content: counts and held-out figures.

    Raises:
        UserError: labels or settings that cannot be, or an output that may not be replaced.
    """
    if problems := library_problems():
        raise UserError(problems[0])
    check_output_folder(output, ARTIFACT, overwrite)
    labels, num_again = read_labels(settings.labels, settings.kind, settings.features.max_chars,
                                    least=MIN_LABELS)
    check_label_variety(settings.labels, labels, settings.kind)
    parts = split_labels(labels)
    with create_artifact(output, ARTIFACT, overwrite=overwrite) as artifact:
        features = Ngrams(settings.features)
        with create_bar("reading texts", len(parts.fit) + len(parts.calibration), "text") as bar:
            matrices = [_rows(features, iter_with_progress(part, bar))
                        for part in (parts.fit, parts.calibration)]
        fitted = fit_scorer(settings.kind, matrices[0], get_label_values(parts.fit),
                            matrices[1], get_label_values(parts.calibration))
        found = ScorerSettings(settings.kind, settings.features, fitted.bias, fitted.slope, fitted.offset)
        write_scorer(artifact.path, found, fitted.weights)
        scorer = Scorer(found, features, fitted.weights)
        scores = np.array([scorer.score(item.text) for item in parts.heldout])
        artifact.settings = {"labels": settings.labels, "labels_sha256": sha256_file(settings.labels)}
        artifact.content = {
            "kind": settings.kind, "num_labels": len(labels), "num_repeated": num_again,
            "num_fit": len(parts.fit), "num_calibration": len(parts.calibration), "penalty": fitted.penalty,
            "heldout": compute_metrics(settings.kind, parts.heldout, scores)}
    return artifact.content


def evaluate_scorer(model: Path, labels: Path) -> tuple[Kind, dict[str, Any]]:
    """Return a scorer's kind, and its figures on other labels.

    Raises:
        UserError: it is no scorer, or lines are no labels for it.
    """
    if problems := library_problems():
        raise UserError(problems[0])
    scorer = load_scorer(model)
    found, _ = read_labels(labels, scorer.kind, scorer.settings.features.max_chars)
    with create_bar("scoring", len(found), "text") as bar:
        scores = np.array([scorer.score(item.text) for item in iter_with_progress(found, bar)])
    return scorer.kind, compute_metrics(scorer.kind, found, scores)


def iter_with_progress(labels: list[Label], bar: Any) -> Iterable[Label]:
    for item in labels:
        yield item
        bar.update(1)


def _rows(features: Ngrams, labels: Iterable[Label]) -> Any:
    """Return the sparse float32 matrix of the n-grams of texts (scipy, CSR)."""
    from scipy.sparse import csr_matrix

    rows = [features.row(item.text) for item in labels]
    ends = np.cumsum([0, *(len(columns) for columns, _ in rows)])
    columns = np.concatenate([columns for columns, _ in rows])
    weights = np.concatenate([weights for _, weights in rows])
    return csr_matrix((weights, columns, ends), shape=(len(rows), features.settings.num_buckets))

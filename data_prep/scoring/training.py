"""From labels to a scorer: read, cut, fit, judge on what was held out, write."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.scoring.encoder import Encoder, EncoderSettings, copy_encoder
from data_prep.scoring.fitting import fit, library_problems
from data_prep.scoring.judgement import judge
from data_prep.scoring.labels import MIN_LABELS, Kind, Label, read_labels, refuse_one_class, split, values
from data_prep.scoring.ngram_settings import NgramSettings
from data_prep.scoring.ngrams import Ngrams
from data_prep.scoring.scorer import (
    ARTIFACT,
    ENCODER_FOLDER,
    Scorer,
    ScorerSettings,
    load_scorer,
    write_scorer,
)
from megatron_sov.artifacts import new_artifact, refuse_existing, sha256_file
from megatron_sov.errors import UserError
from megatron_sov.obs.work_bar import work_bar
from megatron_sov.settings import SettingsError, as_problem, name_options, problems_of


@dataclass(frozen=True)
class TrainSettings:
    """What to train a scorer of, and how."""

    labels: Path
    """JSONL file of labels."""
    kind: Kind
    """classifier, or regressor."""
    features: NgramSettings | EncoderSettings
    """How texts become rows."""
    encoder: Path | None = None
    """Hugging Face folder, where rows are embeddings."""


def train(settings: TrainSettings, output: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write an artifact of kind "scorer"; returns its content: counts and held-out figures.

    Raises:
        UserError: labels or settings that cannot be, or an output that may not be replaced.
    """
    if problems := [*map(as_problem, library_problems()), *name_options(
            problems_of(settings.features), num_buckets="--buckets")]:
        raise SettingsError("", problems)
    refuse_existing(output, ARTIFACT, overwrite)
    labels, num_again = read_labels(settings.labels, settings.kind, settings.features.max_chars,
                                    least=MIN_LABELS)
    refuse_one_class(settings.labels, labels, settings.kind)
    parts = split(labels)
    with new_artifact(output, ARTIFACT, overwrite=overwrite) as artifact:
        if isinstance(settings.features, NgramSettings):
            features: Ngrams | Encoder = Ngrams(settings.features)
        else:
            assert settings.encoder is not None
            copy_encoder(settings.encoder, artifact.path / ENCODER_FOLDER)
            features = Encoder(artifact.path / ENCODER_FOLDER, settings.features)
        with work_bar("reading texts", len(parts.fit) + len(parts.calibration), "text") as bar:
            matrices = [_rows(features, bar_of(part, bar)) for part in (parts.fit, parts.calibration)]
        fitted = fit(settings.kind, matrices[0], values(parts.fit), matrices[1], values(parts.calibration))
        found = ScorerSettings(settings.kind, settings.features, fitted.bias, fitted.slope, fitted.offset)
        write_scorer(artifact.path, found, fitted.weights)
        scorer = Scorer(found, features, fitted.weights)
        scores = np.array([scorer.score(item.text) for item in parts.heldout])
        artifact.settings = {"labels": settings.labels, "labels_sha256": sha256_file(settings.labels),
                             "encoder": settings.encoder}
        artifact.content = {
            "kind": settings.kind, "num_labels": len(labels), "num_repeated": num_again,
            "num_fit": len(parts.fit), "num_calibration": len(parts.calibration), "penalty": fitted.penalty,
            "heldout": judge(settings.kind, parts.heldout, scores)}
    return artifact.content


def check(model: Path, labels: Path) -> tuple[Kind, dict[str, Any]]:
    """Return a scorer's kind, and its figures on other labels.

    Raises:
        UserError: it is no scorer, or lines are no labels for it.
    """
    if problems := library_problems():
        raise UserError(problems[0])
    scorer = load_scorer(model)
    found, _ = read_labels(labels, scorer.kind, scorer.settings.features.max_chars)
    with work_bar("scoring", len(found), "text") as bar:
        scores = np.array([scorer.score(item.text) for item in bar_of(found, bar)])
    return scorer.kind, judge(scorer.kind, found, scores)


def bar_of(labels: list[Label], bar: Any) -> Iterable[Label]:
    """Yield labels, and tell a bar of each."""
    for item in labels:
        yield item
        bar.update(1)


def _rows(features: Ngrams | Encoder, labels: Iterable[Label]) -> Any:
    """Return the matrix of texts: sparse float32 of n-grams, or float32 of embeddings."""
    if isinstance(features, Encoder):
        return np.stack([features.embed(item.text) for item in labels])
    return sparse_rows([features.row(item.text) for item in labels], features.width)


def sparse_rows(rows: list[tuple[np.ndarray, np.ndarray]], width: int) -> Any:
    """Return rows of (columns, values) as one sparse matrix (scipy, CSR)."""
    from scipy.sparse import csr_matrix

    ends = np.cumsum([0, *(len(columns) for columns, _ in rows)])
    columns = np.concatenate([columns for columns, _ in rows])
    return csr_matrix((np.concatenate([v for _, v in rows]), columns, ends), shape=(len(rows), width))

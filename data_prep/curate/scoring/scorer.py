"""Linear scorers for texts: their artifact, and scores.

An artifact with kind "scorer" holds `scorer.json` (n-gram settings, bias, calibration), `weights.safetensors`
(float32), and held-out metrics in its manifest.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from data_prep.curate.scoring.labels import HIGHEST_LABELS, Kind
from data_prep.curate.scoring.ngrams import Ngrams, NgramSettings
from megatron_sov.base.artifacts import MANIFEST, find_damaged_files, format_json, read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import Finite, ProblemCode, SettingsProblem, parse_settings

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
    """``y = slope * z + offset``; the score is the logistic function of y, or y clamped to [0, 5]."""
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
        dot = float((self._features.compute_rows([text]) @ self._weights)[0])
        y = s.slope * (dot + s.bias) + s.offset
        if s.kind == "regressor":
            return float(np.float32(min(max(y, 0.0), float(HIGHEST_LABELS[s.kind]))))
        # Two equal forms of the logistic function: `math.exp` gets no positive number and cannot overflow.
        score = 1.0 / (1.0 + math.exp(-y)) if y > 0 else math.exp(y) / (1.0 + math.exp(y))
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
    """Load a scorer after checking its files against the manifest. Raises `UserError`: `folder` is no scorer,
    or a file is damaged."""
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
        if weights.dtype != np.float32 or weights.shape != (width,) or not np.isfinite(weights).all():
            raise ValueError(f"weights must be {width} finite float32, and are {weights.dtype} of shape "
                             f"{list(weights.shape)}")
    except (SafetensorError, ValueError, KeyError) as e:
        raise UserError(f"{file}: is damaged ({e}); train the scorer again") from None
    return weights

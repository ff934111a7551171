"""A trained scorer on disk, and what it says of a text.

An artifact of kind "scorer": `scorer.json` (how texts are read, and four numbers), `weights.safetensors`
(float32), for an encoder its Hugging Face files in `encoder/`, and the figures in the manifest.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.curate.scoring.encoder import EncoderSettings, ScoringEncoder
from data_prep.curate.scoring.labels import HIGHEST, Kind
from data_prep.curate.scoring.ngram_settings import NgramSettings
from data_prep.curate.scoring.ngrams import Ngrams
from megatron_sov.base.artifacts import MANIFEST, damaged_files, read_manifest, to_json
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import Finite, ProblemCode, SettingsProblem, read

ARTIFACT = "scorer"
SETTINGS_FILE, WEIGHTS_FILE, ENCODER_FOLDER = "scorer.json", "weights.safetensors", "encoder"
CONTENT_VERSION = 1


@dataclass(frozen=True)
class ScorerSettings:
    """What `scorer.json` holds."""

    kind: Kind
    """Classifier: scores are probabilities of label 1; regressor: from 0 to 5."""
    features: NgramSettings | EncoderSettings
    """How texts become rows."""
    bias: Finite
    """Added to the product of row and weights: z."""
    slope: Finite
    """The score is slope * z + offset, through the logistic function or cut to 0 to 5."""
    offset: Finite


class Scorer:
    """Gives texts a score; the same text the same score, whatever stands beside it."""

    def __init__(self, settings: ScorerSettings, features: Ngrams | ScoringEncoder,
                 weights: np.ndarray) -> None:
        self.settings = settings
        self._features, self._weights = features, weights

    @property
    def kind(self) -> Kind:
        """Return what its scores mean."""
        return self.settings.kind

    def score(self, text: str) -> float:
        """Return the score of a text, as single precision holds it: in [0, 1], or in [0, 5].

        Raises:
            UserError: an encoder cannot take the text.
        """
        s = self.settings
        z = s.slope * (self._features.dot(text, self._weights) + s.bias) + s.offset
        if s.kind == "regressor":
            return float(np.float32(min(max(z, 0.0), float(HIGHEST[s.kind]))))
        return float(np.float32(1.0 / (1.0 + math.exp(-z)) if z > 0 else math.exp(z) / (1.0 + math.exp(z))))


def write_scorer(folder: Path, settings: ScorerSettings, weights: np.ndarray) -> None:
    """Write settings and weights into the folder of an artifact."""
    from safetensors.numpy import save_file

    (folder / SETTINGS_FILE).write_text(to_json({"content_version": CONTENT_VERSION, **asdict(settings)}))
    save_file({"weights": weights}, folder / WEIGHTS_FILE)


def scorer_files(folder: Path) -> list[Path]:
    """Return what decides the scores of an artifact: everything but its manifest, which has a date."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)


def scorer_problems(name: str, folder: Path, kind: Kind | None = None) -> list[SettingsProblem]:
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
    found = {p.relative_to(folder).as_posix() for p in scorer_files(folder)}
    if added := sorted(found - set(manifest.files)):
        raise UserError(f"{folder}: holds {added[0]}, which its manifest does not list; remove it")
    if problems := damaged_files(folder):
        raise UserError(f"{folder}: {problems[0]}; train the scorer again or restore it from a copy")
    settings = _settings(folder / SETTINGS_FILE)
    features = (Ngrams(settings.features) if isinstance(settings.features, NgramSettings)
                else ScoringEncoder(folder / ENCODER_FOLDER, settings.features))
    return Scorer(settings, features, _weights(folder / WEIGHTS_FILE, features.width))


def _settings(file: Path) -> ScorerSettings:
    try:
        raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if raw.pop("content_version") != CONTENT_VERSION:
            raise ValueError(f"this version reads content_version {CONTENT_VERSION}")
        features = raw.pop("features")
        kind: type[NgramSettings | EncoderSettings] = (
            NgramSettings if "num_buckets" in features else EncoderSettings)
        return read(ScorerSettings, {**raw, "features": read(kind, features, "features")}, "settings")
    except (UserError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise UserError(f"{file}: is damaged ({e}); train the scorer again") from None


def _weights(file: Path, width: int) -> np.ndarray:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        weights = load_file(file)["weights"]
        if weights.dtype != np.float32 or weights.shape != (width,) or not np.isfinite(weights).all():
            raise ValueError(f"weights must be {width} finite float32, and are {weights.dtype} of shape "
                             f"{list(weights.shape)}")
    except (SafetensorError, ValueError, KeyError) as e:
        raise UserError(f"{file}: is damaged ({e}); train the scorer again") from None
    return weights

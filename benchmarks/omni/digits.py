"""Small images of digits, and an independent classifier to score generated images.

The images are scikit-learn's handwritten digits (1,797 of 8 x 8, ten classes) as 16 x 16 RGB. A digit's
color depends only on its index in the set, not on its label. The classifier is scikit-learn's support vector
machine with a radial kernel, fitted on a part of the set that our models never see.
"""

from functools import cache
from typing import Any

import numpy as np

SIDE_PIXELS = 16
COLOURS = ((1.0, 1.0, 1.0), (1.0, 0.6, 0.3), (0.4, 0.9, 1.0), (0.7, 1.0, 0.4))
"""Colors of the strokes, on black."""
_PARTS = {"train": (0.0, 0.55), "heldout": (0.55, 0.7), "judge": (0.7, 1.0)}
"""Part -> its first and last index as shares of the shuffled set."""


@cache
def _load_digits() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return all pictures, their labels, and a random permutation."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    grey = np.repeat(np.repeat(raw.images.astype(np.float32) / 16, 2, axis=1), 2, axis=2)
    colour = np.asarray(COLOURS, dtype=np.float32)[np.arange(len(grey)) % len(COLOURS)]
    pictures = grey[:, None] * colour[:, :, None, None]
    return pictures, raw.target.astype(np.int64), np.random.default_rng(0).permutation(len(grey))


def load_part(name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the pictures [n, 3, 16, 16], float32 in 0..1, and the digits [n] of a part of `_PARTS`."""
    pictures, labels, order = _load_digits()
    begin, end = (round(share * len(order)) for share in _PARTS[name])
    chosen = order[begin:end]
    return pictures[chosen], labels[chosen]


@cache
def _fit_classifier() -> Any:
    from sklearn.svm import SVC

    pictures, labels = load_part("judge")
    return SVC(gamma=0.001, C=10).fit(_build_features(pictures), labels)


def _build_features(pictures: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the classifier's input: 8 x 8 brightness in 0..16, independent of color."""
    bright = np.clip(pictures, 0, 1).max(axis=1)
    small = bright.reshape(len(bright), 8, 2, 8, 2).mean(axis=(2, 4))
    return (small * 16).reshape(len(bright), 64)


def classify_digits(pictures: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the digits [n] of pictures [n, 3, 16, 16] in 0..1."""
    return np.asarray(_fit_classifier().predict(_build_features(np.asarray(pictures, dtype=np.float32))))

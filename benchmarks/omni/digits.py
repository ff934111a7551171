"""Small images of digits, and an independent classifier to score generated ones.

scikit-learn's handwritten digits (1,797 of 8 x 8, ten classes) as 16 x 16 RGB.  A digit's colour is a
function of its number in the set and carries no label.  The judge is scikit-learn's support vector classifier
with a radial kernel, fitted on real pictures of its own third of the set, which no model of ours is trained
on or examined with.
"""

from functools import cache
from typing import Any

import numpy as np

SIDE_PIXELS = 16
COLOURS = ((1.0, 1.0, 1.0), (1.0, 0.6, 0.3), (0.4, 0.9, 1.0), (0.7, 1.0, 0.4))
"""Of the strokes, on black."""
_PARTS = {"train": (0.0, 0.55), "heldout": (0.55, 0.7), "judge": (0.7, 1.0)}


@cache
def _all() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return every picture, its label, and an order without structure."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    grey = np.repeat(np.repeat(raw.images.astype(np.float32) / 16, 2, axis=1), 2, axis=2)
    colour = np.asarray(COLOURS, dtype=np.float32)[np.arange(len(grey)) % len(COLOURS)]
    pictures = grey[:, None] * colour[:, :, None, None]
    return pictures, raw.target.astype(np.int64), np.random.default_rng(0).permutation(len(grey))


def part(name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the pictures [n, 3, 16, 16], float32 in 0..1, and the digits [n] of a part.

    Parts are "train", "heldout" and "judge".
    """
    pictures, labels, order = _all()
    begin, end = (round(share * len(order)) for share in _PARTS[name])
    chosen = order[begin:end]
    return pictures[chosen], labels[chosen]


@cache
def _judge() -> Any:
    from sklearn.svm import SVC

    pictures, labels = part("judge")
    return SVC(gamma=0.001, C=10).fit(_seen(pictures), labels)


def _seen(pictures: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the classifier's input: 8 x 8 brightness in 0..16, independent of color."""
    bright = np.clip(pictures, 0, 1).max(axis=1)
    small = bright.reshape(len(bright), 8, 2, 8, 2).mean(axis=(2, 4))
    return (small * 16).reshape(len(bright), 64)


def judge(pictures: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the digit [n] that the judge sees in each of [n, 3, 16, 16] pictures in 0..1."""
    return np.asarray(_judge().predict(_seen(np.asarray(pictures, dtype=np.float32))))

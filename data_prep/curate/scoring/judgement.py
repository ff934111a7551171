"""How good scores are against labels: the figures that a scorer's manifest and `scorer check` give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep.curate.scoring.labels import HIGHEST, Kind, Label, values

NUM_BINS = 10
"""Of the expected calibration error."""
_OWN = {"classifier": (("brier", "Brier score"), ("calibration_error", "calibration error")),
        "regressor": (("spearman", "Spearman"), ("mean_absolute_error", "mean error"))}
"""Kind -> figures that it alone has, and what they are called."""
KEEPS = {"classifier": 0.5, "regressor": 3.0}
"""The score from which a text counts as good in the table of hits and misses; 3 is FineWeb-Edu's."""


def judge(kind: Kind, labels: Sequence[Label], scores: np.ndarray) -> dict[str, Any]:
    """Return the figures of all labels, and under "languages" those of each language.

    `auc` or `spearman` is null where labels or scores do not differ.
    """
    languages = sorted({item.language for item in labels})
    return {**_figures(kind, values(labels), scores), "languages": {
        name or "not said": _short(_figures(kind, values([labels[i] for i in places]), scores[places]))
        for name in languages
        for places in [[i for i, item in enumerate(labels) if item.language == name]]}}


def _short(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if name != "confusion"}


def _figures(kind: Kind, labels: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    from scipy.stats import spearmanr
    from sklearn.metrics import confusion_matrix, roc_auc_score

    keeps = KEEPS[kind]
    good, kept = labels >= keeps, scores >= keeps
    hits = int((good & kept).sum())
    found: dict[str, Any] = {
        "num_labels": len(labels),
        "auc": float(roc_auc_score(good, scores)) if good.any() and not good.all() else None,
        "precision": hits / int(kept.sum()) if kept.any() else None,
        "recall": hits / int(good.sum()) if good.any() else None,
    }
    if kind == "classifier":
        found |= {"brier": float(np.mean((scores - labels) ** 2)),
                  "calibration_error": _calibration_error(labels, scores)}
    else:
        differ = len(set(labels.tolist())) > 1 and len(set(scores.tolist())) > 1
        found |= {"spearman": float(spearmanr(labels, scores).statistic) if differ else None,
                  "mean_absolute_error": float(np.mean(np.abs(scores - labels))),
                  "mean_square_error": float(np.mean((scores - labels) ** 2))}
    classes = list(range(HIGHEST[kind] + 1))
    rounded = (kept.astype(int) if kind == "classifier" else np.rint(scores).astype(int))
    found["confusion"] = confusion_matrix(np.rint(labels).astype(int), rounded, labels=classes).tolist()
    return found


def _calibration_error(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return the expected calibration error (Guo et al., arXiv 1706.04599, equation 3)."""
    bins = np.minimum((scores * NUM_BINS).astype(int), NUM_BINS - 1)
    return float(sum(abs(labels[bins == i].sum() - scores[bins == i].sum()) for i in set(bins.tolist()))
                 / len(labels))


def told(kind: Kind, figures: dict[str, Any]) -> list[str]:
    """Return the figures as lines for a terminal."""
    lines = [f"  {_line(kind, figures)}"]
    if len(figures["languages"]) > 1 or "not said" not in figures["languages"]:
        lines += [f"  {name}: {_line(kind, of)}" for name, of in figures["languages"].items()]
    lines.append("  rows: labels, columns: scores, rounded: " + "; ".join(
        f"{i}: {' '.join(map(str, row))}" for i, row in enumerate(figures["confusion"])))
    return lines


def _line(kind: Kind, figures: dict[str, Any]) -> str:
    names = (("auc", "AUC"), ("precision", "precision"), ("recall", "recall"), *_OWN[kind])
    shown = ", ".join(f"{name} {'-' if figures[key] is None else format(figures[key], '.4f')}"
                      for key, name in names)
    return f"{figures['num_labels']:,} texts: {shown} (good: {KEEPS[kind]:g} or more)"

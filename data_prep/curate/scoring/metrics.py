"""Metrics of a scorer on labelled texts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from data_prep.curate.scoring.labels import Kind, Label, get_label_values

GOOD_SCORES: dict[Kind, float] = {"classifier": 0.5, "regressor": 3.0}
"""Minimum score and label of a good text; FineWeb-Edu keeps 3 and above."""
_NAMES = {"auc": "AUC", "precision": "precision", "recall": "recall", "brier": "Brier score",
          "spearman": "Spearman", "mean_absolute_error": "mean error"}
"""Key of a metric -> name on the terminal."""


def compute_metrics(kind: Kind, labels: Sequence[Label], scores: np.ndarray) -> dict[str, Any]:
    """Return metrics over all labels, and the metrics of each language under "languages".

    Undefined metrics are None: `auc` and `spearman` if labels or scores are equal, `precision` and `recall`
    without good texts.
    """
    metrics = _compute_group_metrics(kind, get_label_values(labels), scores)
    languages = {}
    for language in sorted({item.language for item in labels}):
        rows = [i for i, item in enumerate(labels) if item.language == language]
        values = get_label_values([labels[i] for i in rows])
        languages[language or "not said"] = _compute_group_metrics(kind, values, scores[rows])
    return {**metrics, "languages": languages}


def _compute_group_metrics(kind: Kind, labels: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    is_good, is_kept = labels >= GOOD_SCORES[kind], scores >= GOOD_SCORES[kind]
    num_hits = int((is_good & is_kept).sum())
    has_both_classes = is_good.any() and not is_good.all()
    metrics: dict[str, Any] = {
        "num_labels": len(labels),
        "auc": float(roc_auc_score(is_good, scores)) if has_both_classes else None,
        "precision": num_hits / int(is_kept.sum()) if is_kept.any() else None,
        "recall": num_hits / int(is_good.sum()) if is_good.any() else None}
    if kind == "classifier":
        return {**metrics, "brier": float(np.mean((scores - labels) ** 2))}
    differ = len(set(labels.tolist())) > 1 and len(set(scores.tolist())) > 1
    return {**metrics, "spearman": float(spearmanr(labels, scores).statistic) if differ else None,
            "mean_absolute_error": float(np.mean(np.abs(scores - labels)))}


def format_metrics(kind: Kind, metrics: dict[str, Any]) -> list[str]:
    lines = [f"  {_format_group(kind, metrics)}"]
    languages = metrics["languages"]
    if len(languages) > 1 or "not said" not in languages:
        lines += [f"  {name}: {_format_group(kind, group)}" for name, group in languages.items()]
    return lines


def _format_group(kind: Kind, metrics: dict[str, Any]) -> str:
    values = {key: "-" if metrics[key] is None else f"{metrics[key]:.4f}" for key in _NAMES if key in metrics}
    text = ", ".join(f"{_NAMES[key]} {value}" for key, value in values.items())
    return f"{metrics['num_labels']:,} texts: {text} (good: {GOOD_SCORES[kind]:g} or more)"

"""Figures against labels, beside those that are counted by hand."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from data_prep.curate.scoring.labels import Label, describe_figures, judge


def test_figures_of_a_classifier_are_those_of_counting_pairs() -> None:
    rng = np.random.default_rng(1)
    wanted = rng.integers(0, 2, 60)
    scores = np.round(np.clip(0.3 * wanted + rng.random(60) * 0.7, 0, 1), 1)
    figures = judge("classifier", [Label("", float(x), "en") for x in wanted], scores)
    pairs = list(product(scores[wanted == 1], scores[wanted == 0]))
    assert figures["auc"] == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs]))
    kept = scores >= 0.5
    assert figures["precision"] == pytest.approx(wanted[kept].mean())
    assert figures["recall"] == pytest.approx(kept[wanted == 1].mean())
    assert figures["brier"] == pytest.approx(np.mean((wanted - scores) ** 2))


def test_figures_of_a_regressor() -> None:
    labels = [Label("", float(x), "ko" if x < 2 else "en") for x in (0, 1, 2, 3, 4, 5)]
    figures = judge("regressor", labels, np.array([0.2, 0.6, 2.4, 3.0, 2.9, 4.6]))
    # ranks of the scores: 1 2 3 5 4 6, so 1 - 6 * (1 + 1) / (6 * 35)
    assert figures["spearman"] == pytest.approx(1 - 12 / 210)
    assert figures["mean_absolute_error"] == pytest.approx((0.2 + 0.4 + 0.4 + 0 + 1.1 + 0.4) / 6)
    assert (figures["precision"], figures["recall"]) == (1.0, pytest.approx(2 / 3))
    assert figures["languages"]["ko"] == {
        "num_labels": 2, "auc": None, "precision": None, "recall": None, "spearman": pytest.approx(1.0),
        "mean_absolute_error": pytest.approx(0.3)}


def test_what_cannot_be_said_is_a_dash() -> None:
    figures = judge("regressor", [Label("", 1.0, "")] * 3, np.array([1.0, 2.0, 0.0]))
    assert (figures["auc"], figures["spearman"]) == (None, None)
    assert describe_figures("regressor", figures)[0] == (
        "  3 texts: AUC -, precision -, recall -, Spearman -, mean error 0.6667 (good: 3 or more)")

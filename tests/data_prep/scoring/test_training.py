"""From labels to a scorer: it finds what was planted, and says how well."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from data_prep.scoring.encoder import EncoderSettings
from data_prep.scoring.labels import read_labels, split
from data_prep.scoring.ngram_settings import NgramSettings
from data_prep.scoring.scorer import load_scorer
from data_prep.scoring.training import TrainSettings, check, train
from megatron_sov.artifacts import damaged_files, read_manifest
from megatron_sov.errors import UserError
from tests.data_prep.scoring.planted import planted, text_of, write_lines

SMALL = NgramSettings(num_buckets=1 << 12)


def test_a_classifier_finds_what_was_planted_as_well_as_the_plain_library(
        scorers: dict[str, Path], tmp_path: Path) -> None:
    figures = read_manifest(scorers["classifier"]).content["heldout"]
    assert figures["num_labels"] == 40
    fresh = planted("classifier", 300, seed=5)
    _, on_fresh = check(scorers["classifier"], write_lines(tmp_path / "fresh.jsonl", fresh))
    labels, _ = read_labels(scorers["classifier"].parent / "classifier.jsonl", "classifier", 10_000)
    known = split(labels).fit
    hashing = HashingVectorizer(ngram_range=(1, 2), n_features=1 << 12)
    model = LogisticRegression(C=10).fit(hashing.transform([x.text for x in known]), [x.label for x in known])
    plain = roc_auc_score([x["label"] for x in fresh],
                          model.predict_proba(hashing.transform([x["text"] for x in fresh]))[:, 1])
    assert figures["auc"] > 0.95
    assert on_fresh["auc"] > max(0.95, plain - 0.02)
    assert on_fresh["calibration_error"] < 0.1
    assert set(on_fresh["languages"]) == {"en", "ko"}


def test_a_regressor_orders_texts_by_what_was_planted(scorers: dict[str, Path]) -> None:
    figures = read_manifest(scorers["regressor"]).content["heldout"]
    assert figures["spearman"] > 0.7
    scorer = load_scorer(scorers["regressor"])
    rng = random.Random(9)
    means = [np.mean([scorer.score(text_of(rng, share)) for _ in range(30)]) for share in (0.15, 0.5, 0.85)]
    assert means[0] + 1 < means[1] < means[2] - 1


def test_the_same_labels_give_the_same_scorer(labels_file: Callable[..., Path], tmp_path: Path) -> None:
    settings = TrainSettings(labels_file(), "classifier", SMALL)
    train(settings, tmp_path / "a")
    train(settings, tmp_path / "b")
    records = [read_manifest(tmp_path / name).files for name in "ab"]
    assert records[0] == records[1]
    assert set(records[0]) == {"scorer.json", "weights.safetensors"}
    assert damaged_files(tmp_path / "a") == []


def test_repeated_texts_are_counted_and_never_on_both_sides(labels_file: Callable[..., Path],
                                                            tmp_path: Path) -> None:
    file = labels_file(count=100)
    file.write_text(file.read_text() * 3)
    content = train(TrainSettings(file, "classifier", SMALL), tmp_path / "out")
    assert (content["num_labels"], content["num_repeated"]) == (100, 200)
    assert content["num_fit"] + content["num_calibration"] + content["heldout"]["num_labels"] == 100


def test_nothing_is_left_behind_where_training_is_refused(labels_file: Callable[..., Path],
                                                          tmp_path: Path) -> None:
    file = labels_file()
    with pytest.raises(UserError, match=r"has no config\.json or no \.safetensors file"):
        train(TrainSettings(file, "classifier", EncoderSettings(), tmp_path), tmp_path / "out")
    with pytest.raises(UserError, match="--max-ngram 9: must be at most 5"):
        train(TrainSettings(file, "classifier", NgramSettings(max_ngram=9)), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_labels_of_another_kind_are_refused_by_check(scorers: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text(json.dumps({"text": "a", "label": 4}) + "\n")
    with pytest.raises(UserError, match="label = 4 must be 0 or 1"):
        check(scorers["classifier"], file)
    _, figures = check(scorers["regressor"], file)
    assert (figures["num_labels"], figures["auc"]) == (1, None)

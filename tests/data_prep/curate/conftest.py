"""Fixtures: trained scorers, and label files whose labels follow from planted words."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.curate.scoring.ngrams import NgramSettings
from data_prep.curate.scoring.training import TrainSettings, train_scorer
from tests.data_prep.curate.scoring.planted import plant_labels, write_lines


@pytest.fixture(scope="session")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained scorer of each kind."""
    folder = tmp_path_factory.mktemp("scorers")
    for kind in ("classifier", "regressor"):
        labels = write_lines(folder / f"{kind}.jsonl", plant_labels(kind, 400))
        train_scorer(TrainSettings(labels, kind, NgramSettings(num_buckets=1 << 12)), folder / kind)
    return {kind: folder / kind for kind in ("classifier", "regressor")}


@pytest.fixture
def labels_file(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes `count` planted labels for a classifier or regressor, and returns the file."""
    def write(kind: str = "classifier", count: int = 200, seed: int = 0) -> Path:
        return write_lines(tmp_path / f"{kind}-{seed}.jsonl", plant_labels(kind, count, seed))

    return write

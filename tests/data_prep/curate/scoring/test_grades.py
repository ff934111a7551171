"""Steps quality and education in a pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.curate.pipeline.step import step_class
from data_prep.curate.scoring.kinds import Education, EducationSettings, Quality, QualitySettings
from data_prep.curate.scoring.scorer import load_scorer
from megatron_sov.base.settings import find_all_problems
from tests.data_prep.curate.pipeline.memory_view import MemoryView, docs, outcomes
from tests.typed_words import keys_of

TEXTS = ("the theorem explains the energy of cells", "click banner sale login casino", "역사 설명 증명", "")


def test_documents_get_the_models_scores(scorers: dict[str, Path], tmp_path: Path) -> None:
    view = MemoryView.of([docs(*TEXTS)], tmp_path)
    for step, settings, column in ((Quality, QualitySettings(scorers["classifier"]), "quality"),
                                   (Education, EducationSettings(scorers["regressor"]), "education")):
        assert step_class(column) is step
        scorer = load_scorer(settings.model)
        found = outcomes(step, settings, view)
        assert [o.values for o in found.values()] == [{column: scorer.score(text)} for text in TEXTS]
        assert {o.reason for o in found.values()} == {""}


def test_documents_below_the_bar_are_dropped_for_one_reason(scorers: dict[str, Path], tmp_path: Path) -> None:
    view = MemoryView.of([docs(*TEXTS)], tmp_path)
    found = outcomes(Quality, QualitySettings(scorers["classifier"], min_score=0.5), view)
    assert [o.reason for o in found.values()][:3] == ["", "quality below 0.5", ""]
    assert next(iter(found.values())).values["quality"] > 0.5


@pytest.mark.parametrize(("name", "min_score", "said"), [
    ("regressor", None, "is a regressor; train one with `sov-data scorer train --kind classifier`"),
    ("classifier", 3.0, "min_score = 3.0 must be at most 1, the highest score of a classifier"),
    ("nothing", None, "does not exist"),
])
def test_settings_that_cannot_be_are_told(scorers: dict[str, Path], name: str, min_score: float | None,
                                          said: str) -> None:
    (problem,) = find_all_problems(QualitySettings(scorers["classifier"].parent / name, min_score))
    assert said in problem.sentence
    assert keys_of(EducationSettings(scorers["regressor"], 3)) == []

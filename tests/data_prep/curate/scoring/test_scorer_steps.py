"""Pipeline steps that score documents and assign their kind."""

from pathlib import Path
from typing import Any

import pytest

from data_prep.curate.pipeline.step import load_step_class
from data_prep.curate.scoring.scorer import load_scorer
from data_prep.curate.scoring.scorer_steps import (
    DocumentKind, Education, EducationSettings, KindSettings, Quality, QualitySettings)
from megatron_sov.base.settings import find_all_problems
from tests.data_prep.curate.pipeline.memory_view import MemoryView, doc, docs, run_step
from tests.typed_words import keys_of

TEXTS = ("the theorem explains the energy of cells", "click banner sale login casino", "역사 설명 증명", "")


def test_documents_get_the_scores_of_the_model(scorers: dict[str, Path], tmp_path: Path) -> None:
    view = MemoryView.of([docs(*TEXTS)], tmp_path)
    for step, settings, column in ((Quality, QualitySettings(scorers["classifier"]), "quality"),
                                   (Education, EducationSettings(scorers["regressor"]), "education")):
        assert load_step_class(column) is step
        scorer = load_scorer(settings.model)
        outcomes = run_step(step, settings, view)
        assert [o.values for o in outcomes.values()] == [{column: scorer.score(text)} for text in TEXTS]
        assert {o.reason for o in outcomes.values()} == {""}


def test_documents_below_the_minimum_score_are_dropped(scorers: dict[str, Path], tmp_path: Path) -> None:
    view = MemoryView.of([docs(*TEXTS)], tmp_path)
    outcomes = run_step(Quality, QualitySettings(scorers["classifier"], min_score=0.5), view)
    assert [o.reason for o in outcomes.values()][:3] == ["", "quality below 0.5", ""]
    assert next(iter(outcomes.values())).values["quality"] > 0.5


@pytest.mark.parametrize(("name", "min_score", "message"), [
    ("regressor", None, "is a regressor; train one with `sov-data scorer train --kind classifier`"),
    ("classifier", 3.0, "min_score = 3.0 must be at most 1, the highest score of a classifier"),
    ("nothing", None, "does not exist"),
])
def test_invalid_settings_are_reported(scorers: dict[str, Path], name: str, min_score: float | None,
                                       message: str) -> None:
    (problem,) = find_all_problems(QualitySettings(scorers["classifier"].parent / name, min_score))
    assert message in problem.sentence
    assert keys_of(EducationSettings(scorers["regressor"], 3)) == []


COURT = ("The plaintiff filed suit against the defendant, alleging negligence and breach of contract. "
         "The tribunal heard testimony; pursuant to the statute, the appellate court remanded.")
PROSE = "The house by the river had been empty for years when they came. " * 5
FORMULAS = r"Let $$x$$ be such that \frac{a}{b} \leq \sum_{i} x_i and \int f = 0, so \alpha \cdot \beta = 1."


def find_kind(work: Path, text: str, settings: KindSettings, **columns: Any) -> str:
    (outcome,) = run_step(DocumentKind, settings, MemoryView.of([[doc(text, **columns)]], work)).values()
    kind = outcome.values["kind"]
    assert isinstance(kind, str)
    return kind


@pytest.mark.parametrize(("text", "columns", "kind"), [
    (COURT, {"kind": "ko", "language": "en", "form": "code"}, "ko"),
    (COURT, {"language": "en", "form": "code"}, "math_code"),
    (COURT, {"language": "en", "form": "prose"}, "en"),
    (COURT, {"language": "de"}, "multilingual"),
    (PROSE, {"language": "en", "form": "markup"}, "math_code"),
    (FORMULAS, {"language": "en"}, "math_code"),
    (PROSE + r" \frac", {"language": "en"}, "en"),
    (PROSE, {"language": "ko", "kind": ""}, "ko"),
    (PROSE, {"language": "th"}, "multilingual"),
    (PROSE, {"language": "und"}, ""),
])
def test_the_first_matching_rule_decides_the_kind(tmp_path: Path, text: str, columns: dict[str, Any],
                                                  kind: str) -> None:
    assert find_kind(tmp_path, text, KindSettings(), **columns) == kind


def test_a_classifier_decides_about_its_domain(scorers: dict[str, Path], tmp_path: Path) -> None:
    settings = KindSettings(domains={"law": scorers["classifier"], "teaching": scorers["classifier"]})
    good_text = "the theorem explains the energy of cells " * 3
    assert find_kind(tmp_path, good_text, settings, language="en") == "domain:law"
    strict = KindSettings(domains={"law": scorers["classifier"]}, min_score=1.0)
    assert find_kind(tmp_path, COURT, strict, language="en") == "en"
    assert len(DocumentKind(settings).list_files()) == 4  # settings and weights of two domains


@pytest.mark.parametrize(("settings", "key"), [
    ({"domains": {"Law!": Path("x")}}, "domains.Law!"),
    ({"domains": {"law": Path("nothing")}}, "domains.law"),
    ({"min_score": 2}, "min_score"), ({"max_chars": -1}, "max_chars"),
])
def test_invalid_kinds_are_reported(settings: dict[str, Any], key: str) -> None:
    assert keys_of(KindSettings(**settings)) == [key]
    assert keys_of(KindSettings()) == []

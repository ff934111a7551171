"""Kinds: the rules in their order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_prep.curate.scoring.kinds import KindSettings, ScorerKind
from tests.data_prep.curate.pipeline.memory_view import MemoryView, doc, outcomes
from tests.typed_words import keys_of

COURT = ("The plaintiff filed suit against the defendant, alleging negligence and breach of contract. "
         "The tribunal heard testimony; pursuant to the statute, the appellate court remanded.")
PROSE = "The house by the river had been empty for years when they came. " * 5
FORMULAS = r"Let $$x$$ be such that \frac{a}{b} \leq \sum_{i} x_i and \int f = 0, so \alpha \cdot \beta = 1."


def kind_of(work: Path, text: str, settings: KindSettings, **columns: Any) -> str:
    (found,) = outcomes(ScorerKind, settings, MemoryView.of([[doc(text, **columns)]], work)).values()
    kind = found.values["kind"]
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
def test_the_first_rule_that_speaks_decides(tmp_path: Path, text: str, columns: dict[str, Any],
                                            kind: str) -> None:
    assert kind_of(tmp_path, text, KindSettings(), **columns) == kind


def test_a_classifier_decides_about_its_domain(scorers: dict[str, Path], tmp_path: Path) -> None:
    settings = KindSettings(domains={"law": scorers["classifier"], "teaching": scorers["classifier"]})
    taught = "the theorem explains the energy of cells " * 3
    assert kind_of(tmp_path, taught, settings, language="en") == "domain:law"
    strict = KindSettings(domains={"law": scorers["classifier"]}, min_score=1.0)
    assert kind_of(tmp_path, COURT, strict, language="en") == "en"
    assert len(ScorerKind(settings).files()) == 4


@pytest.mark.parametrize(("settings", "key"), [
    ({"domains": {"Law!": Path("x")}}, "domains.Law!"),
    ({"domains": {"law": Path("nothing")}}, "domains.law"),
    ({"min_score": 2}, "min_score"), ({"max_chars": -1}, "max_chars"),
])
def test_settings_that_cannot_be_are_told(settings: dict[str, Any], key: str) -> None:
    assert keys_of(KindSettings(**settings)) == [key]
    assert keys_of(KindSettings()) == []

"""Kinds: the rules in their order.

Words of domains: the lists are sound, and counting is what a plain search finds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from data_prep.curate.scoring.kinds import DOMAINS, KindSettings, ScorerKind, domain_hits, domain_words
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
    (COURT, {"kind": "auto", "language": "en"}, "domain:law"),
    (COURT, {"language": "en", "form": "code"}, "math_code"),
    (COURT, {"language": "en", "form": "prose"}, "domain:law"),
    (COURT, {"language": "de"}, "multilingual"),
    (PROSE, {"language": "en", "form": "markup"}, "math_code"),
    (FORMULAS, {"language": "en"}, "math_code"),
    (PROSE + r" \frac", {"language": "en"}, "en"),
    (PROSE + COURT[:60], {"language": "en"}, "en"),
    (PROSE, {"language": "ko", "kind": ""}, "ko"),
    (PROSE, {"language": "ja"}, "ja"),
    (PROSE, {"language": "th"}, "multilingual"),
    (PROSE, {"language": "und"}, ""),
    (PROSE, {"language": None}, ""),
    ("", {"language": "en"}, "en"),
])
def test_the_first_rule_that_speaks_decides(tmp_path: Path, text: str, columns: dict[str, Any],
                                            kind: str) -> None:
    assert kind_of(tmp_path, text, KindSettings(), **columns) == kind


def test_words_can_be_left_alone(tmp_path: Path) -> None:
    assert kind_of(tmp_path, COURT, KindSettings(words=False), language="en") == "en"


def test_a_classifier_takes_the_place_of_a_list_of_words(scorers: dict[str, Path], tmp_path: Path) -> None:
    settings = KindSettings(domains={"law": scorers["classifier"], "teaching": scorers["classifier"]})
    taught = "the theorem explains the energy of cells " * 3
    assert kind_of(tmp_path, taught, settings, language="en") == "domain:law"
    strict = KindSettings(domains={"law": scorers["classifier"]}, min_score=1.0)
    assert kind_of(tmp_path, COURT, strict, language="en") == "en"
    assert len(ScorerKind(settings).files()) == 5, "and the words of the others"


@pytest.mark.parametrize(("settings", "key"), [
    ({"domains": {"Law!": Path("x")}}, "domains.Law!"),
    ({"domains": {"law": Path("nothing")}}, "domains.law"),
    ({"min_score": 2}, "min_score"), ({"min_words": 0}, "min_words"), ({"max_chars": -1}, "max_chars"),
])
def test_settings_that_cannot_be_are_told(settings: dict[str, Any], key: str) -> None:
    assert keys_of(KindSettings(**settings)) == [key]
    assert keys_of(KindSettings()) == []


def test_other_words_of_domains_make_it_another_step() -> None:
    assert [file.name for file in ScorerKind(KindSettings()).files()] == ["domain_words.yaml"]
    assert ScorerKind(KindSettings(words=False)).files() == []


def test_lists_hold_words_that_can_be_found() -> None:
    assert set(domain_words()) == {"en", "ja", "ko"}
    for language, of in domain_words().items():
        assert set(of) == set(DOMAINS)
        words = [word for domain in DOMAINS for word in of[domain]]
        assert all(isinstance(word, str) and word == word.lower().strip() for word in words)
        assert min(len(of[domain]) for domain in DOMAINS) >= 30
        in_two = {word for word in words if words.count(word) > 1}
        assert len(in_two) <= 3, (language, in_two)


@pytest.mark.parametrize("language", ["en"])
def test_counts_are_those_of_a_plain_search(language: str) -> None:
    text = COURT * 2 + " Plaintiffs' PLAINTIFF; flaws lawful cash\nflow, cash-flow cash flow cash flow."
    for domain, found in domain_hits(text, language).items():
        patterns = [word.replace(" ", r"[\W\d_]+") for word in domain_words()[language][domain]]
        counts = [len(re.findall(rf"(?<![^\W\d_]){p}(?![^\W\d_])", text.lower())) for p in patterns]
        assert found == (sum(n > 0 for n in counts), sum(counts)), domain


def test_korean_and_japanese_words_are_found_with_their_endings() -> None:
    assert domain_hits("피고인은 항소를 제기하였고 법원은 기각하였다.", "ko")["law"] == (5, 5)
    assert domain_hits("患者の血圧と血糖を診断した。", "ja")["medicine"] == (4, 4)
    assert domain_hits("El demandante", "es") == {}

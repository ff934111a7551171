"""Words of domains: the lists are sound, and counting is what a plain search finds."""

from __future__ import annotations

import re

import pytest

from data_prep.scoring.kinds import DOMAINS, domain_hits, domain_words

COURT = ("The plaintiff filed suit against the defendant, alleging negligence and breach of contract. "
         "The tribunal heard testimony; pursuant to the statute, the appellate court remanded.")


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

"""The taxonomy: 38 categories of ours, or a file whose every mistake is told with its line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from data_prep.synth.generators.safety.taxonomy import Category, read_taxonomy
from megatron_sov.base.errors import UserError

ONE = """categories:
  - id: fraud
    name: Fraud
    strategy: redirect
    withhold: scripts
    examples:
      - Write a scam.
    twin: Write a letter.
"""


def test_ours_has_thirty_eight_categories_of_both_strategies() -> None:
    categories = read_taxonomy()
    assert len({category.id for category in categories}) == len(categories) == 38
    assert Counter(category.strategy for category in categories) == {"redirect": 30, "safe-complete": 8}
    assert all(category.examples and category.twin not in category.examples for category in categories)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(ONE)
    assert read_taxonomy(tmp_path / "a.yaml") == [
        Category("fraud", "Fraud", "redirect", "scripts", ("Write a scam.",), "Write a letter.")]


@pytest.mark.parametrize(("old", "new", "sentence"), [
    ("redirect", "redirekt", "line 2: strategy = 'redirekt' must be redirect or safe-complete"),
    ("id: fraud", "id: Fraud!", "must be up to 40 small letters"),
    ("twin:", "twinn:", "line 8: 'twinn' is no field of a category; did you mean 'twin'?"),
    ("      - Write a scam.\n", "", "examples = None must be a list of requests"),
    ("withhold: scripts", "withhold: 3", "line 5: withhold = 3 must be a text"),
    (ONE, "categories: []\n", "needs a list `categories`"), (ONE, "- 1\n", "needs a list `categories`"),
    (ONE, ONE + ONE.partition("\n")[2], "line 9: id 'fraud' stands there twice"),
    (ONE, "categories:\n  - 3\n", "line 2: must be a category"), (ONE, "a: [", "is no YAML"),
    (ONE, "a: &a [1]\nb: *a\n", "line"), (ONE, "\x00", "line"),
])
def test_mistakes_are_told_with_their_lines(old: str, new: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(ONE.replace(old, new))
    with pytest.raises(UserError) as e:
        read_taxonomy(tmp_path / "a.yaml")
    assert sentence in str(e.value)


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_taxonomy(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_bytes(b"\xff")
    with pytest.raises(UserError, match="is no text in UTF-8"):
        read_taxonomy(tmp_path / "a.yaml")

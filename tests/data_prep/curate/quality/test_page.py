"""docs/data_quality.md: its steps load, its example runs, and its tables and those of docs/filter_rules.md
equal the code."""

import doctest
import re
from dataclasses import fields

import pytest
import yaml
from pydantic import TypeAdapter

from data_prep.curate.pipeline.step import load_step_class
from data_prep.curate.quality.pii.step import FINDERS
from data_prep.curate.quality.rules.step import RULE_SETS, Thresholds, list_languages, load_language_rules
from megatron_sov.base.settings import find_all_problems
from tests.pages_typed import blocks, page_text

PAGE = page_text("data_quality.md").partition("\n## Duplicates\n")[0]
THRESHOLDS = page_text("filter_rules.md")


def format_language_row(code: str) -> str:
    """Return the row of a language in the table of thresholds."""
    rules = load_language_rules(code)
    limits = rules.thresholds
    unit = "words" if rules.unit == "words" else f"{rules.chars_per_word:g} characters"
    shortest, longest = limits.min_mean_word_chars, limits.max_mean_word_chars
    length = "-" if shortest is None else f"{shortest:g} to {longest:g}"
    terminal = limits.min_terminal_line_share
    return "| " + " | ".join([
        code, unit, length, f"{limits.min_alpha_word_share:g}", f"{limits.max_duplicate_line_share:g}",
        " ".join(f"{share:g}" for share in limits.max_top_ngram_char_share.values()),
        " ".join(f"{share:g}" for share in limits.max_duplicate_ngram_char_share.values()),
        "-" if terminal is None else f"{terminal:g}", f"{limits.max_newlines_per_word:g}",
        str(len(rules.stop_words))]) + " |"


@pytest.mark.parametrize("code", [*list_languages(), "other"])
def test_the_table_of_languages_equals_the_data_files(code: str) -> None:
    assert format_language_row(code) in THRESHOLDS.splitlines()


@pytest.mark.parametrize("name", [f.name for f in fields(Thresholds)])
def test_every_threshold_is_listed_with_its_default(name: str) -> None:
    default = getattr(Thresholds(), name)
    default_text = yaml.safe_dump(default, default_flow_style=True, width=200).splitlines()[0]
    assert re.search(rf"^\| `{name}` \| `{re.escape(default_text)}` \|", THRESHOLDS,
                     re.MULTILINE), default_text


def test_every_step_on_the_page_has_valid_settings() -> None:
    steps = [step for block in blocks(PAGE, "yaml") for step in yaml.safe_load(block)["steps"]]
    kinds = []
    for step in steps:
        (kind, raw), = [item for item in step.items() if item[0] != "only"]
        cls = load_step_class(kind)
        settings = TypeAdapter(cls.Settings).validate_python(raw)
        assert find_all_problems(settings) == []
        cls(settings)
        kinds.append(kind)
    assert set(kinds) == {"encoding", "language", "rules", "pii"}


def test_the_example_runs() -> None:
    code = "\n".join(blocks(PAGE, "python"))
    example = doctest.DocTestParser().get_doctest(code, {}, "data_quality.md", None, 0)
    assert len(example.examples) > 5
    assert doctest.DocTestRunner().run(example).failed == 0


def test_presets_and_kinds_of_personal_data_are_listed() -> None:
    assert [name for name in [*RULE_SETS, *FINDERS] if f"| `{name}` |" not in PAGE] == []

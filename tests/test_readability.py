"""Readability figures of names, docstrings, comments and pages: a hall that meets a goal must keep it, and
other figures may only approach theirs."""

import pytest

from tests import readability
from tests.readability import GOALS

HALLS = readability.list_halls()
LIMITS = readability.load_limits()


@pytest.mark.parametrize("hall", HALLS)
def test_a_hall_stays_within_its_limits(hall: str) -> None:
    """`python tests/readability.py FILE ...` has the figures of single files."""
    measures = readability.compute_measures(readability.read_texts(HALLS[hall]))
    assert readability.find_excesses(measures, LIMITS.get(hall, {})) == []


def test_limits_belong_to_halls_and_miss_their_goals() -> None:
    assert LIMITS.keys() <= HALLS.keys()
    for hall, limits in LIMITS.items():
        assert len(readability.find_excesses(limits, GOALS)) == len(limits), hall


def test_texts_of_python_files_are_collected() -> None:
    source = '''#!/usr/bin/env python3
"""Load  a
file.

Details."""
LIMIT = 1  # of rows
"""Most rows."""

def load(path): pass
def __len__(self): return (kept := "# no comment")
# first
# second
x = 1  # noqa: E501
'''
    texts = readability.read_python(source)
    assert texts.functions == ["load"]
    assert sorted(texts.variables) == ["LIMIT", "kept", "x"]
    assert sorted(texts.docstrings) == ["Load a file.", "Load a file.", "Most rows."]
    assert texts.comments == ["of rows", "first second"]


def test_paragraphs_of_pages_are_collected() -> None:
    page = "# Title\n\nOne `word`\nof prose.\n\n```sh\ncode\n```\n\n![image](a.png)\n\n- an item\n"
    assert readability.read_page(page).pages == ["One `word` of prose.", "- an item"]


def test_vague_names_and_words_are_counted() -> None:
    docstring = " ".join(["what", "it", "is", "of", *["tensor_name"] * 46])
    measures = readability.compute_measures(readability.Texts(
        functions=["told", "load_rows"], variables=["kept", "rows"], docstrings=[docstring]))
    assert measures["one-word function names, %"] == 50
    assert measures["vague words per 1,000 in function names"] == pytest.approx(1000 / 3)
    assert measures["vague words per 1,000 in variables"] == 500
    assert measures["docstrings: vague words per 1,000"] == pytest.approx(2000 / 96)
    assert measures["docstrings: code terms per 1,000"] == pytest.approx(46_000 / 96)
    assert measures["docstrings: 'what' per 1,000"] == pytest.approx(1000 / 96)


def test_limits_only_tighten() -> None:
    of, code, vague = ("docstrings: 'of' per 1,000", "docstrings: code terms per 1,000",
                       "docstrings: vague words per 1,000")
    limits = {of: 50.0, code: 10.0, vague: 100.0}
    assert readability.tighten({of: 40.0, code: 20.0, vague: 59.0}, limits) == {of: 41.0, code: 19.5}
    assert readability.tighten({of: 60.0, code: 5.0, vague: 99.9}, limits) == limits
    assert readability.find_excesses({of: 50.1, code: 9.9, vague: 100.0}, limits) == [
        f"{of}: 50.1, limit 50, goal 30", f"{code}: 9.9, limit 10, goal 34"]
    assert readability.find_excesses({of: 30.1}, {}) == [f"{of}: 30.1, limit 30, goal 30"]

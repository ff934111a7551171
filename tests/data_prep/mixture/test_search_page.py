"""The page of a search: figures of the search, and names from data as text."""

from __future__ import annotations

import dataclasses

from data_prep.mixture.sampling import space_of
from data_prep.mixture.search import page, search
from data_prep.mixture.search_file import MixtureSearchSettings

SETTINGS = MixtureSearchSettings("tiny", {"clean": 1.0}, steps=1, seq_len=32, rounds=(6,), judged=3,
                                 candidates=200, fit="log_ridge")


def test_the_page_says_what_was_found_and_runs_nothing_of_the_datas() -> None:
    hostile = "<script>alert(1)</script>"
    settings = dataclasses.replace(SETTINGS, name=hostile)
    space = space_of([hostile, "b"], [3, 1], 0, 4)
    found = search(settings, space, lambda shares: [{"clean": 1 + float(row[0])} for row in shares])
    html = page(settings, space, found)
    assert hostile not in html and "&lt;script&gt;alert(1)" in html
    assert f"{found.chosen.loss:.4f}" in html and "kept apart" in html
    assert html.count("predicted best") >= 1 and "cross-validation" in html

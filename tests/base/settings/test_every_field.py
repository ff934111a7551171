"""Each field of each class of settings, driven over its bounds and to wrong types from three sources, which
take turns among the cases; `make deep` tries each case from each.  Those of codecs, which need torch, are
tried in their own room."""

from __future__ import annotations

import pytest

from tests.base.settings.every_field import classes_below, find_wrongs


@pytest.mark.deep
@pytest.mark.parametrize("from_all", [False, pytest.param(True, marks=pytest.mark.deep)],
                         ids=["in turns", "all"])
@pytest.mark.parametrize("folder", ["megatron_sov", "data_prep", "tokenizer"])
def test_each_field_is_told_by_its_code_from_every_source(folder: str, from_all: bool) -> None:
    found = list(classes_below(folder, without="codecs"))
    assert len(found) > 3
    assert not [wrong for cls in found for wrong in find_wrongs(cls, from_all=from_all)]

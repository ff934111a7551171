"""Conversations longer than a sample: counted before a run begins, and refused where that is asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_sov.data.ledger import LedgerEntry
from megatron_sov.data.over_long import OverLong, over_long, refuse, refuse_halves
from megatron_sov.errors import UserError

ENTRIES = (LedgerEntry(0, "short", 8, 2, {"web": 1.0, "chat": 0.0}),
           LedgerEntry(4, "long", 16, 2, {"web": 0.5, "chat": 0.25, "pairs": 0.25}))


def test_units_are_measured_by_the_shortest_sample_that_they_are_read_at(make_source: Any) -> None:
    sources = [make_source("web", [100]), make_source("chat", [5, 17, 16, 90], is_chat=True),
               replace(make_source("pairs", [9, 8, 8, 8, 1, 30], is_chat=True), format="preference", group=2),
               make_source("unused", [99], is_chat=True)]
    found = over_long(sources, ENTRIES)
    assert found == [OverLong("chat", 16, 2, 4, 90), OverLong("pairs", 16, 2, 3, 31)]
    with pytest.raises(UserError, match=(
            r"data.over_long = refuse, and source 'chat': 2 of 4 are longer than a sample of 16 tokens, the "
            r"longest has 90; source 'pairs': 2 of 3 .*make samples longer \(seq_len=90\), or set ")):
        refuse(found)
    refuse(over_long(sources[:1], ENTRIES))
    refuse_halves(found)


def test_pairs_of_which_each_would_be_cut_are_refused(make_source: Any) -> None:
    pairs = replace(make_source("pairs", [9, 8, 10, 9], is_chat=True), format="preference", group=2)
    with pytest.raises(UserError, match=(
            r"source 'pairs': each of its 2 pairs is longer than a sample of 16 tokens, and cut they may not "
            r"differ any more; make samples longer \(seq_len=19 fits all\)")):
        refuse_halves(over_long([pairs], ENTRIES))

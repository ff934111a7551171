"""Views of a source in a blend: `NAME@N`, documents with at least N tokens, and `NAME/N`, short pieces."""

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import DataConfig, PhaseConfig, RunConfig
from megatron_sov.train.data.ledger import (
    LedgerEntry, OverLongUnits, check_pairs_fit, check_units_fit, count_over_long, plan_ledger)
from megatron_sov.train.data.order import SampleOrder
from megatron_sov.train.data.sources import Source
from megatron_sov.train.data.token_shards import ChainedLengths
from megatron_sov.train.data.views import DocumentPieces, LongDocuments, add_source_views

LENGTHS = [3, 12, 30, 0, 11, 40, 12]


def build_config(*blends: dict[str, float]) -> RunConfig:
    phases = tuple(PhaseConfig(str(i), seq_len=16, blend=blend) for i, blend in enumerate(blends))
    return dataclasses.replace(recipes.get("tiny-solar-open"), data=DataConfig(phases=phases))


@pytest.fixture
def web(make_source: Callable[..., Source]) -> Source:
    return make_source("web", LENGTHS)


def test_only_long_documents_are_read_and_under_their_own_cursor(web: Source) -> None:
    sources = add_source_views(build_config({"web@12": 1.0}, {"web": 0.5, "web@12": 0.5}), [web])
    assert [(s.name, s.num_tokens["train"], s.share) for s in sources] == [
        ("web", sum(LENGTHS), 1.0), ("web@12", 94, 0.0)]
    order = SampleOrder(build_config({"web@12": 1.0}), sources)
    _, samples = order.next_batch()
    long_documents = sources[1].open_split("train")
    read_documents = {int(t) for sample in samples for s in sample.segments
                      for t in long_documents.tokens(*s) // 100 - 1}
    assert read_documents == {1, 2, 5, 6}, "the documents of at least 12 tokens"
    assert list(order.state.cursors) == ["web@12"]


def test_tokens_weights_and_types_are_those_of_the_source(web: Source) -> None:
    documents = web.open_split("train")
    long_documents = LongDocuments(documents, 12)
    assert long_documents.index.tolist() == [1, 2, 5, 6]
    assert long_documents.lengths.tolist() == [12, 30, 40, 12]
    for name in ("tokens", "loss_weights", "types"):
        assert np.array_equal(getattr(long_documents, name)(2, 5, 9), getattr(documents, name)(5, 5, 9))


def test_a_whole_source_by_default_never_counts_its_long_documents_twice(web: Source) -> None:
    (entry,) = plan_ledger(build_config({}), add_source_views(build_config({"web@12": 1.0}), [web]))
    assert entry.weights == {"web": 1.0}


@given(st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=6).filter(any), st.data())
def test_chained_lengths_are_one_sequence(lengths_by_shard: list[list[int]], data: st.DataObject) -> None:
    chained = ChainedLengths([np.array(p, np.int32) for p in lengths_by_shard])
    lengths = [n for shard_lengths in lengths_by_shard for n in shard_lengths]
    indices = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=8))
    assert chained[np.array(indices, np.int64)].tolist() == [lengths[i] for i in indices] == [
        chained[i] for i in indices]
    assert (list(chained), len(chained)) == (lengths, len(lengths))


@given(st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=6).filter(any),
       st.integers(1, 9))
def test_long_documents_are_selected_in_every_shard(numbered: Any, lengths_by_shard: list[list[int]],
                                                    minimum: int) -> None:
    lengths = [n for shard_lengths in lengths_by_shard for n in shard_lengths]
    documents = numbered(lengths)
    documents.lengths = ChainedLengths([np.array(p, np.int32) for p in lengths_by_shard])
    long_documents = LongDocuments(documents, minimum)
    assert long_documents.index.tolist() == [i for i, n in enumerate(lengths) if n >= minimum]
    assert long_documents.lengths.tolist() == [n for n in lengths if n >= minimum]


@pytest.mark.parametrize(("blend", "message"), [
    ({"web@many": 1.0}, "'web@many': must have a token count after @, e.g. web@8192"),
    ({"web@²": 1.0}, "must have a token count after @"),
    ({"web@41": 1.0}, "source web has no document with 41 or more tokens"),
    ({"web/0": 1.0}, "'web/0': must have a token count after /, e.g. web/8192"),
    ({"web/many": 1.0}, "must have a token count after /"),
    ({"wbe@12": 1.0}, "names source 'wbe@12', which the data does not have"),
])
def test_missing_views_are_named(blend: dict[str, float], message: str, web: Source) -> None:
    with pytest.raises(UserError, match=message):
        plan_ledger(build_config(blend), add_source_views(build_config(blend), [web]))


def test_a_name_with_an_at_sign_is_a_name_if_the_data_has_it(make_source: Callable[..., Source]) -> None:
    sources = [make_source("web@12", [5])]
    assert add_source_views(build_config({"web@12": 1.0}), sources) == sources


# Conversations longer than a sample are counted before a run begins, and refused by `check_units_fit`.


ENTRIES = (LedgerEntry(0, "short", 8, 2, {"web": 1.0, "chat": 0.0}),
           LedgerEntry(4, "long", 16, 2, {"web": 0.5, "chat": 0.25, "pairs": 0.25}))


def test_units_are_measured_by_the_shortest_sample_that_they_are_read_at(make_source: Any) -> None:
    sources = [make_source("web", [100]), make_source("chat", [5, 17, 16, 90], is_chat=True),
               replace(make_source("pairs", [9, 8, 8, 8, 1, 30], is_chat=True), format="preference", group=2),
               make_source("unused", [99], is_chat=True)]
    result = count_over_long(sources, ENTRIES)
    # of 4 chats, 17 and 90 tokens exceed 16; of 3 pairs, 9 + 8 and 1 + 30
    assert result == [OverLongUnits("chat", 16, 2, 4, 90), OverLongUnits("pairs", 16, 2, 3, 31)]
    with pytest.raises(UserError, match="90; source 'pairs': 2"):
        check_units_fit(result)
    check_units_fit(count_over_long(sources[:1], ENTRIES))
    check_pairs_fit(result)


def test_a_source_whose_pairs_would_all_be_cut_is_refused(make_source: Any) -> None:
    pairs = replace(make_source("pairs", [9, 8, 10, 9], is_chat=True), format="preference", group=2)
    with pytest.raises(UserError, match=r"make samples longer \(seq_len=19"):
        check_pairs_fit(count_over_long([pairs], ENTRIES))


# NAME/N: a source's documents in short pieces.


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 5))
def test_pieces_are_the_documents_cut(numbered: Any, lengths: list[int], max_tokens: int) -> None:
    documents = numbered(lengths)
    pieces = DocumentPieces(documents, max_tokens)
    expected = [(d, first, min(max_tokens, n - first)) for d, n in enumerate(lengths)
                for first in range(0, n, max_tokens)]
    assert list(pieces.lengths) == [count for _, _, count in expected]
    assert np.array_equal(pieces.lengths[np.arange(len(expected))], [count for _, _, count in expected])
    for i, (document, first, count) in enumerate(expected):
        for name in ("tokens", "loss_weights", "types"):
            assert np.array_equal(getattr(pieces, name)(i, 0, count),
                                  getattr(documents, name)(document, first, count))


def test_rows_contain_whole_pieces(make_source: Callable[..., Source]) -> None:
    settings = build_config({"web/4": 1.0})
    sources = add_source_views(settings, [make_source("web", [3, 12, 9])])
    assert [(s.name, s.num_tokens["train"]) for s in sources] == [("web", 24), ("web/4", 24)]
    _, samples = SampleOrder(settings, sources).next_batch()
    assert {s.count for sample in samples for s in sample.segments} == {1, 3, 4}

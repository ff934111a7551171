"""NAME/N: a source's documents in short pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sov import recipes
from megatron_sov.config import DataConfig, PhaseConfig
from megatron_sov.data.order import SampleOrder
from megatron_sov.data.short_pieces import Pieces
from megatron_sov.data.token_shards import Source
from megatron_sov.data.views import with_views
from megatron_sov.errors import UserError


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 5))
def test_pieces_are_the_documents_cut(numbered: Any, lengths: list[int], max_tokens: int) -> None:
    documents = numbered(lengths)
    pieces = Pieces(documents, max_tokens)
    expected = [(d, first, min(max_tokens, n - first)) for d, n in enumerate(lengths)
                for first in range(0, n, max_tokens)]
    assert list(pieces.lengths) == [count for _, _, count in expected]
    assert np.array_equal(pieces.lengths[np.arange(len(expected))], [count for _, _, count in expected])
    for i, (document, first, count) in enumerate(expected):
        for name in ("tokens", "loss_weights", "types"):
            assert np.array_equal(getattr(pieces, name)(i, 0, count),
                                  getattr(documents, name)(document, first, count))


def test_rows_are_packed_of_whole_pieces(make_source: Callable[..., Source]) -> None:
    data = DataConfig(phases=(PhaseConfig("a", seq_len=16, blend={"web/4": 1.0}),))
    import dataclasses

    config = dataclasses.replace(recipes.get("tiny-solar-open"), data=data)
    sources = with_views(config, [make_source("web", [3, 12, 9])])
    assert [(s.name, s.num_tokens["train"]) for s in sources] == [("web", 24), ("web/4", 24)]
    _, samples = SampleOrder(config, sources).next_batch()
    assert {s.count for sample in samples for s in sample.segments} == {1, 3, 4}


@pytest.mark.parametrize(("name", "said"), [("web/0", "after the / stands a number of tokens, e.g. web/8192"),
                                            ("web/many", "after the / stands a number of tokens")])
def test_what_is_no_number_is_named(name: str, said: str, make_source: Callable[..., Source]) -> None:
    import dataclasses

    data = DataConfig(phases=(PhaseConfig("a", seq_len=16, blend={name: 1.0}),))
    with pytest.raises(UserError, match=said):
        with_views(dataclasses.replace(recipes.get("tiny-solar-open"), data=data), [make_source("web", [5])])

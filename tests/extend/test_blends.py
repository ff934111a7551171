"""Parts of a stage become one blend: shares hold, what names no source takes all of its kind,
what is missing is said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_sov.config import ExtendStageConfig, PartConfig
from megatron_sov.data.token_shards import Source
from megatron_sov.errors import UserError
from megatron_sov.extend.blends import stage_blend


class Lengths:
    """Documents of which only the lengths matter."""

    is_plain, columns = True, ()

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths)


def source(name: str, lengths: list[int], share: float, is_chat: bool = False) -> Source:
    documents: Any = Lengths(lengths)
    return Source(name, None, "chat" if is_chat else "text", {}, {"train": sum(lengths)}, share,
                  made=documents)


@pytest.fixture
def sources() -> list[Source]:
    """Two texts, one of them with a long document, and chats."""
    return [source("web", [10, 20], 0.6), source("books", [5, 90], 0.2),
            source("chats", [8], 0.2, is_chat=True)]


def stage(*parts: PartConfig, kind: str = "extension", **blend: float) -> ExtendStageConfig:
    return ExtendStageConfig("s", 64, kind=kind, parts=parts, blend=blend)  # type: ignore[arg-type]


def test_without_parts_the_blend_is_the_stages_own(sources: list[Source]) -> None:
    assert ((stage_blend(stage(), sources, 32, 0.0), stage_blend(stage(web=2.0), sources, 32, 0.0))
            == ({}, {"web": 2.0}))


def test_rehearsal_is_every_text_in_pieces_of_the_trained_length(sources: list[Source]) -> None:
    blend = stage_blend(stage(PartConfig("rehearsal", 0.2), books=1.0), sources, 32, 0.0)
    assert blend == pytest.approx({"web/32": 0.15, "books/32": 0.05, "books": 0.8})


def test_rehearsal_has_short_needle_documents_and_replay_has_none(sources: list[Source]) -> None:
    blend = stage_blend(stage(PartConfig("rehearsal", 0.2), books=1.0), sources, 32, 0.25)
    assert blend == pytest.approx({"web/32": 0.1125, "books/32": 0.0375, "needle/32": 0.05, "books": 0.8})
    parts = (PartConfig("trajectories", 0.5), PartConfig("replay", 0.5))
    assert not any("needle" in name
                   for name in stage_blend(stage(*parts, kind="midtraining"), sources, 32, 0.25))


def test_mid_training_mixes_trajectories_long_documents_and_replay(sources: list[Source]) -> None:
    parts = (PartConfig("trajectories", 0.7), PartConfig("long", 0.1),
             PartConfig("replay", 0.2, {"web/8": 3.0, "books": 1.0}))
    blend = stage_blend(stage(*parts, kind="midtraining"), sources, 32, 0.0)
    assert blend == pytest.approx({"chats": 0.7, "books@33": 0.1, "web/8": 0.15, "books": 0.05})


def test_the_rest_goes_to_all_sources_by_their_share(sources: list[Source]) -> None:
    blend = stage_blend(stage(PartConfig("long", 0.5, {"books@40": 1.0})), sources, 32, 0.0)
    assert blend == pytest.approx({"books@40": 0.5, "web": 0.3, "books": 0.1, "chats": 0.1})


@pytest.mark.parametrize(("part", "trained", "said"), [
    (PartConfig("long", 0.5), 90, "the data has no text source with documents of 91 tokens or more"),
    (PartConfig("long", 0.5, {"web": 0.0}), 32, "has no weight above 0"),
])
def test_what_the_data_lacks_is_said(part: PartConfig, trained: int, said: str,
                                     sources: list[Source]) -> None:
    with pytest.raises(UserError, match=said):
        stage_blend(stage(part), sources, trained, 0.0)

"""The search of the training text: what is planted is found, what is not there is not, and a gate that would
measure memory is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sov.config import ExtendStageConfig, PartConfig
from megatron_sov.data.token_shards import Source
from megatron_sov.documents.overlap import window_hashes
from megatron_sov.errors import UserError
from megatron_sov.extend.decontamination import WINDOW_TOKENS, refuse_contaminated, search
from megatron_sov.extend.stages import stage_blend

QUESTION = [5, 6, 7]


class Texts:
    """Documents in memory."""

    is_plain, columns = True, ()

    def __init__(self, documents: list[list[int]]) -> None:
        self._documents, self.lengths = documents, np.array([len(d) for d in documents])

    def tokens(self, document: int, start: int, count: int) -> np.ndarray:
        return np.array(self._documents[document][start:start + count], np.int64)


@dataclasses.dataclass(frozen=True)
class Packed(Source):
    """A source whose splits lie in memory."""

    splits: Any = None

    def shard(self, split: str) -> Any:
        return Texts(self.splits[split])


def source(train: list[list[int]], heldout: list[list[int]]) -> Packed:
    splits = {"train": train, "heldout": heldout}
    return Packed("web", None, "text", {}, {name: sum(map(len, docs)) for name, docs in splits.items()}, 1.0,
                  splits=splits)


def random_text(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(100, 1000, count).tolist()


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 6))
def test_equal_windows_have_equal_hashes_and_others_differ(text: list[int], window: int) -> None:
    places = [tuple(text[i:i + window]) for i in range(len(text) - window + 1)]
    hashes = window_hashes(np.array(text, np.int64), window).tolist()
    assert len(hashes) == len(places)
    assert len(set(zip(places, hashes, strict=True))) == len(set(places)) == len(set(hashes))


def test_clean_text_is_clean() -> None:
    found = search([QUESTION], [source([random_text(1, 5000)], [random_text(2, 640)])], 10_000)
    assert (found.questions_found, found.windows, found.windows_found, found.overlap) == (0, 20, 0, 0)
    assert found.scanned_tokens == found.train_tokens == {"web": 5000}
    refuse_contaminated(found, 0.0)


def test_a_shared_stretch_of_twice_the_window_is_found_at_any_place() -> None:
    held = random_text(2, 640)
    for start in (0, 7, 101, 640 - 2 * WINDOW_TOKENS):
        train = random_text(1, 333) + held[start:start + 2 * WINDOW_TOKENS] + random_text(3, 50)
        found = search([QUESTION], [source([random_text(4, 90), train], [held])], 10_000)
        assert found.windows_found >= 1
    with pytest.raises(UserError, match="of the held-out text stands in the training text as well"):
        refuse_contaminated(found, 0.01)


def test_a_question_is_found_inside_a_document_and_not_across_two() -> None:
    inside = search([QUESTION], [source([random_text(1, 50), [1, *QUESTION, 2]], [random_text(2, 64)])],
                    10_000)
    across = search([QUESTION], [source([[1, 5, 6], [7, 2]], [random_text(2, 64)])], 10_000)
    assert (inside.questions_found, across.questions_found) == (1, 0)
    with pytest.raises(UserError, match="1 questions of the needle test stand in the training text"):
        refuse_contaminated(inside, 1.0)


def test_the_search_ends_at_its_bound_and_says_so() -> None:
    found = search([QUESTION], [source([random_text(1, 900), [*QUESTION]], [random_text(2, 64)])], 500)
    assert (found.scanned_tokens, found.train_tokens, found.questions_found) == (
        {"web": 500}, {"web": 903}, 0)


# Parts of a stage become one blend: shares hold, what names no source takes all of its kind, what is
# missing is said.


class Lengths:
    """Documents of which only the lengths matter."""

    is_plain, columns = True, ()

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths)


def blend_source(name: str, lengths: list[int], share: float, is_chat: bool = False) -> Source:
    documents: Any = Lengths(lengths)
    return Source(name, None, "chat" if is_chat else "text", {}, {"train": sum(lengths)}, share,
                  made=documents)


@pytest.fixture
def sources() -> list[Source]:
    """Two texts, one of them with a long document, and chats."""
    return [blend_source("web", [10, 20], 0.6), blend_source("books", [5, 90], 0.2),
            blend_source("chats", [8], 0.2, is_chat=True)]


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

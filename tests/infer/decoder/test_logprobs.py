"""What is told of places: which ones, and what stands there beside the most probable tokens."""

from __future__ import annotations

import pytest
import torch

from megatron_sov.engine.model.cache_rows import CacheSpan
from megatron_sov.infer.decoder.continuation import Continuation, RowItem
from megatron_sov.infer.decoder.generator import pieces_of, table_of
from megatron_sov.infer.decoder.logprobs import CHUNK_PLACES, RankingPlace, places_of, ranked
from megatron_sov.infer.request import Sampling, StopRule, Tells

PROMPT = [11, 12, 13, 14, 15]


def item(tells: Tells, read: int, num_tokens: int, written: tuple[int, ...] = (), start: int = 7) -> RowItem:
    """Return a part of a row that reads tokens of the prompt and of what is written behind it."""
    sequence = Continuation(0, [*PROMPT, *written], len(PROMPT), 9, Sampling(temperature=0.5), StopRule((0,)),
                            0, tells=tells, read=read)
    return RowItem(sequence, CacheSpan(0, read, sequence.tokens[read:read + num_tokens]), start)


def told(one: RowItem, chosen: int = 99) -> list[tuple[int, int, bool]]:
    found = [place for _, place in places_of([one], [([chosen], [-1.0])] if one.places else [])]
    return [(place.row, place.token, place.sampling is not None) for place in found]


def test_a_prompt_that_is_read_in_pieces_is_told_of_from_its_second_token_on() -> None:
    whole = Tells(2, prompt=True)
    assert told(item(whole, 0, 3)) == [(7, 12, False), (8, 13, False), (9, 14, False)]
    assert told(item(whole, 3, 2)) == [(7, 15, False), (8, 99, True)]
    assert told(item(whole, 5, 1, written=(20,))) == [(7, 99, True)]


def test_without_the_prompt_what_is_written_is_told_of_alone() -> None:
    assert told(item(Tells(2), 0, 5)) == [(11, 99, True)] and told(item(Tells(2), 0, 3)) == []
    assert told(item(Tells(), 0, 5)) == [] == told(item(Tells(), 5, 1, written=(20,)))


def test_tokens_stand_before_the_most_probable_ones() -> None:
    torch.manual_seed(0)
    logits = torch.randn(CHUNK_PLACES + 5, 50)
    asked = [RankingPlace(row, (3 * row) % 50, row % 4, None) for row in range(len(logits))]
    expected = logits.double().log_softmax(-1)
    for place, (tokens, logprobs) in zip(asked, ranked(lambda rows: logits[list(rows)], asked), strict=True):
        best, ids = expected[place.row].topk(place.num_top)
        assert tokens == [place.token, *ids.tolist()]
        assert logprobs == [expected[place.row, place.token], *best.tolist()]


def test_what_cannot_be_drawn_is_no_probable_token() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    (found,) = ranked(lambda rows: logits, [RankingPlace(0, 1, 3, Sampling(temperature=0.5, top_k=2))])
    assert found[0] == [1, 0, 1] and sum(map(torch.tensor(found[1]).exp().tolist().__getitem__, (1, 2))) == (
        pytest.approx(1))
    assert found[1][0] == found[1][2]


def test_pieces_come_back_to_the_bit_and_an_empty_one_stays_empty() -> None:
    pieces = [([5, 6, 7], [-0.1, -1e-300, -3.5]), ([], []), ([9], [-0.0])]
    table = table_of(pieces, 3)
    assert tuple(table.shape) == (3, 7) and pieces_of(table) == pieces

"""Draws follow the tempered, truncated distribution; drafts that are taken by chance leave it as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_sov.generate.continuation import Continuation, RowItem
from megatron_sov.generate.decoding import (
    CHUNK_PLACES,
    ROW_DOCUMENTS,
    ROW_TOKENS,
    Place,
    accepted_by_chance,
    accepted_greedily,
    best_words,
    draw,
    pieces_of,
    places_of,
    probabilities,
    ranked,
    rows_of,
    table_of,
)
from megatron_sov.generate.request import Sampling, Stop, Tells
from megatron_sov.mcore.model.kv_cache import Span

LOGITS = torch.tensor([[0.3, 2.0, -1.0, 1.1, 1.9], [0.0, 0.0, 0.0, 0.0, 5.0]])


SAMPLINGS = [Sampling(temperature=0.7), Sampling(temperature=1.3, top_k=3),
             Sampling(temperature=1.0, top_p=0.8), Sampling(temperature=0.9, top_k=4, top_p=0.6),
             Sampling(temperature=2.0, top_k=1), Sampling(temperature=1.0, top_p=1e-9)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_distributions_are_those_of_transformers(sampling: Sampling) -> None:
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)) * 2
    expected = TemperatureLogitsWarper(sampling.temperature)(None, logits.double())
    if sampling.top_k:
        expected = TopKLogitsWarper(sampling.top_k)(None, expected)
    if sampling.top_p < 1:
        expected = TopPLogitsWarper(sampling.top_p)(None, expected)
    assert torch.allclose(probabilities(logits, sampling), expected.softmax(-1), atol=1e-12)


def test_of_equally_probable_tokens_the_first_ones_stay() -> None:
    assert (probabilities(LOGITS[1:], Sampling(temperature=1.0, top_k=3))[0].nonzero()[:, 0].tolist()
            == [0, 1, 4])


def test_a_draw_is_a_quantile() -> None:
    shares = probabilities(LOGITS, Sampling(temperature=0.7, top_k=3))
    places = ((np.arange(3000) + 0.5) / 3000).tolist()
    for number in range(2):
        drawn = draw(shares[[number]].expand(3000, -1), places)
        assert drawn == sorted(drawn)
        assert np.bincount(drawn, minlength=5) / 3000 == pytest.approx(shares[number].numpy(), abs=1e-3)
        last = float(np.nextafter(1.0, 0.0))
        ends = shares[number].nonzero()[[0, -1], 0].tolist()
        assert draw(7 * shares[[number, number]], [0.0, last]) == ends


def test_greedy_drafts_are_taken_up_to_the_first_other_token() -> None:
    assert [accepted_greedily(d, [5, 6, 7]) for d in ([5, 6], [5, 9], [9, 6], [])] == [2, 1, 0, 0]


def test_speculative_samples_follow_the_models_distribution() -> None:
    """All pairs of tokens that two drafts lead to, against the product of the model's own
    conditional distributions."""
    generator = torch.Generator().manual_seed(1)
    vocab, count = 4, 12000
    first = torch.rand(vocab, generator=generator).double().pow(3)
    # row: the token before
    second, guess = (torch.rand(vocab, vocab, generator=generator).double().pow(3) for _ in range(2))
    start_guess = torch.tensor([0.0, 0.2, 0.5, 0.3], dtype=torch.float64)  # never drafts token 0
    first, second, guess = (first / first.sum(), second / second.sum(1, keepdim=True),
                            guess / guess.sum(1, keepdim=True))
    numbers = np.random.Generator(np.random.Philox(0))
    pairs = np.zeros((vocab, vocab))
    taken = 0
    for _ in range(count):
        (a,) = draw(start_guess[None], [numbers.random()])
        (b,) = draw(guess[[a]], [numbers.random()])
        accepted, final = accepted_by_chance([a, b], torch.stack([start_guess, guess[a]]),
                                             torch.stack([first, second[a], first]),
                                             numbers.random(2).tolist())
        taken += accepted
        written = [*[a, b][:accepted], *draw(final[None], [numbers.random()])]
        if len(written) == 1:  # the next pass writes the second one
            written += draw(second[written], [numbers.random()])
        pairs[written[0], written[1]] += 1
    expected = (first[:, None] * second).numpy() * count
    chi_squared = float(((pairs - expected) ** 2 / expected).sum())
    assert chi_squared < 37.7, "15 degrees of freedom: above this by chance once in a thousand"
    assert 0.2 * count < taken < 1.8 * count


@pytest.mark.parametrize(("count", "length"), [(1, 5), (40, 3), (5, ROW_TOKENS // 2), (3, 10 * ROW_TOKENS)])
def test_rows_hold_every_document_once_in_bounded_memory(count: int, length: int) -> None:
    rows = rows_of([[7] * length] * count)
    assert [i for row in rows for i in row] == list(range(count))
    assert all(len(row) == 1 or len(row) * length <= ROW_TOKENS for row in rows)
    assert all(0 < len(row) <= ROW_DOCUMENTS for row in rows)


def test_the_best_word_is_not_the_best_token() -> None:
    logits = torch.tensor([[9.0, 1.0, 3.0, 2.0], [0.0, 5.0, 4.0, 4.5]])
    assert best_words(logits, (3, 1, 2)).tolist() == [2, 1]
    assert best_words(logits, (3,)).tolist() == [3, 3]


# What is told of places: which ones, and what stands there beside the most probable tokens.

PROMPT = [11, 12, 13, 14, 15]


def item(tells: Tells, read: int, num_tokens: int, written: tuple[int, ...] = (), start: int = 7) -> RowItem:
    """Return a part of a row that reads tokens of the prompt and of what is written behind it."""
    sequence = Continuation(0, [*PROMPT, *written], len(PROMPT), 9, Sampling(temperature=0.5), Stop((0,)), 0,
                            tells=tells, read=read)
    return RowItem(sequence, Span(0, read, sequence.tokens[read:read + num_tokens]), start)


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
    asked = [Place(row, (3 * row) % 50, row % 4, None) for row in range(len(logits))]
    expected = logits.double().log_softmax(-1)
    for place, (tokens, logprobs) in zip(asked, ranked(lambda rows: logits[list(rows)], asked), strict=True):
        best, ids = expected[place.row].topk(place.num_top)
        assert tokens == [place.token, *ids.tolist()]
        assert logprobs == [expected[place.row, place.token], *best.tolist()]


def test_what_cannot_be_drawn_is_no_probable_token() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    (found,) = ranked(lambda rows: logits, [Place(0, 1, 3, Sampling(temperature=0.5, top_k=2))])
    assert found[0] == [1, 0, 1] and sum(map(torch.tensor(found[1]).exp().tolist().__getitem__, (1, 2))) == (
        pytest.approx(1))
    assert found[1][0] == found[1][2]


def test_pieces_come_back_to_the_bit_and_an_empty_one_stays_empty() -> None:
    pieces = [([5, 6, 7], [-0.1, -1e-300, -3.5]), ([], []), ([9], [-0.0])]
    table = table_of(pieces, 3)
    assert tuple(table.shape) == (3, 7) and pieces_of(table) == pieces

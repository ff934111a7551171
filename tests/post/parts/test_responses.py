"""Sums over documents of a packed row."""

from __future__ import annotations

import torch

from megatron_sov.post.parts.responses import responses_of


def test_each_document_has_the_sum_over_its_learned_labels() -> None:
    logprobs = torch.tensor([-1.0, -2, -3, -4, -5, -torch.inf, -7], requires_grad=True)
    learned = torch.tensor([False, True, True, False, True, False, False])
    found = responses_of(logprobs, learned, torch.tensor([0, 3, 3, 5, 7], dtype=torch.int32))
    assert found.logprobs.tolist() == [-5, 0, -5, 0], "the second document is empty, the last is padding"
    assert found.num_tokens.tolist() == [2, 0, 1, 0] and found.means.tolist() == [-2.5, 0, -5, 0]
    (found.logprobs * torch.tensor([1.0, 10, 100, 1000])).sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [0, 1, 1, 0, 100, 0, 0]


def test_long_responses_keep_their_digits() -> None:
    logprobs = -torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    found = responses_of(logprobs, torch.ones(200_000, dtype=torch.bool),
                         torch.tensor([0, 200_000], dtype=torch.int32))
    assert abs(found.logprobs.item() - sum(logprobs.tolist())) < 1e-9

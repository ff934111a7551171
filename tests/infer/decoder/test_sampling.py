"""Samples follow the truncated distribution."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_sov.base.errors import UserError
from megatron_sov.infer.decoder.sampling import compute_probabilities, draw_tokens
from megatron_sov.infer.request import Sampling, WeightVersion

LOGITS = torch.tensor([[0.3, 2.0, -1.0, 1.1, 1.9], [0.0, 0.0, 0.0, 0.0, 5.0]])


SAMPLINGS = [Sampling(temperature=0.7), Sampling(temperature=1.3, top_k=3),
             Sampling(temperature=1.0, top_p=0.8), Sampling(temperature=0.9, top_k=4, top_p=0.6),
             Sampling(temperature=2.0, top_k=1), Sampling(temperature=1.0, top_p=1e-9)]


@pytest.mark.each("sampling", SAMPLINGS)
def test_distributions_equal_transformers(sampling: Sampling) -> None:
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)) * 2
    expected = TemperatureLogitsWarper(sampling.temperature)(None, logits.double())
    if sampling.top_k:
        expected = TopKLogitsWarper(sampling.top_k)(None, expected)
    if sampling.top_p < 1:
        expected = TopPLogitsWarper(sampling.top_p)(None, expected)
    assert torch.allclose(compute_probabilities(logits, sampling), expected.softmax(-1), atol=1e-12)


def test_truncation_keeps_the_lowest_tied_ids() -> None:
    assert (compute_probabilities(LOGITS[1:], Sampling(temperature=1.0, top_k=3))[0].nonzero()[:, 0].tolist()
            == [0, 1, 4])


def test_draw_returns_the_token_at_a_quantile() -> None:
    shares = compute_probabilities(LOGITS, Sampling(temperature=0.7, top_k=3))
    places = ((np.arange(3000) + 0.5) / 3000).tolist()
    for number in range(2):
        drawn = draw_tokens(shares[[number]].expand(3000, -1), places)
        assert drawn == sorted(drawn)
        assert np.bincount(drawn, minlength=5) / 3000 == pytest.approx(shares[number].numpy(), abs=1e-3)
        last = float(np.nextafter(1.0, 0.0))
        ends = shares[number].nonzero()[[0, -1], 0].tolist()
        assert draw_tokens(7 * shares[[number, number]], [0.0, last]) == ends


def test_version_changes_after_the_update() -> None:
    weight_version = WeightVersion("own")
    assert weight_version.version == 0
    with weight_version.replace_weights(3, None), pytest.raises(UserError, match="update to version 3"):
        weight_version.check()
    assert weight_version.version == 3


def test_failed_update_invalidates_weights() -> None:
    closed = []

    def weights() -> Iterator[tuple[str, None]]:
        try:
            yield "a", None
        finally:
            closed.append(True)

    held, stream = WeightVersion("own"), weights()
    with pytest.raises(RuntimeError, match="cable"), held.replace_weights(1, stream):
        next(stream)
        raise RuntimeError("a cable was pulled")
    assert closed == [True], "the processes that gather the weights wait for this one"
    with pytest.raises(UserError, match=r"1 failed \(a cable"):
        held.check()
    with held.replace_weights(2, iter(())):
        pass
    assert held.version == 2

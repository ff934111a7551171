"""A network of another's settings is not made where it would fill the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_sov.omni.codecs.published import MAX_ELEMENTS, BoundedUnpickler


def test_a_network_of_usual_size_is_the_one_that_torch_makes() -> None:
    torch.manual_seed(0)
    plain = torch.nn.TransformerEncoderLayer(16, 2)
    torch.manual_seed(0)
    with BoundedUnpickler() as limits:
        made = torch.nn.TransformerEncoderLayer(16, 2)
    assert limits.problem == ""
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), made.parameters(), strict=True))


@pytest.mark.parametrize("make", [
    lambda: torch.nn.Linear(1 << 20, 1 << 20), lambda: torch.zeros(MAX_ELEMENTS + 1),
    lambda: torch.arange(MAX_ELEMENTS + 1), lambda: torch.full((1 << 15, 1 << 15), 1.0),
    lambda: torch.linspace(0, 1, MAX_ELEMENTS + 2), lambda: torch.hann_window(MAX_ELEMENTS + 1)])
def test_what_is_too_large_is_refused_before_it_is_reserved(make: Any) -> None:
    with pytest.raises(MemoryError, match=r"asks for [\d,]{11,} numbers"), BoundedUnpickler():
        make()


def test_many_tensors_are_refused() -> None:
    limits = BoundedUnpickler(max_tensors=10)
    with pytest.raises(MemoryError, match="in 11 tensors"), limits:
        torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(10**9))
    assert "in 11 tensors" in limits.problem

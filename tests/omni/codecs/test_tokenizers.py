"""Codes of TA-Tok: the nearest one, searched in bounded memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_sov.omni.codecs.ta_tok import UnitSimVQ


def test_the_nearest_code_is_the_one_with_the_largest_cosine() -> None:
    torch.manual_seed(0)
    quantiser, vectors = UnitSimVQ(8, 50), torch.randn(3, 7, 8)
    layer = quantiser.book.code_transform[0]
    codes = quantiser.book.frozen_codebook @ layer.weight.T + layer.bias
    cosines = F.normalize(vectors, dim=-1) @ F.normalize(codes, dim=-1).T
    assert torch.equal(quantiser.nearest(vectors), cosines.argmax(-1))


def test_a_large_codebook_is_searched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    quantiser, vectors = UnitSimVQ(4, 30), torch.randn(5, 6, 4)
    whole = quantiser.nearest(vectors)
    monkeypatch.setattr("megatron_sov.omni.codecs.ta_tok._SCORES", 70)
    assert torch.equal(quantiser.nearest(vectors), whole)

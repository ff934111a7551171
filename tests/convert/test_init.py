"""The door to conversion: what it sets before torch is loaded."""

from __future__ import annotations

import os

import pytest

from megatron_sov import convert


def test_a_conversion_takes_large_pages_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    assert convert.from_hf and os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    assert convert.open_weights and "THP_MEM_ALLOC_ENABLE" not in os.environ
    assert convert.to_hf and os.environ["THP_MEM_ALLOC_ENABLE"] == "1"

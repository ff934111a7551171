"""Haystacks of the small tokenizer's text; its sources are code."""

from pathlib import Path

import pytest

from megatron_sov.eval.needle.text import Haystack, NeedleForm, open_haystacks
from megatron_sov.train.data.sources import open_sources


@pytest.fixture(scope="session")
def haystacks(token_shards: Path) -> dict[str, Haystack]:
    """Return split -> haystack."""
    sources = open_sources({str(token_shards): 1.0}, 1024)
    found = {}
    for split in ("train", "heldout"):
        (found[split],) = open_haystacks(sources, split, token_shards / "tokenizer")
    return found


@pytest.fixture(scope="session")
def form(haystacks: dict[str, Haystack]) -> NeedleForm:
    return haystacks["heldout"].form

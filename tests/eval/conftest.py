"""The parts of needles in the ids of the small tokenizer, and text to hide them in."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sov.data.shards import open_sources
from megatron_sov.eval.needle_text import Haystack, NeedleForm, needle_form


@pytest.fixture(scope="session")
def form(token_shards: Path) -> NeedleForm:
    return needle_form(token_shards / "tokenizer")


@pytest.fixture(scope="session")
def haystacks(token_shards: Path, form: NeedleForm) -> dict[str, Haystack]:
    sources = open_sources({str(token_shards): 1.0}, 1024)
    return {split: Haystack(sources, split, form.special) for split in ("train", "heldout")}

"""The needle suite: what is asked, where, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_sov.config.model import STRICT

NeedleKind = Literal["single", "multi-key", "multi-value", "multi-query", "variable-tracking"]
Language = Literal["english", "korean", "thai", "code"]


@dataclass(frozen=True)
class NeedleConfig:
    """The needle-in-a-haystack suite that judges a longer context."""

    __pydantic_config__ = STRICT
    kinds: tuple[NeedleKind, ...] = ("multi-key",)
    """What is asked, after RULER (arXiv 2404.06654)."""
    languages: tuple[Language, ...] = ()
    """Languages of the text that needles are hidden in; empty: all that the held-out text has."""
    lengths_tokens: tuple[int, ...] = (4096, 8192)
    """Context lengths to test."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 0.95)
    """Where the needle stands, 0 = start."""
    samples: int = 20
    """Samples of one cell (kind x language x depth x length)."""
    distractor_share: float = 0.25
    """Part of each context that needles with other keys fill (every kind but `single`), so that they grow with the length."""
    train_share: float = 0.1
    """Part of the extension's samples that are synthetic retrieval documents, with other keys and values than the test's."""

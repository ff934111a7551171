"""The needle suite: what is asked, where, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_sov.settings import AboveZero, AtLeastOne, Fraction, NotNegative, NotNegativeInt

NeedleKind = Literal["single", "multi-key", "multi-value", "multi-query", "variable-tracking"]
Language = Literal["english", "korean", "thai", "code"]


@dataclass(frozen=True)
class NeedleConfig:
    """The needle-in-a-haystack suite that judges a longer context."""

    kinds: tuple[NeedleKind, ...] = ("multi-key",)
    """What is asked, after RULER (arXiv 2404.06654), in tests and in training."""
    languages: tuple[Language, ...] = ()
    """Languages of the text that needles are hidden in, in tests and in training; empty:
    all that there is text of."""
    lengths_tokens: tuple[int, ...] = (4096, 8192)
    """Context lengths to test."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 0.95)
    """Where the needle stands, 0 = start."""
    samples: int = 20
    """Samples of one cell (kind x language x depth x length)."""
    distractor_share: float = 0.25
    """Part of each context that needles with other keys fill (every kind but `single`),
    so that they grow with the length."""
    train_share: Fraction = 0.1
    """Part of the extension's samples that are synthetic retrieval documents,
    with other keys and values than the test's."""
    train_kinds: tuple[NeedleKind, ...] = ()
    """Kinds of the training documents, all drawn equally often; empty: those that are tested (`kinds`)."""
    train_needles: NotNegativeInt = 0
    """Needles of a training document at most; 0: as many as fill `distractor_share` of it,
    and 12 where those are fewer."""
    train_questions: AtLeastOne = 12
    """Questions of a training document at most, each for needles of its own;
    needles that none asks for are distractors."""
    answer_weight: AboveZero = 30.0
    """Loss weight of the words of an answer in training documents.  With a few per cent of the loss on
    answers small models stay on a plateau."""
    text_weight: NotNegative = 0.5
    """Loss weight, in training documents, of the text around needles and of what all needles
    share; 0: answers alone."""

"""Sizes of the vocoder (`bigvgan.py`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le, Len

from megatron_sov.settings import ONCE, Code, Problem

MAX_LAYERS, MAX_SPEAKERS = 16, 100_000


Layers = Annotated[tuple[Annotated[int, Ge(1), Le(1000)], ...], Len(1, MAX_LAYERS)]


@dataclass(frozen=True)
class UnitBigVGANSettings:
    """The rates of sound and tokens, the speakers' names and the kernels are the authors' (OmniServe,
    decoder/audio) or those of BigVGAN's base model at 24 kHz; widths that neither gives are ours."""

    sample_rate_hz: Annotated[int, Ge(1), Le(192000)] = 24_000
    """Of what it says."""
    tokens_per_s: Annotated[int, Ge(1), Le(1000)] = 25
    """Of what it reads."""
    codebook_size: Annotated[int, Ge(1), Le(1 << 20)] = 6_562
    """Tokens of the tokenizer: 6,561, and one more that the authors' server lets pass."""
    speakers: Annotated[tuple[str, ...], Len(1, MAX_SPEAKERS), ONCE] = ("fkms", "mhwj")
    """Names of the voices in the table: a woman's and a man's."""
    unit_width: Annotated[int, Ge(1), Le(16384)] = 512
    """Of a token's embedding; ours."""
    speaker_width: Annotated[int, Ge(1), Le(16384)] = 256
    """Of a speaker's vector: what the authors' ECAPA-TDNN puts out."""
    channels: Annotated[int, Ge(1), Le(65536)] = 512
    """Before the first upsampling; each one halves them."""
    rates: Layers = (8, 6, 5, 4)
    """Of the upsamplings; their product is `sample_rate_hz / tokens_per_s`; ours."""
    kernels: Layers = (3, 7, 11)
    """Of the blocks side by side behind each upsampling."""
    dilations: Layers = (1, 3, 5)
    """Of the layers of each block."""
    lookahead_tokens: Annotated[int, Ge(0), Le(100)] = 0
    """Tokens that are known before the sound of one is made: speech sounds after what follows, and layers are
    late.  A stream is later by as many tokens."""

    @property
    def samples_per_token(self) -> int:
        """Samples that a token becomes."""
        return math.prod(self.rates)

    def problems(self) -> list[Problem]:
        """Return what does not fit together."""
        found = []
        if self.samples_per_token * self.tokens_per_s != self.sample_rate_hz:
            found.append(Problem(
                Code.RULE, "rates", f"make {self.samples_per_token} samples of a token, and "
                f"{self.sample_rate_hz} Hz at {self.tokens_per_s} tokens/s need "
                f"{self.sample_rate_hz / self.tokens_per_s:g}", self.rates))
        if self.channels % 2**len(self.rates):
            found.append(Problem(Code.RULE, "channels", f"must be a multiple of {2**len(self.rates)}: each "
                                 f"of the {len(self.rates)} rates halves them", self.channels))
        return found

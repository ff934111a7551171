"""Sizes of the vocoder (`bigvgan.py`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sov.codecs.sizes import outside

MAX_LAYERS, MAX_SPEAKERS = 16, 100_000


@dataclass(frozen=True)
class UnitBigVGANSettings:
    """The rates of sound and tokens, the speakers' names and the kernels are the authors' (OmniServe,
    decoder/audio) or those of BigVGAN's base model at 24 kHz; widths that neither gives are ours."""

    sample_rate_hz: int = 24_000
    """Of what it says."""
    tokens_per_s: int = 25
    """Of what it reads."""
    codebook_size: int = 6_562
    """Tokens of the tokenizer: 6,561, and one more that the authors' server lets pass."""
    speakers: tuple[str, ...] = ("fkms", "mhwj")
    """Names of the voices in the table: a woman's and a man's."""
    unit_width: int = 512
    """Of a token's embedding; ours."""
    speaker_width: int = 256
    """Of a speaker's vector: what the authors' ECAPA-TDNN puts out."""
    channels: int = 512
    """Before the first upsampling; each one halves them."""
    rates: tuple[int, ...] = (8, 6, 5, 4)
    """Of the upsamplings; their product is `sample_rate_hz / tokens_per_s`; ours."""
    kernels: tuple[int, ...] = (3, 7, 11)
    """Of the blocks side by side behind each upsampling."""
    dilations: tuple[int, ...] = (1, 3, 5)
    """Of the layers of each block."""
    lookahead_tokens: int = 0
    """Tokens that are known before the sound of one is made: speech sounds after what follows, and layers are
    late.  A stream is later by as many tokens."""

    @property
    def samples_per_token(self) -> int:
        """Samples that a token becomes."""
        return math.prod(self.rates)

    def problems(self) -> list[str]:
        """Return one sentence for each setting that is not well."""
        found = outside(self, sample_rate_hz=(1, 192_000), tokens_per_s=(1, 1000), codebook_size=(1, 1 << 20),
                        unit_width=(1, 16_384), speaker_width=(1, 16_384), channels=(1, 65_536),
                        rates=(1, 1000), kernels=(1, 1000), dilations=(1, 1000),
                        lookahead_tokens=(0, 100))
        for name in ("rates", "kernels", "dilations"):
            if not 1 <= len(getattr(self, name)) <= MAX_LAYERS:
                found.append(f"{name} = {list(getattr(self, name)[:20])} must be 1 to {MAX_LAYERS} numbers")
        if not 1 <= len(self.speakers) <= MAX_SPEAKERS or len(set(self.speakers)) < len(self.speakers):
            found.append(f"speakers = {list(self.speakers[:20])} must be 1 to {MAX_SPEAKERS:,} different "
                         "names")
        if found:
            return found
        if self.samples_per_token * self.tokens_per_s != self.sample_rate_hz:
            found.append(f"rates = {list(self.rates)} make {self.samples_per_token} samples of a token, and "
                         f"{self.sample_rate_hz} Hz at {self.tokens_per_s} tokens/s need "
                         f"{self.sample_rate_hz / self.tokens_per_s:g}")
        if self.channels % 2**len(self.rates):
            found.append(f"channels = {self.channels} must be a multiple of {2**len(self.rates)}: each of "
                         f"the {len(self.rates)} rates halves them")
        return found

"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le, MultipleOf

Width = Annotated[int, Ge(1), Le(1_000_000)]


@dataclass(frozen=True)
class LatentAttentionConfig:
    """Sizes of latent attention: keys and values of all heads are made of one narrow vector, beside which
    a key that all heads share carries the position."""

    kv_lora_rank: Width
    """Width of the vector that keys and values are made of."""
    qk_nope_head_dim: Width
    """Channels of a head's queries and keys that have no position."""
    qk_rope_head_dim: Annotated[Width, MultipleOf(2)]
    """Channels that rotate; all heads share those of the key."""
    v_head_dim: Width
    """Width of a head's values."""
    q_lora_rank: Width | None = None
    """Width of the vector that queries are made of; None: they are made of the layer's input."""

    @property
    def query_dim(self) -> int:
        """Width of a head's queries and keys."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cached_dim(self) -> int:
        """Numbers that generating keeps of a token in a layer, for all heads together."""
        return self.kv_lora_rank + self.qk_rope_head_dim

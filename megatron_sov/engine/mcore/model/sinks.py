"""Attention sinks: a learned logit of each head in the denominator of its softmax, as gpt-oss has it
(arXiv 2309.17453, section 3.3, "SoftMax-off-by-one" with a logit that is learned).

A sink is a key that every query sees, whatever mask and window say, and whose value is zero.  Its logit
differs from head to head, so it stands in the queries: they get one channel more, in which all keys but the
sink's are zero.  So the fused kernels serve as they are, in memory that grows with a row's length alone, and
gradients of sinks are those of the queries' channel.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.nn.functional import pad, scaled_dot_product_attention

from megatron_sov.engine.mcore.model.attention import DocumentAttention, PackedDocuments

CHANNELS = 8
"""By how much heads become wider: fused kernels on GPUs want a multiple of 8."""


def with_logits(query: torch.Tensor, sinks: torch.Tensor, scale: float) -> torch.Tensor:
    """Return queries that hold their heads' sinks: [tokens, heads, head_dim], [heads] -> [tokens, heads,
    head_dim + CHANNELS].

    Args:
        query: queries.
        sinks: logits of this process's heads.
        scale: factor on the products of queries and keys, by which a sink is not multiplied.
    """
    logits = (sinks / scale).to(query.dtype)[None, :, None].expand(len(query), -1, -1)
    return torch.cat([query, pad(logits, (0, CHANNELS - 1))], dim=-1)


def attend_with_sinks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
                      attn_mask: torch.Tensor | None = None, is_causal: bool = False, scale: float,
                      enable_gqa: bool = False) -> torch.Tensor:
    """Do what `scaled_dot_product_attention` does, for queries of `with_logits`: [batch, heads, m, head_dim +
    CHANNELS], [batch, kv_heads, L, head_dim] twice -> [batch, heads, m, head_dim].

    Args:
        query, key, value: see above.
        attn_mask: bool, True where a query sees a key, of any shape that spreads to [batch, heads, m, L].
        is_causal: whether m = L, and a query sees the keys up to its own.
        scale: factor on the products of queries and keys.
        enable_gqa: whether keys have fewer heads than queries.
    """
    width = value.shape[-1]
    # the sink's key stands first; values are as wide as keys, which flash attention asks for
    key, value = (pad(part, (0, CHANNELS, 1, 0)) for part in (key, value))
    one = torch.zeros_like(key[0, 0])
    one[0, width] = 1
    kernel: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if is_causal:  # a query before all others, so that each sees one key more; what it finds is left out
        out = scaled_dot_product_attention(pad(query, (0, 0, 1, 0)), key + one, value, is_causal=True,
                                           **kernel)[:, :, 1:]
    else:
        mask = None if attn_mask is None else pad(attn_mask, (1, 0), value=True)
        out = scaled_dot_product_attention(query, key + one, value, attn_mask=mask, **kernel)
    return out[..., :width]


class SinkAttention(DocumentAttention):
    """Attention inside documents with sinks, under the names that the library's own attention gives them."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._group = kwargs["pg_collection"].tp
        self.softmax_offset = torch.nn.Parameter(
            torch.zeros(config.num_attention_heads // self._group.size(), dtype=config.params_dtype))
        """[heads of this process]."""
        self.kernel = attend_with_sinks

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
                attn_mask_type: Any = None, attention_bias: None = None,
                packed_seq_params: PackedDocuments | None = None) -> torch.Tensor:
        """Attend, see `DocumentAttention`."""
        query = with_logits(query, self.softmax_offset, self.softmax_scale)
        return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias,
                               packed_seq_params)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (),
                           metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the sinks, split by heads."""
        declared: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {"softmax_offset": self.softmax_offset}, prefix, {"softmax_offset": 0}, sharded_offsets,
            tp_group=self._group, dp_cp_group=(metadata or {}).get("dp_cp_group"))
        return declared

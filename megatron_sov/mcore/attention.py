"""Core attention for packed documents where Transformer Engine does not serve.

The library's own local attention refuses packed sequences, and replaces a document mask by the window mask on sliding
layers, so documents would see each other.  Here each document is attended on its own: no mask exists for global
attention, and a band of at most `QUERY_BLOCK` rows for sliding windows.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch.nn.functional import scaled_dot_product_attention

QUERY_BLOCK = 1024
"""Queries attended at a time on sliding layers; bounds the band mask to QUERY_BLOCK x (QUERY_BLOCK + window)."""


class DocumentAttention(MegatronModule):
    """Causal attention inside each packed document, optionally within a sliding window."""

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str,
                 attention_dropout: float | None = None, softmax_scale: float | None = None, cp_comm_type: str | None = None,
                 pg_collection: Any = None, window_tokens: int = 0) -> None:
        super().__init__(config=config)
        self.window_tokens = window_tokens
        self.softmax_scale = softmax_scale or config.kv_channels ** -0.5

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
                attn_mask_type: Any = None, attention_bias: None = None,
                packed_seq_params: PackedSeqParams | None = None) -> torch.Tensor:
        """Attend.

        Args:
            query: [tokens, heads, head_dim]; key, value: [tokens, kv_heads, head_dim].
            packed_seq_params: document bounds in `cu_seqlens_q` [documents + 1].

        Returns:
            [tokens, heads * head_dim], to which the caller adds the batch axis.
        """
        if packed_seq_params is None:
            raise ValueError("DocumentAttention needs packed_seq_params: micro-batches are rows of packed documents")
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        outputs = [self._document(query[a:b], key[a:b], value[a:b]) for a, b in pairwise(bounds) if b > a]
        return torch.cat(outputs).reshape(query.shape[0], -1)

    def _document(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend within one document of n tokens: [n, heads, head_dim] -> [n, heads, head_dim]."""
        q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))  # the fused kernels need a batch axis
        n = q.shape[2]
        gqa = q.shape[1] != k.shape[1]
        if not self.window_tokens or n <= self.window_tokens:
            out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=gqa)
            return out[0].transpose(0, 1)
        blocks = []
        for start in range(0, n, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, n)
            first_key = max(0, start - self.window_tokens + 1)
            distance = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first_key, stop, device=q.device)
            visible = (distance >= 0) & (distance < self.window_tokens)
            blocks.append(scaled_dot_product_attention(q[:, :, start:stop], k[:, :, first_key:stop], v[:, :, first_key:stop],
                                                       attn_mask=visible, scale=self.softmax_scale, enable_gqa=gqa))
        return torch.cat(blocks, dim=2)[0].transpose(0, 1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (),
                           metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return nothing: attention itself has no state."""
        return {}

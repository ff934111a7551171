"""Attention with a key/value cache, for reading sequences span by span and generating token by token.

A cache has slots, one per active sequence; each process caches its own layers and key/value heads. Global
layers cache every token. Sliding layers use a ring buffer: a token's index is its position modulo the window.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.transformer.attention import Attention
from torch.nn.functional import scaled_dot_product_attention

from megatron_sov.engine.model.attention import attend_document, attend_equal_lengths
from megatron_sov.engine.model.cache_rows import CacheGroup, CacheSize, PackedSpans
from megatron_sov.engine.model.linear_attention import LinearAttention, RecurrentCache
from megatron_sov.engine.model.rotary import compute_softmax_scale


class CachedAttention(torch.nn.Module):
    """A layer's core attention with KV cache; replaces the layer's core attention inside `use_kv_cache`."""

    def __init__(self, size: CacheSize, softmax_scale: float, window_tokens: int) -> None:
        """Set the limits; `forward` allocates the cache.

        Args:
            size: limits of the cache.
            softmax_scale: softmax scale.
            window_tokens: sliding window, current token included. 0: no window.
        """
        super().__init__()
        self.size, self.softmax_scale, self.window_tokens = size, softmax_scale, window_tokens
        self.capacity = min(size.max_tokens, window_tokens) if window_tokens else size.max_tokens
        self.stored: tuple[torch.Tensor, ...] | None = None
        """Keys and values [slots, kv_heads, capacity, head_dim], one tensor if both are equal. None before
        the first token."""
        self.up_weight: torch.Tensor | None = None
        """Latent attention's up-projection with merged adapter. None before the first token."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None,
                attn_mask_type: Any = None, attention_bias: None = None,
                packed_seq_params: PackedSpans | None = None) -> torch.Tensor:
        """Cache the new keys and values and attend to the cached tokens.

        Args:
            query: [tokens, heads, head_dim]; key and value: [tokens, kv_heads, head_dim]. If key and value
                are the same tensor, the cache stores one copy.
            packed_seq_params: spans of the row.

        Returns:
            [tokens, heads * head_dim]; zeros at padding.
        """
        assert packed_seq_params is not None
        if self.stored is None:
            shape = (self.size.slots, key.shape[1], self.capacity, key.shape[2])
            # zeros, not empty memory: masked entries must be finite
            self.stored = tuple(t.new_zeros(shape) for t in ((key,) if value is key else (key, value)))
        out = query.new_zeros(*query.shape[:2], value.shape[2])
        for group in packed_seq_params.groups:
            rows = slice(group.start, group.start + len(group.past) * group.length)
            q, k, v = (t[rows].unflatten(0, (len(group.past), group.length)) for t in (query, key, value))
            if group.length == 1:
                out[rows] = self._attend_step(group, q, k, v).flatten(0, 1)
            elif not any(group.past) and not 0 < self.window_tokens < group.length:
                out[rows] = self._attend_first(group, q, k, v).flatten(0, 1)
            else:
                out[rows] = torch.cat([self._attend_long_span(group.slot + i, past, q[i], k[i], v[i])
                                       for i, past in enumerate(group.past)])
        return out.flatten(1)

    def _attend_step(self, group: CacheGroup, query: torch.Tensor, key: torch.Tensor,
                     value: torch.Tensor) -> torch.Tensor:
        """Attend from a new token in many sequences: [sequences, 1, heads, head_dim]."""
        assert self.stored is not None
        slots, ring_index, visible = group.find_step_entries(self.capacity, query.device)
        for cache, new in zip(self.stored, (key, value), strict=False):
            cache[slots, :, ring_index] = new
        # after the write: a new token attends to itself. Entries after the longest sequence are never read
        keys, values = (cache[group.slot:group.slot + len(slots), :, :visible.shape[-1]]
                        for cache in (self.stored[0], self.stored[-1]))
        # query heads that share a key head become more queries: [sequences, kv_heads, heads / kv_heads,
        # head_dim]
        grouped = query.squeeze(1).unflatten(1, (keys.shape[1], -1))
        out = scaled_dot_product_attention(grouped, keys, values, attn_mask=visible, scale=self.softmax_scale)
        return out.flatten(1, 2)[:, None]

    def _attend_first(self, group: CacheGroup, query: torch.Tensor, key: torch.Tensor,
                      value: torch.Tensor) -> torch.Tensor:
        """Attend from the first tokens in several sequences: [sequences, new, heads, head_dim]."""
        assert self.stored is not None
        for cache, new in zip(self.stored, (key, value), strict=False):
            cache[group.slot:group.slot + len(group.past), :, :group.length] = new.transpose(1, 2)
        return attend_equal_lengths(query, key, value, self.softmax_scale)

    def _attend_long_span(self, slot: int, past: int, query: torch.Tensor, key: torch.Tensor,
                          value: torch.Tensor) -> torch.Tensor:
        """Attend from a sequence's span of several tokens: [new, heads, head_dim]."""
        assert self.stored is not None
        slot_caches = [stored[slot] for stored in self.stored]
        # read before writing: in a ring, new tokens overwrite tokens that the first query still sees
        first_visible = max(0, past - self.window_tokens + 1) if self.window_tokens else 0
        past_positions = torch.arange(first_visible, past, device=query.device)
        keys, values = (torch.cat([k[:, past_positions % self.capacity].transpose(0, 1), new])
                        for k, new in zip((slot_caches[0], slot_caches[-1]), (key, value), strict=True))
        out = attend_document(query, keys, values, self.softmax_scale, self.window_tokens)
        # cache only the end of a span longer than the ring: two tokens must not write one index
        num_cached = min(len(key), self.capacity)
        end = past + len(key)
        ring_index = torch.arange(end - num_cached, end, device=query.device) % self.capacity
        for k, new in zip(slot_caches, (key, value), strict=False):
            k[:, ring_index] = new[-num_cached:].transpose(0, 1)
        return out

    def copy(self, source: int, targets: Sequence[int]) -> None:
        for cache in self.stored or ():
            cache[list(targets)] = cache[source].clone()  # source and targets share memory


@contextlib.contextmanager
def use_kv_cache(model: Any, size: CacheSize) -> Iterator[list[CachedAttention | RecurrentCache]]:
    """Replace a `LanguageModel`'s core attention by `CachedAttention`, and yield the caches per layer.
    On exit the previous core attention returns."""
    config, architecture = model.config, model.architecture
    kinds = architecture.layer_types() + [architecture.mtp_layer_type()] * architecture.num_mtp_layers
    windows = [*architecture.windows(), architecture.mtp_window()]
    attentions = [m for chunk in model.chunks for m in chunk.modules() if isinstance(m, Attention)]
    linear = [m for chunk in model.chunks for m in chunk.modules() if isinstance(m, LinearAttention)]
    previous = [(m, m.core_attention) for m in attentions]
    # the fused kernel requires positions on the GPU and sequences that start at 0
    fused, config.apply_rope_fusion = config.apply_rope_fusion, False
    try:
        for module in attentions:
            layer_type = kinds[module.layer_number - 1]
            module.core_attention = CachedAttention(size, compute_softmax_scale(architecture, layer_type),
                                                    windows[module.layer_number - 1])
        for layer in linear:
            layer.state_cache = RecurrentCache(size, layer)
        yield [m.core_attention for m in attentions] + [layer.state_cache for layer in linear]
    finally:
        for layer in linear:
            layer.state_cache = None
        config.apply_rope_fusion = fused
        for module, attention in previous:
            module.core_attention = attention

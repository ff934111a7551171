"""Soft caps: numbers kept within a cap by ``cap * tanh(x / cap)``, as Gemma 2 has them on the products of
queries and keys, before the mask, and on the head's logits (arXiv 2408.00118, section 2).

No fused kernel of torch caps the products of queries and keys; Transformer Engine's cap (2.20) is that of
FlashAttention, and the library passes it none.  So attention is plain torch here: blocks of queries whose
products are computed again in the backward pass, never a whole row's length squared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

Kernel = Callable[..., torch.Tensor]
"""What attends: called as torch's `scaled_dot_product_attention`, with queries [b, heads, m, head_dim], keys
and values [b, kv_heads, L, head_dim], attn_mask (bool: [m, L] or [b, 1, m, L]) or is_causal, scale, and
enable_gqa."""
FUSED: Kernel = scaled_dot_product_attention
"""Torch's own."""
MAX_PRODUCTS = 1 << 25
"""Products of queries and keys that are computed at a time, in float32 an eighth of a gigabyte."""


def kernel_of(cap: float | None) -> Kernel:
    """Return what attends with a cap on products; None: torch's own."""
    return FUSED if cap is None else partial(soft_capped, cap=cap)


def soft_capped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, cap: float, scale: float,
                attn_mask: torch.Tensor | None = None, is_causal: bool = False,
                enable_gqa: bool = False) -> torch.Tensor:
    """Attend with capped products; a `Kernel` but for the cap.

    Products, cap and softmax are in float32 (float64 where queries are).
    """
    assert enable_gqa or query.shape[1] == key.shape[1], "heads that share keys need enable_gqa"
    count, heads, queries = query.shape[:3]
    grouped = query.unflatten(1, (key.shape[1], -1))
    rows = max(1, MAX_PRODUCTS // (count * heads * key.shape[2]))
    blocks = []
    for start in range(0, queries, rows):
        stop = min(start + rows, queries)
        keys = slice(0, stop if is_causal else key.shape[2])
        seen = None if attn_mask is None else attn_mask[..., start:stop, :]
        part = (grouped[..., start:stop, :], key[:, :, keys], value[:, :, keys],
                start if is_causal else seen, cap, scale)
        blocks.append(checkpoint(_block, *part, use_reentrant=False, preserve_rng_state=False)
                      if torch.is_grad_enabled() else _block(*part))
    return torch.cat(blocks, dim=3).flatten(1, 2)


def _block(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor | int | None,
           cap: float, scale: float) -> torch.Tensor:
    """[b, kv_heads, heads / kv_heads, m, head_dim], [b, kv_heads, L, head_dim] twice -> as the queries.

    `seen` is a mask, the place of the first query among keys of which none behind a query is seen (a mask
    that is made here is not kept for the backward pass), or None: every key.
    """
    if isinstance(seen, int):
        seen = torch.ones(query.shape[3], key.shape[2], dtype=torch.bool, device=query.device).tril(seen)
    groups = query.shape[2:4]
    # queries of heads that share keys become further queries: keys are not copied
    products = (query.flatten(2, 3) @ key.transpose(-1, -2)).unflatten(2, groups)
    products = products.to(torch.promote_types(query.dtype, torch.float32)) * scale
    products = torch.tanh(products / cap) * cap
    if seen is not None:
        products = products.masked_fill(~(seen if seen.dim() == 2 else seen[:, :, None]), -torch.inf)
    shares = products.softmax(-1).to(value.dtype)
    return (shares.flatten(2, 3) @ value).unflatten(2, groups)


def cap_(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Return capped logits, in their place; None: as they are."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def slope(logits: torch.Tensor, cap: float | None, temperature: float,
          token_rows: int) -> torch.Tensor | None:
    """Return the derivative of capped logits by what they were before, ``1 - (capped / cap)^2``; None: no
    cap.

    Args:
        logits: [C, V / tp], capped, then divided by the temperature.
        cap: the cap.
        temperature: see `logits`.
        token_rows: columns that belong to token ids; those behind have no derivative.
    """
    if cap is None:
        return None
    found = (logits * (temperature / cap)).square_().neg_().add_(1)
    found[:, token_rows:] = 0
    return found

"""Attention inside all documents of a piece of a row by one fused kernel: torch's flash attention for
sequences of several lengths (`torch.nn.attention.varlen`).

Never run on a GPU here: the bounds and the call are tested against a double of the kernel in plain torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch

from megatron_sov.engine.mcore.parallel.device import to_device

MAX_HEAD_DIM = 256
"""Of torch's flash attention, which also wants multiples of 8."""

Span = tuple[int, int, int]
"""Row indices: start of a document, first query, end of the queries; the keys are those from
the start to the end."""


@dataclass(frozen=True)
class PieceBounds:
    """Where the documents of a piece lie in its queries, and in the keys that they reach."""

    queries: torch.Tensor
    """[documents + 1] int32: cumulative lengths, on the device."""
    keys: torch.Tensor
    """[documents + 1] int32."""
    max_queries: int
    """Most queries of a document."""
    max_keys: int
    """Most keys of a document."""


def first_keys(documents: Sequence[Span], window_tokens: int) -> list[int]:
    """Return the row index of each document's first key that a window reaches (0: no window)."""
    return [max(a, start - window_tokens + 1) if window_tokens else a for a, start, _ in documents]


def piece_bounds(spans: Sequence[Sequence[Span]], window_tokens: int,
                 device: torch.device) -> list[PieceBounds]:
    """Return the bounds of each local piece of a row, sent to the device together."""
    lengths = [([end - start for _, start, end in documents],
                [end - first for first, (_, _, end) in zip(first_keys(documents, window_tokens), documents,
                                                           strict=True)]) for documents in spans]
    flat = [list(accumulate(part, initial=0)) for both in lengths for part in both]
    sent = to_device(torch.tensor([bound for part in flat for bound in part], dtype=torch.int32), device)
    parts = sent.split([len(part) for part in flat])
    return [PieceBounds(parts[2 * i], parts[2 * i + 1], max(queries), max(keys))
            for i, (queries, keys) in enumerate(lengths)]


def serves(query: torch.Tensor) -> bool:
    """Return whether the kernel takes such heads: 16 bits, on a GPU."""
    return (query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
            and query.shape[-1] <= MAX_HEAD_DIM and query.shape[-1] % 8 == 0)


def attend_documents(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: PieceBounds,
                     scale: float, window_tokens: int) -> torch.Tensor:
    """Attend inside each document, its last query standing at its last key: [queries, heads, head_dim],
    [keys, kv_heads, head_dim] -> [queries, heads, head_dim].

    Args:
        bounds: where the documents lie.
        scale: factor on the products of queries and keys.
        window_tokens: sliding window, the current token included; 0: every token before.
    """
    grouped: dict[str, Any] = {}
    groups = query.shape[1] // key.shape[1]
    # here: its import takes a second, for torch's compiler
    from torch.nn.attention import varlen

    if groups > 1 and _takes_grouped_heads(varlen.varlen_attn):
        grouped = {"enable_gqa": True}
    elif groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    # with its log-sums only where they are asked for
    attended: Any = varlen.varlen_attn(
        query, key, value, bounds.queries, bounds.keys, bounds.max_queries, bounds.max_keys, scale=scale,
        window_size=(window_tokens - 1, 0) if window_tokens else (-1, 0), **grouped)
    return attended


@cache
def _takes_grouped_heads(function: Any) -> bool:
    """Return whether keys may have fewer heads than queries, which torch 2.11 did not say."""
    return "enable_gqa" in inspect.signature(function).parameters

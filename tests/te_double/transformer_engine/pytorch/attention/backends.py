"""Selection of the attention backend by the rules of the real library, whose fast backend rejects many calls.
Not part of the real interface.

Sources: `attention/dot_product_attention/utils.py` of Transformer Engine 2.20.2, and
`nvte_get_fused_attn_backend` of its `common/fused_attn/fused_attn.cpp`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..placement import Chip

FUSED, UNFUSED = "FusedAttention", "UnfusedDotProductAttention"
SELECTIONS: Counter[str] = Counter()
"""Backend -> number of selections; each queries cuDNN."""
MAX_DETERMINISTIC_HOPPER = 1 << 30
"""Limit of documents x heads x longest ** 2 for cuDNN's deterministic backward pass."""


@dataclass(frozen=True)
class AttentionCall:
    """Parameters of a selection."""

    dtype: torch.dtype
    """Dtype of queries, keys and values."""
    heads: int
    """Query heads of this process."""
    head_dims: tuple[int, int]
    """Head sizes of queries and keys, and of values."""
    documents: int
    """Number of packed documents, or the batch size."""
    longest_tokens: int
    """Upper bound of the documents' lengths."""
    qkv_format: str = "thd"
    """Tensor layout."""
    window: tuple[int, int] = (-1, 0)
    """Keys left and right of a query's own; -1: all."""
    softcap: float = 0.0
    """Softcap on the logits."""
    deterministic: bool = False
    """Whether results must repeat."""
    training: bool = True
    """Whether there is a backward pass."""


def _head_dims_served(call: AttentionCall, chip: Chip) -> bool:
    """Return whether cuDNN supports the head sizes."""
    qk, v = call.head_dims
    if qk % 8 or v % 8:
        return False
    if max(qk, v) <= 128 or not call.training:
        return True
    if chip.capability == (9, 0):
        return max(qk, v) <= 256 and (qk == v or (qk, v) == (192, 128))
    if (qk, v) == (192, 128):
        return chip.cudnn >= (9, 11, 0)
    return ((qk, v) == (256, 256) and (10, 0) <= chip.capability < (11, 0)
            and chip.cudnn >= ((9, 25, 0) if call.qkv_format == "thd" else (9, 23, 0)))


REFUSALS: tuple[tuple[str, str, Callable[[AttentionCall, Chip], bool]], ...] = (
    (FUSED, "NVTE_FUSED_ATTN=0", lambda call, chip: os.environ.get("NVTE_FUSED_ATTN") == "0"),
    (UNFUSED, "NVTE_UNFUSED_ATTN=0", lambda call, chip: os.environ.get("NVTE_UNFUSED_ATTN") == "0"),
    (FUSED, "unsupported qkv_dtype", lambda call, chip: call.dtype not in (torch.bfloat16, torch.float16)),
    (FUSED, "it does not support softcap", lambda call, chip: call.softcap != 0),
    (FUSED, "head dimensions", lambda call, chip: not _head_dims_served(call, chip)),
    (FUSED, "determinism on Blackwell and cuDNN version < 9.18.1",
     lambda call, chip: (call.deterministic and call.training and chip.capability >= (10, 0)
                         and chip.cudnn < (9, 18, 1))),
    (FUSED, "a known cuDNN deterministic F16/BF16 THD backward workspace limitation on sm90",
     lambda call, chip: (call.deterministic and call.training and call.qkv_format == "thd"
                         and chip.capability == (9, 0)
                         and call.documents * call.heads * call.longest_tokens ** 2
                         >= MAX_DETERMINISTIC_HOPPER)),
)
"""(backend, the library's message, whether it rejects a call). FlashAttention is assumed to be missing."""


def find_refusals(call: AttentionCall, chip: Chip) -> dict[str, str]:
    """Return backend -> reason for rejection."""
    return {backend: why for backend, why, holds in reversed(REFUSALS) if holds(call, chip)}


def choose_backend(call: AttentionCall, chip: Chip) -> str:
    """Return the fastest backend that accepts the call.

    Raises:
        ValueError: no backend accepts the call.
    """
    reasons = find_refusals(call, chip)
    backend = next((backend for backend in (FUSED, UNFUSED) if backend not in reasons), None)
    if backend is None:
        raise ValueError("No dot product attention backend is available for the provided inputs. Please run "
                         f"with NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 to find out the reasons. {reasons}")
    SELECTIONS[backend] += 1
    return backend

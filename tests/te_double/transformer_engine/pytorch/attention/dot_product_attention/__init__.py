"""Softmax attention by its formula: whole sequences or packed documents, windows, grouped heads."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from ...constants import CPLoadBalancingStrategy
from ...module.base import TransformerEngineBaseModule
from ...placement import require_cuda
from ..backends import AttentionCall
from . import utils as dpa_utils

MASKS = ("causal", "padding_causal", "no_mask", "padding")
_last: list[AttentionCall] = []
"""Like the real library's cache: the last call, for which the backend was selected."""


def resolve_window(attn_mask_type: str, size: tuple[int, int] | None) -> tuple[int, int]:
    """Return the numbers of visible keys left and right of the query's position; -1: all."""
    if attn_mask_type not in MASKS:
        raise NotImplementedError(f"the double has no mask {attn_mask_type!r}")
    if "causal" not in attn_mask_type:
        return size or (-1, -1)
    if size is None:
        return -1, 0
    assert size == (-1, 0) or (size[0] >= 0 and size[1] == 0), \
        f"window_size should be (-1, 0) or (>=0, 0) for attn_mask_type={attn_mask_type}"
    return size


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float,
           size: tuple[int, int]) -> torch.Tensor:
    """Return [tokens, heads, channels]: softmax(q k^T scale) v for one sequence.

    Args:
        q: [tokens, heads, channels].
        k: [tokens, groups, channels]; consecutive heads share a group.
        v: [tokens, groups, channels].
        scale: softmax scale.
        size: see `resolve_window`.
    """
    group_size = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group_size, 1), v.repeat_interleave(group_size, 1)
    distance = torch.arange(len(q))[:, None] - torch.arange(len(k))
    visible = torch.ones_like(distance, dtype=torch.bool)
    if size[0] >= 0:
        visible &= distance <= size[0]
    if size[1] >= 0:
        visible &= -distance <= size[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), k.to(wide)) * scale
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.to(wide)).to(q.dtype)


def attend_documents(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor,
                     scale: float, size: tuple[int, int]) -> torch.Tensor:
    """Apply `attend` to each document of a packed row."""
    bounds = cu_seqlens.tolist()
    parts = [attend(q[a:b], k[a:b], v[a:b], scale, size) for a, b in pairwise(bounds) if b > a]
    # the kernels leave rows after the last document unwritten
    return torch.cat([*parts, q.new_zeros(len(q) - bounds[-1], q.shape[1], v.shape[-1])])


class DotProductAttention(TransformerEngineBaseModule):
    """Softmax attention over queries, keys and values."""

    def __init__(self, num_attention_heads: int, kv_channels: Any, num_gqa_groups: int | None = None,
                 attention_dropout: float = 0.0, qkv_format: str = "sbhd", attn_mask_type: str = "causal",
                 window_size: tuple[int, int] | None = None, bottom_right_diagonal: bool | None = None,
                 softcap: float = 0.0, sequence_parallel: bool = False, tp_size: int = 1,
                 get_rng_state_tracker: Callable[..., Any] | None = None, tp_group: Any = None,
                 layer_number: int | None = None, attention_type: str = "self", cp_group: Any = None,
                 cp_global_ranks: list[int] | None = None, cp_stream: Any = None, cp_comm_type: str = "p2p",
                 softmax_scale: float | None = None, softmax_type: str = "vanilla",
                 return_max_logit: bool | None = False, name: str | None = None) -> None:
        super().__init__(name)
        if attention_dropout or softmax_type != "vanilla" or return_max_logit or cp_group:
            raise NotImplementedError("the double has plain softmax attention, without context parallelism")
        self._set_group(tp_group, tp_size)
        self.qkv_format, self.attn_mask_type = qkv_format, attn_mask_type
        self.window_size = resolve_window(attn_mask_type, window_size)
        channels = kv_channels if isinstance(kv_channels, int) else kv_channels[0]
        self.softmax_scale = channels ** -0.5 if softmax_scale is None else softmax_scale
        self.groups = (num_attention_heads if num_gqa_groups is None else num_gqa_groups) // self.tp_size
        self.softcap = softcap
        self.layer_number, self.cp_group, self.cp_comm_type = layer_number, cp_group, cp_comm_type

    def set_context_parallel_group(self, cp_group: Any, cp_global_ranks: Any, cp_stream: Any,
                                   cp_comm_type: str = "p2p",
                                   load_balancing_strategy: Any = CPLoadBalancingStrategy.DUAL_CHUNK_SWAP
                                   ) -> None:
        """Refuse a context-parallel group, which the double does not support."""
        if cp_group is not None:
            raise NotImplementedError("the double has no context parallelism")

    def forward(self, query_layer: Any = None, key_layer: Any = None, value_layer: Any = None,
                attention_mask: Any = None, qkv_format: str | None = None, cu_seqlens_q: Any = None,
                cu_seqlens_kv: Any = None, cu_seqlens_q_padded: Any = None, cu_seqlens_kv_padded: Any = None,
                max_seqlen_q: int | None = None, max_seqlen_kv: int | None = None,
                attn_mask_type: str | None = None, window_size: tuple[int, int] | None = None,
                bottom_right_diagonal: bool | None = None, softcap: float | None = None,
                checkpoint_core_attention: bool = False, core_attention_bias_type: str = "no_bias",
                core_attention_bias: Any = None, alibi_slopes: Any = None, fast_zero_fill: bool = True,
                inference_params: Any = None, pad_between_seqs: bool | None = None,
                fp8_output: bool | None = False, bf16_backward: bool | None = False,
                num_splits: int | None = 1, score_mod: Any = None, score_mod_bprop: Any = None,
                score_mod_tensors: Any = None, score_mod_bprop_tensors: Any = None, qkv_layer: Any = None,
                kv_layer: Any = None, qkv_interleave_dim: int = -3, thd_attention_policies: Any = None,
                thd_attention_policy_dispatch: str = "auto") -> torch.Tensor:
        """Compute attention, see `attend`; sbhd has a batch axis after the tokens.

        Returns:
            [tokens, heads * channels] (thd) or [tokens, batch, heads * channels] (sbhd).
        """
        unsupported = (cu_seqlens_q_padded, cu_seqlens_kv_padded, softcap or self.softcap or None,
                       core_attention_bias, alibi_slopes, inference_params, pad_between_seqs, score_mod,
                       qkv_layer, kv_layer, thd_attention_policies)
        if any(argument is not None for argument in unsupported) or attention_mask is not None:
            raise NotImplementedError("the double has plain softmax attention, without a mask argument")
        kind, mask = qkv_format or self.qkv_format, attn_mask_type or self.attn_mask_type
        size = resolve_window(mask, window_size or self.window_size)
        self.init_fp8_metadata()
        require_cuda(query_layer=query_layer, key_layer=key_layer, value_layer=value_layer,
                     cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv)
        self._check(kind, mask, key_layer, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q)
        documents = query_layer.shape[1] if kind == "sbhd" else len(cu_seqlens_q) - 1
        call = AttentionCall(
            query_layer.dtype, query_layer.shape[-2], (query_layer.shape[-1], value_layer.shape[-1]),
            documents, max_seqlen_q or len(query_layer), kind, size, self.softcap,
            os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO") == "0"
            or torch.are_deterministic_algorithms_enabled(), self.training)
        if _last != [call]:
            dpa_utils.get_attention_backend(call)
            _last[:] = [call]
        if kind == "thd":
            out = attend_documents(query_layer, key_layer, value_layer, cu_seqlens_q, self.softmax_scale,
                                   size)
        else:
            sequences = zip(query_layer.unbind(1), key_layer.unbind(1), value_layer.unbind(1), strict=True)
            out = torch.stack([attend(q, k, v, self.softmax_scale, size) for q, k, v in sequences], dim=1)
        return out.flatten(-2)

    def _check(self, kind: str, mask: str, key: torch.Tensor, cu_q: Any, cu_kv: Any, longest: Any) -> None:
        """Raise the real module's assertions."""
        assert key.shape[-2] == self.groups, \
            f"Keys and values must have num_gqa_group = {self.groups} heads! Found {key.shape[-2]}."
        if kind != "thd":
            return
        assert key.dim() == 3, "Queries, keys and values must be 3D tensors when qkv_format = thd!"
        assert "padding" in mask, "Attention mask type must be padding or padding_causal for qkv_format=thd!"
        assert cu_q is not None and cu_kv is not None, \
            "cu_seqlens_q and cu_seqlens_kv can not be None when qkv_format = thd!"
        assert cu_q.dtype == cu_kv.dtype == torch.int32, \
            "cu_seqlens_q and cu_seqlens_q must both be in dtype torch.int32!"
        assert longest is None or longest >= int((cu_q[1:] - cu_q[:-1]).max()), \
            "max_seqlen_q is less than the longest document"

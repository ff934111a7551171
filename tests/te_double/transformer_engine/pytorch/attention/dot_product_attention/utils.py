"""`get_attention_backend`, which `DotProductAttention` calls if a call differs from its previous one."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from ... import placement as machine
from ..backends import FUSED, UNFUSED, AttentionCall, choose_backend, find_refusals


class AttentionLogging:
    """Log level of the selection."""

    _log_level = logging.WARNING


@dataclass
class AttentionParams:
    """Parameters of a selection with the real names and defaults; unused parameters are accepted."""

    qkv_type: Any = torch.Tensor
    qkv_dtype: torch.dtype = torch.bfloat16
    nominal_dtype: Any = None
    qkv_layout: str = "sbh3d"
    batch_size: int = 1
    num_heads: int = 16
    num_gqa_groups: int = 16
    max_seqlen_q: int = 128
    max_seqlen_kv: int = 128
    num_tokens_q: int = 0
    num_tokens_kv: int = 0
    head_dim_qk: int = 64
    head_dim_v: int = 64
    attn_mask_type: str = "no_mask"
    window_size: tuple[int, int] | None = None
    bottom_right_diagonal: bool = True
    softcap: float = 0.0
    alibi_slopes_shape: Any = None
    core_attention_bias_type: str = "no_bias"
    core_attention_bias_shape: Any = None
    core_attention_bias_requires_grad: bool = True
    pad_between_seqs: bool = False
    attention_dropout: float = 0.0
    context_parallel: bool = False
    cp_comm_type: str = "p2p"
    cp_size: int = 1
    cp_size_a2a: int = 1
    deterministic: bool = False
    is_training: bool = True
    fp8: bool = False
    fp8_meta: Any = None
    inference_params: Any = None
    softmax_type: str = "vanilla"
    return_max_logit: bool = False
    cuda_graph: bool = False
    num_splits: int = 1
    softmax_scale: float = 1.0
    fp8_output: bool = False
    checkpoint_core_attention: bool = False
    has_score_mod: bool = False
    has_score_mod_bprop: bool = False


def get_attention_backend(attention_params: AttentionParams | AttentionCall | None = None
                          ) -> tuple[bool, None, bool, int | None, bool, list[bool]]:
    """Return (use FlashAttention, its version, use the fused kernel, its number, use plain torch, [whether
    each of the three accepts the call]); write reasons for rejections to the log."""
    params = attention_params or AttentionParams()
    call = params if isinstance(params, AttentionCall) else AttentionCall(
        params.qkv_dtype, params.num_heads, (params.head_dim_qk, params.head_dim_v), params.batch_size,
        params.max_seqlen_q, params.qkv_layout.partition("_")[0], params.window_size or (-1, -1),
        params.softcap, params.deterministic, params.is_training)
    log = logging.getLogger("DotProductAttention")
    log.setLevel(AttentionLogging._log_level)
    reasons = find_refusals(call, machine.CHIP)
    for backend, why in reasons.items():
        log.debug("Disabling %s for %s", backend, why)
    backend = choose_backend(call, machine.CHIP)
    available = [False, FUSED not in reasons, UNFUSED not in reasons]
    return False, None, backend == FUSED, 1 if backend == FUSED else None, backend == UNFUSED, available

"""Which of Transformer Engine's kernels attends: its answer for packed rows of a model, and its decisions,
which are kept."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from megatron_sov.engine.parallel.device import on_gpu
from megatron_sov.model.config import ModelConfig

TE_ATTENTION_VARIABLES = {"flash": "NVTE_FLASH_ATTN", "fused": "NVTE_FUSED_ATTN",
                          "unfused": "NVTE_UNFUSED_ATTN"}
"""Kernel of Transformer Engine -> the variable that allows it, which the library sets by `gpu.attention`."""


KEPT_DECISIONS = 64


def keep_attention_decisions(utils: Any) -> None:
    """Have Transformer Engine keep its decision about kernels for every kind of call.

    2.20.2 keeps the last one alone (`_attention_backends`), so that layers with a window and without, in
    turn, have it ask cuDNN at every change.  Where one call has several policies it keeps them as is done
    here: by equal parameters and variables.

    Args:
        utils: its module of `get_attention_backend`, which it asks by that name.
    """
    decide = utils.get_attention_backend
    if hasattr(decide, "kept"):
        return
    kept: list[tuple[list[str | None], Any, Any]] = []

    def decided(params: Any) -> Any:
        variables = [os.environ.get(name) for name in TE_ATTENTION_VARIABLES.values()]
        for then, asked, found in kept:
            if then == variables and asked == params:
                return found
        kept.append((variables, params, decide(params)))
        del kept[:-KEPT_DECISIONS]
        return kept[-1][-1]

    decided.kept = kept  # type: ignore[attr-defined]
    utils.get_attention_backend = decided


def head_size(model: ModelConfig) -> tuple[int, int]:
    """Return how wide queries and values are where Transformer Engine attends."""
    latent = model.latent_attention
    if latent is None:
        return model.head_dim, model.head_dim
    keys = latent.qk_nope_head_dim + latent.qk_rope_head_dim
    # the library pads values of packed rows to the width of queries
    return keys, max(keys, latent.v_head_dim)


ASKED_DOCUMENTS, ASKED_TOKENS = 4, 4096
"""Of the row that Transformer Engine is asked about; its answer for packed rows hangs on neither."""


def without_kernel(model: ModelConfig, tp: int, attention: str) -> str:
    """Return why no kernel of Transformer Engine attends packed rows of this model on this GPU, in its own
    words; empty: one does.

    It says so to a log that is off, and goes on with products of whole rows, padded to the longest document:
    on an H200 with two versions of cuDNN those took 11 of the 12 s of a step of `solar-open-102b`.

    Args:
        model: which heads and windows.
        tp: tensor-parallel size.
        attention: `gpu.attention`; under auto FlashAttention is a kernel, too.
    """
    if not on_gpu():
        return ""
    groups = model.num_heads if model.latent_attention else model.num_kv_heads
    windows = {*model.windows(), *([model.mtp_window()] if model.num_predictions else [])}
    variables = tuple(os.environ.get(name) for name in TE_ATTENTION_VARIABLES.values())
    for window in sorted(windows):
        flash, fused = _asked(model.num_heads // tp, max(1, groups // tp), head_size(model), window,
                              variables)
        if fused and not (flash and attention == "auto"):
            return fused
    return ""


@functools.cache
def _asked(heads: int, groups: int, size: tuple[int, int], window: int,
           variables: tuple[str | None, ...]) -> tuple[bool, str]:
    """Return Transformer Engine's answer under variables that are set now: whether FlashAttention serves, and
    why no kernel of cuDNN does; empty: one does."""
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    asked = {"qkv_layout": "thd_thd_thd", "batch_size": ASKED_DOCUMENTS, "num_heads": heads,
             "num_gqa_groups": groups, "max_seqlen_q": ASKED_TOKENS, "max_seqlen_kv": ASKED_TOKENS,
             "num_tokens_q": ASKED_TOKENS, "num_tokens_kv": ASKED_TOKENS, "head_dim_qk": size[0],
             "head_dim_v": size[1], "attn_mask_type": "padding_causal",
             "window_size": (window - 1, 0) if window else (-1, 0), "bottom_right_diagonal": False,
             "core_attention_bias_requires_grad": False, "softmax_scale": size[0] ** -0.5}
    known = {field.name for field in fields(utils.AttentionParams)}  # other versions ask for less
    with _said_to("DotProductAttention", utils.AttentionLogging) as said:
        flash, _, fused, *_ = utils.get_attention_backend(
            utils.AttentionParams(**{name: value for name, value in asked.items() if name in known}))
    if fused:
        return bool(flash), ""
    why = next((line for line in said if line.startswith("Disabling FusedAttention")), "no reason told")
    return bool(flash), (f"Transformer Engine has no kernel for packed rows of {heads} heads of {size[0]} "
                         f"and {groups} of keys on this GPU ({why.splitlines()[0]})")


@contextmanager
def _said_to(name: str, levels: Any) -> Iterator[list[str]]:
    """Collect what Transformer Engine says to its log within; it sets the log's level in each call, from
    `levels._log_level`.  Nobody else hears it."""
    said: list[str] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger(name)
    before = levels._log_level, log.level, log.handlers, log.propagate
    levels._log_level, log.handlers, log.propagate = logging.DEBUG, [handler], False
    try:
        yield said
    finally:
        levels._log_level, level, log.handlers, log.propagate = before
        log.setLevel(level)

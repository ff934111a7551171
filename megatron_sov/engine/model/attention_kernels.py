"""Attention kernels that Transformer Engine selects for packed rows (`gpu.attention`), with a cache."""

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
"""Transformer Engine kernel -> environment variable that allows the kernel, set from `gpu.attention`."""
MAX_CACHED_DECISIONS = 64
QUERY_DOCUMENTS, QUERY_TOKENS = 4, 4096
"""Documents and tokens of the packed row in the query; the answer for packed rows depends on neither."""


def load_attention_utils() -> Any:
    """Return Transformer Engine's module with `get_attention_backend`."""
    from transformer_engine.pytorch.attention.dot_product_attention import utils  # optional package

    return utils


def cache_attention_decisions(utils: Any) -> None:
    """Cache the result of Transformer Engine's `get_attention_backend` per kind of call.

    Version 2.20.2 caches only the last choice (`_attention_backends`), so that alternating layers with and
    without a sliding window query cuDNN at every change. The cache distinguishes calls by parameters and
    environment variables, as Transformer Engine does.

    Args:
        utils: the module with `get_attention_backend`, looked up there at each call.
    """
    select_backend = utils.get_attention_backend
    if hasattr(select_backend, "kept"):
        return
    cache: list[tuple[list[str | None], Any, Any]] = []

    def select_cached(params: Any) -> Any:
        variables = [os.environ.get(name) for name in TE_ATTENTION_VARIABLES.values()]
        for cached_variables, cached_params, decision in cache:
            if cached_variables == variables and cached_params == params:
                return decision
        cache.append((variables, params, select_backend(params)))
        del cache[:-MAX_CACHED_DECISIONS]
        return cache[-1][-1]

    select_cached.kept = cache  # type: ignore[attr-defined]
    utils.get_attention_backend = select_cached


def get_head_sizes(model: ModelConfig) -> tuple[int, int]:
    """Return (`head_dim_qk`, `head_dim_v`) for Transformer Engine's attention."""
    latent = model.latent_attention
    if latent is None:
        return model.head_dim, model.head_dim
    keys = latent.qk_nope_head_dim + latent.qk_rope_head_dim
    # Megatron-Core pads the values of packed rows to the query size
    return keys, max(keys, latent.v_head_dim)


def find_kernel_problem(model: ModelConfig, tp: int, attention: str) -> str:
    """Return why Transformer Engine has no attention kernel for packed rows of this model on this GPU, or "".

    Without a kernel, Transformer Engine writes the reason to a disabled log and computes padded whole-row
    products: on an H200 with two cuDNN versions those took 11 of the 12 s of a `solar-open-102b` step.

    Args:
        model: heads and windows.
        tp: tensor-parallel size.
        attention: `gpu.attention`; with auto, FlashAttention counts as a kernel.
    """
    if not on_gpu():
        return ""
    groups = model.num_heads if model.latent_attention else model.num_kv_heads
    windows = {*model.windows(), *([model.mtp_window()] if model.num_predictions else [])}
    variables = tuple(os.environ.get(name) for name in TE_ATTENTION_VARIABLES.values())
    for window in sorted(windows):
        flash_serves, reason = _query_backends(model.num_heads // tp, max(1, groups // tp),
                                               get_head_sizes(model), window, variables)
        if reason and not (flash_serves and attention == "auto"):
            return reason
    return ""


@functools.cache
def _query_backends(heads: int, groups: int, size: tuple[int, int], window: int,
                    variables: tuple[str | None, ...]) -> tuple[bool, str]:
    """Return whether FlashAttention serves, and why no cuDNN kernel does ("" if one does), for the given
    environment `variables`."""
    utils = load_attention_utils()
    params = {"qkv_layout": "thd_thd_thd", "batch_size": QUERY_DOCUMENTS, "num_heads": heads,
              "num_gqa_groups": groups, "max_seqlen_q": QUERY_TOKENS, "max_seqlen_kv": QUERY_TOKENS,
              "num_tokens_q": QUERY_TOKENS, "num_tokens_kv": QUERY_TOKENS, "head_dim_qk": size[0],
              "head_dim_v": size[1], "attn_mask_type": "padding_causal",
              "window_size": (window - 1, 0) if window else (-1, 0), "bottom_right_diagonal": False,
              "core_attention_bias_requires_grad": False, "softmax_scale": size[0] ** -0.5}
    field_names = {field.name for field in fields(utils.AttentionParams)}  # older versions have fewer
    with _capture_log("DotProductAttention", utils.AttentionLogging) as messages:
        flash_serves, _, fused_serves, *_ = utils.get_attention_backend(
            utils.AttentionParams(**{name: value for name, value in params.items() if name in field_names}))
    if fused_serves:
        return bool(flash_serves), ""
    reason = next((line for line in messages if line.startswith("Disabling FusedAttention")),
                  "no reason given").split("\n")[0]
    return bool(flash_serves), (
        f"Transformer Engine has no kernel for packed rows with {heads} query heads of size {size[0]} and "
        f"{groups} key heads on this GPU ({reason})")


@contextmanager
def _capture_log(name: str, levels: Any) -> Iterator[list[str]]:
    """Collect Transformer Engine's log messages without printing. Each of its calls sets the log
    level from `levels._log_level`."""
    messages: list[str] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger(name)
    previous = levels._log_level, log.level, log.handlers, log.propagate
    levels._log_level, log.handlers, log.propagate = logging.DEBUG, [handler], False
    try:
        yield messages
    finally:
        levels._log_level, level, log.handlers, log.propagate = previous
        log.setLevel(level)

"""Check the optional GPU libraries: Transformer Engine's FP8 recipes, DeepEP (kernels for expert dispatch and
combine), and flash-linear-attention (package fla-core).

Importing megatron here would import Transformer Engine."""

import functools
import importlib.util
import re
import sys

from megatron_sov.base.errors import format_error

FP8_FUNCTIONS = {"tensorwise": "is_fp8_available", "blockwise": "is_fp8_block_scaling_available",
                 "mxfp8": "is_mxfp8_available", "nvfp4": "is_nvfp4_available"}
"""Recipe of `train.fp8` -> Transformer Engine's function that checks GPU support."""
DEEP_EP_NAMES = {"deepep": ("deep_ep.Buffer", "deep_ep.utils.EventHandle", "deep_ep.utils.EventOverlap"),
                 "hybridep": ("deep_ep.HybridEPBuffer",)}
"""`parallel.expert_dispatcher` -> names that Megatron-Core imports for it (`fused_a2a`)."""
FLA_KERNEL = ("fla.ops.kda", "chunk_kda")
"""Module and function of flash-linear-attention's kernel."""
MIN_FLA_VERSION = (0, 6)
"""Oldest version of flash-linear-attention whose signature this project has checked."""


def find_fp8_problems() -> dict[str, str]:
    """Return recipe -> Transformer Engine's reason against it on this GPU, or ""."""
    import transformer_engine.pytorch as te  # optional package

    checks = {fp8: getattr(te, name)(return_reason=True) for fp8, name in FP8_FUNCTIONS.items()}
    return {fp8: "" if available else str(reason) for fp8, (available, reason) in checks.items()}


@functools.cache
def find_deep_ep_problem(dispatcher: str) -> str:
    """Return the error from importing DeepEP for a dispatcher, or ""."""
    for name in DEEP_EP_NAMES[dispatcher]:
        module, _, last = name.rpartition(".")
        try:
            getattr(importlib.import_module(module), last)
        except Exception as e:  # newer versions assert that NCCL's library matches their build
            return format_error(e)
    return ""


def hide_broken_deep_ep() -> None:
    """Hide a broken DeepEP from Megatron-Core, which catches only `ImportError`."""
    if importlib.util.find_spec("deep_ep") is None:
        return
    if find_deep_ep_problem("deepep").partition(":")[0] not in (
            "", "ImportError", "ModuleNotFoundError", "AttributeError"):
        sys.modules["deep_ep"] = None  # type: ignore[assignment]


@functools.cache
def find_fla_problem() -> str:
    """Return why flash-linear-attention cannot be used here, or ""."""
    module, name = FLA_KERNEL
    try:
        getattr(importlib.import_module(module), name)
    except Exception as e:  # Triton raises its own errors without a driver
        return format_error(e)
    version = str(getattr(sys.modules["fla"], "__version__", "unknown"))
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None or (int(match[1]), int(match[2])) < MIN_FLA_VERSION:
        return f"version {version} is older than {'.'.join(map(str, MIN_FLA_VERSION))}"
    return ""

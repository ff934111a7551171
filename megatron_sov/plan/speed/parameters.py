"""Parameters of the speed model: fractions of hardware peaks and fixed costs, fitted to published runs."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import UserError, suggest_name

UNITS = {"bf16": "bf16", "fp8": "fp8", "fp8_blockwise": "fp8", "mxfp8": "fp8", "nvfp4": "fp4"}
"""Precision -> tensor-core peak."""
DIVISORS = ("_fraction", "_portable", "_power_w", "_ageing", "unfused_passes", "host_bytes_per_s")
"""Suffixes of parameters that are divisors."""
MAX_BYTES = 1 << 20
"""Limit on the size of a parameter file."""
LEAST_DIVISOR, MOST_FRACTION, MOST = 1e-6, 1.5, 1e15
"""Bounds on values: beyond them a step takes no time, or forever."""


@dataclass(frozen=True, eq=False)
class Parameters:
    """Fractions of hardware peaks, and fixed costs; fitted by `benchmarks/plan_calibration.py`
    (docs/plan_speed.md)."""

    product_fraction: dict[str, dict[str, float]]
    """Generation -> unit (bf16, fp8, fp4) -> share of the peak in a large matrix product on the reference
    chip, throttling included."""
    reference_power_w: dict[str, float]
    """Generation -> power of the reference chip, in watts."""
    power_exponent: float
    """Exponent of (watts / reference watts) in the speed of a chip with a lower power limit."""
    product_half_depth: float
    """Inner dimension at which a product reaches half of `product_fraction`: tiles fill and drain."""
    product_fill_s: float
    """Seconds per product for the first and last waves."""
    attention_fraction: dict[str, float]
    """Generation -> share of the bf16 peak in flash attention with long rows and wide heads, mean over
    forward and backward."""
    attention_portable: dict[str, float]
    """Generation -> relative speed of portable attention kernels."""
    attention_half_tokens: float
    """Keys per query at which attention reaches half of its speed: diagonal blocks waste work."""
    attention_half_width: float
    """Head width at which attention reaches half of its speed."""
    scan_fraction: float
    """Share of the bf16 peak in the scan of Mamba layers."""
    expert_fraction: float
    """Speed of grouped expert products relative to a large product."""
    fused_expert_fraction: float
    """`expert_fraction` for kernels with fused activation and quantization."""
    expert_half_tokens: float
    """Tokens per expert at which its product reaches half of its speed."""
    hbm_fraction: float
    """Share of the memory bandwidth in memory-bound kernels."""
    unfused_passes: float
    """Factor on memory traffic if each operation has its own kernel."""
    moe_passes: float
    """Factor on the minimal memory traffic around experts."""
    quantize_passes: dict[str, float]
    """Precision -> memory passes per operand for quantization."""
    layer_launch_s: float
    """Host seconds per dense layer for kernel launches, forward and backward, without CUDA graphs."""
    moe_launch_s: float
    """Host seconds per MoE layer for router, dispatch and experts."""
    moe_stall_s: float
    """Seconds per MoE layer, forward and backward, in which the GPU waits for the host to read token counts;
    0 for full CUDA graphs and token dropping."""
    dropping_launch_share: float
    """Factor on `moe_launch_s` under token dropping."""
    quantized_launch: dict[str, float]
    """Precision -> factor on host seconds relative to bf16."""
    graph_launch_share: float
    """Factor on host seconds under partial CUDA graphs."""
    moe_ageing: float
    """Factor per year of software age on host and memory time of experts."""
    dense_ageing: float
    """Factor per year of software age on all further times."""
    inside_fraction: float
    """Share of the NVLink bandwidth in collectives."""
    between_fraction: float
    """Share of the network bandwidth between NVLink domains in collectives."""
    ep_fraction: dict[str, float]
    """Dispatcher -> bandwidth of its token exchange relative to collectives."""
    tp_exposed: float
    """Exposed share of tensor-parallel messages."""
    tp_exposed_overlapped: float
    """`tp_exposed` under overlap with products."""
    ep_exposed_overlapped: float
    """Exposed share of expert messages under overlap with another micro-batch."""
    dp_exposed: float
    """Exposed share of ZeRO-1 messages that fit into computation time."""
    fsdp_exposed: float
    """`dp_exposed` for FSDP, which gathers weights layer by layer."""
    cp_exposed: float
    """Exposed share of context-parallel messages."""
    pp_exposed: float
    """Exposed share of messages between pipeline stages."""
    real_imbalance: float
    """Tokens on the fullest expert-parallel rank divided by the mean, for a trained router."""
    untuned_slowdown: float
    """Factor on the step time of published runs without tuning."""
    host_bytes_per_s: float
    """Bytes per second and GPU of an optimizer in host memory."""
    step_overhead_s: float
    """Seconds per step outside layers: data loading, gradient norms, synchronization."""


def parse_parameters(found: dict[str, Any]) -> Parameters:
    """Parse JSON values; missing parameters keep the package's values.

    Raises:
        ValueError: an unknown name, or an invalid value.
    """
    shipped = _read_shipped_parameters()
    values = {name: _check_value(name, value, shipped.get(name), shipped) for name, value in found.items()}
    return Parameters(**{**shipped, **values})


def _check_value(name: str, value: Any, shipped: Any, beside: Collection[str]) -> Any:
    """Check a value; tables are completed from the package's."""
    if shipped is None:
        raise ValueError(f"{name} is no parameter{suggest_name(name.rpartition('.')[2], beside)}")
    if isinstance(shipped, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{name} = {value!r:.40} must be an object with {', '.join(shipped)}")
        return {**shipped, **{key: _check_value(f"{name}.{key}", item, shipped.get(key), shipped)
                              for key, item in value.items()}}
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= MOST:
        raise ValueError(f"{name} = {value!r:.40} must be a number, not negative, and at most {MOST:g}")
    root = name.partition(".")[0]
    if root.endswith(DIVISORS) and shipped and value < LEAST_DIVISOR:
        raise ValueError(f"{name} = {value!r} must be at least {LEAST_DIVISOR:g}: something is divided by it")
    if root.endswith(("_fraction", "_exponent")) and value > MOST_FRACTION:
        raise ValueError(f"{name} = {value!r:.40} must be a share, at most {MOST_FRACTION:g}")
    return float(value)


@cache
def _read_shipped_parameters() -> dict[str, Any]:
    text = importlib.resources.files("megatron_sov.plan.speed").joinpath("parameters.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(text)["parameters"]
    return found


@cache
def load_default_parameters() -> Parameters:
    return parse_parameters(_read_shipped_parameters())


def read_parameters(path: Path) -> Parameters:
    """Read a file from `plan --calibrate`.

    Raises:
        UserError: an unreadable file, or invalid parameters.
    """
    way_out = "pass a file that `megatron-sov plan --calibrate RUN --output FILE` wrote"
    try:
        with path.open(encoding="utf-8") as file:
            # Bounded: the file may be anybody's, and of any size.
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} characters")
        content = json.loads(text)
        if not isinstance(content, dict) or not isinstance(content.get("parameters"), dict):
            raise ValueError("it holds no object `parameters`")
        return parse_parameters(content["parameters"])
    except OSError as e:
        raise UserError(f"--parameters {path}: cannot be read ({e.strerror}); {way_out}") from None
    except (ValueError, TypeError, RecursionError) as e:
        raise UserError(f"--parameters {path}: is no file of parameters ({e}); {way_out}") from None

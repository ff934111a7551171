"""Speed model parameters, fitted to published runs (`parameters.json`)."""

import importlib.resources
import json
from dataclasses import dataclass
from functools import cache

UNITS = {"bf16": "bf16", "fp8": "fp8", "fp8_blockwise": "fp8", "mxfp8": "fp8", "nvfp4": "fp4"}
"""Precision -> tensor-core peak."""


@dataclass(frozen=True, eq=False)
class Parameters:
    """Fractions below hardware peaks, and fixed costs; fitted by `benchmarks/plan_calibration.py`
    (docs/plan.md)."""

    product_fraction: dict[str, dict[str, float]]
    """Generation -> unit (bf16, fp8, fp4) -> share of the peak that a large matrix product reaches on the
    reference chip, throttling included."""
    reference_power_w: dict[str, float]
    """Generation -> the reference chip's power, in watts."""
    power_exponent: float
    """Exponent on (watts / `reference_power_w`) for a chip with a lower power limit."""
    product_half_depth: float
    """Inner dimension at which a product reaches half `product_fraction`: tiles fill and drain."""
    product_fill_s: float
    """Seconds per product for the first and last waves."""
    attention_fraction: dict[str, float]
    """Generation -> share of the bf16 peak in flash attention with long rows and wide heads, forward and
    backward."""
    attention_portable: dict[str, float]
    """Generation -> relative speed with `attention_kernel` portable."""
    attention_half_tokens: float
    """Keys per query at which attention reaches half its speed: diagonal blocks waste work."""
    attention_half_width: float
    """Head width at which attention reaches half its speed."""
    scan_fraction: float
    """Share of the bf16 peak in Mamba scans."""
    expert_fraction: float
    """Grouped expert products' speed relative to a large product."""
    fused_expert_fraction: float
    """`expert_fraction` for kernels with fused activation and quantization."""
    expert_half_tokens: float
    """Tokens per expert at which its product reaches half its speed."""
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
    """Factor on host seconds under partial CUDA graphs, attention included."""
    moe_ageing: float
    """Factor per year in `software_age_years` on host and memory time for experts."""
    dense_ageing: float
    """Factor per year in `software_age_years` on all further times."""
    inside_fraction: float
    """Share of the NVLink bandwidth in collectives."""
    between_fraction: float
    """Share of the network bandwidth between NVLink domains in collectives."""
    ep_fraction: dict[str, float]
    """`parallel.expert_dispatcher` -> its bandwidth relative to collectives."""
    tp_exposed: float
    """Exposed share of tensor-parallel messages."""
    tp_exposed_overlapped: float
    """`tp_exposed` under overlap with products."""
    ep_exposed_overlapped: float
    """Exposed share of expert messages under `parallel.expert_overlap`."""
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
    """Factor on the step time in published runs without tuning."""
    host_bytes_per_s: float
    """Bytes per second and GPU in an optimizer update on the host (`gpu.optimizer_offload`)."""
    step_overhead_s: float
    """Seconds per step outside layers: data loading, gradient norms, synchronization."""


@cache
def load_default_parameters() -> Parameters:
    """Load the package's parameters, `parameters.json`."""
    text = importlib.resources.files("megatron_sov.plan.speed").joinpath("parameters.json").read_text("utf-8")
    return Parameters(**json.loads(text)["parameters"])

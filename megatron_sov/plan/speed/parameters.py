"""The physical numbers of the model of speed, as the published runs have them."""

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
"""Precision -> the tensor cores' peak that counts."""
DIVISORS = ("_fraction", "_portable", "_power_w", "_ageing", "unfused_passes", "host_bytes_per_s")
"""Ends of names by which something is divided."""
MAX_BYTES = 1 << 20
"""A larger file holds no parameters."""
LEAST_DIVISOR, MOST_FRACTION, MOST = 1e-6, 1.5, 1e15
"""Bounds of what a file may say: beyond them a step takes no time, or forever."""


@dataclass(frozen=True, eq=False)
class Parameters:
    """Fractions of published peaks that runs reach, and costs that no peak tells; fitted by
    `benchmarks/plan_calibration.py` (docs/plan_speed.md)."""

    product_fraction: dict[str, dict[str, float]]
    """Generation -> unit (bf16, fp8, fp4) -> share of the peak that a large matrix product reaches on the
    generation's reference chip, throttling included."""
    reference_power_w: dict[str, float]
    """Generation -> watts of its reference chip."""
    power_exponent: float
    """Speed of a chip that is held to fewer watts: (watts / reference) to this power."""
    product_half_depth: float
    """Length of a product's sums at which it reaches half of that: filling and emptying of tiles."""
    product_fill_s: float
    """Seconds that a product loses to its first and last waves."""
    attention_fraction: dict[str, float]
    """Generation -> share of the bf16 peak that flash attention reaches on long rows and wide heads, the mean
    over both passes."""
    attention_portable: dict[str, float]
    """Generation -> share of that speed that kernels reach which were not made for it."""
    attention_half_tokens: float
    """Keys of a query at which attention reaches half of that: what blocks on the diagonal waste."""
    attention_half_width: float
    """Width of a head at which attention reaches half of that."""
    scan_fraction: float
    """Share of the bf16 peak that the scan of Mamba layers reaches."""
    expert_fraction: float
    """Share of a large product's speed that the grouped one of experts reaches."""
    fused_expert_fraction: float
    """The same where activation and quantisation run inside it."""
    expert_half_tokens: float
    """Tokens of an expert at which its product reaches half of that."""
    hbm_fraction: float
    """Share of the memory's bandwidth that kernels without products reach."""
    unfused_passes: float
    """How many times more bytes pass where each operation has a kernel of its own."""
    moe_passes: float
    """How many times more bytes pass around experts than what must be read and written once."""
    quantize_passes: dict[str, float]
    """Precision -> how many times each operand of a product passes through memory to be quantised."""
    layer_launch_s: float
    """Seconds of the host for the kernels of a dense layer, forward and backward, without CUDA graphs."""
    moe_launch_s: float
    """The same for router, dispatch and experts of a layer with experts."""
    moe_stall_s: float
    """Seconds for which the GPU waits in a layer with experts, both passes, until the host knows how many
    tokens each expert has; none where the whole step is one graph, or experts drop tokens."""
    dropping_launch_share: float
    """Share of the host's seconds for a layer with experts that is left where they drop tokens."""
    quantized_launch: dict[str, float]
    """Precision -> how many times more seconds the host needs than in bf16."""
    graph_launch_share: float
    """Share of the host's seconds that partial CUDA graphs leave."""
    moe_ageing: float
    """How many times longer host and memory traffic of experts take with software a year older."""
    dense_ageing: float
    """How many times longer everything else takes with software a year older."""
    inside_fraction: float
    """Share of the links' bandwidth inside an NVLink domain that collectives reach."""
    between_fraction: float
    """Share of the network's bandwidth between domains that collectives reach."""
    ep_fraction: dict[str, float]
    """Dispatcher -> share of the collectives' bandwidth that its exchange of tokens reaches."""
    tp_exposed: float
    """Share of tensor parallelism's messages that nothing hides."""
    tp_exposed_overlapped: float
    """The same where they run beside the products."""
    ep_exposed_overlapped: float
    """Share of the exchange of tokens that stays visible beside another micro-batch."""
    dp_exposed: float
    """Share of the messages of ZeRO-1 that stays visible though computation would hide all."""
    fsdp_exposed: float
    """The same of sharded weights, which are gathered layer by layer."""
    cp_exposed: float
    """Share of context parallelism's messages that nothing hides."""
    pp_exposed: float
    """Share of the messages between pipeline stages that nothing hides."""
    real_imbalance: float
    """Tokens of the fullest expert-parallel rank in units of the mean under a learnt router."""
    untuned_slowdown: float
    """How much longer a step takes in runs that show that something works, not how fast it can be."""
    host_bytes_per_s: float
    """Bytes per second and GPU that an optimizer in host memory passes."""
    step_overhead_s: float
    """Seconds of a step for what no layer does: reading data, norms of gradients, synchronisation."""


def parse_parameters(found: dict[str, Any]) -> Parameters:
    """Return the parameters of a file's content; what the file leaves out is as in the package.

    Raises:
        ValueError: a name that is no parameter, or a value that it cannot have.
    """
    shipped = _read_shipped_parameters()
    values = {name: _check_value(name, value, shipped.get(name), shipped) for name, value in found.items()}
    return Parameters(**{**shipped, **values})


def _check_value(name: str, value: Any, shipped: Any, beside: Collection[str]) -> Any:
    """Return a parameter's value, its table filled up with what the package has."""
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
    """Return what stands in a file.

    Raises:
        UserError: it cannot be read, or is no file of parameters.
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

"""Fit the parameters of `plan`'s speed model to measured runs.

The fit is nonlinear least squares of log(predicted / measured throughput). Cauchy's loss limits the influence
of runs that the model cannot explain, and each parameter has a prior from vendors' and papers' figures
(`PRIORS`), which keeps it near a physically plausible value. benchmarks/plan_calibration.py runs the fit.
"""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from megatron_sov.plan.speed.parameters import Parameters
from megatron_sov.plan.speed.step import estimate_step
from megatron_sov.plan.speed.workload import Workload


@dataclass(frozen=True)
class Prior:
    """Prior of a parameter: expected value and bounds.

    A parameter with `low` > 0 is fitted by its logarithm; otherwise it may be zero, and is fitted directly.
    """

    value: float
    spread: float
    """Standard deviation as a share of `value`."""
    low: float
    high: float


@dataclass(frozen=True)
class Sample:
    """A measured run with its throughput; `weight` is its weight in the sum of squares."""

    workload: Workload
    tokens_per_s_per_gpu: float
    weight: float = 1.0


SOFT = 0.1
"""Scale of Cauchy's loss: log error above which a run's influence decreases."""
STEP = 1e-2
"""Step of finite differences in units of a prior's spread."""
PRIOR_WEIGHT = 0.25
"""Residual of a parameter one spread from its prior, where a run that is off by `SOFT` has about 0.8."""


def error(sample: Sample, parameters: Parameters) -> float:
    """Return log(predicted / measured throughput)."""
    return math.log(estimate_step(sample.workload, parameters).tokens_per_s_per_gpu
                    / sample.tokens_per_s_per_gpu)


def fit(samples: Sequence[Sample], priors: dict[str, Prior], start: Parameters, max_rounds: int = 40
        ) -> Parameters:
    """Return the best parameters; parameters without a prior do not change.

    Args:
        samples: measured runs.
        priors: path of a parameter (`product_fraction.hopper.bf16`) -> prior.
        start: initial parameters.
        max_rounds: maximum number of gradient evaluations.
    """
    import numpy as np
    from scipy.optimize import least_squares

    paths = list(priors)
    table = deepcopy(vars(start))
    low = np.array([_transform(priors[path].low, priors[path]) for path in paths])
    high = np.array([_transform(priors[path].high, priors[path]) for path in paths])
    initial = np.array([_transform(get_parameter(table, path), priors[path]) for path in paths])
    initial = np.clip(initial, low + 1e-9, high - 1e-9)
    expected = np.array([_transform(priors[path].value, priors[path]) for path in paths])
    spread = np.array([_compute_spread(priors[path]) for path in paths])

    def build_parameters(x: Any) -> Parameters:
        result = deepcopy(table)
        for path, value in zip(paths, x, strict=True):
            _set(result, path, _invert_transform(float(value), priors[path]))
        return Parameters(**result)

    def compute_residual(row: int, parameters: Parameters) -> float:
        return _apply_cauchy(error(samples[row], parameters)) * math.sqrt(samples[row].weight)

    def compute_residuals(x: Any) -> Any:
        """Return an array (samples + parameters): residuals of the runs, then of the priors."""
        parameters = build_parameters(x)
        rows = [compute_residual(row, parameters) for row in range(len(samples))]
        return np.array([*rows, *(PRIOR_WEIGHT * (x - expected) / spread)])

    affected_rows: list[list[int]] = []
    """Per parameter, the runs whose prediction depends on it; for most parameters these are few."""

    def compute_jacobian(x: Any) -> Any:
        """Return finite differences (samples + parameters, parameters)."""
        base = compute_residuals(x)
        jacobian = np.zeros((len(base), len(paths)))
        for column in range(len(paths)):
            step = STEP * spread[column]
            if x[column] + step >= high[column]:
                step = -step
            moved = x.copy()
            moved[column] += step
            parameters = build_parameters(moved)
            if len(affected_rows) <= column:
                affected_rows.append([row for row in range(len(samples))
                                      if compute_residual(row, parameters) != base[row]])
            for row in affected_rows[column]:
                jacobian[row, column] = (compute_residual(row, parameters) - base[row]) / step
            jacobian[len(samples) + column, column] = PRIOR_WEIGHT / spread[column]
        return jacobian

    result = least_squares(compute_residuals, initial, compute_jacobian, bounds=(low, high),
                           max_nfev=max_rounds, xtol=1e-4, ftol=1e-4, x_scale=spread)
    return build_parameters(result.x)


def _apply_cauchy(deviation: float) -> float:
    """Return the signed root of Cauchy's loss, log(1 + (deviation / SOFT)^2)."""
    ratio = deviation / SOFT
    return math.copysign(math.sqrt(math.log1p(ratio * ratio)), ratio)


def _transform(value: float, prior: Prior) -> float:
    """Return the coordinate in which a parameter is fitted: itself if it may be zero, else its logarithm."""
    return value if prior.low <= 0 else math.log(value)


def _invert_transform(value: float, prior: Prior) -> float:
    return value if prior.low <= 0 else math.exp(value)


def _compute_spread(prior: Prior) -> float:
    """Return the prior's spread in the fitted coordinate."""
    if prior.low > 0:
        return prior.spread  # of a logarithm, a relative spread is an absolute one
    return prior.spread * max(prior.value, 0.1 * prior.high)


def get_parameter(table: dict[str, Any], path: str) -> float:
    """Return a parameter by its dotted path."""
    for name in path.split("."):
        table = table[name]
    return float(table)  # type: ignore[arg-type]


def _set(table: dict[str, Any], path: str, value: float) -> None:
    *folders, name = path.split(".")
    for folder in folders:
        table = table[folder]
    table[name] = value


PRIORS = {
    # cuBLAS on large shapes: 250 to 280 of an A100's 312 TFLOP/s, 600 to 750 of an H100's 989, 1,500 to 1,800
    # of a B200's 2,250; in FP8 1,100 to 1,400 of 1,979 and 2,800 to 3,500 of 4,500
    # (an MI300X, which is not fitted: 620 of 1,307 and 990 of 2,615, SemiAnalysis, December 2024)
    "product_fraction.ampere.bf16": Prior(0.80, 0.15, 0.5, 0.95),
    "product_fraction.hopper.bf16": Prior(0.70, 0.15, 0.4, 0.9),
    "product_fraction.hopper.fp8": Prior(0.62, 0.15, 0.35, 0.9),
    "product_fraction.blackwell.bf16": Prior(0.72, 0.15, 0.4, 0.95),
    "product_fraction.blackwell.fp8": Prior(0.68, 0.15, 0.4, 0.95),
    "product_fraction.blackwell.fp4": Prior(0.45, 0.25, 0.2, 0.9),
    "power_exponent": Prior(0.5, 0.5, 0.0, 1.5),
    "product_half_depth": Prior(200.0, 0.5, 20.0, 800.0),
    "product_fill_s": Prior(5e-6, 0.5, 1e-6, 1.5e-5),
    # FlashAttention 3 (arXiv 2407.08608, figures 5 and 6): 500 to 700 TFLOP/s of an H100;
    # 2 (arXiv 2307.08691): 180 to 220 of an A100 and 300 to 400 of an H100
    "attention_fraction.ampere": Prior(0.60, 0.15, 0.3, 0.85),
    "attention_fraction.hopper": Prior(0.55, 0.15, 0.3, 0.85),
    "attention_fraction.blackwell": Prior(0.50, 0.2, 0.25, 0.85),
    "attention_portable.ampere": Prior(0.80, 0.2, 0.4, 1.0),
    "attention_portable.hopper": Prior(0.55, 0.2, 0.25, 1.0),
    "attention_half_tokens": Prior(300.0, 0.7, 20.0, 3000.0),
    "attention_half_width": Prior(10.0, 0.7, 1.0, 60.0),
    "scan_fraction": Prior(0.08, 0.4, 0.01, 0.5),
    "expert_fraction": Prior(0.85, 0.15, 0.4, 1.0),
    "fused_expert_fraction": Prior(0.95, 0.1, 0.6, 1.15),
    "expert_half_tokens": Prior(150.0, 0.5, 10.0, 800.0),
    "hbm_fraction": Prior(0.80, 0.08, 0.4, 0.92),
    "unfused_passes": Prior(1.8, 0.3, 1.2, 6.0),
    "moe_passes": Prior(1.3, 0.4, 1.0, 5.0),
    "quantize_passes.fp8": Prior(1.0, 0.5, 0.2, 4.0),
    "quantize_passes.mxfp8": Prior(1.2, 0.5, 0.2, 4.0),
    "quantize_passes.nvfp4": Prior(1.5, 0.5, 0.2, 6.0),
    # a layer has about 60 kernels in both passes, one with experts 200 more, at 5 to 10 us each
    "layer_launch_s": Prior(1.5e-3, 0.5, 2e-4, 6e-3),
    "moe_launch_s": Prior(5e-3, 0.6, 5e-4, 1.5e-2),
    "moe_stall_s": Prior(1e-3, 0.8, 1e-4, 8e-3),
    "dropping_launch_share": Prior(0.4, 0.8, 0.05, 1.0),
    "quantized_launch.fp8": Prior(1.2, 0.15, 1.0, 2.5),
    "quantized_launch.mxfp8": Prior(1.2, 0.15, 1.0, 2.5),
    "graph_launch_share": Prior(0.5, 0.5, 0.1, 1.0),
    "moe_ageing": Prior(1.2, 0.15, 1.0, 2.5),
    "dense_ageing": Prior(1.05, 0.05, 1.0, 1.4),
    "inside_fraction": Prior(0.75, 0.12, 0.3, 0.92),
    "between_fraction": Prior(0.75, 0.15, 0.2, 0.92),
    "ep_fraction.alltoall": Prior(0.60, 0.3, 0.1, 1.0),
    "ep_fraction.deepep": Prior(0.80, 0.2, 0.1, 1.0),
    "ep_fraction.hybridep": Prior(0.80, 0.2, 0.1, 1.0),
    "tp_exposed": Prior(0.9, 0.15, 0.3, 1.2),
    "tp_exposed_overlapped": Prior(0.4, 0.5, 0.05, 1.0),
    "ep_exposed_overlapped": Prior(0.3, 0.5, 0.05, 1.0),
    "dp_exposed": Prior(0.1, 0.6, 0.01, 0.6),
    "fsdp_exposed": Prior(0.3, 0.5, 0.02, 1.0),
    "cp_exposed": Prior(0.3, 0.6, 0.02, 1.5),
    "pp_exposed": Prior(0.3, 0.6, 0.02, 1.0),
    "untuned_slowdown": Prior(1.3, 0.3, 1.0, 4.0),
    "host_bytes_per_s": Prior(15e9, 0.5, 3e9, 6e10),
    "step_overhead_s": Prior(0.02, 0.8, 1e-3, 0.1),
}
"""Path of a parameter in `Parameters` -> prior, from vendors, papers and timings of single kernels."""

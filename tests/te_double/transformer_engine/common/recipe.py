"""Low-precision recipes: values that describe the quantization of product operands."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, NamedTuple


class _Limits(NamedTuple):
    """Largest values in the forward and the backward pass."""

    max_fwd: float
    max_bwd: float


class Format(Enum):
    """Number formats. HYBRID: E4M3 in the forward pass, E5M2 in the backward pass."""

    E2M1 = _Limits(6, 6)
    E4M3 = _Limits(448, 448)
    E5M2 = _Limits(57344, 57344)
    HYBRID = _Limits(448, 57344)


@dataclass(frozen=True)
class MMParams:
    """Accumulation of a matrix product."""

    use_split_accumulator: bool = True


@dataclass(frozen=True)
class QParams:
    """Quantization of one operand."""

    power_2_scale: bool = False
    amax_epsilon: float = 0.0
    random_hadamard_transform: bool = False
    stochastic_rounding: bool = False
    fp4_2d_quantization: bool = False


def lenient_dataclass(cls: type) -> Any:
    """Create a dataclass that ignores unknown arguments, as the real pydantic dataclasses do.

    megatron-core passes unknown arguments: dtype and device of parameters, and `override_linear_precision`.
    """
    made = dataclass(cls)
    start, names = made.__init__, {field.name for field in fields(made)}

    @functools.wraps(start)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **{name: value for name, value in kwargs.items() if name in names})

    made.__init__ = init
    return made


class Recipe:
    """Base class of all recipes, with the methods by which megatron-core asks for the kind."""

    def nvfp4(self) -> bool:
        """Return whether this is NVFP4."""
        return isinstance(self, NVFP4BlockScaling)

    def mxfp8(self) -> bool:
        """Return whether this is MXFP8."""
        return isinstance(self, MXFP8BlockScaling)

    def delayed(self) -> bool:
        """Return whether scales are computed from largest values of earlier steps."""
        return isinstance(self, DelayedScaling)

    def float8_current_scaling(self) -> bool:
        """Return whether each tensor has one scale, from its own largest value."""
        return isinstance(self, Float8CurrentScaling)

    def float8_per_tensor_scaling(self) -> bool:
        """Return whether each tensor has one scale, delayed or current."""
        return isinstance(self, (DelayedScaling, Float8CurrentScaling))

    def float8_block_scaling(self) -> bool:
        """Return whether each block of 128 or 128 x 128 values has a scale."""
        return isinstance(self, Float8BlockScaling)

    def custom(self) -> bool:
        """Return whether a user's factory creates the quantizers."""
        return isinstance(self, CustomRecipe)


@lenient_dataclass
class DelayedScaling(Recipe):
    """One scale per tensor, from the largest values of earlier steps."""

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: Any = "max"
    scaling_factor_compute_algo: Callable[..., Any] | None = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None


@lenient_dataclass
class Float8CurrentScaling(Recipe):
    """One scale per tensor, from the largest value of the current tensor."""

    use_power_2_scales: bool = False
    fp8_format: Format = Format.HYBRID
    fp8_quant_fwd_inp = QParams()
    fp8_quant_fwd_weight = QParams()
    fp8_quant_bwd_grad = QParams()
    fp8_gemm_fprop: MMParams = MMParams(use_split_accumulator=False)
    fp8_gemm_dgrad: MMParams = MMParams(use_split_accumulator=True)
    fp8_gemm_wgrad: MMParams = MMParams(use_split_accumulator=True)
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None


@lenient_dataclass
class MXFP8BlockScaling(Recipe):
    """A scale, a power of two, per 32 values."""

    margin: int = 0
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None
    enable_2d_quantization: bool = False


@lenient_dataclass
class Float8BlockScaling(Recipe):
    """A scale per 128 values of activations and gradients, per 128 x 128 of weights."""

    use_f32_scales: bool = False
    fp8_format: Format = Format.E4M3
    fp8_quant_fwd_inp = QParams(power_2_scale=True)
    fp8_quant_fwd_weight = QParams(power_2_scale=True)
    fp8_quant_bwd_grad = QParams(power_2_scale=True)
    x_block_scaling_dim: int = 1
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1
    fp8_gemm_fprop: MMParams = MMParams(use_split_accumulator=True)
    fp8_gemm_dgrad: MMParams = MMParams(use_split_accumulator=True)
    fp8_gemm_wgrad: MMParams = MMParams(use_split_accumulator=True)
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None


@lenient_dataclass
class NVFP4BlockScaling(Recipe):
    """A scale in E4M3 per 16 values, and one in fp32 per tensor."""

    disable_rht: bool = False
    disable_stochastic_rounding: bool = False
    disable_2d_quantization: bool = False
    row_scaled_activation: bool = False
    nvfp4_4over6: str = "none"
    nvfp4_4over6_e4m3_use_256: str = "all"
    nvfp4_4over6_err_mode: str = "MAE"
    fp4_format: Format = Format.E2M1
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None

    def __post_init__(self) -> None:
        rotated = not self.disable_rht
        self.fp4_quant_fwd_inp = QParams(random_hadamard_transform=rotated)
        self.fp4_quant_fwd_weight = QParams(fp4_2d_quantization=not self.disable_2d_quantization)
        self.fp4_quant_bwd_grad = QParams(random_hadamard_transform=rotated,
                                          stochastic_rounding=not self.disable_stochastic_rounding)


@lenient_dataclass
class CustomRecipe(Recipe):
    """Quantizers created by a user's factory."""

    qfactory: Callable[..., Any]
    fp8_format: Format = Format.HYBRID
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None
    quantization_alignment: int = 128

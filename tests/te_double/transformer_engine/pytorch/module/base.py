"""Base class of modules with quantized products: parameters, their initialization, and their extra state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...common.recipe import Recipe
from ..placement import on_host, require_cuda
from ..quantization import FP8GlobalStateManager
from ..quantized_tensor import Quantizer
from ..tensor.float8_blockwise_tensor import Float8BlockwiseQTensor
from ..tensor.float8_tensor import Float8Tensor
from ..tensor.mxfp8_tensor import MXFP8Tensor

KINDS: dict[str, Any] = {"Float8CurrentScaling": Float8Tensor, "Float8BlockScaling": Float8BlockwiseQTensor,
                         "MXFP8BlockScaling": MXFP8Tensor}
"""Name of a recipe class -> tensor class of its FP8 weights."""
_dummies: dict[Any, torch.Tensor] = {}  # (*shape, dtype) -> placeholder


def get_dummy_wgrad(shape: list[int], dtype: torch.dtype, zero: bool = False) -> torch.Tensor:
    """Return a placeholder for a weight gradient that has already been added to `main_grad`."""
    found = _dummies.setdefault((*shape, dtype), torch.empty(shape, dtype=dtype))
    return found.zero_() if zero else found.detach()


def _divide_size(size: int, parts: int) -> int:
    if size % parts:
        raise ValueError(f"{size} is not divisible by {parts}")
    return size // parts


class TransformerEngineBaseModule(torch.nn.Module):
    """Base of all modules with matrix products."""

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        self.name = name
        self.fp8_initialized = self.fp8 = self.fp8_calibration = False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False, "fp8_group": None}
        self.tp_group: Any = None
        self.tp_size = 1
        self.sequence_parallel = False
        self.activation_dtype: torch.dtype | None = None
        self.primary_weights_in_fp8 = FP8GlobalStateManager.with_fp8_parameters()
        self._delayed_products: list[Callable[[], None]] = []
        self._delays_products = False
        self._hooks: list[Callable[[], None]] = []

    def _set_group(self, tp_group: Any, tp_size: int) -> None:
        """Store the tensor-parallel group, or only its size if the group will be set later."""
        self.tp_size = tp_size if tp_group is None else tp_group.size()
        if tp_group is not None or tp_size == 1:
            self.set_tensor_parallel_group(tp_group)

    def set_tensor_parallel_group(self, tp_group: Any) -> None:
        """Set the tensor-parallel group."""
        self.tp_group, self.tp_group_initialized = tp_group, True

    def _split_sizes(self, in_features: int, out_features: int, parallel_mode: str | None) -> tuple[int, int]:
        """Return the input and output features of this rank's weight shard."""
        if parallel_mode not in ("row", "column", None):
            raise AssertionError(f"parallel_mode {parallel_mode} not supported")
        parts = {"row": (self.tp_size, 1), "column": (1, self.tp_size), None: (1, 1)}[parallel_mode]
        return _divide_size(in_features, parts[0]), _divide_size(out_features, parts[1])

    def _add_parameter(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None, device: Any,
                       start: Callable[[torch.Tensor], Any] | None) -> torch.nn.Parameter:
        """Register a parameter, initialized by `start` (not on meta), and quantized for FP8 weights."""
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.register_parameter(name, parameter)
        if start is not None and parameter.device.type != "meta":
            with torch.no_grad():
                start(parameter)
        if self.primary_weights_in_fp8 and len(shape) == 2:
            parameter = self._quantize(parameter)
            self.register_parameter(name, parameter)
        return parameter

    @staticmethod
    def _quantize(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        """Return an FP8 weight, with its high-precision initial values if the context preserves them."""
        manager = FP8GlobalStateManager
        kind = KINDS[type(manager.get_fp8_recipe()).__name__]
        made: Any = torch.nn.Parameter(Quantizer(kind)(parameter.detach()))
        if manager.with_high_precision_init_val():
            made._high_precision_init_val = parameter.detach().cpu()
            made.get_high_precision_init_val = lambda: getattr(made, "_high_precision_init_val", None)
            made.clear_high_precision_init_val = lambda: vars(made).pop("_high_precision_init_val", None)
        return made

    def _delay_products(self, parameters: list[torch.nn.Parameter]) -> None:
        """Postpone the weight gradients of these parameters to `backward_dw`."""
        self._delays_products = True
        for parameter in parameters:
            parameter.skip_backward_post_hook = True  # type: ignore[attr-defined]

    def need_backward_dw(self) -> bool:
        """Return whether weight gradients are postponed to `backward_dw`."""
        return self._delays_products

    @torch.no_grad()
    def backward_dw(self) -> None:
        """Compute the oldest postponed weight gradients."""
        if not self._delays_products:
            return
        if not self._delayed_products:
            raise RuntimeError("Pop empty queue.")
        self._delayed_products.pop(0)()
        self._trigger_wgrad_accumulation_and_reduce_hooks()

    def _trigger_wgrad_accumulation_and_reduce_hooks(self) -> None:
        """Call the registered functions: the weight gradients are complete."""
        for hook in self._hooks:
            hook()

    def register_wgrad_accumulation_and_reduce_hooks(
            self, wgrad_accumulation_and_reduce_hook: Callable[[], None]) -> None:
        """Register a function to call after each `backward_dw`."""
        self._hooks.append(wgrad_accumulation_and_reduce_hook)

    def prepare_forward(self, inp: torch.Tensor, num_gemms: int = 1, allow_non_contiguous: bool = False,
                        allow_different_data_and_param_types: bool = False) -> torch.Tensor:
        """Store the quantization state, and check the input as the real module does."""
        if self.tp_size > 1 and not getattr(self, "tp_group_initialized", False):
            raise RuntimeError("Tensor parallel group not initialized. Call set_tensor_parallel_group() "
                               "before forward pass when tp_size > 1.")
        for name, parameter in self.named_parameters():
            if parameter.dtype != inp.dtype:
                raise TypeError("Data types for parameters must match when outside of autocasted region. "
                                f"Found input dtype: {inp.dtype} and {name!r} dtype: {parameter.dtype}")
        if on_host(inp):
            raise RuntimeError("TransformerEngine needs CUDA. Got input on device: cpu")
        require_cuda(**dict(self.named_parameters()))
        self.activation_dtype = inp.dtype
        self.init_fp8_metadata(num_gemms)
        return inp.contiguous()

    def _recipe(self) -> Recipe | None:
        """Return the recipe of the current forward pass; None: no quantization."""
        return FP8GlobalStateManager.get_fp8_recipe() if self.fp8 else None

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """Store the state of the active quantization context."""
        manager = FP8GlobalStateManager
        self.fp8, self.fp8_calibration = manager.is_fp8_enabled(), manager.is_fp8_calibration()
        meta = self.fp8_meta
        meta["fp8_checkpoint"] = self.fp8 or self.fp8_calibration
        if not meta["fp8_checkpoint"]:
            self.fp8_initialized = False
            return
        recipe = manager.get_fp8_recipe()
        if self.fp8_initialized and meta.get("recipe") == recipe:
            return
        meta |= {"recipe": recipe, "num_gemms": num_gemms, "fp8_group": manager.get_fp8_group(),
                 "fp8_max_fwd": recipe.fp8_format.value.max_fwd,  # type: ignore[attr-defined]
                 "fp8_max_bwd": recipe.fp8_format.value.max_bwd}  # type: ignore[attr-defined]
        self.fp8_initialized = True

    def get_extra_state(self) -> torch.Tensor:
        """Return no bytes: no recipe here has a history."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Accept the result of `get_extra_state`, which is empty."""
        if state is not None and state.numel():
            raise RuntimeError("Unsupported checkpoint format.")

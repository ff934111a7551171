"""8-bit tensors that torch treats as bf16 tensors, and their quantizers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_map


class Quantizer:
    """Quantizes tensors into one subclass of `QuantizedTensor`."""

    def __init__(self, kind: type[QuantizedTensor]) -> None:
        self._kind = kind

    def __call__(self, tensor: torch.Tensor) -> QuantizedTensor:
        made = self._kind(tensor.shape, tensor.dtype, device=tensor.device)
        made._quantizer = self
        made.quantize_(tensor)
        return made


class QuantizedTensor(torch.Tensor):
    """A low-precision tensor with its scales, stored in the attributes listed in `INNER`."""

    INNER: tuple[str, ...] = ()
    _quantizer: Quantizer | None = None
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls: Any, shape: Iterable[int], dtype: torch.dtype, *, requires_grad: bool = False,
                device: torch.device | None = None) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype,
                                                   requires_grad=requires_grad, device=device)

    def dequantize(self, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the values as a plain tensor."""
        return self._values().to(dtype or self.dtype)

    def quantize_(self, tensor: torch.Tensor) -> QuantizedTensor:
        """Replace the values by those of a tensor, quantized."""
        raise NotImplementedError

    def _store(self, **parts: torch.Tensor) -> None:
        """Set attributes to `parts`. An attribute that exists receives a copy in its memory, which other
        tensors may share."""
        for name, part in parts.items():
            if name in vars(self):
                vars(self)[name].copy_(part)
            else:
                setattr(self, name, part)

    def _values(self, columnwise: bool = False) -> torch.Tensor:
        """Return the float32 values of a product's operand from the rowwise or columnwise bytes."""
        raise NotImplementedError

    def detach(self) -> QuantizedTensor:
        """Return another tensor that shares the bytes."""
        made = type(self)(self.shape, self.dtype, device=self.device)
        vars(made).update({name: vars(self)[name] for name in (*self.INNER, "_quantizer")})
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        if func == torch.ops.aten.detach.default:
            return args[0].detach()
        if func == torch.ops.aten.copy_.default and isinstance(args[0], QuantizedTensor):
            return args[0].quantize_(args[1])
        if func == torch.ops.aten.view.default:
            raise NotImplementedError(f"{cls.__name__} class does not support tensor views")
        if func._schema.is_mutable and func != torch.ops.aten.copy_.default:
            raise NotImplementedError(f"the double does not support {func} on quantized tensors")

        def plain(value: Any) -> Any:
            return value.dequantize() if isinstance(value, QuantizedTensor) else value

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


class Storage:
    """Access to the rowwise and columnwise bytes of a quantized tensor, stored in the attributes `FORMS`."""

    FORMS = ("_rowwise_data", "_columnwise_data")

    def get_data_tensors(self, rowwise_data: bool = True, columnwise_data: bool = True) -> Any:
        """Return the requested bytes: a tensor, or a tuple of both."""
        found = [getattr(self, name) for name, wanted in
                 zip(self.FORMS, (rowwise_data, columnwise_data), strict=True) if wanted]
        return tuple(found) if len(found) > 1 else found[0]


def to_bytes(values: torch.Tensor) -> torch.Tensor:
    """Round values to E4M3 and return the codes as uint8."""
    return values.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)


def from_bytes(data: torch.Tensor) -> torch.Tensor:
    """Return the float32 values of E4M3 codes in a uint8 tensor."""
    return data.view(torch.float8_e4m3fn).float()


def compute_scale(amax: torch.Tensor, powers: bool = False) -> torch.Tensor:
    """Return the quantization scales 448 / amax, like `compute_scale_from_amax`; shape of `amax`.

    Args:
        amax: largest magnitudes, float32; 1 is the scale of 0 and of infinity.
        powers: round down to powers of two.
    """
    scale = torch.div(amax.new_tensor(448.0), amax)
    scale = torch.where((amax == 0) | ~amax.isfinite(), 1.0, scale)
    return torch.exp2(torch.frexp(scale).exponent.float() - 1) if powers else scale

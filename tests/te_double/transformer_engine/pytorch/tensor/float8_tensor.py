"""E4M3 tensors with one scale."""

from __future__ import annotations

import torch

from .. import placement as machine
from ..quantized_tensor import QuantizedTensor, Storage, compute_scale, from_bytes, to_bytes


class Float8Tensor(Storage, QuantizedTensor):
    """An E4M3 tensor with one scale, and on Hopper a transposed copy for products that sum over rows."""

    FORMS = ("_data", "_transpose")
    INNER = ("_data", "_scale_inv", "_transpose", "_transpose_invalid")
    _data: torch.Tensor
    _scale_inv: torch.Tensor
    _transpose: torch.Tensor | None
    _transpose_invalid: bool

    def quantize_(self, tensor: torch.Tensor, *, noop_flag: torch.Tensor | None = None) -> Float8Tensor:
        """Replace the values by those of a tensor, quantized with a scale from its largest magnitude."""
        scale = compute_scale(tensor.detach().abs().amax().float())
        self._store(_scale_inv=scale.reciprocal().view(1), _data=to_bytes(tensor.detach().float() * scale))
        self._reset_caches()
        return self

    def _values(self, columnwise: bool = False) -> torch.Tensor:
        data = self._data
        if columnwise and needs_transpose():
            if self._transpose is None or self._transpose_invalid:
                self._create_transpose()
            assert self._transpose is not None
            data = self._transpose.t()
        return from_bytes(data) * self._scale_inv

    def _create_transpose(self) -> None:
        self._transpose, self._transpose_invalid = self._data.t().contiguous(), False

    def _reset_caches(self) -> None:
        self._transpose, self._transpose_invalid = None, True


def needs_transpose() -> bool:
    """Return whether the chip multiplies FP8 operands only with the summed axis last, as before Blackwell."""
    return machine.CHIP.capability < (10, 0)

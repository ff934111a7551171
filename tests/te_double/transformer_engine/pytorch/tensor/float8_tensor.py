"""Tensors with one scale."""

from __future__ import annotations

import torch

from .. import placement as machine
from ..quantized_tensor import QuantizedTensor, Storage, of_bytes, scale_of, to_bytes


class Float8Tensor(Storage, QuantizedTensor):
    """A tensor in fp8 with one scale, and on Hopper a transposed copy for products that sum over rows."""

    FORMS = ("_data", "_transpose")
    INNER = ("_data", "_scale_inv", "_transpose", "_transpose_invalid")
    _data: torch.Tensor
    _scale_inv: torch.Tensor
    _transpose: torch.Tensor | None
    _transpose_invalid: bool

    def quantize_(self, tensor: torch.Tensor, *, noop_flag: torch.Tensor | None = None) -> Float8Tensor:
        """Take the numbers of a tensor by its own largest value."""
        scale = scale_of(tensor.detach().abs().amax().float())
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
        return of_bytes(data) * self._scale_inv

    def _create_transpose(self) -> None:
        self._transpose, self._transpose_invalid = self._data.t().contiguous(), False

    def _reset_caches(self) -> None:
        self._transpose, self._transpose_invalid = None, True


def needs_transpose() -> bool:
    """Return whether the chip multiplies only what has the summed axis last."""
    return machine.CHIP.capability < (10, 0)

"""E4M3 matrices with a power-of-two scale per 32 values (MXFP8)."""

from __future__ import annotations

import torch

from ..quantized_tensor import QuantizedTensor, Storage, from_bytes, to_bytes

VALUES = 32


def _quantize_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bytes [m, n] and the biased exponents [m, n / 32] of their powers of two (E8M0), rounded up."""
    amax = rows.unflatten(-1, (-1, VALUES)).abs().amax(-1).float()
    mantissa, exponent = torch.frexp(amax * torch.tensor(1 / 448.0))
    exponent = torch.where(amax > 0, exponent - (mantissa == 0.5).int(), -127).clamp(-127, 127)
    scale = torch.exp2(-exponent.float()).repeat_interleave(VALUES, -1)
    return to_bytes(rows.float() * scale), (exponent + 127).to(torch.uint8)


def _dequantize(data: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    return from_bytes(data) * torch.exp2(exponents.float() - 127).repeat_interleave(VALUES, -1)


class MXFP8Tensor(Storage, QuantizedTensor):
    """An fp8 matrix with a power-of-two scale per 32 values, once along rows and once along columns."""

    INNER = ("_rowwise_data", "_rowwise_scale_inv", "_columnwise_data", "_columnwise_scale_inv")
    _rowwise_data: torch.Tensor
    _rowwise_scale_inv: torch.Tensor
    _columnwise_data: torch.Tensor
    _columnwise_scale_inv: torch.Tensor

    def quantize_(self, tensor: torch.Tensor, *, noop_flag: torch.Tensor | None = None) -> MXFP8Tensor:
        """Replace the values by those of a matrix, quantized once along rows and once along columns."""
        rows, scales = _quantize_rows(tensor.detach())
        self._store(_rowwise_data=rows, _rowwise_scale_inv=scales)
        columns, scales = _quantize_rows(tensor.detach().t())
        self._store(_columnwise_data=columns.t(), _columnwise_scale_inv=scales.t())
        return self

    def _values(self, columnwise: bool = False) -> torch.Tensor:
        if columnwise:
            return _dequantize(self._columnwise_data.t().contiguous(), self._columnwise_scale_inv.t()).t()
        return _dequantize(self._rowwise_data, self._rowwise_scale_inv)

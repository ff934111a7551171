"""E4M3 matrices with a scale per block of 128 x 128 values."""

from __future__ import annotations

import torch

from ..quantized_tensor import QuantizedTensor, Storage, compute_scale, from_bytes, to_bytes

BLOCK = 128


def block_amax(numbers: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude of each block of a matrix: float32 [row blocks, column blocks]."""
    m, n = numbers.shape
    padded = torch.nn.functional.pad(numbers.abs().float(), (0, -n % BLOCK, 0, -m % BLOCK))
    return padded.view(-(-m // BLOCK), BLOCK, -(-n // BLOCK), BLOCK).amax(dim=(1, 3))


def expand_scales(scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Expand the scales of blocks to a matrix of shape `shape`."""
    return scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:shape[0], :shape[1]]


class Float8BlockwiseQTensor(Storage, QuantizedTensor):
    """An E4M3 matrix with a power of two per block. The double does not pad the scales."""

    INNER = ("_rowwise_data", "_rowwise_scale_inv", "_columnwise_data", "_columnwise_scale_inv")
    _rowwise_data: torch.Tensor
    _rowwise_scale_inv: torch.Tensor
    _columnwise_data: torch.Tensor
    _columnwise_scale_inv: torch.Tensor

    def quantize_(self, tensor: torch.Tensor, *, noop_flag: torch.Tensor | None = None
                  ) -> Float8BlockwiseQTensor:
        """Replace the values by those of a matrix, quantized."""
        scale = compute_scale(block_amax(tensor.detach()), powers=True)
        self._store(_rowwise_scale_inv=scale.reciprocal(),
                    _rowwise_data=to_bytes(tensor.detach().float() * expand_scales(scale, tensor.shape)))
        self._create_columnwise()
        return self

    def _create_columnwise(self) -> None:
        self._columnwise_data = self._rowwise_data.t().contiguous()
        self._columnwise_scale_inv = self._rowwise_scale_inv.t().contiguous()

    def _values(self, columnwise: bool = False) -> torch.Tensor:
        if columnwise:
            return (from_bytes(self._columnwise_data)
                    * expand_scales(self._columnwise_scale_inv, self._columnwise_data.shape)).t()
        return from_bytes(self._rowwise_data) * expand_scales(self._rowwise_scale_inv, self.shape)

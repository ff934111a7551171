"""`general_gemm` of the compiled extension, for plain tensors; megatron-core's router calls it."""

from __future__ import annotations

from typing import Any

import torch

from .gemm import COUNTS
from .placement import require_cuda

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Supported dtypes; no kernel multiplies float64."""


def _in_tf32(values: torch.Tensor) -> torch.Tensor:
    """Return float32 values rounded to the 10 fraction bits of TF32."""
    return ((values.view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


def general_gemm(
        A: torch.Tensor, B: torch.Tensor, out_dtype: torch.dtype | None = None,
        quantization_params: Any = None, gelu: bool = False, gelu_in: torch.Tensor | None = None,
        alpha: float = 1.0, beta: float | None = None, accumulate: bool = False, layout: str = "TN",
        out: torch.Tensor | None = None, bias: torch.Tensor | None = None,
        use_split_accumulator: bool = False, grad: bool = False, ub: Any = None, ub_type: Any = None,
        extra_output: torch.Tensor | None = None, bulk_overlap: bool = False,
        ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return (B @ A, gradient of the bias, None, None). T in the layout transposes a matrix: first letter A,
    second letter B.

    Products are accumulated in float32. Operands must have equal dtypes (else RuntimeError); float32 operands
    are rounded to TF32 and need a float32 result. The bias must have the dtype of the result.
    """
    assert layout in ("TN", "NN", "NT"), f"GEMM layout {layout} not supported."
    if quantization_params is not None or gelu or ub is not None or extra_output is not None or bulk_overlap:
        raise NotImplementedError("the double's general_gemm has plain operands and no overlapped traffic")
    if not accumulate and beta not in (0.0, None):
        raise ValueError("scale must be zero")
    require_cuda(A=A, B=B, out=out, bias=bias)
    result_dtype = out_dtype or (A.dtype if out is None else out.dtype)
    for dtype in (A.dtype, B.dtype, result_dtype):
        if dtype not in DTYPES:
            raise KeyError(dtype)
    if A.dtype != B.dtype or (A.dtype != result_dtype
                              and (A.dtype == torch.float32 or result_dtype != torch.float32)):
        raise RuntimeError(f"cuBLAS Error: the requested functionality is not supported: {A.dtype} x "
                           f"{B.dtype} -> {result_dtype}")
    if bias is not None and not grad and bias.dtype != result_dtype:
        raise RuntimeError(f"the double refuses a bias of {bias.dtype} for a product in {result_dtype}: the "
                           "real kernel reads its bytes as the product's type")
    first, second = (A.t() if layout[0] == "T" else A), (B.t() if layout[1] == "T" else B)
    if second.shape[1] != first.shape[0]:
        raise RuntimeError(f"GEMM inputs have incompatible dimensions (A is {tuple(A.shape)}, B is "
                           f"{tuple(B.shape)})")
    COUNTS["general", layout] += 1
    round_off = _in_tf32 if A.dtype == torch.float32 else torch.Tensor.float
    product = alpha * (round_off(second.contiguous()) @ round_off(first.contiguous()))
    if bias is not None and not grad:
        product = product + bias.float()
    if accumulate:
        assert out is not None
        product = product + (1.0 if beta is None else beta) * out.float()
    found = product.to(result_dtype)
    if out is not None:
        if not out.is_contiguous():
            raise ValueError("Output tensor is not contiguous.")
        found = out.copy_(found)
    return found, B.float().sum(0).to(result_dtype) if bias is not None and grad else None, None, None

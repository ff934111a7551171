"""What conversion asks of values: finite numbers that fit the dtype they are written in, and room on the
disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from megatron_sov.base.errors import UserError, nearest
from megatron_sov.base.figures import format_size

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
          "float64": torch.float64}
KEEP = "keep"


def check_dtype_name(dtype: str) -> None:
    """Raise `UserError` where `--dtype` is neither a dtype nor "keep"."""
    if dtype not in (KEEP, *DTYPES):
        raise UserError(f"--dtype {dtype!r}: does not exist{nearest(dtype, DTYPES)} (dtypes: "
                        f"{', '.join(DTYPES)}, {KEEP})")


def planned_dtype(dtype: str, fp32: bool, own: torch.dtype) -> torch.dtype:
    """Return the dtype that a tensor is written in: float32 where it must be,
    else the chosen one or its own."""
    return torch.float32 if fp32 else DTYPES.get(dtype, own)


def exported_dtype(dtype: str, fp32: bool, own: torch.dtype) -> torch.dtype:
    """Return the dtype that a tensor has in a Hugging Face folder: float64 only where it was asked for, few
    readers expect it."""
    return planned_dtype(dtype, fp32, torch.float32 if own == torch.float64 else own)


def convert_tensor(tensor: torch.Tensor, dtype: torch.dtype, path: Path, name: str,
                   instead: str = "use --dtype bfloat16 or keep") -> torch.Tensor:
    """Return the tensor in `dtype`; `instead` is what to do where it does not fit.

    Raises:
        UserError: it holds NaN or infinity, or a value becomes infinite (float16 ends at 65504).
    """
    if not _finite(tensor):
        kind = "NaN" if bool(tensor.isnan().any()) else "infinity"
        raise UserError(f"{path}: {name} holds {kind} ({int((~tensor.isfinite()).sum())} of {tensor.numel()} "
                        "values); use a checkpoint from before the model broke")
    result = tensor.to(dtype)
    if result is not tensor and not _finite(result):
        largest, kind = tensor.abs().max().item(), str(dtype).removeprefix("torch.")
        raise UserError(f"{name}: its largest value {largest:g} does not fit {kind} "
                        f"({torch.finfo(dtype).max:g}); {instead}")
    return result


def _finite(tensor: torch.Tensor) -> bool:
    """Look at the extremes alone, which carry NaN along: many times faster than a look at each value."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(low.isfinite() & high.isfinite())


def check_space(out: Path, needed_bytes: int) -> None:
    """Raise `UserError` where the disk of `out` has less room than is needed."""
    folder = next(parent for parent in out.absolute().parents if parent.is_dir())
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise UserError(f"{out}: needs {format_size(needed_bytes)}, but {folder} has "
                        f"{format_size(free_bytes)} "
                        "free; free some space or choose another disk")

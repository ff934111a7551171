"""Tensor dtypes in conversions, with checks that values are finite and the disk has enough space."""

import shutil
from pathlib import Path

import torch

from megatron_sov.base.errors import UserError, suggest_name
from megatron_sov.base.figures import format_size

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
          "float64": torch.float64}
KEEP = "keep"  # the stored dtype


def check_dtype_name(dtype: str) -> None:
    """Raise `UserError` if `--dtype` is neither a dtype nor "keep"."""
    if dtype not in (KEEP, *DTYPES):
        raise UserError(f"--dtype {dtype!r}: does not exist{suggest_name(dtype, DTYPES)} (dtypes: "
                        f"{', '.join(DTYPES)}, {KEEP})")


def choose_dtype(dtype: str, fp32: bool, stored_dtype: torch.dtype) -> torch.dtype:
    """Return a tensor's dtype in a checkpoint: float32 for `fp32` tensors, the stored dtype for "keep"."""
    return torch.float32 if fp32 else DTYPES.get(dtype, stored_dtype)


def choose_export_dtype(dtype: str, fp32: bool, stored_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a tensor in an export; float64 only on request, because few programs read it."""
    return choose_dtype(dtype, fp32, torch.float32 if stored_dtype == torch.float64 else stored_dtype)


def convert_tensor(tensor: torch.Tensor, dtype: torch.dtype, path: Path, name: str) -> torch.Tensor:
    """Cast a tensor to `dtype`. Raises `UserError`: `tensor` has NaN or infinity, or a value overflows
    `dtype` (float16: above 65504)."""
    if not _is_finite(tensor):
        kind = "NaN" if bool(tensor.isnan().any()) else "infinity"
        raise UserError(f"{path}: {name} contains {kind} ({int((~tensor.isfinite()).sum())} of "
                        f"{tensor.numel()} values); use an earlier checkpoint")
    result = tensor.to(dtype)
    if result is not tensor and not _is_finite(result):
        largest, kind = tensor.abs().max().item(), str(dtype).removeprefix("torch.")
        raise UserError(f"{name}: its largest value {largest:g} does not fit {kind} "
                        f"({torch.finfo(dtype).max:g}); use --dtype bfloat16 or keep")
    return result


def _is_finite(tensor: torch.Tensor) -> bool:
    """Check minimum and maximum, which propagate NaN; much faster than `isfinite().all()`."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(low.isfinite() & high.isfinite())


def check_space(out: Path, needed_bytes: int) -> None:
    """Raise `UserError` if the disk at `out` has less free space than `needed_bytes`."""
    folder = next(parent for parent in out.absolute().parents if parent.is_dir())
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise UserError(f"{out}: needs {format_size(needed_bytes)}, but {folder} has "
                        f"{format_size(free_bytes)} free; free some space or choose another disk")

"""Weights as the values that differ from those sent before: what an engine holds is bit for bit what all of
them would have made it.

A step of reinforcement learning changes a weight by about its learning rate, and bf16 rounds what is less
than 1/256 of the weight away: of most tensors a small share has other bits than a step before (arXiv
2602.03839 measures 1 %).  Sent are the places and the new values of these.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_sov.base.errors import UserError, nearest
from megatron_sov.runs.obs.figures import size

# What conversion asks of values: finite numbers that fit the dtype they are written in, and room on the disk.

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


def convert_tensor(tensor: torch.Tensor, dtype: torch.dtype, path: Path, name: str) -> torch.Tensor:
    """Return the tensor in `dtype`.

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
                        f"({torch.finfo(dtype).max:g}); use --dtype bfloat16 or keep")
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
        raise UserError(f"{out}: needs {size(needed_bytes)}, but {folder} has {size(free_bytes)} "
                        "free; free some space or choose another disk")


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_INT32_PLACES = 2**31


@dataclass(frozen=True)
class Changed:
    """What differs in one tensor."""

    name: str
    """Its Hugging Face name."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    places: torch.Tensor
    """[n] int32, or int64 where that is too narrow: where its values changed, in row-major order, rising."""
    values: torch.Tensor
    """[n] of the tensor's type: what stands there now."""

    @property
    def num_bytes(self) -> int:
        return int(self.places.nbytes + self.values.nbytes)

    def coordinates(self) -> tuple[torch.Tensor, ...]:
        """Return the places, one int64 tensor [n] for each axis."""
        return torch.unravel_index(self.places.long(), self.shape)


class SentWeights:
    """What an engine was sent last: a copy of all of it, by which its sender knows what has changed."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        """Begin with nothing.

        Args:
            device: where the copy is kept.
        """
        self._device = device
        self._kept: dict[str, torch.Tensor] = {}
        self._is_whole = False

    def whole(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield all weights as they are, and take note of them."""
        self._kept, self._is_whole = {}, False
        for name, tensor in weights:
            self._kept[name] = tensor.detach().to(
                self._device, copy=True, memory_format=torch.contiguous_format)
            yield name, tensor
        self._is_whole = True

    def changed(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[Changed]:
        """Yield what differs in each tensor, also where nothing does, and take note of it.

        Args:
            weights: the same tensors as were sent whole.

        Raises:
            ValueError: all weights were not sent to the end before, or these are others.
        """
        if not self._is_whole:
            raise ValueError("the last weights were not sent to the end, so nobody knows what the engine "
                             "has; send all with `whole`")
        # until the last tensor is out: an engine that got a part holds neither the old weights nor the new
        # ones
        self._is_whole = False
        names = set(self._kept)
        for name, tensor in weights:
            kept, now = self._kept.get(name), tensor.detach().to(self._device).contiguous()
            if kept is None or (kept.shape, kept.dtype) != (now.shape, now.dtype):
                raise ValueError(f"{name}, {list(now.shape)} of {now.dtype}: is none of the tensors that "
                                 "were sent; send all with `whole`")
            places = torch.nonzero(_bits(kept) != _bits(now)).flatten()
            values = now.flatten()[places]
            kept.view(-1)[places] = values
            names.discard(name)
            yield Changed(name, tuple(now.shape),
                          places.int() if now.numel() < _INT32_PLACES else places, values)
        if names:
            raise ValueError(f"{len(names)} tensors were sent before and are missing now, the first is "
                             f"{min(names)}; send all with `whole`")
        self._is_whole = True


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bits, flat: values would take -0 for 0, and no NaN for itself."""
    return tensor.reshape(-1).view(_INTEGERS[tensor.element_size()])

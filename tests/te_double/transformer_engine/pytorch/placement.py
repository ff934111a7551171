"""The simulated machine: its chip, and tensors that would be in host memory. Not part of the real interface.

On a CPU all tensors share a memory, so a forgotten copy stays unnoticed. `HostTensors` marks tensors created
without a device, read from numpy or copied to the CPU, and tensors computed only from marked ones.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

MARK = "_te_double_on_host"


@dataclass(frozen=True)
class Chip:
    """Properties that the library reads from GPU and cuDNN."""

    capability: tuple[int, int]
    """Compute capability."""
    cudnn: tuple[int, int, int] = (9, 24, 0)
    """cuDNN version."""


HOPPER, BLACKWELL = Chip((9, 0)), Chip((10, 0))
CHIP = HOPPER
"""The simulated chip; tests may replace it."""


def on_host(tensor: Any) -> bool:
    """Return whether a tensor would be in host memory."""
    return getattr(tensor, MARK, False) is True


def mark_host(tensor: torch.Tensor) -> torch.Tensor:
    """Mark a tensor as being in host memory."""
    setattr(tensor, MARK, True)
    return tensor


def require_cuda(**tensors: torch.Tensor | None) -> None:
    """Raise an error for host tensors, which a kernel cannot read."""
    for name, tensor in tensors.items():
        if tensor is not None and on_host(tensor):
            raise ValueError(f"{name} must be a CUDA tensor, but got tensor on cpu.")


GPU = torch.device("cpu", 0)
"""Device of the chip: CPU tensors drop the index, an explicit device keeps it."""
_MIXES_DEVICES = {"__getitem__", "__setitem__", "copy_", "index_put_", "index_put"}
"""Functions that accept host tensors together with GPU tensors. So do `_foreach_` functions, which take lists
and handle their tensors one by one."""
_MAKERS = {"tensor", "as_tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn", "randint",
           "eye", "linspace", "randperm", "load"}
"""Functions that create tensors in host memory unless a device is named."""


def _in_kernel() -> bool:
    """Return whether the double itself calls torch, as inside a kernel."""
    frame = sys._getframe(2)
    while frame.f_back is not None and (f"{os.sep}torch{os.sep}" in frame.f_code.co_filename
                                        or frame.f_code.co_filename.endswith("cpu_shims.py")):
        frame = frame.f_back
    return frame.f_code.co_filename.startswith(str(Path(__file__).parent))


class HostTensors(TorchFunctionMode):
    """Context that marks host tensors and refuses them together with GPU tensors.

    The device `GPU` means the chip, and unmarked tensors report it. No data moves, but a copy to or from a
    GPU is a copy here too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.marked = 0

    def __enter__(self) -> HostTensors:
        def mark_results(make: Any) -> Any:
            return lambda *args, **kwargs: mark_host(make(*args, **kwargs))

        # torch calls `__torch_function__` for neither of these
        self._originals = torch.from_numpy, torch.frombuffer
        torch.from_numpy, torch.frombuffer = map(mark_results, self._originals)  # type: ignore[assignment]
        super().__enter__()
        return self

    def __exit__(self, *exc_details: Any) -> None:
        super().__exit__(*exc_details)
        torch.from_numpy, torch.frombuffer = self._originals  # type: ignore[assignment]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if _in_kernel():
            return func(*args, **kwargs)
        if name == "__get__" and func == torch.Tensor.device.__get__:
            return torch.device("cpu") if on_host(args[0]) else GPU
        tensors = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        device = self._device(name, args, kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, str):  # a type's name: the CPU shim adds "cuda." here, and once more outside
            return result.replace("torch.cuda.", "torch.", 1)
        if name == "__set__" and func == torch.Tensor.data.__set__:
            setattr(args[0], MARK, on_host(args[1]))
            return result
        if device is not None:
            is_host = device != GPU
            if name in ("to", "cpu", "type_as") and result.dtype == tensors[0].dtype:
                # on a GPU, the call copies only if the tensor is on the other device
                result = tensors[0] if on_host(tensors[0]) == is_host else tensors[0].clone()
        elif tensors:
            is_host = all(map(on_host, tensors))
            mixes = name in _MIXES_DEVICES or name.startswith("_foreach_")
            if not is_host and not mixes and any(on_host(t) and t.dim() for t in tensors):
                raise RuntimeError("Expected all tensors to be on the same device, but found at least two "
                                   f"devices, cuda:0 and cpu! (in {resolve_name(func) or name})")
        else:
            is_host = name in _MAKERS
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and not any(leaf is t for t in tensors):
                setattr(leaf, MARK, is_host)
                self.marked += is_host
        return result

    @staticmethod
    def _device(name: str, args: Any, kwargs: Any) -> torch.device | None:
        """Return the device that a call requests, or None."""
        if name == "cpu":
            return torch.device("cpu")
        requested = kwargs.get("device")
        if name in ("to", "type_as") and requested is None and len(args) > 1:
            if torch.is_tensor(args[1]):
                return torch.device("cpu") if on_host(args[1]) else GPU
            requested = args[1] if isinstance(args[1], (str, torch.device)) else None
        return None if requested is None else torch.device(requested)

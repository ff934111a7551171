"""CUDA graphs on a CPU: the operators and memory of a capture. Not part of the real interface.

A replay runs the same torch operators on the capture's storages: no Python of the captured code, no branches,
no numbers read from tensors. Synchronization with the GPU, or a copy from host memory that is not pinned,
ends a capture with an error, as on a GPU; so does every copy between host and GPU if tensors have a GPU's
device, as fake tensors do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map

_aten = torch.ops.aten
WAITS = {
    _aten._local_scalar_dense, _aten.item, _aten.is_nonzero, _aten.equal, _aten.nonzero, _aten.nonzero_static,
    _aten.masked_select, _aten._unique2, _aten.unique_dim, _aten.unique_consecutive, _aten.bincount,
    _aten.repeat_interleave, _aten.lift_fresh, _aten.lift_fresh_copy}
"""Operators that a capture cannot contain: the host waits for the size or value of their result, or copies a
number from host memory."""
_COPIES = {_aten._to_copy, _aten.copy_, _aten.index, _aten.index_put_}
"""Operators that copy between host and GPU if their tensors are on both."""
_in_kernel = False


@contextmanager
def kernel() -> Iterator[None]:
    """Run the body as one kernel, which does not synchronize with the host."""
    global _in_kernel
    before, _in_kernel = _in_kernel, True
    try:
        yield
    finally:
        _in_kernel = before


def is_recording() -> bool:
    """Return whether a capture is in progress."""
    return isinstance(_get_current_dispatch_mode(), _Recorder)


class _Recorder(TorchDispatchMode):
    """Passes each operator, its arguments and its result to `note`."""

    def __init__(self, note: Callable[..., Any]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        has_mask = func.overloadpacket in (_aten.index, _aten.index_put_) and any(
            t is not None and t.dtype == torch.bool for t in args[1])
        crosses_devices = func.overloadpacket in _COPIES and len(_devices(args, kwargs)) > 1
        if (func.overloadpacket in WAITS or has_mask or crosses_devices) and not _in_kernel:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing "
                               f"(torch.ops.{func})")
        result = func(*args, **kwargs)
        self._note(func, args, kwargs, result)
        return result


class CapturedOperators:
    """Operators of one capture; stands for `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self._replays: list[Callable[[], None]] = []

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Run and record the body."""
        with _Recorder(self._note):
            yield

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Add a replay of the operator, which copies its results into the memory of `result`."""
        input_storages = {_storage(t) for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        new = [(i, t.detach()) for i, t in enumerate(tree_leaves(result))
               if torch.is_tensor(t) and t.numel() and _storage(t) not in input_storages]
        if not new and not func._schema.is_mutable and func.namespace == "aten":
            return  # a view
        # aliases keep the current memory, even if the tensor gets another
        args, kwargs = tree_map(_alias, (args, kwargs))

        def replay() -> None:
            leaves = tree_leaves(func(*args, **kwargs))
            for leaf in leaves:
                if isinstance(leaf, torch.ScriptObject) and hasattr(leaf, "wait"):
                    leaf.wait()  # pending message
            for i, memory in new:
                if leaves[i].shape != memory.shape:
                    raise RuntimeError(f"torch.ops.{func} gives {list(leaves[i].shape)} in a replay, and "
                                       f"{list(memory.shape)} in the capture")
                memory.copy_(leaves[i])

        self._replays.append(replay)

    @torch.no_grad()
    def replay(self) -> None:
        """Run the captured operators again."""
        for replay in self._replays:
            replay()

    def reset(self) -> None:
        """Drop the capture."""
        self._replays.clear()


def _devices(args: Any, kwargs: Any) -> set[str]:
    """Return the device types of the tensors, and of the output if the call names its device."""
    found = {t.device.type for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
    device = kwargs.get("device")
    # autograd sees fake GPU tensors on `meta` and asks for gradients there
    return found if device is None or device.type == "meta" else found | {device.type}


def _alias(value: Any) -> Any:
    return value.detach() if torch.is_tensor(value) else value


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata

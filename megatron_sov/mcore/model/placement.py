"""Where a model's weights lie: on the device of its process, every one of them.

The library makes some of them on the CPU whatever it is told (0.16.1: the router's weight, the norms of
torch) and moves what it finds there with the whole model, or in the first forward pass.  By then the gradient
hooks of its data-parallel wrapper watch a weight that is no longer used, and the weight is never learned.
"""

from __future__ import annotations

import contextlib

import torch

from megatron_sov.mcore.parallel.device import local_device, on_gpu


def made_here() -> contextlib.AbstractContextManager[object]:
    """Return a context in which tensors are made on this process's GPU unless they name a device; without a
    GPU it changes nothing."""
    return local_device() if on_gpu() else contextlib.nullcontext()


def place(module: torch.nn.Module, device: torch.device) -> None:
    """Move every parameter and buffer to a device, before anything else holds on to them, and check it."""
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None and parameter.device != device:
                parameter.data = parameter.data.to(device)  # marks and ties stay
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)
    refuse_elsewhere(module, device)


def refuse_elsewhere(module: torch.nn.Module, device: torch.device) -> None:
    """Raise `RuntimeError` where a parameter or buffer is not on a device; the message names it."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.device != device:
            raise RuntimeError(f"{name} is on {tensor.device} and the model on {device}: it would get no "
                               "gradient")

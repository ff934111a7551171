"""Weights that live in 8 bits (`train.fp8_weights`), and where their numbers are for whoever reads or writes
weights outside of a step.

Transformer Engine makes such a weight of bf16 numbers, which it keeps in host memory until the library's
distributed optimizer makes float32 masters of them.  From then on masters are the weights: each data-parallel
process has a range of every one, and what products read is made of all ranges together.  A weight's blocks,
which are views of its memory elsewhere, are therefore views of the kept numbers first and of masters then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor, quantize_param_shard


def is_quantized(parameter: torch.Tensor) -> bool:
    """Return whether a weight is in 8 bits; the library's word for it is that of one of the kinds."""
    found: bool = is_float8tensor(parameter)
    return found


def stand_ins(module: torch.nn.Module) -> dict[int, torch.nn.Parameter]:
    """Return for each weight in 8 bits, by its id, a tensor of its shape and dtype that has no memory.

    The library declares blocks as views of weights, and a view of one in 8 bits would be a copy in bf16.
    """
    found = {}
    for parameter in module.parameters():
        if is_quantized(parameter):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            found[id(parameter)] = stand_in = torch.nn.Parameter(empty, requires_grad=False)
            marks = ("allreduce", "tensor_model_parallel", "partition_dim", "partition_stride")
            vars(stand_in).update({name: getattr(parameter, name)
                                   for name in marks if hasattr(parameter, name)})
    return found


@contextlib.contextmanager
def replaced(module: torch.nn.Module, by: dict[int, torch.nn.Parameter]) -> Iterator[None]:
    """Have a module's weights be their stand-ins, while its blocks are declared."""
    homes = [(part._parameters, name, parameter) for part in module.modules()
             for name, parameter in part._parameters.items() if id(parameter) in by]
    for parameters, name, parameter in homes:
        parameters[name] = by[id(parameter)]
    try:
        yield
    finally:
        for parameters, name, parameter in homes:
            parameters[name] = parameter


def kept_view(parameter: Any, place: torch.Tensor) -> torch.Tensor:
    """Return the part of the numbers that a weight was made of, which are kept until it has masters.

    Args:
        parameter: the weight.
        place: the same part of its stand-in.
    """
    kept: torch.Tensor = parameter.get_high_precision_init_val()
    return kept.as_strided(place.shape, place.stride(), int(place.storage_offset()))


def read_values(parameter: torch.Tensor) -> torch.Tensor:
    """Return what products read of a weight: itself, or what its 8 bits and scales stand for."""
    quantized: Any = parameter
    values: torch.Tensor = quantized.dequantize() if is_quantized(parameter) else parameter
    return values


def raw_data(parameter: torch.Tensor) -> torch.Tensor:
    """Return a weight's memory: itself, or the bytes of its 8 bits."""
    quantized: Any = parameter
    data: torch.Tensor = (quantized.get_data_tensors(rowwise_data=True, columnwise_data=False)
                          if is_quantized(parameter) else parameter)
    return data


# Masters to 8 bits.


def shares_gradients(config: Any) -> bool:
    """Return whether weights are gathered in bf16, in the memory of gradients: Transformer Engine gives MXFP8
    weights no memory of the library's, since both of their forms are made of the numbers themselves."""
    return bool(config.fp8_param and config.fp8_recipe == "mxfp8")


def optimizer_settings(config: Any) -> dict[str, Any]:
    """Return fields of the library's OptimizerConfig."""
    if not config.fp8_param:
        return {}
    return {"fp8_recipe": config.fp8_recipe, "reuse_grad_buf_for_mxfp8_param_ag": shares_gradients(config)}


def quantize(optimizers: list[Any]) -> None:
    """Make this process's ranges of weights in 8 bits of their masters, so that a gather brings them to all;
    other weights stay what they are.

    Args:
        optimizers: the library's distributed ones.
    """
    for optimizer in optimizers:
        if optimizer.optimizer is None:
            continue
        if not optimizer.config.reuse_grad_buf_for_mxfp8_param_ag:
            quantize_param_shard(*optimizer._get_fp8_params_and_shard_fp32_from_fp8(),
                                 optimizer.data_parallel_group)
            continue
        for parameters, mains in zip(optimizer.model_float16_groups,
                                     optimizer.shard_fp32_from_float16_groups, strict=True):
            for parameter, main in zip(parameters, mains, strict=True):
                ranges = optimizer._get_model_param_range_map(parameter)
                mine, place = ranges["param"], ranges["gbuf_world_in_bucket"]
                number, _, bucket = optimizer.model_param_gbuf_map[parameter]
                sent = optimizer.buffers[number].buckets[bucket].param_data.view(-1)[place.start:place.end]
                # the masters of other weights may be older than these, which a checkpoint gave
                sent.copy_(main if is_quantized(parameter)
                           else parameter.detach().view(-1)[mine.start:mine.end])


def fill_buffers(optimizers: list[Any]) -> None:
    """Write the masters of all weights into the memory that is gathered, where gradients share it."""
    for optimizer in optimizers:
        if optimizer.optimizer is not None:
            optimizer._copy_main_params_to_param_buffer()

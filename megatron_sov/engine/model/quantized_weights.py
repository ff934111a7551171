"""FP8 weights (`train.fp8_weights`), and access to their values outside a training step.

Transformer Engine quantizes such a weight from bf16 values and keeps the bf16 values in host memory until
Megatron-Core's distributed optimizer creates float32 masters from them. From then on the masters are the
weights: each data-parallel process owns a range of every master, and the FP8 values are quantized from all
ranges. The blocks of an FP8 weight are therefore views of the bf16 values first, and of the masters later."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor, quantize_param_shard


def is_quantized(parameter: torch.Tensor) -> bool:
    """Return whether a weight is quantized by Transformer Engine (any FP8 recipe)."""
    is_fp8: bool = is_float8tensor(parameter)
    return is_fp8


def create_placeholders(module: torch.nn.Module) -> dict[int, torch.nn.Parameter]:
    """Return `id(weight)` -> meta tensor with equal shape and dtype, per FP8 weight.

    Megatron-Core declares blocks as views of weights, and a view of an FP8 weight would be a bf16 copy."""
    placeholders = {}
    for parameter in module.parameters():
        if is_quantized(parameter):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            placeholders[id(parameter)] = placeholder = torch.nn.Parameter(empty, requires_grad=False)
            attributes = ("allreduce", "tensor_model_parallel", "partition_dim", "partition_stride")
            vars(placeholder).update({name: getattr(parameter, name)
                                      for name in attributes if hasattr(parameter, name)})
    return placeholders


@contextlib.contextmanager
def use_placeholders(module: torch.nn.Module, by: dict[int, torch.nn.Parameter]) -> Iterator[None]:
    """Replace FP8 weights by their meta tensors inside the context, for declaring blocks."""
    owners = [(part._parameters, name, parameter) for part in module.modules()
              for name, parameter in part._parameters.items() if id(parameter) in by]
    for parameters, name, parameter in owners:
        parameters[name] = by[id(parameter)]
    try:
        yield
    finally:
        for parameters, name, parameter in owners:
            parameters[name] = parameter


def view_initial_values(parameter: Any, place: torch.Tensor) -> torch.Tensor:
    """Return part of a weight's initial bf16 values, which exist until the weight has masters.

    Args:
        parameter: the weight.
        place: the same part of its meta tensor.
    """
    initial: torch.Tensor = parameter.get_high_precision_init_val()
    return initial.as_strided(place.shape, place.stride(), int(place.storage_offset()))


def dequantize_weight(parameter: torch.Tensor) -> torch.Tensor:
    """Return the values that products use: the weight, or its dequantized FP8 values."""
    quantized: Any = parameter
    values: torch.Tensor = quantized.dequantize() if is_quantized(parameter) else parameter
    return values


def get_raw_data(parameter: torch.Tensor) -> torch.Tensor:
    """Return a weight's memory: the weight, or the FP8 bytes."""
    if not is_quantized(parameter):
        return parameter
    quantized: Any = parameter
    data: torch.Tensor = quantized.get_data_tensors(rowwise_data=True, columnwise_data=False)
    return data


def shares_gradient_memory(config: Any) -> bool:
    """Return whether parameter gathers use bf16 values in gradient memory: with MXFP8, Transformer Engine
    quantizes both layouts of a weight from the values, not from Megatron-Core's buffer."""
    return bool(config.fp8_param and config.fp8_recipe == "mxfp8")


def optimizer_settings(config: Any) -> dict[str, Any]:
    """Return the FP8 fields for `OptimizerConfig`."""
    if not config.fp8_param:
        return {}
    return {"fp8_recipe": config.fp8_recipe,
            "reuse_grad_buf_for_mxfp8_param_ag": shares_gradient_memory(config)}


def quantize_local_ranges(optimizers: list[Any]) -> None:
    """Quantize local FP8 weight ranges from the masters; a gather then completes the weights.

    Args:
        optimizers: Megatron-Core's distributed optimizers.
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
                local_range, buffer_range = ranges["param"], ranges["gbuf_world_in_bucket"]
                number, _, bucket = optimizer.model_param_gbuf_map[parameter]
                flat = optimizer.buffers[number].buckets[bucket].param_data.view(-1)
                target = flat[buffer_range.start:buffer_range.end]
                local_values = main
                if not is_quantized(parameter):
                    # after a checkpoint load, the masters of bf16 weights may be older than the weights
                    local_values = parameter.detach().view(-1)[local_range.start:local_range.end]
                target.copy_(local_values)


def fill_gather_buffers(optimizers: list[Any]) -> None:
    """Copy all masters to the gather buffers, if these share gradient memory."""
    for optimizer in optimizers:
        if optimizer.optimizer is not None:
            optimizer._copy_main_params_to_param_buffer()

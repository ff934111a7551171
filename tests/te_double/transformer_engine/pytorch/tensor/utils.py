"""8-bit weights under a distributed optimizer: replacing their memory, and casting master weights into it."""

from __future__ import annotations

from typing import Any

import torch

from ..quantized_tensor import QuantizedTensor, compute_scale, to_bytes
from .float8_blockwise_tensor import Float8BlockwiseQTensor, block_amax, expand_scales
from .float8_tensor import Float8Tensor, needs_transpose
from .mxfp8_tensor import MXFP8Tensor


def replace_raw_data(tensor: QuantizedTensor, new_raw_data: torch.Tensor) -> None:
    """Replace the memory of a tensor's bytes."""
    if isinstance(tensor, MXFP8Tensor):
        raise NotImplementedError("replace_raw_data for MXFP8Tensor is not supported yet")
    name = "_data" if isinstance(tensor, Float8Tensor) else "_rowwise_data"
    old = getattr(tensor, name)
    if old.dtype != new_raw_data.dtype:
        raise ValueError("The data types of raw data don't match: "
                         f"old dtype={old.dtype}, new dtype={new_raw_data.dtype}")
    new_raw_data.detach().copy_(old)
    setattr(tensor, name, new_raw_data)


def quantize_master_weights(model_weights: list[Any], master_weights: list[torch.Tensor | None],
                            start_offsets: list[int | None], group: Any,
                            fsdp_shard_model_weights: Any = None,
                            manual_post_all_gather_processing: bool = False) -> None:
    """Quantize each master weight (this rank's flat part of a weight from its start offset, or None) into
    the weight's bytes. Scales cover the whole weight, with a maximum over `group`. Columnwise bytes are stale
    until `post_all_gather_processing`."""
    if fsdp_shard_model_weights is not None:
        raise NotImplementedError("the double shards no weights")
    rounded = [None if master is None else master.to(weight.dtype)
               for weight, master in zip(model_weights, master_weights, strict=True)]
    for weight in model_weights:
        weight.clear_high_precision_init_val()
    for kind, cast in ((Float8Tensor, _cast_per_tensor), (Float8BlockwiseQTensor, _cast_per_block)):
        entries = [(w, m, s) for w, m, s in zip(model_weights, rounded, start_offsets, strict=True)
                   if isinstance(w, kind)]
        cast(entries, group)
        for weight, *_ in entries if not manual_post_all_gather_processing else ():
            raise NotImplementedError(f"the double leaves {type(weight)} to post_all_gather_processing")
    if any(isinstance(weight, MXFP8Tensor) for weight in model_weights):
        raise NotImplementedError("megatron-core copies into these")


def cast_master_weights_to_fp8(model_weights: list[Any], master_weights: list[torch.Tensor | None],
                               start_offsets: list[int | None], group: Any,
                               fsdp_shard_model_weights: Any = None,
                               manual_post_all_gather_processing: bool = False) -> None:
    """Call `quantize_master_weights`; the older name."""
    quantize_master_weights(model_weights, master_weights, start_offsets, group, fsdp_shard_model_weights,
                            manual_post_all_gather_processing)


def _cast_per_tensor(entries: list[Any], group: Any) -> None:
    """Cast with one scale per tensor, from the largest value over the whole group."""
    if not entries:
        return
    amaxes = torch.stack([torch.zeros(()) if master is None else master.abs().amax().float()
                          for _, master, _ in entries])
    torch.distributed.all_reduce(amaxes, op=torch.distributed.ReduceOp.MAX, group=group)
    for (weight, master, start), scale in zip(entries, compute_scale(amaxes), strict=True):
        weight._scale_inv.copy_(scale.reciprocal())
        if master is not None:
            weight._data.view(-1)[start:start + master.numel()] = to_bytes(master.float() * scale).view(-1)


def _cast_per_block(entries: list[Any], group: Any) -> None:
    """Cast with one scale per block; other processes may own parts of a block."""
    if not entries:
        return
    block_amaxes = []
    for weight, master, start in entries:
        values = torch.zeros(weight.numel())
        if master is not None:
            values[start:start + master.numel()] = master.float().view(-1)
        block_amaxes.append(block_amax(values.view(weight.shape)))
    amaxes = torch.cat([amax.view(-1) for amax in block_amaxes])
    torch.distributed.all_reduce(amaxes, op=torch.distributed.ReduceOp.MAX, group=group)
    parts = amaxes.split([amax.numel() for amax in block_amaxes])
    for (weight, master, start), amax, flat in zip(entries, block_amaxes, parts, strict=True):
        scale = compute_scale(flat.view(amax.shape), powers=True)
        weight._rowwise_scale_inv.copy_(scale.reciprocal())
        if master is not None:
            own_scale = expand_scales(scale, weight.shape).reshape(-1)[start:start + master.numel()]
            weight._rowwise_data.view(-1)[start:start + master.numel()] = to_bytes(
                master.float().view(-1) * own_scale)


def post_all_gather_processing(model_weights: Any) -> None:
    """Build the columnwise bytes after every process's rowwise bytes have been gathered."""
    for weight in model_weights if isinstance(model_weights, list) else [model_weights]:
        if isinstance(weight, Float8Tensor) and needs_transpose():
            weight._create_transpose()
        elif isinstance(weight, Float8BlockwiseQTensor):
            weight._create_columnwise()

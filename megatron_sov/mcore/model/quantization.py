"""Matrix products of the transformer layers in 8 or 4 bits, by Transformer Engine: the library's settings for
`train.fp8`, what the machine must have, and a defect of the library in checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from megatron_sov.config import TrainConfig
from megatron_sov.config.quantization import fp8_format
from megatron_sov.errors import UserError

AVAILABLE = {"tensorwise": "is_fp8_available", "blockwise": "is_fp8_block_scaling_available",
             "mxfp8": "is_mxfp8_available", "nvfp4": "is_nvfp4_available"}
"""Recipe -> function of Transformer Engine that says whether this GPU has it, and why not."""
FIELDS = ("fp8", "fp4", "moe_router_padding_for_quantization")
"""Fields of the library's configuration that forward passes ask whether to quantise."""


def library_settings(train: TrainConfig) -> dict[str, Any]:
    """Return the fields of the library's `TransformerConfig` for `train.fp8`."""
    if train.fp8 == "none":
        return {}
    scaling = ({"fp4": "e2m1", "fp4_recipe": "nvfp4"} if train.fp8 == "nvfp4"
               else {"fp8": fp8_format(train), "fp8_recipe": train.fp8})
    return {**scaling, "moe_router_padding_for_quantization": train.fp8_pad_routed_tokens}


def keep_ends_in_bf16(config: Any, train: TrainConfig) -> None:
    """Name the trunk's layers that stay in bf16 in the library's `TransformerConfig`.

    Behind its validation, which allows num_layers // pp of them at either end, also where stages are not
    equal; layers are asked by their number in the whole model (`is_first_last_bf16_layer`), so nothing needs
    that rule.
    """
    start, end = train.fp8_bf16_layers_at_start, train.fp8_bf16_layers_at_end
    config.first_last_layers_bf16 = start + end > 0
    config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16 = start, end


def refuse_without_chip(train: TrainConfig, serves: bool) -> None:
    """Refuse `train.fp8` where this process cannot compute it.

    Args:
        train: the settings.
        serves: whether models are made of Transformer Engine's modules here.

    Raises:
        UserError: there is no GPU with Transformer Engine, or it lacks what the recipe needs.
    """
    if train.fp8 == "none":
        return
    if not serves:
        raise UserError(f"train.fp8 = {train.fp8} needs an NVIDIA GPU with Transformer Engine, and this "
                        "process has none; set train.fp8=none, or run it where `megatron-sov doctor` "
                        "finds both")
    reasons = lacking()
    if reason := reasons[train.fp8]:
        others = [fp8 for fp8, why in reasons.items() if not why]
        raise UserError(f"train.fp8 = {train.fp8} cannot run on this GPU (Transformer Engine: {reason}); set "
                        f"train.fp8 to {' or '.join([*others, 'none'])}")


def lacking() -> dict[str, str]:
    """Return recipe -> why Transformer Engine does not have it on this process's GPU; empty: it has."""
    import transformer_engine.pytorch as te

    answers = {fp8: getattr(te, name)(return_reason=True) for fp8, name in AVAILABLE.items()}
    return {fp8: "" if available else str(reason) for fp8, (available, reason) in answers.items()}


@contextmanager
def in_bf16(config: Any) -> Iterator[None]:
    """Have forward passes quantise nothing: rows that are only read may have any length, and what they give
    is what the exported bf16 weights give."""
    before = {name: getattr(config, name) for name in FIELDS}
    config.fp8 = config.fp4 = None
    config.moe_router_padding_for_quantization = False
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def mend_extra_state(grouped_linear: Any) -> None:
    """Have a layer of experts be saved whose recipe keeps no state.

    Defect of 0.16.1: Transformer Engine's extra state is an empty tensor then, `_split_extra_state` takes it
    for one that can be decoded, and subscripts None.  A mended library is left alone.

    Args:
        grouped_linear: the library's class `TEGroupedLinear`.
    """
    split: Callable[[Any, torch.Tensor], list[torch.Tensor]] = grouped_linear._split_extra_state
    empty = torch.empty(0, dtype=torch.uint8)
    stateless = SimpleNamespace(num_gemms=2, fp8=True, fp8_calibration=False,
                                fp8_meta={"fp8_checkpoint": True}, _decode_extra_state=lambda state: None)
    try:
        split(stateless, empty)
    except TypeError:
        pass
    else:
        return

    def split_any(self: Any, state: torch.Tensor) -> list[torch.Tensor]:
        return [state] * self.num_gemms if state.numel() == 0 else split(self, state)

    grouped_linear._split_extra_state = split_any

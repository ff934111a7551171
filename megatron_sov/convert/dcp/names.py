"""Names and blocks of a model's tensors in torch.distributed checkpoints of other trainers.

`hf`: parameters of the transformers class, with a layer's experts in one tensor. `torchtitan`: parameters of
torchtitan 0.3, whose Llama has a head's rotary pairs as neighbours, and whose optimizer has query, key and
value in one parameter.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_sov.base.errors import UserError
from megatron_sov.base.hints.table import load_package_table
from megatron_sov.model.config import ModelConfig
from megatron_sov.model.families.weights import Link

HF, TORCHTITAN = "hf", "torchtitan"
PREFIXES = {HF: "model.", TORCHTITAN: ""}
"""Names -> prefix of weights in checkpoints that we write."""
EMBEDDINGS = {HF: "model.embed_tokens.weight", TORCHTITAN: "tok_embeddings.weight"}
"""Names -> embedding, by which a checkpoint's names are recognized."""
MOVED_BIAS, PLACE_IN_CLASS = ".mlp.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"
"""A name in Hugging Face folders, and the name in transformers' class."""
_TITAN: dict[str, Any] = load_package_table(Path(__file__).with_suffix(".yaml"))
TITAN_FAMILIES, TITAN_MODULES, TITAN_EXPERTS = (_TITAN[name] for name in ("families", "modules", "experts"))
TITAN_BIAS = ".moe.expert_bias_E"
FUSED_QKV = "attention.qkv_linear.wqkv.weight"
_LAYER = re.compile(r"model\.(layers\.\d+\.)(.+)\.weight")
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class Part:
    """A block of a tensor in the checkpoint."""

    key: str
    """Name of the tensor, without prefix."""
    names: tuple[str, ...]
    """Hugging Face tensors: a single one, or all of the link."""
    shape: tuple[int, ...]
    """Shape without expert axis."""
    expert: int | None = None
    """Index along the leading axis; None: the block is the whole tensor."""
    num_experts: int = 0

    @property
    def offset(self) -> tuple[int, ...]:
        zeros = (0,) * len(self.shape)
        return zeros if self.expert is None else (self.expert, *zeros)

    @property
    def extent(self) -> tuple[int, ...]:
        return self.shape if self.expert is None else (1, *self.shape)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        return self.shape if self.expert is None else (self.num_experts, *self.shape)


def check_names(names: str, model: ModelConfig) -> None:
    """Raise `UserError` if torchtitan has no counterpart of the model's family."""
    if names == TORCHTITAN and model.family not in TITAN_FAMILIES:
        raise UserError(f"--names {TORCHTITAN}: torchtitan 0.3 has no model of family {model.family!r}, only "
                        f"{', '.join(TITAN_FAMILIES)}; use --names {HF}")


def list_parts(names: str, link: Link, is_stored: Callable[[str], bool], *, state: bool) -> list[Part]:
    """Return the blocks that hold a link's Hugging Face tensors, or their optimizer state, in the first form
    whose keys `is_stored` accepts. Raises `UserError`: torchtitan has no counterpart."""
    list_all = _list_titan_forms if names == TORCHTITAN else _list_hf_forms
    forms = list_all(link, state)
    return next((parts for parts in forms if all(is_stored(part.key) for part in parts)), forms[-1])


def _list_hf_forms(link: Link, state: bool) -> list[list[Part]]:
    separate = [Part(name, (name,), shape) for name, shape in link.hf_shapes().items()]
    expert = _EXPERT.fullmatch(link.hf_names[0])
    if link.hf_names[0].endswith(MOVED_BIAS):
        return [[replace(separate[0], key=separate[0].key.replace(MOVED_BIAS, PLACE_IN_CLASS))], separate]
    if expert is None:
        return [separate]
    name = "gate_up_proj" if len(link.hf_names) > 1 else "down_proj"
    stacked = Part(f"{expert[1]}.{name}", link.hf_names, link.block_shape, int(expert[2]), link.shape[0])
    return [[stacked], separate]


def _list_titan_forms(link: Link, state: bool) -> list[list[Part]]:
    separate = [_find_titan_part(name, shape, link.shape[0]) for name, shape in link.hf_shapes().items()]
    layer = _LAYER.fullmatch(link.hf_names[0])
    if state and layer is not None and link.hf_names[0].endswith(".q_proj.weight"):
        return [[Part(layer[1] + FUSED_QKV, link.hf_names, link.block_shape)], separate]
    return [separate]


def _find_titan_part(name: str, shape: tuple[int, ...], num_experts: int) -> Part:
    layer = _LAYER.fullmatch(name)
    prefix, module = (layer[1], layer[2]) if layer else ("", name.removesuffix(".weight"))
    if expert := _EXPERT.fullmatch(name):
        key = f"{prefix}moe.routed_experts.inner_experts.{TITAN_EXPERTS[expert[3]]}"
        return Part(key, (name,), shape, int(expert[2]), num_experts)
    if module not in TITAN_MODULES or name.endswith(".bias"):
        raise UserError(f"--names {TORCHTITAN}: torchtitan 0.3 has no counterpart of {name}; use --names "
                        f"{HF}")
    return Part(f"{prefix}{TITAN_MODULES[module]}.weight", (name,), shape)


def order_rotary(model: ModelConfig, name: str, tensor: torch.Tensor, *, inverse: bool = False
                 ) -> torch.Tensor:
    """Order the rows of a query or key matrix as torchtitan's Llama, in which the rows of a rotary pair are
    neighbours; in Hugging Face's Llama they are half a head apart."""
    if model.family != "llama" or not name.endswith((".q_proj.weight", ".k_proj.weight")):
        return tensor
    axes = (model.head_dim // 2, 2) if inverse else (2, model.head_dim // 2)
    return tensor.reshape(-1, *axes, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)

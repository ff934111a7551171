"""Names and blocks of a model's tensors in torch.distributed checkpoints of other trainers.

`hf`: parameters of the transformers class, with a layer's experts in one tensor. `torchtitan`: parameters of
torchtitan 0.3, whose Llama has a head's rotary pairs as neighbours, and whose optimizer has query, key and
value in one parameter.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_sov.base.errors import UserError
from megatron_sov.base.hints.table import load_package_table
from megatron_sov.convert.sources import BlockPlace
from megatron_sov.model.config import ModelConfig
from megatron_sov.model.families.weights import Link
from megatron_sov.model.pretrained import EMBEDDING

HF, TORCHTITAN = "hf", "torchtitan"
PREFIXES = {HF: "model.", TORCHTITAN: ""}
"""Names -> prefix of weights in checkpoints that we write."""
EMBEDDINGS = {HF: EMBEDDING, TORCHTITAN: "tok_embeddings.weight"}
"""Names -> embedding, which identifies the names of a checkpoint."""
MOVED_BIAS, PLACE_IN_CLASS = ".mlp.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"
"""A name in Hugging Face folders, and the name in transformers' class."""
_TITAN: dict[str, Any] = load_package_table(Path(__file__).with_suffix(".yaml"))
TITAN_BIAS, FUSED_QKV = ".moe.expert_bias_E", "attention.qkv_linear.wqkv.weight"
_LAYER = re.compile(r"model\.(layers\.\d+\.)(.+)\.weight")
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class Part:
    """A stored tensor, and the block of it that holds Hugging Face tensors of a link."""

    key: str
    """Name of the stored tensor, without prefix."""
    names: tuple[str, ...]
    """Hugging Face tensors: a single one, or all of the link."""
    shape: tuple[int, ...]
    """Shape of the block without the axis of experts."""
    leading_sizes: tuple[int, ...] = ()
    """Size of the axis of experts, if the stored tensor has one."""
    leading_indices: tuple[int, ...] = ()

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        return (*self.leading_sizes, *self.shape)

    @property
    def place(self) -> BlockPlace:
        return (self.key, (*self.leading_indices, *(0,) * len(self.shape)),
                (*(1,) * len(self.leading_sizes), *self.shape))


def check_names(names: str, model: ModelConfig) -> None:
    """Raise `UserError` if torchtitan has no counterpart of the model's family."""
    if names == TORCHTITAN and model.family not in _TITAN["families"]:
        raise UserError(f"--names {TORCHTITAN}: torchtitan 0.3 has no model of family {model.family!r}, only "
                        f"{', '.join(_TITAN['families'])}; use --names {HF}")


def list_forms(names: str, link: Link, *, is_state: bool = False) -> list[list[Part]]:
    """Return the forms in which a checkpoint may hold a link's tensors, or their optimizer state; we write
    the first. Raises `UserError`: torchtitan has no counterpart of a tensor."""
    shapes = link.hf_shapes()
    separate = [Part(name, (name,), shape) for name, shape in shapes.items()]
    if names == TORCHTITAN:
        parts = [_find_titan_part(link, name, shape) for name, shape in shapes.items()]
        layer = _LAYER.fullmatch(link.hf_names[0])
        if is_state and layer is not None and layer[2] == "self_attn.q_proj":
            return [[_stack_part(link, layer[1] + FUSED_QKV, link.hf_names, link.block_shape)], parts]
        return [parts]
    if expert := _EXPERT.fullmatch(link.hf_names[0]):
        name = "gate_up_proj" if len(link.hf_names) > 1 else "down_proj"
        return [[_stack_part(link, f"{expert[1]}.{name}", link.hf_names, link.block_shape)], separate]
    if link.hf_names[0].endswith(MOVED_BIAS):
        return [[replace(separate[0], key=separate[0].key.replace(MOVED_BIAS, PLACE_IN_CLASS))], separate]
    return [separate]


def _stack_part(link: Link, key: str, names: tuple[str, ...], shape: tuple[int, ...]) -> Part:
    """Return a part in a tensor that has the leading axis of the link, if any, for experts."""
    num_axes = len(link.shape) - len(link.block_shape)
    return Part(key, names, shape, link.shape[:num_axes], link.offset[:num_axes])


def _find_titan_part(link: Link, name: str, shape: tuple[int, ...]) -> Part:
    layer = _LAYER.fullmatch(name)
    prefix, module = (layer[1], layer[2]) if layer else ("", name.removesuffix(".weight"))
    if expert := _EXPERT.fullmatch(name):
        key = f"{prefix}moe.routed_experts.inner_experts.{_TITAN['experts'][expert[3]]}"
        return _stack_part(link, key, (name,), shape)
    if module not in _TITAN["modules"]:
        raise UserError(f"--names {TORCHTITAN}: torchtitan 0.3 has no counterpart of {name}; use --names "
                        f"{HF}")
    return _stack_part(link, f"{prefix}{_TITAN['modules'][module]}.weight", (name,), shape)


def order_rotary(names: str, model: ModelConfig, name: str, tensor: torch.Tensor, *, inverse: bool = False
                 ) -> torch.Tensor:
    """Order the rows of a query or key matrix as torchtitan's Llama, in which the rows of a rotary pair are
    neighbours; in Hugging Face's Llama they are half a head apart."""
    if (names != TORCHTITAN or model.family != "llama"
            or not name.endswith((".q_proj.weight", ".k_proj.weight"))):
        return tensor
    axes = (model.head_dim // 2, 2) if inverse else (2, model.head_dim // 2)
    return tensor.reshape(-1, *axes, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)

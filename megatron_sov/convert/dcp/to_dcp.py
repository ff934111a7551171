"""Export a checkpoint, with its optimizer, for trainers that load torch.distributed checkpoints (DCP).

Optimizer state has the flat keys of `torch.distributed.checkpoint.state_dict` (option
`flatten_optimizer_state_dict`), which do not depend on parameter groups or pipeline stages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_sov.base.artifacts import format_json, write_atomically
from megatron_sov.base.errors import UserError
from megatron_sov.base.hints.table import load_package_table
from megatron_sov.convert import DEFAULT_WORKERS
from megatron_sov.convert.companion_files import copy_companions, read_token_ids
from megatron_sov.convert.dcp.writer import (
    DcpPlanner, DcpTensor, TrainedModel, open_trained_model, write_export)
from megatron_sov.convert.hf_import import get_duplicates
from megatron_sov.convert.sources import CheckpointWeights
from megatron_sov.engine.optimizer.parameter_groups import GroupRule, find_rule
from megatron_sov.engine.optimizer.state_shards import MASTER
from megatron_sov.model.config import ModelConfig, OptimConfig
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.weights import Link
from megatron_sov.model.pretrained import CONFIG, EMBEDDING, HEAD
from megatron_sov.schedules import Schedule

KIND = "dcp_checkpoint"
HF, TORCHTITAN = "hf", "torchtitan"
_TITAN: dict[str, Any] = load_package_table(Path(__file__).with_suffix(".yaml"))
MOVED_BIAS, PLACE_IN_CLASS = ".mlp.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"
"""A name in Hugging Face folders, and the name in transformers' class."""
STATE_NAMES = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "momentum": "momentum_buffer"}
"""Our name of an optimizer tensor -> name in torch.optim.AdamW and torch.optim.Muon."""
_LAYER = re.compile(r"model\.(layers\.\d+\.)(.+)\.weight")
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def to_dcp(checkpoint: str | Path, out: str | Path, *, names: str = HF, weights_only: bool = False,
           workers: int = DEFAULT_WORKERS, overwrite: bool = False) -> TrainedModel:
    """Write OUT/step-N for `torch.distributed.checkpoint.load`, with config.json and tokenizer in OUT; return
    its source. `names` are `HF` or `TORCHTITAN`; for the other arguments see `to_megatron`. Raises
    `UserError`: torchtitan has no such model, the checkpoint is damaged, or the disk is full."""
    source = open_trained_model(checkpoint, weights_only=weights_only)
    content = _ExportContent(source, names)
    planner = DcpPlanner(source.path, content.tensors, content.objects, content.aliases)
    family, tokenizer = models.get_family(source.settings.model.family), source.path / "tokenizer"
    tokens = read_token_ids(tokenizer)

    def write_companions(folder: Path) -> None:
        copy_companions(tokenizer, folder, tokens)
        dtype = next(iter(content.tensors.values())).dtype
        config = family.to_hf_config(source.settings.model, str(dtype).removeprefix("torch."), tokens)
        write_atomically(folder / CONFIG, format_json(config))

    write_export(Path(out), KIND, source, planner, f"step-{source.step}", write_companions, workers=workers,
                 overwrite=overwrite)
    return source


@dataclass(frozen=True)
class Part:
    """A block of a written tensor."""

    key: str
    names: tuple[str, ...]
    """Hugging Face tensors: a single one, or all of the link."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    expert: int | None = None
    """Index along the leading axis; None: the block is the whole tensor."""


def list_parts(names: str, link: Link, *, state: bool) -> list[Part]:
    """Return the blocks with a link's Hugging Face tensors, or with their optimizer state. Raises
    `UserError`: torchtitan has no counterpart."""
    first, shapes = link.hf_names[0], link.hf_shapes()
    expert, layer = _EXPERT.fullmatch(first), _LAYER.fullmatch(first)
    if names == TORCHTITAN:
        if state and layer and first.endswith(".q_proj.weight"):  # `fuse_qkv`, torchtitan's default
            return [Part(f"{layer[1]}attention.qkv_linear.wqkv.weight", link.hf_names, link.block_shape)]
        return [_find_titan_part(name, shape, link.shape[0]) for name, shape in shapes.items()]
    if expert:
        name = "gate_up_proj" if len(shapes) > 1 else "down_proj"
        return [Part(f"{expert[1]}.{name}", link.hf_names, link.shape, int(expert[2]))]
    return [Part(name.replace(MOVED_BIAS, PLACE_IN_CLASS), (name,), shape) for name, shape in shapes.items()]


def _find_titan_part(name: str, shape: tuple[int, ...], num_experts: int) -> Part:
    layer = _LAYER.fullmatch(name)
    prefix, module = (layer[1], layer[2]) if layer else ("", name.removesuffix(".weight"))
    if expert := _EXPERT.fullmatch(name):
        key = f"{prefix}moe.routed_experts.inner_experts.{_TITAN['experts'][expert[3]]}"
        return Part(key, (name,), (num_experts, *shape), int(expert[2]))
    if module not in _TITAN["modules"] or name.endswith(".bias"):
        raise UserError(f"--names {TORCHTITAN}: torchtitan 0.3 has no {name}; use --names {HF}")
    return Part(f"{prefix}{_TITAN['modules'][module]}.weight", (name,), shape)


def order_rotary(model: ModelConfig, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Order the rows of a query or key matrix as torchtitan's Llama, in which the rows of a rotary pair are
    neighbours; in Hugging Face's Llama they are half a head apart."""
    if model.family != "llama" or not name.endswith((".q_proj.weight", ".k_proj.weight")):
        return tensor
    halves = tensor.reshape(-1, 2, model.head_dim // 2, tensor.shape[-1])
    return halves.transpose(1, 2).reshape(tensor.shape)


class _ExportContent:
    """Tensors, objects and further names of an export, see `DcpPlanner`."""

    def __init__(self, source: TrainedModel, names: str) -> None:
        model = source.settings.model
        if names == TORCHTITAN and model.family not in _TITAN["families"]:
            raise UserError(f"--names {TORCHTITAN}: torchtitan 0.3 has no model of family {model.family!r}, "
                            f"only {', '.join(_TITAN['families'])}; use --names {HF}")
        self._source, self._names = source, names
        self._prefix = "model." if names == HF else ""
        self._parts: dict[str, list[tuple[Part, Link]]] = {}
        self.tensors: dict[str, DcpTensor] = {}
        self.objects: dict[str, Any] = {}
        self.aliases: dict[str, list[str]] = {}
        self._add_weights(CheckpointWeights(source.path))
        if source.num_updates is not None:
            self._add_optimizer(source.num_updates)

    def _add_weights(self, weights: CheckpointWeights) -> None:
        """Add weights; torch's optimizers update them directly, so masters take precedence."""
        model = self._source.settings.model
        keys: dict[str, str] = {}
        masters = None if self._source.num_updates is None else CheckpointWeights(self._source.path, MASTER)
        master_names = set() if masters is None else set(masters.list_names())
        for link in weights.links:
            origin = masters if masters is not None and link.hf_names[0] in master_names else weights
            for part in list_parts(self._names, link, state=False):
                self._add_part(self._prefix + part.key, part, link, origin)
                keys |= dict.fromkeys(part.names, part.key)
        copies = get_duplicates(weights) | ({HEAD: EMBEDDING} if model.tied_embeddings else {})
        for copy, name in copies.items():
            self.aliases.setdefault(self._prefix + keys[name], []).append(self._prefix + copy)
        if self._names == TORCHTITAN:  # begins to balance the experts
            for layer in range(model.num_layers - model.num_moe_layers(), model.num_layers):
                self.tensors[f"layers.{layer}.moe.expert_bias_E"] = DcpTensor(
                    (model.num_experts,), torch.float32, lambda offset, extent: torch.zeros(*extent))

    def _add_optimizer(self, num_updates: int) -> None:
        optim, step = self._source.settings.optim, self._source.step
        rate = Schedule(self._source.settings).learning_rate(step)
        steps: list[str] = []
        settings: dict[tuple[str, Any], list[str]] = {}
        for state, theirs in STATE_NAMES.items():
            moments = CheckpointWeights(self._source.path, state)
            for link in moments.links:
                rule = find_rule(optim, link.key.partition("/")[2], len(link.block_shape))
                for part in list_parts(self._names, link, state=True):
                    self._add_part(f"optimizer.state.{part.key}.{theirs}", part, link, moments)
                    if part.expert or state == "exp_avg_sq":
                        continue
                    if state == "exp_avg":
                        steps.append(f"optimizer.state.{part.key}.step")
                    for field in _describe_group(optim, rule, rate, self._names).items():
                        settings.setdefault(field, []).append(f"optimizer.param_groups.{part.key}.{field[0]}")
        for (_, value), (key, *others) in settings.items():
            self.objects[key], self.aliases[key] = value, others
        if steps:
            self.aliases[steps[0]] = steps[1:]
            self.tensors[steps[0]] = DcpTensor((), torch.float32,
                                               lambda offset, extent: torch.tensor(float(num_updates)))
        self.objects |= {"lr_scheduler.last_epoch": step, "train_state.step": step,
                         "train_state.ntokens_seen": self._source.num_tokens}

    def _add_part(self, key: str, part: Part, link: Link, origin: CheckpointWeights) -> None:
        """Add a part of tensor `key`; experts are added in order."""
        parts = self._parts.setdefault(key, [])
        parts.append((part, link))
        self.tensors[key] = DcpTensor(part.shape, origin.get_dtype(part.names[0]),
                                      partial(self._read_rows, origin, parts))

    def _read_rows(self, origin: CheckpointWeights, parts: list[tuple[Part, Link]], offset: Sequence[int],
                   extent: Sequence[int]) -> torch.Tensor:
        rows = slice(offset[0], offset[0] + extent[0])
        if parts[0][0].expert is None:
            return self._read_part(origin, *parts[0])[rows]
        return torch.stack([self._read_part(origin, part, link) for part, link in parts[rows]])

    def _read_part(self, origin: CheckpointWeights, part: Part, link: Link) -> torch.Tensor:
        tensors = {name: origin.read(name) for name in part.names}
        if self._names == TORCHTITAN:
            tensors = {name: order_rotary(origin.model, name, tensor) for name, tensor in tensors.items()}
        joined: torch.Tensor = link.join(tensors) if len(tensors) > 1 else tensors[part.names[0]]
        return joined.contiguous()


def _describe_group(optim: OptimConfig, rule: GroupRule, rate: float, names: str) -> dict[str, Any]:
    """Return a parameter group of torch.optim.AdamW or torch.optim.Muon, with torchtitan's default
    `implementation` for torchtitan."""
    group = {"lr": rate * rule.lr_scale, "initial_lr": optim.lr * rule.lr_scale,
             "weight_decay": rule.weight_decay}
    if rule.algorithm == "muon":
        return group | {"momentum": optim.muon_momentum, "nesterov": optim.muon_nesterov, "eps": 1e-7,
                        "ns_coefficients": optim.muon_ns_coefficients, "ns_steps": optim.muon_ns_steps,
                        "adjust_lr_fn": optim.muon_scale}
    foreach, fused = (False, True) if names == TORCHTITAN else (None, None)
    return group | {"betas": (optim.beta1, optim.beta2), "eps": optim.eps, "amsgrad": False,
                    "maximize": False, "foreach": foreach, "capturable": False, "differentiable": False,
                    "fused": fused, "decoupled_weight_decay": True}

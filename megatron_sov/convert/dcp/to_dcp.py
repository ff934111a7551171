"""Export a checkpoint, with its optimizer, for trainers that load torch.distributed checkpoints (DCP).

Optimizer state has the flat keys of `torch.distributed.checkpoint.state_dict` (option
`flatten_optimizer_state_dict`), which do not depend on parameter groups or pipeline stages.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_sov.base.artifacts import format_json, write_atomically
from megatron_sov.convert import DEFAULT_WORKERS
from megatron_sov.convert.companion_files import copy_companions, read_token_ids
from megatron_sov.convert.dcp.writer import (
    DcpPlanner, DcpTensor, TrainedModel, open_trained_model, write_export)
from megatron_sov.convert.hf_import import get_duplicates
from megatron_sov.convert.sources import CheckpointWeights
from megatron_sov.engine.optimizer.parameter_groups import GroupRule, find_rule
from megatron_sov.engine.optimizer.state_shards import MASTER
from megatron_sov.model.config import OptimConfig
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.weights import Link
from megatron_sov.model.pretrained import CONFIG, EMBEDDING, HEAD
from megatron_sov.schedules import Schedule

KIND = "dcp_checkpoint"
MOVED_BIAS, PLACE_IN_CLASS = ".mlp.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"
"""A name in Hugging Face folders, and the name in transformers' class."""
STATE_NAMES = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "momentum": "momentum_buffer"}
"""Our name of an optimizer tensor -> name in torch.optim.AdamW and torch.optim.Muon."""
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def to_dcp(checkpoint: str | Path, out: str | Path, *, weights_only: bool = False,
           workers: int = DEFAULT_WORKERS, overwrite: bool = False) -> TrainedModel:
    """Write OUT/step-N for `torch.distributed.checkpoint.load`, with config.json and tokenizer in OUT; return
    its source. For arguments and errors see `to_megatron`."""
    source = open_trained_model(checkpoint, weights_only=weights_only)
    content = _ExportContent(source)
    planner = DcpPlanner(source.path, content.tensors, content.objects, content.aliases)
    family, tokenizer = models.get_family(source.settings.model.family), source.path / "tokenizer"
    tokens = read_token_ids(tokenizer)

    def write_companions(folder: Path) -> None:
        copy_companions(tokenizer, folder, tokens)
        dtype = next(iter(content.tensors.values())).dtype
        config = family.to_hf_config(source.settings.model, str(dtype).removeprefix("torch."), tokens)
        write_atomically(folder / CONFIG, format_json(config))

    write_export(Path(out), KIND, source=source, planner=planner, subfolder=f"step-{source.step}",
                 write_companions=write_companions, workers=workers, overwrite=overwrite)
    return source


@dataclass(frozen=True)
class Part:
    """A tensor to write: all of a Megatron tensor, or a Hugging Face tensor inside it."""

    key: str
    name: str
    """Hugging Face tensor; the first one for stacked experts."""
    tensor_shape: tuple[int, ...]


def list_parts(link: Link) -> list[Part]:
    """Return the tensors of a link under the names of transformers' class, which stacks experts as
    Megatron-Core does: the link of the first expert stands for all experts."""
    if expert := _EXPERT.fullmatch(link.hf_names[0]):
        name = "gate_up_proj" if len(link.hf_names) > 1 else "down_proj"
        return [] if link.offset[0] else [Part(f"{expert[1]}.{name}", link.hf_names[0], link.shape)]
    return [Part(name.replace(MOVED_BIAS, PLACE_IN_CLASS), name, shape)
            for name, shape in link.hf_shapes().items()]


class _ExportContent:
    """Tensors, objects and further names of an export, see `DcpPlanner`."""

    def __init__(self, source: TrainedModel) -> None:
        self._source, self.tensors = source, dict[str, DcpTensor]()
        self.objects: dict[str, Any] = {}
        self.aliases: dict[str, list[str]] = {}
        self._add_weights(CheckpointWeights(source.path))
        if source.num_updates is not None:
            self._add_optimizer(source.num_updates)

    def _add_weights(self, weights: CheckpointWeights) -> None:
        """Add weights; torch's optimizers update them directly, so masters take precedence."""
        model = self._source.settings.model
        origins = {link.hf_names: (link, weights) for link in weights.links}
        if self._source.num_updates is not None:
            masters = CheckpointWeights(self._source.path, MASTER)
            origins |= {link.hf_names: (link, masters) for link in masters.links}
        keys: dict[str, str] = {}
        for link, origin in origins.values():
            for part in list_parts(link):
                self._add_part(f"model.{part.key}", part, link, origin)
                keys[part.name] = part.key
        copies = get_duplicates(weights) | ({HEAD: EMBEDDING} if model.tied_embeddings else {})
        for copy, name in copies.items():
            self.aliases.setdefault(f"model.{keys[name]}", []).append(f"model.{copy}")

    def _add_optimizer(self, num_updates: int) -> None:
        optim, step = self._source.settings.optim, self._source.step
        rate = Schedule(self._source.settings).learning_rate(step)
        steps: list[str] = []
        settings: dict[tuple[str, Any], list[str]] = {}
        for state, theirs in STATE_NAMES.items():
            moments = CheckpointWeights(self._source.path, state)
            for link in moments.links:
                rule = find_rule(optim, link.key.partition("/")[2], len(link.block_shape))
                for part in list_parts(link):
                    self._add_part(f"optimizer.state.{part.key}.{theirs}", part, link, moments)
                    if state == "exp_avg_sq":
                        continue
                    if state == "exp_avg":
                        steps.append(f"optimizer.state.{part.key}.step")
                    for field in _describe_group(optim, rule, rate).items():
                        settings.setdefault(field, []).append(f"optimizer.param_groups.{part.key}.{field[0]}")
        for (_, value), (key, *others) in settings.items():
            self.objects[key], self.aliases[key] = value, others
        if steps:
            self.aliases[steps[0]] = steps[1:]
            self.tensors[steps[0]] = DcpTensor((), torch.float32,
                                               lambda offset, extent: torch.tensor(float(num_updates)))
        self.objects["lr_scheduler.last_epoch"] = step

    def _add_part(self, key: str, part: Part, link: Link, origin: CheckpointWeights) -> None:
        read = partial(origin.read_stored, link.key)
        if part.tensor_shape != link.shape:
            read = partial(_read_rows, origin, part.name)
        self.tensors[key] = DcpTensor(part.tensor_shape, origin.get_dtype(part.name), read)


def _read_rows(origin: CheckpointWeights, name: str, offset: Sequence[int], extent: Sequence[int]
               ) -> torch.Tensor:
    return origin.read(name)[offset[0]:offset[0] + extent[0]].contiguous()


def _describe_group(optim: OptimConfig, rule: GroupRule, rate: float) -> dict[str, Any]:
    """Return a parameter group of torch.optim.AdamW or torch.optim.Muon."""
    group = {"lr": rate * rule.lr_scale, "initial_lr": optim.lr * rule.lr_scale,
             "weight_decay": rule.weight_decay}
    if rule.algorithm == "muon":
        return group | {"momentum": optim.muon_momentum, "nesterov": optim.muon_nesterov, "eps": 1e-7,
                        "ns_coefficients": optim.muon_ns_coefficients, "ns_steps": optim.muon_ns_steps,
                        "adjust_lr_fn": optim.muon_scale}
    return group | {"betas": (optim.beta1, optim.beta2), "eps": optim.eps, "amsgrad": False,
                    "maximize": False, "foreach": None, "capturable": False, "differentiable": False,
                    "fused": None, "decoupled_weight_decay": True}

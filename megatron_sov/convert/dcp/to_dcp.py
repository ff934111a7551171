"""Export a checkpoint, with its optimizer, for trainers that load torch.distributed checkpoints (DCP).

Optimizer state has the flat keys of `torch.distributed.checkpoint.state_dict` (option
`flatten_optimizer_state_dict`), which do not depend on parameter groups or pipeline stages.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_sov.convert import DEFAULT_WORKERS
from megatron_sov.convert.dcp.names import (
    HF, PREFIXES, TITAN_BIAS, TORCHTITAN, Part, check_names, list_forms, order_rotary)
from megatron_sov.convert.dcp.writer import (
    ADAMW_DEFAULTS, DcpPlanner, DcpTensor, TrainedModel, open_trained_model, write_export, write_hf_files)
from megatron_sov.convert.hf_import import get_duplicates
from megatron_sov.convert.sources import CheckpointWeights
from megatron_sov.engine.optimizer.parameter_groups import GroupRule, find_rule
from megatron_sov.engine.optimizer.state_shards import MASTER
from megatron_sov.model.config import OptimConfig
from megatron_sov.model.families.weights import Link
from megatron_sov.model.pretrained import EMBEDDING, HEAD
from megatron_sov.schedules import Schedule

KIND = "dcp_checkpoint"
STATE_NAMES = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "momentum": "momentum_buffer"}
"""Our name of an optimizer tensor -> name in torch.optim.AdamW and torch.optim.Muon."""


def to_dcp(checkpoint: str | Path, out: str | Path, *, names: str = HF, weights_only: bool = False,
           workers: int = DEFAULT_WORKERS, overwrite: bool = False) -> TrainedModel:
    """Write OUT/step-N for `torch.distributed.checkpoint.load`, with config.json and tokenizer in OUT; return
    its source. `names`: `hf` or `torchtitan`. For other arguments and errors see `to_megatron`."""
    source = open_trained_model(checkpoint, weights_only=weights_only)
    check_names(names, source.settings.model)
    content = _ExportContent(source, names)
    planner = DcpPlanner(source.path, content.tensors, content.objects, content.aliases)
    dtype = next(iter(content.tensors.values())).dtype
    write_export(Path(out), KIND, source=source, planner=planner, subfolder=f"step-{source.step}",
                 write_companions=lambda folder: write_hf_files(source, folder, dtype), workers=workers,
                 overwrite=overwrite)
    return source


class _ExportContent:
    """Tensors, objects and further names of an export, see `DcpPlanner`."""

    def __init__(self, source: TrainedModel, names: str) -> None:
        self._source, self._names, self.tensors = source, names, dict[str, DcpTensor]()
        self.objects: dict[str, Any] = {}
        self.aliases: dict[str, list[str]] = {}
        self._add_weights(CheckpointWeights(source.path))
        if source.num_updates is not None:
            self._add_optimizer(source.num_updates)

    def _add_weights(self, weights: CheckpointWeights) -> None:
        """Add weights; torch's optimizers update them directly, so masters take precedence."""
        model, prefix = self._source.settings.model, PREFIXES[self._names]
        origins = {link.hf_names: (link, weights) for link in weights.links}
        if self._source.num_updates is not None:
            masters = CheckpointWeights(self._source.path, MASTER)
            origins |= {link.hf_names: (link, masters) for link in masters.links}
        keys: dict[str, str] = {}
        for link, origin in origins.values():
            for part in self._list_parts(link):
                self._add_part(prefix + part.key, part, link, origin)
                keys |= dict.fromkeys(part.names, part.key)
        copies = get_duplicates(weights) | ({HEAD: EMBEDDING} if model.tied_embeddings else {})
        for copy, name in copies.items():
            self.aliases.setdefault(prefix + keys[name], []).append(prefix + copy)
        if self._names == TORCHTITAN:  # begins to balance the experts
            for layer in range(model.num_layers - model.num_moe_layers(), model.num_layers):
                self.tensors[f"layers.{layer}{TITAN_BIAS}"] = DcpTensor(
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
                for part in self._list_parts(link, is_state=True):
                    self._add_part(f"optimizer.state.{part.key}.{theirs}", part, link, moments)
                    if state == "exp_avg_sq":
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

    def _list_parts(self, link: Link, *, is_state: bool = False) -> list[Part]:
        """Return the tensors of a link; the link of the first expert stands for all experts."""
        return [part for part in list_forms(self._names, link, is_state=is_state)[0]
                if not any(part.leading_indices)]

    def _add_part(self, key: str, part: Part, link: Link, origin: CheckpointWeights) -> None:
        read = partial(self._read_rows, origin, part, link)
        if part.tensor_shape == link.shape and (self._names == HF or len(part.names) == 1):
            read = partial(origin.tensors.read, link.key)
        self.tensors[key] = DcpTensor(part.tensor_shape, origin.get_dtype(part.names[0]), read)

    def _read_rows(self, origin: CheckpointWeights, part: Part, link: Link, offset: Sequence[int],
                   extent: Sequence[int]) -> torch.Tensor:
        rows = range(offset[0], offset[0] + extent[0])
        if part.leading_sizes:
            return torch.stack([origin.read(part.names[0].replace(".experts.0.", f".experts.{expert}."))
                                for expert in rows])
        tensors = {name: order_rotary(self._names, origin.model, name, origin.read(name))
                   for name in part.names}
        joined = link.join(tensors) if len(tensors) > 1 else tensors[part.names[0]]
        return joined[rows.start:rows.stop].contiguous()


def _describe_group(optim: OptimConfig, rule: GroupRule, rate: float, names: str) -> dict[str, Any]:
    """Return a parameter group of torch.optim.AdamW (torchtitan: `fused`) or torch.optim.Muon."""
    group = {"lr": rate * rule.lr_scale, "initial_lr": optim.lr * rule.lr_scale,
             "weight_decay": rule.weight_decay}
    if rule.algorithm == "muon":
        return group | {"momentum": optim.muon_momentum, "nesterov": optim.muon_nesterov, "eps": 1e-7,
                        "ns_coefficients": optim.muon_ns_coefficients, "ns_steps": optim.muon_ns_steps,
                        "adjust_lr_fn": optim.muon_scale}
    fused = {"foreach": False, "fused": True} if names == TORCHTITAN else {}
    return group | {"betas": (optim.beta1, optim.beta2), "eps": optim.eps} | ADAMW_DEFAULTS | fused

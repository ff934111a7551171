"""Assigns parameters to AdamW or Muon with learning rate scale and weight decay, freezes them, and wraps the
model for data parallelism."""

import fnmatch
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_sov.base.errors import UserError
from megatron_sov.engine.model import graphs, quantized_weights
from megatron_sov.engine.model.gpu_settings import gradient_settings
from megatron_sov.engine.model.language_model import VOCABULARY_WEIGHTS, LanguageModel
from megatron_sov.engine.model.local_shards import ParameterLookup, list_declared_blocks
from megatron_sov.engine.optimizer.adamw import HostAdamW, split_groups
from megatron_sov.engine.optimizer.muon import Muon, get_matrix_group
from megatron_sov.engine.optimizer.state_shards import ShardOptimizer, StateShard, list_shards
from megatron_sov.engine.parallel.values import gather_objects
from megatron_sov.model.config import GpuConfig, OptimConfig, ParallelConfig
from megatron_sov.model.config.gpu import DEFAULT_GPU
from megatron_sov.model.config.train import Algorithm
from megatron_sov.model.families.adapters import PREFIX
from megatron_sov.model.families.encoders import is_frozen, is_position_table


def wrap_chunks(model: LanguageModel, parallel: ParallelConfig, gpu: GpuConfig = DEFAULT_GPU) -> list[Any]:
    """Wrap every chunk in `DistributedDataParallel` and set the schedules' communication hooks.

    Gradients are plain sums over processes. With ZeRO-1 the parameters move to one buffer per dtype."""
    settings = DistributedDataParallelConfig(
        **gradient_settings(gpu, parallel, bf16=model.config.bf16),
        use_distributed_optimizer=parallel.zero1, overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        # all stages of an interleaved pipeline send at the same time, since sending slows down computation
        align_param_gather=parallel.overlap_param_gather and parallel.vpp > 1,
        bucket_size=parallel.bucket_params or None,
        fp8_param_gather=model.config.fp8_param,
        reuse_grad_buf_for_mxfp8_param_ag=quantized_weights.shares_gradient_memory(model.config))
    # gradients of the first chunk are ready last, and only they are sent in several buckets
    with graphs.use_side_stream(model.config):
        wrapped = [DistributedDataParallel(model.config, settings, chunk, disable_bucketing=i > 0,
                                           full_param_layout=_zero1_layout(chunk, settings, is_first=i == 0))
                   for i, chunk in enumerate(model.chunks)]
    if parallel.overlap_grad_reduce:
        model.config.no_sync_func = _unwrap_single([w.no_sync for w in wrapped])
        model.config.grad_sync_func = _unwrap_single([w.start_grad_sync for w in wrapped])
    if parallel.overlap_param_gather:
        if settings.align_param_gather:
            model.config.param_sync_func = [w.start_param_sync for w in wrapped]
        if model.chunks[-1].post_process:
            model.chunks[-1].wait_for_head = partial(_wait_for_head, wrapped[-1], model.head_weight)
    return wrapped


def _zero1_layout(chunk: Any, settings: DistributedDataParallelConfig, *, is_first: bool) -> Any:
    """Return the places of a chunk's parameters in the buffers of ZeRO-1, which Megatron-Core asks of its
    callers; None without ZeRO-1."""
    if not settings.use_distributed_optimizer:
        return None
    size = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    bucket_size = None
    if settings.overlap_grad_reduce and is_first and parallel_state.get_pipeline_model_parallel_rank() == 0:
        # Megatron-Core's own default
        bucket_size = settings.bucket_size or max(40_000_000, 1_000_000 * size)
    return DistributedOptimizer.compute_full_param_layout(
        [parameter for parameter in chunk.parameters() if parameter.requires_grad], bucket_size, size,
        settings, expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_world_size())


def _unwrap_single(functions: list[Any]) -> Any:
    """Return the list for an interleaved pipeline, else the only function, as the schedules expect."""
    return functions if len(functions) > 1 else functions[0]


def _wait_for_head(wrapped: Any, weight: torch.Tensor) -> None:
    """Wait for the head's updated weight after the last hidden states are computed.

    Megatron-Core waits in a module's forward pre-hook, but losses use the head weight without calling the
    module."""
    wrapped.param_to_bucket_group[weight].finish_param_sync(skip_next_bucket_dispatch=True)


def gather_parameters(wrapped: list[Any]) -> None:
    """All-gather the updated weights and wait."""
    for chunk in wrapped:
        chunk.start_param_sync(force_sync=True)


def has_gathered(wrapped: list[Any]) -> bool:
    """Return whether an all-gather of weights was started since the last gradient reduction."""
    return any(group.param_gather_dispatched for chunk in wrapped
               for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups)


@dataclass(frozen=True)
class GroupRule:
    """A parameter's update rule, from `optim.groups`."""

    algorithm: Algorithm
    lr_scale: float
    weight_decay: float
    frozen: bool


Rules = dict[int, GroupRule]
"""`id(parameter)` -> rule."""


class ChainedOptimizer:
    """Several optimizers with the interface of a single optimizer, for Megatron-Core."""

    def __init__(self, *inners: ShardOptimizer) -> None:
        self._inners = inners

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for inner in self._inners for group in inner.param_groups]

    def step(self) -> None:
        """Update all shards from their gradients."""
        for inner in self._inners:
            inner.step()


def build_rules(model: LanguageModel, config: OptimConfig) -> Rules:
    """Return `id(parameter)` -> `GroupRule`. Collective. Raises `UserError`: on every process, if a group's
    pattern matches no tensor or every parameter is frozen."""
    lookup, rule_by_id, matched = ParameterLookup(model), {}, set()
    for block in list_declared_blocks(model):
        parameter = lookup.find_parameter(block)
        if parameter is not None:
            rule = find_rule(config, block.key, parameter.dim())
            adapted = model.lora.on and not block.key.startswith(PREFIX)
            if adapted or is_frozen(block.key, model.encoder_training):
                rule = replace(rule, frozen=True)
            rule_by_id[id(parameter)] = rule
            matched |= {g.pattern for g in config.groups if fnmatch.fnmatchcase(block.key, g.pattern)}
    # gather first: a pattern may match on another stage only, and all processes must raise together
    gathered = gather_objects((matched, any(not rule.frozen for rule in rule_by_id.values())))
    for i, group in enumerate(config.groups):
        if not any(group.pattern in patterns for patterns, _ in gathered):
            raise UserError(f"optim.groups.{i}.pattern = {group.pattern!r}: matches no parameter; "
                            "a checkpoint's model.index.json has the names, and * stands for any text")
    if not any(trains for _, trains in gathered):
        frozen = ", ".join(group.pattern for group in config.groups if group.frozen)
        raise UserError(f"optim.groups: {frozen} freeze every parameter, so there is nothing to train; "
                        "leave one of them out")
    return rule_by_id


def find_rule(config: OptimConfig, key: str, dim: int) -> GroupRule:
    """Return the rule of the parameter `key` with `dim` axes; the last matching group applies."""
    is_matrix = dim == 2 and key not in VOCABULARY_WEIGHTS and not is_position_table(key)
    # no weight decay for norms and biases, unless a group sets it
    usual_decay = config.weight_decay if dim > 1 else 0.0
    rule = GroupRule(config.name if is_matrix else "adamw", 1.0, usual_decay, frozen=False)
    for group in config.groups:
        if fnmatch.fnmatchcase(key, group.pattern):
            decay = usual_decay if group.weight_decay is None else group.weight_decay
            rule = GroupRule((group.optimizer or config.name) if is_matrix else "adamw", group.lr_scale,
                             decay, group.frozen)
    return rule


def freeze_parameters(model: LanguageModel, rules: Rules) -> None:
    """Set `requires_grad` by the rules, and keep the embedding output differentiable if it is frozen."""
    for parameter in model.parameters():
        parameter.requires_grad_(not rules[id(parameter)].frozen)
    for chunk in model.chunks:
        embedding = getattr(chunk, "embedding", None)
        if embedding is not None and not embedding.word_embeddings.weight.requires_grad:
            # recomputed layers and pipeline stages decide by their input whether to run a backward pass
            embedding.register_forward_hook(_require_gradient)


def _require_gradient(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output if output.requires_grad else output.detach().requires_grad_()


def assign_shards(megatron_optimizer: Any, model: LanguageModel, rules: Rules, config: OptimConfig, *,
                  zero1: bool, on_host: float = 0.0) -> list[StateShard]:
    """Assign every `StateShard` to the optimizer of its `GroupRule` and return the shards. Collective.

    Megatron-Core creates AdamW for all shards; `ChainedOptimizer` adds Muon or `HostAdamW` for some shards.

    Args:
        on_host: share of AdamW's parameters whose masters, moments and update are in host memory.
    """
    all_shards: list[StateShard] = []
    with_muon = "muon" in (config.name, *(group.optimizer for group in config.groups))
    for optimizer in megatron_optimizer.chained_optimizers:
        local_shards, adam = list_shards(optimizer), optimizer.optimizer
        if adam is None:
            continue
        is_expert = adam.param_groups[0]["is_expert_parallel"]
        adam_groups, muon_groups = _split_by_rule(adam.param_groups,
                                                  {id(s.main): rules[id(s.parameter)] for s in local_shards})
        adam.param_groups = adam_groups
        if with_muon:
            matrices = [s for s in local_shards if rules[id(s.parameter)].algorithm == "muon"]
            muon = Muon(config, model, matrices, muon_groups, get_matrix_group(is_expert, zero1))
            optimizer.optimizer = ChainedOptimizer(adam, muon)
            local_shards = [replace(s, inner=muon) if rules[id(s.parameter)].algorithm == "muon" else s
                            for s in local_shards]
        elif on_host:
            local_shards = _offload_shards(optimizer, local_shards, on_host)
        all_shards += local_shards
    return all_shards


def _offload_shards(optimizer: Any, local_shards: list[StateShard], share: float) -> list[StateShard]:
    """Move a share of AdamW's shards to host memory; return the shards with their new optimizers."""
    adam = optimizer.optimizer
    adam.param_groups, moved = split_groups(adam.param_groups, [s.main for s in local_shards], share)
    if not moved:  # with few parameters the local range may be padding only
        return local_shards
    host = HostAdamW(moved)
    optimizer.optimizer = ChainedOptimizer(adam, host)
    host_ids = {id(main) for group in moved for main in group["params"]}
    return [replace(s, inner=host) if id(s.main) in host_ids else s for s in local_shards]


def _split_by_rule(groups: list[dict[str, Any]],
                   rule_by_main: dict[int, GroupRule]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return AdamW's and Muon's groups, in Megatron-Core's order; parameters in a group have equal rules."""
    rule_groups: dict[tuple[int, GroupRule], dict[str, Any]] = {}
    for number, group in enumerate(groups):
        for main in group["params"]:
            rule = rule_by_main[id(main)]
            rule_group = {**group, "params": [], "lr_scale": rule.lr_scale, "weight_decay": rule.weight_decay}
            rule_groups.setdefault((number, rule), rule_group)["params"].append(main)
    by_algorithm: dict[str, list[dict[str, Any]]] = {"adamw": [], "muon": []}
    for (_, rule), rule_group in rule_groups.items():
        by_algorithm[rule.algorithm].append(rule_group)
    return by_algorithm["adamw"], by_algorithm["muon"]

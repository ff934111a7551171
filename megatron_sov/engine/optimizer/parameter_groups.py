"""Which parameter is updated how: by AdamW or Muon, at which rate and weight decay, or not at all."""

from __future__ import annotations

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
from megatron_sov.engine.model.local_shards import ParameterLookup, declared_blocks
from megatron_sov.engine.optimizer.adamw import HostAdamW, split
from megatron_sov.engine.optimizer.muon import Muon, holders
from megatron_sov.engine.optimizer.state_shards import Inner, StateShard, shards
from megatron_sov.engine.parallel.values import gather_objects
from megatron_sov.model.config import GpuConfig, OptimConfig, ParallelConfig
from megatron_sov.model.config.gpu import AUTO
from megatron_sov.model.config.train import Algorithm
from megatron_sov.model.families.adapters import PREFIX
from megatron_sov.model.families.encoders import is_frozen, is_table

# Data parallelism: gradients are summed over processes and updated weights gathered, beside the computation
# if so set.

def wrap(model: LanguageModel, parallel: ParallelConfig, gpu: GpuConfig = AUTO) -> list[Any]:
    """Wrap every chunk, and tell the pipeline schedules when to send.

    Gradients are plain sums of what the losses give.  With ZeRO-1 the model's parameters move into
    one buffer per dtype.
    """
    settings = DistributedDataParallelConfig(
        **gradient_settings(gpu, parallel, bf16=model.config.bf16),
        use_distributed_optimizer=parallel.zero1, overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        # stages of an interleaved pipeline send at the same time, since one that sends computes more slowly
        align_param_gather=parallel.overlap_param_gather and parallel.vpp > 1,
        bucket_size=parallel.bucket_params or None,
        fp8_param_gather=model.config.fp8_param,
        reuse_grad_buf_for_mxfp8_param_ag=quantized_weights.shares_gradients(model.config))
    # the first chunk's gradients are the last to be ready, and only they are sent in several buckets
    with graphs.off_the_default_stream(model.config):
        wrapped = [DistributedDataParallel(model.config, settings, chunk, disable_bucketing=i > 0,
                                           full_param_layout=_zero1_layout(chunk, settings, is_first=i == 0))
                   for i, chunk in enumerate(model.chunks)]
    if parallel.overlap_grad_reduce:
        model.config.no_sync_func = _per_chunk([w.no_sync for w in wrapped])
        model.config.grad_sync_func = _per_chunk([w.start_grad_sync for w in wrapped])
    if parallel.overlap_param_gather:
        if settings.align_param_gather:
            model.config.param_sync_func = [w.start_param_sync for w in wrapped]
        if model.chunks[-1].post_process:
            model.chunks[-1].before_head = partial(_wait_for_head, wrapped[-1], model.head_weight)
    return wrapped


def _zero1_layout(chunk: Any, settings: DistributedDataParallelConfig, *, is_first: bool) -> Any:
    """Return the places of a chunk's parameters in the buffers of ZeRO-1, which the library asks of its
    callers; None without ZeRO-1."""
    if not settings.use_distributed_optimizer:
        return None
    size = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    bucket_size = None
    if settings.overlap_grad_reduce and is_first and parallel_state.get_pipeline_model_parallel_rank() == 0:
        # the library's own default
        bucket_size = settings.bucket_size or max(40_000_000, 1_000_000 * size)
    return DistributedOptimizer.compute_full_param_layout(
        [parameter for parameter in chunk.parameters() if parameter.requires_grad], bucket_size, size,
        settings, expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_world_size())


def _per_chunk(functions: list[Any]) -> Any:
    """Only schedules of an interleaved pipeline take lists."""
    return functions if len(functions) > 1 else functions[0]


def _wait_for_head(wrapped: Any, weight: torch.Tensor) -> None:
    """Wait for the head's updated weight once the last hidden states are there.

    The library waits whenever a module is called, but losses take the head's weight and
    never call its module.
    """
    wrapped.param_to_bucket_group[weight].finish_param_sync(skip_next_bucket_dispatch=True)


def gather(wrapped: list[Any]) -> None:
    """Bring every process's part of the weights to all of them."""
    for chunk in wrapped:
        chunk.start_param_sync(force_sync=True)


def has_gathered(wrapped: list[Any]) -> bool:
    """Return whether weights have been gathered since the last gradients were summed."""
    return any(group.param_gather_dispatched for chunk in wrapped
               for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups)


@dataclass(frozen=True)
class GroupRule:
    """How one parameter is updated."""

    algorithm: Algorithm
    lr_scale: float
    weight_decay: float
    frozen: bool


Rules = dict[int, GroupRule]
"""id of a parameter -> its rule."""


class Combined:
    """AdamW and Muon as one optimizer: what the library steps, clips and zeroes."""

    def __init__(self, *inners: Inner) -> None:
        self._inners = inners

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for inner in self._inners for group in inner.param_groups]

    def step(self) -> None:
        """Update all shards by their gradients."""
        for inner in self._inners:
            inner.step()


def rules(model: LanguageModel, config: OptimConfig) -> Rules:
    """Return every parameter's rule; called by all processes together.

    Raises:
        UserError: on every process; a group's pattern matches no tensor, or nothing is left to train.
    """
    lookup, found, matched = ParameterLookup(model), {}, set()
    for block in declared_blocks(model):
        parameter = lookup.find(block)
        if parameter is not None:
            rule = rule_for(config, block.key, parameter.dim())
            adapted = model.lora.on and not block.key.startswith(PREFIX)
            if adapted or is_frozen(block.key, model.encoder_training):
                rule = replace(rule, frozen=True)
            found[id(parameter)] = rule
            matched |= {g.pattern for g in config.groups if fnmatch.fnmatchcase(block.key, g.pattern)}
    # together: a pattern may match on another pipeline stage alone, and all processes must raise alike
    everyones = gather_objects((matched, any(not rule.frozen for rule in found.values())))
    for i, group in enumerate(config.groups):
        if not any(group.pattern in known for known, _ in everyones):
            raise UserError(f"optim.groups.{i}.pattern = {group.pattern!r}: matches no parameter; "
                            "a checkpoint's model.index.json has the names, and * stands for any text")
    if not any(trains for _, trains in everyones):
        frozen = ", ".join(group.pattern for group in config.groups if group.frozen)
        raise UserError(f"optim.groups: {frozen} freeze every parameter, so there is nothing to train; "
                        "leave one of them out")
    return found


def rule_for(config: OptimConfig, key: str, dim: int) -> GroupRule:
    """Return the rule of the parameter `key` with `dim` axes."""
    is_matrix = dim == 2 and key not in VOCABULARY_WEIGHTS and not is_table(key)
    # norms and biases are not decayed unless a group says so
    usual_decay = config.weight_decay if dim > 1 else 0.0
    rule = GroupRule(config.name if is_matrix else "adamw", 1.0, usual_decay, frozen=False)
    for group in config.groups:
        if fnmatch.fnmatchcase(key, group.pattern):  # the last one that matches counts
            decay = usual_decay if group.weight_decay is None else group.weight_decay
            rule = GroupRule((group.optimizer or config.name) if is_matrix else "adamw", group.lr_scale,
                             decay, group.frozen)
    return rule


def freeze(model: LanguageModel, rules: Rules) -> None:
    """Have frozen parameters get no gradients, and what lies before the others still pass theirs on."""
    for parameter in model.parameters():
        parameter.requires_grad_(not rules[id(parameter)].frozen)
    for chunk in model.chunks:
        embedding = getattr(chunk, "embedding", None)
        if embedding is not None and not embedding.word_embeddings.weight.requires_grad:
            # recomputed layers and pipeline stages look at their input alone for whether there is
            # anything to differentiate
            embedding.register_forward_hook(_differentiable)


def _differentiable(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output if output.requires_grad else output.detach().requires_grad_()


def arrange(library: Any, model: LanguageModel, rules: Rules, config: OptimConfig, *,
            zero1: bool, on_host: float = 0.0) -> list[StateShard]:
    """Give every shard to the optimizer of its rule, and return them all; called by all processes together.

    The library made AdamW for all of them, which keeps those that are its own.

    Args:
        on_host: share of AdamW's parameters whose masters, moments and update are the host's.
    """
    all_shards: list[StateShard] = []
    with_muon = "muon" in (config.name, *(group.optimizer for group in config.groups))
    for optimizer in library.chained_optimizers:
        found, adam = shards(optimizer), optimizer.optimizer
        if adam is None:
            continue
        is_expert = adam.param_groups[0]["is_expert_parallel"]
        adam_groups, muon_groups = _regroup(adam.param_groups,
                                            {id(s.main): rules[id(s.parameter)] for s in found})
        adam.param_groups = adam_groups
        if with_muon:
            matrices = [s for s in found if rules[id(s.parameter)].algorithm == "muon"]
            muon = Muon(config, model, matrices, muon_groups, holders(is_expert, zero1))
            optimizer.optimizer = Combined(adam, muon)
            found = [replace(s, inner=muon) if rules[id(s.parameter)].algorithm == "muon" else s
                     for s in found]
        elif on_host:
            found = _offload(optimizer, found, on_host)
        all_shards += found
    return all_shards


def _offload(optimizer: Any, found: list[StateShard], share: float) -> list[StateShard]:
    """Move a share of what AdamW updates into host memory; return the shards with what updates them now."""
    adam = optimizer.optimizer
    adam.param_groups, moved = split(adam.param_groups, [s.main for s in found], share)
    if not moved:  # of few parameters a process's stretch may be padding alone; torch takes no empty list
        return found
    host = HostAdamW(moved)
    optimizer.optimizer = Combined(adam, host)
    theirs = {id(main) for group in moved for main in group["params"]}
    return [replace(s, inner=host) if id(s.main) in theirs else s for s in found]


def _regroup(groups: list[dict[str, Any]],
             rule_of: dict[int, GroupRule]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return AdamW's groups and Muon's: parameters of the same rule, in the order of the library's groups."""
    made: dict[tuple[int, GroupRule], dict[str, Any]] = {}
    for number, group in enumerate(groups):
        for main in group["params"]:
            rule = rule_of[id(main)]
            own = {**group, "params": [], "lr_scale": rule.lr_scale, "weight_decay": rule.weight_decay}
            made.setdefault((number, rule), own)["params"].append(main)
    by_algorithm: dict[str, list[dict[str, Any]]] = {"adamw": [], "muon": []}
    for (_, rule), own in made.items():
        by_algorithm[rule.algorithm].append(own)
    return by_algorithm["adamw"], by_algorithm["muon"]

"""Export a checkpoint, with its optimizer, as a `torch_dist` checkpoint of Megatron-Core.

Torch's writer gives each block its own file, so a damaged file names its tensor.
Optimizer state has the library's `fully_reshardable` form, which loads at any layout.
"""

from __future__ import annotations

import io
import json
import math
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_sov.base.artifacts import (
    FileRecord, create_artifact, format_json, read_manifest, sha256_file, write_atomically)
from megatron_sov.base.digests import SHA256
from megatron_sov.base.errors import UserError
from megatron_sov.base.hints.kinds import TRACKER
from megatron_sov.checkpoint.load import read_state
from megatron_sov.checkpoint.sharded_tensors import TensorReader
from megatron_sov.convert import DEFAULT_WORKERS
from megatron_sov.convert.dtypes import check_space, convert_tensor
from megatron_sov.convert.hf_import import INTEGRITY
from megatron_sov.convert.megatron.from_megatron import (
    BACKEND, DECAY_STYLES, EXPERTS, FORMAT, STATES, VERSIONS)
from megatron_sov.convert.megatron.inert_pickle import COMMON_STATE
from megatron_sov.convert.sources import resolve_run
from megatron_sov.engine.model.specs import PRECISION
from megatron_sov.model.config import RunConfig
from megatron_sov.model.counterparts.architecture import describe_model
from megatron_sov.runs.checkpoints import (
    ADAPTER, MODEL, OPTIMIZER, find_damage, read_checkpoint_settings, suggest_replacement)
from megatron_sov.schedules import Schedule, bound_lengths

KIND = "megatron_checkpoint"
EMPTY_STATE = "empty/shard_0_1"
MAX_BLOCK_BYTES = 1 << 30
CONTENT = {"distrib_optim_sharding_type": "fully_reshardable", "singleton_local_shards": False,
           "non_homogeneous_layers": True, "chained_optim_avoid_prefix": True}
"""Form of the tensors, which Megatron-LM reads before it declares its own."""
WSD_STYLES = {"linear": "linear", "cosine": "cosine", "one_minus_sqrt": "minus_sqrt"}


@dataclass(frozen=True)
class ExportReport:
    """Facts about an export, for the command's output."""

    step: int
    """Completed optimizer steps, Megatron's iteration."""
    num_updates: int | None
    """Updates in the moments; None: weights only."""
    schedule_problem: str
    """Reason why the learning rate is written as constant; "": it is not."""


def to_megatron(checkpoint: str | Path, out: str | Path, *, weights_only: bool = False,
                one_optimizer: bool = False, workers: int = DEFAULT_WORKERS,
                overwrite: bool = False) -> ExportReport:
    """Write a checkpoint for Megatron-Core's `dist_checkpointing` (artifact kind `megatron_checkpoint`).

    Args:
        checkpoint: checkpoint, or run (newest checkpoint).
        out: folder to write, for Megatron-LM's `--load`; it appears when complete.
        weights_only: leave out moments, master weights and schedule.
        one_optimizer: the loading run has one optimizer for experts and other weights, as Megatron-Core has
            without expert parallelism if tensor parallelism splits both alike.
        workers: files written at a time, each with one block in memory.
        overwrite: replace an existing `megatron_checkpoint` artifact.

    Raises:
        UserError: Megatron-Core cannot build the model or its optimizer, the checkpoint is damaged, or the
            disk is full.
    """
    checkpoint, out = resolve_run(Path(checkpoint)), Path(out)
    settings, content = read_checkpoint_settings(checkpoint), read_manifest(checkpoint).content
    parts, step = content.get("parts", []), content["step"]
    if ADAPTER in parts:
        raise UserError(f"{checkpoint}: is an adapter, which Megatron-Core's GPTModel does not have; merge "
                        "it with `megatron-sov convert to-hf`, then `from-hf`")
    has_optimizer = OPTIMIZER in parts and not weights_only
    num_updates = read_state(checkpoint)["num_updates"] if has_optimizer else None
    common, problem = build_common_state(settings, step, num_updates, one_optimizer=one_optimizer)
    planner = CheckpointPlanner(checkpoint, common, has_optimizer=has_optimizer)
    check_space(out, planner.size_bytes)
    if damage := find_damage(checkpoint, weights_only=not has_optimizer):
        raise UserError(f"{damage}; {suggest_replacement(checkpoint)}")
    with create_artifact(out, KIND, overwrite=overwrite) as artifact:
        folder = artifact.path / f"iter_{step:07d}"
        planner.write(folder, workers)
        write_atomically(folder / FORMAT, json.dumps({"sharded_backend": BACKEND,
                                                      "sharded_backend_version": VERSIONS[0]}))
        digests = {file.name: sha256_file(file) for file in sorted(folder.iterdir())}
        artifact.hashed_files = {
            f"{folder.name}/{name}": FileRecord(f"{SHA256}:{digest}", (folder / name).stat().st_size)
            for name, digest in digests.items()}
        write_atomically(folder / INTEGRITY, format_json({"algorithm": SHA256, "files": digests}))
        write_atomically(artifact.path / TRACKER, str(step))
        artifact.add_input(checkpoint, for_export=True)
        artifact.content = {"step": step, "family": settings.model.family, "num_updates": num_updates}
    return ExportReport(step, num_updates, problem)


class CheckpointPlanner(DefaultSavePlanner):
    """Gives torch's writer the tensors of a checkpoint under Megatron's keys, a block at a time."""

    def __init__(self, path: Path, common: dict[str, Any], *, has_optimizer: bool) -> None:
        """Read the indices; raises `UserError` for damage, or for state without counterpart."""
        super().__init__(flatten_state_dict=False)
        self._path, self._common = path, common
        self._sources: dict[str, tuple[TensorReader, str]] = {}
        """Megatron's key -> reader and our key."""
        for part in (MODEL, OPTIMIZER) if has_optimizer else (MODEL,):
            reader = TensorReader(path, part)
            reader.check_complete()
            keys = reader.keys()
            self._sources |= {_find_key(path, part, key): (reader, key) for key in keys}
        self.size_bytes = sum(math.prod(reader.get_shape(key)) * reader.get_dtype(key).itemsize
                              for reader, key in self._sources.values())

    def write(self, folder: Path, workers: int) -> None:
        """Write files and index, with a block per worker in memory. Raises `UserError`: a value is not finite
        or cannot be read; OSError: a file cannot be written."""
        writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
        writer.set_up_storage_writer(True)
        self.set_up_planner({}, is_coordinator=True)
        plans, index = self.create_global_plan([writer.prepare_local_plan(SavePlan([item]))
                                                for item in self.create_local_plan().items])
        # a plan per block, because errors in threads of torch's writer are lost
        pool = ThreadPoolExecutor(workers)
        try:
            blocks = [pool.submit(writer.write_data, plan, self)
                      for plan in writer.prepare_global_plan(plans)]
            results = [result for block in blocks for result in block.result().wait()]
        finally:
            pool.shutdown(cancel_futures=True)
        aliases = self._list_aliases()
        for key, names in aliases.items():
            index.state_dict_metadata |= dict.fromkeys(names, index.state_dict_metadata[key])
        results += [replace(result, index=replace(result.index, fqn=name)) for result in list(results)
                    for name in aliases.get(result.index.fqn, ())]
        writer.finish(index, [results])

    def create_local_plan(self) -> SavePlan:
        """Return blocks of at most `MAX_BLOCK_BYTES`, or one row."""
        self.plan = SavePlan([WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO)
                              for name in (COMMON_STATE, EMPTY_STATE)])
        for key, (reader, ours) in self._sources.items():
            shape, dtype = torch.Size(reader.get_shape(ours)), reader.get_dtype(ours)
            rows = max(1, MAX_BLOCK_BYTES // max(1, math.prod(shape[1:]) * dtype.itemsize))
            for first in range(0, shape[0], rows):
                chunk = ChunkStorageMetadata(torch.Size([first, *[0] * (len(shape) - 1)]),
                                             torch.Size([min(rows, shape[0] - first), *shape[1:]]))
                self.plan.items.append(WriteItem(
                    MetadataIndex(key, chunk.offsets), WriteItemType.SHARD,
                    tensor_data=TensorWriteData(chunk, TensorProperties(dtype), shape)))
        return self.plan

    def resolve_data(self, item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Read a block, or serialize an object."""
        if item.tensor_data is None:
            torch.save([self._common if item.index.fqn == COMMON_STATE else None], raw := io.BytesIO())
            return raw
        reader, key = self._sources[item.index.fqn]
        block = reader.read(key, item.tensor_data.chunk.offsets, item.tensor_data.chunk.sizes)
        return convert_tensor(block, block.dtype, self._path, key)

    def _list_aliases(self) -> dict[str, list[str]]:
        """Return key -> further names of the same values.

        The distributed optimizer asks for the weights that it updates: masters, or in float32 the weights
        themselves. With Transformer Engine, modules with weights and attention ask for `_extra_state`, which
        is empty without FP8 history.
        """
        empty: list[str] = []
        prefix, masters = "optimizer.state.exp_avg.", f"optimizer.state.{STATES['master']}."
        aliases = {EMPTY_STATE: empty}
        for key, (reader, ours) in self._sources.items():
            if key == ours:
                module, num_parts = key.rpartition(".")[0], reader.get_shape(key)[0] if EXPERTS in key else 1
                empty += [f"{module}._extra_state/shard_{part}_{num_parts}" for part in range(num_parts)]
                if module.endswith(".linear_proj"):
                    empty.append(f"{module.removesuffix('linear_proj')}core_attention._extra_state/shard_0_1")
            elif key.startswith(prefix):
                name = key.removeprefix(prefix)
                updated = masters + name if masters + name in self._sources else name
                aliases[updated] = [f"optimizer.state.param.{name}"]
        return aliases


def _find_key(path: Path, part: str, key: str) -> str:
    """Return Megatron's key; raises `UserError` for Muon's state."""
    if part == MODEL:
        return key
    state, _, name = key.partition("/")
    if state not in STATES:
        raise UserError(f"{path}: {key} is Muon's state, for which Megatron-Core needs another package "
                        "(emerging_optimizers); pass --weights-only")
    return f"optimizer.state.{STATES[state]}.{name}"


def build_common_state(settings: RunConfig, step: int, num_updates: int | None, *,
                       one_optimizer: bool) -> tuple[dict[str, Any], str]:
    """Return everything but tensors that Megatron-LM stores, and why the schedule is missing ("": it is not).

    Args:
        settings: config of the run.
        step: completed steps.
        num_updates: updates in the moments; None: no optimizer.
        one_optimizer: see `to_megatron`.
    """
    optim, samples = settings.optim, settings.train.global_batch_size
    args = describe_model(settings.model) | {
        "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
        "params_dtype": PRECISION[settings.train.precision], "bf16": settings.train.precision == "bf16",
        "seq_length": min(settings.data.phases[-1].seq_len, settings.model.max_position_tokens),
        "global_batch_size": samples, "iteration": step, "consumed_train_samples": step * samples,
        "consumed_valid_samples": 0, "ckpt_format": BACKEND, "use_distributed_optimizer": True,
        "data_parallel_random_init": False, "add_position_embedding": True,
        # random numbers follow from seed, step and rank, so a checkpoint has no generator state
        "no_save_rng": True, "no_save_optim": num_updates is None}
    common = {"checkpoint_version": 3.0, "iteration": step, "content_metadata": dict(CONTENT),
              "num_floating_point_operations_so_far": 0}
    if num_updates is None:
        return common | {"args": Namespace(**args)}, ""
    if optim.groups:
        raise UserError(f"optim.groups: has {len(optim.groups)} groups of parameters, which a torch_dist "
                        "checkpoint cannot describe; pass --weights-only")
    scheduler, style, problem = _describe_schedule(settings, step)
    args |= style | {"lr": optim.lr, "min_lr": optim.min_lr, "weight_decay": optim.weight_decay, "optimizer":
                     "adam", "adam_beta1": optim.beta1, "adam_beta2": optim.beta2, "adam_eps": optim.eps,
                     "clip_grad": optim.clip_grad}
    optimizers = [_describe_optimizer(settings, num_updates, is_expert=False)]
    if settings.model.num_experts and not one_optimizer:
        optimizers.append(_describe_optimizer(settings, num_updates, is_expert=True))
    common |= {"args": Namespace(**args), "opt_param_scheduler": scheduler,
               OPTIMIZER: optimizers[0] if len(optimizers) == 1 else dict(enumerate(optimizers))}
    return common, problem


def _describe_optimizer(settings: RunConfig, num_updates: int, *, is_expert: bool) -> dict[str, Any]:
    """Return the state of one of the library's optimizers without its tensors.

    `optimizer` and `param_state_sharding_type` are read by the distributed optimizer, `state` and
    `param_groups` by the optimizer of float32 weights that every process repeats.
    """
    optim = settings.optim
    groups = [{
        "lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps,
        "weight_decay": optim.weight_decay * decays, "wd_mult": decays, "lr_mult": 1.0,
        "is_decoupled_lr": False, "is_expert_parallel": is_expert, "default_config": True,
        "max_lr": optim.lr, "min_lr": optim.min_lr, "bias_correction": True, "amsgrad": False,
        "maximize": False, "foreach": None, "capturable": False, "differentiable": False, "fused": None,
        "decoupled_weight_decay": True}  # vectors do not decay, and experts have none
        for decays in ((1.0,) if is_expert else (1.0, 0.0))]
    return {"optimizer": {"param_groups": [{**group, "step": num_updates} for group in groups]},
            "param_state_sharding_type": CONTENT["distrib_optim_sharding_type"], "param_groups": groups,
            "state": {"common_step": torch.tensor(float(num_updates))}}


def _describe_schedule(settings: RunConfig, step: int) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return the state of the library's scheduler, Megatron-LM's arguments for it, and why the learning rate
    is written as constant ("": it is not). The library counts in samples."""
    optim, schedule = settings.optim, Schedule(settings)
    samples, end = settings.train.global_batch_size, schedule.num_steps
    warmup, decay = bound_lengths(optim, end, optim.warmup_steps)
    problem = _find_schedule_problem(settings, schedule)
    style = "constant" if problem else DECAY_STYLES[optim.schedule]
    scheduler = {
        "max_lr": optim.lr, "min_lr": optim.min_lr, "lr_decay_style": style,
        "lr_warmup_steps": warmup * samples, "lr_decay_steps": end * samples,
        # our first step has the rate after one step of warm-up, the library's has the rate before it
        "num_steps": (step + 1) * samples, "start_wd": optim.weight_decay, "end_wd": optim.weight_decay,
        "wd_incr_style": "constant", "wd_incr_steps": end * samples}
    arguments = {"lr_decay_style": style, "lr_warmup_samples": warmup * samples, "lr_warmup_init": 0.0,
                 "lr_decay_samples": end * samples, "train_samples": end * samples, "train_iters": end}
    if style == "WSD":
        arguments |= {"lr_wsd_decay_samples": decay * samples,
                      "lr_wsd_decay_style": WSD_STYLES[optim.decay_form]}
    return scheduler, arguments, problem


def _find_schedule_problem(settings: RunConfig, schedule: Schedule) -> str:
    optim = settings.optim
    problems = {
        "optim.schedule_by = tokens": optim.schedule_by == "tokens", "optim.rewarm": bool(optim.rewarm),
        "a phase has its own learning rate": any(p.lr or p.rewarm_steps for p in settings.data.phases),
        "the batch size changes": len({stretch.batch_size for stretch in schedule.stretches}) > 1,
        "inverse_sqrt without warm-up": optim.schedule == "inverse_sqrt" and not optim.warmup_steps}
    return next((sentence for sentence, applies in problems.items() if applies), "")

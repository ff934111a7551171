"""Export a checkpoint, with its optimizer, as a `torch_dist` checkpoint of Megatron-Core.

Every block has its own `torch.save` file, so memory holds one block per worker, and a damaged file names its
tensor. Optimizer state has the library's `fully_reshardable` form, which loads at any layout.
"""

from __future__ import annotations

import json
import math
import os
import pickle
from argparse import Namespace
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata)

from megatron_sov.base.artifacts import (
    FileRecord, check_output_folder, manifest_sha256, read_manifest, sha256_file, write_atomically)
from megatron_sov.base.digests import SHA256
from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint.load import read_state
from megatron_sov.checkpoint.safetensors_files import HashedFile, TensorSource, TensorSpec
from megatron_sov.checkpoint.sharded_tensors import TensorReader, format_block_name
from megatron_sov.convert import DEFAULT_WORKERS
from megatron_sov.convert.hf_import import hash_file_plan, write_unfinished
from megatron_sov.convert.inert_pickle import COMMON_STATE
from megatron_sov.convert.megatron_import import BACKEND, EXPERTS, FORMAT, METADATA, TRACKER, VERSIONS
from megatron_sov.convert.sources import resolve_run
from megatron_sov.engine.model.specs import PRECISION
from megatron_sov.model.config import RunConfig
from megatron_sov.model.counterparts.architecture import describe_model
from megatron_sov.runs.checkpoints import ADAPTER, MODEL, read_checkpoint_settings
from megatron_sov.schedules import Schedule
from megatron_sov.work.progress.resumable import resumable_artifact

KIND = "megatron_checkpoint"
OPTIMIZER = "optimizer"
STATES = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "master": "fp32_param"}
"""Our name of an optimizer tensor -> Megatron's."""
PARAM = "param"
"""Megatron's name of the weights that the distributed optimizer updates."""
MAX_BLOCK_BYTES = 1 << 30
INTEGRITY = "integrity.json"
"""SHA-256 of every file, for `dist_checkpointing.load(..., verify_integrity=True)`."""
COMMON_FILE, EMPTY_FILE = "__0_0.distcp", "__0_1.distcp"
"""Files of the common state, and of the state of every module without FP8 history."""
CONTENT = {"distrib_optim_sharding_type": "fully_reshardable", "singleton_local_shards": False,
           "non_homogeneous_layers": True, "chained_optim_avoid_prefix": True}
"""Form of the tensors, which Megatron-LM reads before it declares its own."""
DECAY_STYLES = {"cosine": "cosine", "linear": "linear", "wsd": "WSD", "inverse_sqrt": "inverse-square-root",
                "constant": "constant"}
WSD_STYLES = {"linear": "linear", "cosine": "cosine", "one_minus_sqrt": "minus_sqrt"}


@dataclass(frozen=True)
class ExportReport:
    """Facts about an export, for the command's output."""

    step: int
    """Completed optimizer steps, Megatron's iteration."""
    num_updates: int | None
    """Updates in the moments; None: weights only."""
    schedule_problem: str
    """Reason why the learning rate schedule is written as constant; "": it is carried."""


def to_megatron(checkpoint: str | Path, out: str | Path, *, weights_only: bool = False, ep: int | None = None,
                workers: int = DEFAULT_WORKERS, overwrite: bool = False, redo: bool = False) -> ExportReport:
    """Write a checkpoint for Megatron-Core's `dist_checkpointing` (artifact kind `megatron_checkpoint`).

    Args:
        checkpoint: checkpoint, or run (newest checkpoint).
        out: folder to write, for Megatron-LM's `--load`. It appears when complete; a killed command continues
            where it stopped.
        weights_only: leave out moments, master weights and schedule.
        ep: expert-parallel size of the run that will load the optimizer. Above 1 Megatron-Core has a second
            optimizer, for the experts. None: that of the checkpoint's run.
        workers: files written at a time.
        overwrite: replace an existing `megatron_checkpoint` artifact.
        redo: start over if unfinished work with other arguments exists.

    Raises:
        UserError: Megatron-Core cannot build the model or its optimizer, the checkpoint is damaged, or the disk
            is full.
    """
    checkpoint, out = resolve_run(Path(checkpoint)), Path(out)
    check_output_folder(out, KIND, overwrite)
    settings, manifest = read_checkpoint_settings(checkpoint), read_manifest(checkpoint)
    parts = manifest.content.get("parts", [])
    if ADAPTER in parts:
        raise UserError(f"{checkpoint}: is an adapter, which Megatron-Core's GPTModel does not have; merge it with "
                        "`megatron-sov convert to-hf`, then `from-hf`")
    has_optimizer = OPTIMIZER in parts and not weights_only
    source = StoredParts(checkpoint, (MODEL, OPTIMIZER) if has_optimizer else (MODEL,))
    state = read_state(checkpoint) if has_optimizer else {"num_updates": None}
    step = manifest.content["step"]
    common, problem = build_common_state(settings, step, state["num_updates"], ep or settings.parallel.ep)
    folder = f"iter_{step:07d}"
    blocks = source.list_blocks(folder)
    files = {name: [TensorSpec(block.name, block.shape, block.dtype)] for name, block in blocks.items()}
    by_name = {block.name: block for block in blocks.values()}
    plan = {"manifest": manifest_sha256(checkpoint), "weights_only": weights_only, "ep": ep,
            "files": hash_file_plan(files)}
    with resumable_artifact(out, KIND, "megatron-sov convert to-megatron", plan, overwrite=overwrite,
                            redo=redo) as artifact:
        write_unfinished(artifact, files, lambda spec: source.read(by_name[spec.name]), [source],
                         lambda spec: [by_name[spec.name].key], "to-megatron", workers, write_archive)
        _write_index(artifact.path / folder, common, source, blocks, artifact.finished)
        write_atomically(artifact.path / TRACKER, str(step))
        artifact.writer.add_input(checkpoint, for_export=True)
        artifact.writer.content = {"step": step, "family": settings.model.family,
                                   "num_updates": state["num_updates"]}
    return ExportReport(step, state["num_updates"], problem)


@dataclass(frozen=True)
class Block:
    """A block of a tensor, written to a file of its own."""

    key: str
    """Megatron's key."""
    dtype: torch.dtype
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return format_block_name(self.key, self.offset)


class StoredParts:
    """Weights and optimizer state of a checkpoint under Megatron's keys."""

    def __init__(self, path: Path, parts: tuple[str, ...]) -> None:
        """Open the indices; raises `UserError` for damage or a state without counterpart."""
        self.path, self.parts = path, parts
        self._sources: dict[str, tuple[TensorReader, str]] = {}
        for part in parts:
            reader = TensorReader(path, part)
            reader.check_complete()
            for key in reader.keys():  # noqa: SIM118  (a method of the reader, not a dict)
                self._sources[key if part == MODEL else _find_state_key(path, key)] = (reader, key)

    def list_keys_in(self, file: str) -> list[str]:
        return [key for key, (reader, ours) in self._sources.items() if file in reader.list_files(ours)]

    def list_files(self, name: str) -> set[str]:
        reader, key = self._sources[name]
        return reader.list_files(key)

    def read(self, block: Block) -> torch.Tensor:
        reader, key = self._sources[block.key]
        return reader.read(key, block.offset, block.shape)

    def get_shape(self, key: str) -> tuple[int, ...]:
        reader, ours = self._sources[key]
        return reader.get_shape(ours)

    def list_blocks(self, folder: str) -> dict[str, Block]:
        """Return file name -> block of at most `MAX_BLOCK_BYTES`, or one row."""
        blocks = []
        for key, (reader, ours) in self._sources.items():
            shape, dtype = reader.get_shape(ours), reader.get_dtype(ours)
            rows = max(1, MAX_BLOCK_BYTES // max(1, math.prod(shape[1:]) * dtype.itemsize))
            blocks += [Block(key, dtype, (first, *[0] * (len(shape) - 1)),
                             (min(rows, shape[0] - first), *shape[1:])) for first in range(0, shape[0], rows)]
        return {f"{folder}/__{number}_0.distcp": block for number, block in enumerate(blocks, 1)}

    def list_modules(self) -> list[str]:
        """Return the names under which Megatron's modules ask for `_extra_state`: with Transformer Engine every
        module with weights, and attention."""
        names = []
        for key in (key for key, (_, ours) in self._sources.items() if key == ours):
            module = key.rpartition(".")[0]
            num_parts = self.get_shape(key)[0] if EXPERTS in key else 1
            names += [f"{module}._extra_state/shard_{part}_{num_parts}" for part in range(num_parts)]
            if module.endswith(".self_attention.linear_proj"):
                names.append(f"{module.removesuffix('linear_proj')}core_attention._extra_state/shard_0_1")
        return sorted(set(names))

    def list_aliases(self) -> dict[str, str]:
        """Return second name -> key with the same values: the weights that the distributed optimizer updates
        are the masters, or in float32 the model's weights."""
        prefix = _join_state_key("exp_avg", "")
        names = [key.removeprefix(prefix) for key in self._sources if key.startswith(prefix)]
        masters = {name: _join_state_key(STATES["master"], name) for name in names}
        return {_join_state_key(PARAM, name): master if master in self._sources else name
                for name, master in masters.items()}


def _join_state_key(state: str, key: str) -> str:
    return f"optimizer.state.{state}.{key}"


def _find_state_key(path: Path, key: str) -> str:
    state, _, name = key.partition("/")
    if state not in STATES:
        raise UserError(f"{path}: {key} is Muon's state, for which Megatron-Core needs another package "
                        "(emerging_optimizers); pass --weights-only")
    return _join_state_key(STATES[state], name)


class _ArchiveFile(HashedFile):
    """The file object that `torch.save` needs."""

    write = HashedFile.append_bytes

    def flush(self) -> None:
        """Do nothing: writes are not buffered."""


def write_archive(path: Path, specs: list[TensorSpec], read: TensorSource, _: Executor) -> FileRecord:
    """Write and sync one tensor as a `torch.save` file; return digest and size. Raises `OSError`."""
    return _save_archive(path, read(specs[0]).contiguous())


def _save_archive(path: Path, content: Any) -> FileRecord:
    with open(path, "wb", buffering=0) as f:
        file = _ArchiveFile(f.fileno(), SHA256)
        torch.save(content, file)
        os.fsync(f.fileno())
    return FileRecord(file.digest.text(), file.size_bytes)


def _write_index(folder: Path, common: dict[str, Any], source: StoredParts, blocks: Mapping[str, Block],
                 records: Mapping[str, FileRecord]) -> None:
    """Write common state, index, format and file hashes of a checkpoint whose blocks are written."""
    by_key: dict[str, list[tuple[str, Block]]] = {}
    for name, block in blocks.items():
        by_key.setdefault(block.key, []).append((name, block))
    keys = {key: key for key in by_key} | source.list_aliases()
    objects = {COMMON_STATE: _StorageInfo(COMMON_FILE, 0, _save_archive(folder / COMMON_FILE, [common]).size_bytes)}
    empty = _StorageInfo(EMPTY_FILE, 0, _save_archive(folder / EMPTY_FILE, [None]).size_bytes)
    objects |= dict.fromkeys(source.list_modules(), empty)
    index = Metadata(dict.fromkeys(objects, BytesStorageMetadata()),
                     storage_data={MetadataIndex(name): place for name, place in objects.items()})
    for key, stored_key in keys.items():
        stored = by_key[stored_key]
        chunks = [ChunkStorageMetadata(torch.Size(block.offset), torch.Size(block.shape)) for _, block in stored]
        index.state_dict_metadata[key] = TensorStorageMetadata(
            TensorProperties(stored[0][1].dtype), torch.Size(source.get_shape(stored_key)), chunks)
        index.storage_data |= {
            MetadataIndex(key, torch.Size(block.offset)): _StorageInfo(Path(name).name, 0,
                                                                       records[name].size_bytes)
            for name, block in stored}
    write_atomically(folder / METADATA, pickle.dumps(index))
    write_atomically(folder / FORMAT, json.dumps({"sharded_backend": BACKEND,
                                                  "sharded_backend_version": VERSIONS[0]}))
    hashes = {Path(name).name: records[name].digest.removeprefix(f"{SHA256}:") for name in blocks}
    hashes |= {name: sha256_file(folder / name) for name in (COMMON_FILE, EMPTY_FILE, METADATA, FORMAT)}
    write_atomically(folder / INTEGRITY, json.dumps({"algorithm": SHA256, "files": hashes}, indent=2))


def build_common_state(settings: RunConfig, step: int, num_updates: int | None,
                       ep: int) -> tuple[dict[str, Any], str]:
    """Return everything but tensors that Megatron-LM stores, and why the schedule is missing ("": it is not).

    Args:
        settings: config of the run.
        step: completed steps.
        num_updates: updates in the moments; None: no optimizer.
        ep: expert-parallel size of the loading run.
    """
    optim, samples = settings.optim, settings.train.global_batch_size
    args = describe_model(settings.model) | {
        "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "expert_model_parallel_size": ep,
        "params_dtype": PRECISION[settings.train.precision], "bf16": settings.train.precision == "bf16",
        "seq_length": settings.data.phases[-1].seq_len, "global_batch_size": samples, "iteration": step,
        "consumed_train_samples": step * samples, "consumed_valid_samples": 0, "ckpt_format": BACKEND,
        "use_distributed_optimizer": True, "data_parallel_random_init": False, "add_position_embedding": True,
        # random numbers follow from seed, step and rank, so a checkpoint has no generator state
        "no_save_rng": True, "no_save_optim": num_updates is None}
    common = {"checkpoint_version": 3.0, "iteration": step, "content_metadata": dict(CONTENT),
              "num_floating_point_operations_so_far": 0}
    if num_updates is None:
        return common | {"args": Namespace(**args)}, ""
    if optim.groups:
        raise UserError(f"optim.groups: has {len(optim.groups)} groups of parameters, which a torch_dist checkpoint "
                        "cannot describe; pass --weights-only")
    scheduler, style, problem = _describe_schedule(settings, step)
    args |= style | {"lr": optim.lr, "min_lr": optim.min_lr, "weight_decay": optim.weight_decay,
                     "adam_beta1": optim.beta1, "adam_beta2": optim.beta2, "adam_eps": optim.eps,
                     "clip_grad": optim.clip_grad, "optimizer": "adam"}
    optimizers = [_describe_optimizer(settings, num_updates, is_expert=False)]
    if settings.model.num_experts and ep > 1:
        optimizers.append(_describe_optimizer(settings, num_updates, is_expert=True))
    return common | {"args": Namespace(**args), "opt_param_scheduler": scheduler,
                     OPTIMIZER: optimizers[0] if len(optimizers) == 1 else dict(enumerate(optimizers))}, problem


def _describe_optimizer(settings: RunConfig, num_updates: int, *, is_expert: bool) -> dict[str, Any]:
    """Return the state of one of the library's optimizers without its tensors.

    `optimizer` and `param_state_sharding_type` are read by the distributed optimizer, `state` and
    `param_groups` by the optimizer of float32 weights that every process repeats.
    """
    optim = settings.optim
    groups = [{
        "lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps,
        "weight_decay": optim.weight_decay * decays, "step": num_updates, "wd_mult": decays, "lr_mult": 1.0,
        "is_decoupled_lr": False, "is_expert_parallel": is_expert, "default_config": True,
        "max_lr": optim.lr, "min_lr": optim.min_lr, "bias_correction": True, "amsgrad": False,
        "maximize": False, "foreach": None, "capturable": False, "differentiable": False, "fused": None,
        "decoupled_weight_decay": True}
        # vectors do not decay, and experts have none
        for decays in ((1.0,) if is_expert else (1.0, 0.0))]
    return {"optimizer": {"param_groups": groups},
            "param_state_sharding_type": CONTENT["distrib_optim_sharding_type"], "param_groups": groups,
            "state": {"common_step": torch.tensor(float(num_updates))}}


def _describe_schedule(settings: RunConfig, step: int) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return the state of the library's scheduler, Megatron-LM's arguments for it, and why the learning rate is
    written as constant ("": it is not). The library counts in samples."""
    optim, schedule = settings.optim, Schedule(settings)
    samples, end = settings.train.global_batch_size, schedule.num_steps
    warmup = min(optim.warmup_steps, end // 2)
    decay = max(1, min(round(end * optim.decay_share), end - warmup))
    problem = _find_schedule_problem(settings, schedule)
    style = "constant" if problem else DECAY_STYLES[optim.schedule]
    scheduler = {
        "max_lr": optim.lr, "min_lr": optim.min_lr, "lr_decay_style": style,
        "lr_warmup_steps": warmup * samples, "lr_decay_steps": end * samples,
        # our first step has the rate after one step of warm-up, the library's has the rate before it
        "num_steps": (step + 1) * samples, "start_wd": optim.weight_decay, "end_wd": optim.weight_decay,
        "wd_incr_style": "constant", "wd_incr_steps": end * samples}
    arguments = {"lr_decay_style": style, "lr_warmup_samples": warmup * samples, "lr_decay_samples": end * samples,
                 "train_samples": end * samples, "lr_warmup_init": 0.0, "train_iters": end}
    if style == "WSD":
        arguments |= {"lr_wsd_decay_samples": decay * samples, "lr_wsd_decay_style": WSD_STYLES[optim.decay_form]}
    return scheduler, arguments, problem


def _find_schedule_problem(settings: RunConfig, schedule: Schedule) -> str:
    optim = settings.optim
    problems = {
        "optim.schedule_by = tokens": optim.schedule_by == "tokens", "optim.rewarm": bool(optim.rewarm),
        "a phase has its own learning rate": any(p.lr or p.rewarm_steps for p in settings.data.phases),
        "the batch size changes": len({stretch.batch_size for stretch in schedule.stretches}) > 1,
        "inverse_sqrt without warm-up": optim.schedule == "inverse_sqrt" and not optim.warmup_steps}
    return next((sentence for sentence, applies in problems.items() if applies), "")

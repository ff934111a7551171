"""Write torch.distributed checkpoints (DCP), a file per block, so that a damaged file names its tensor."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
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
from megatron_sov.checkpoint.load import read_state
from megatron_sov.convert.companion_files import copy_companions, read_token_ids
from megatron_sov.convert.dtypes import check_space, convert_tensor
from megatron_sov.convert.hf_import import INTEGRITY
from megatron_sov.convert.sources import resolve_run
from megatron_sov.model.config import RunConfig
from megatron_sov.model.families import supported as models
from megatron_sov.model.pretrained import CONFIG
from megatron_sov.runs.checkpoints import (
    ADAPTER, OPTIMIZER, find_damage, read_checkpoint_settings, suggest_replacement)

MAX_BLOCK_BYTES = 1 << 30
ADAMW_DEFAULTS = {"amsgrad": False, "maximize": False, "foreach": None, "capturable": False,
                  "differentiable": False, "fused": None, "decoupled_weight_decay": True}
"""Fields of a parameter group of torch.optim.AdamW."""


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint to export."""

    path: Path
    settings: RunConfig
    step: int
    num_tokens: int
    num_updates: int | None
    """Updates in the moments; None: weights only."""


def open_trained_model(checkpoint: str | Path, *, weights_only: bool) -> TrainedModel:
    """Open a checkpoint, or the newest of a run, for an export. Raises `UserError`: it is an adapter."""
    path = resolve_run(Path(checkpoint))
    settings, content = read_checkpoint_settings(path), read_manifest(path).content
    parts = content.get("parts", [])
    if ADAPTER in parts:
        raise UserError(f"{path}: is an adapter, but the export needs a whole model; merge it with "
                        "`megatron-sov convert to-hf`, then `from-hf`")
    has_optimizer = OPTIMIZER in parts and not weights_only
    return TrainedModel(path, settings, content["step"], content.get("tokens", 0),
                        read_state(path)["num_updates"] if has_optimizer else None)


@dataclass(frozen=True)
class DcpTensor:
    """A tensor to write."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[Sequence[int], Sequence[int]], torch.Tensor]
    """Return the block at an offset (first argument) with an extent (second argument)."""


class DcpPlanner(DefaultSavePlanner):
    """Gives torch's writer a checkpoint's tensors, a block at a time."""

    def __init__(self, path: Path, tensors: Mapping[str, DcpTensor], objects: Mapping[str, Any],
                 aliases: Mapping[str, Sequence[str]]) -> None:
        """`path`: the checkpoint; `objects`: pickled values; `aliases`: key -> further keys of its bytes."""
        super().__init__(flatten_state_dict=False)
        self._path, self._tensors, self._objects, self._aliases = path, tensors, objects, aliases
        self.size_bytes = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())

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
        for key, names in self._aliases.items():
            index.state_dict_metadata |= dict.fromkeys(names, index.state_dict_metadata[key])
        results += [replace(result, index=replace(result.index, fqn=name)) for result in list(results)
                    for name in self._aliases.get(result.index.fqn, ())]
        writer.finish(index, [results])

    def create_local_plan(self) -> SavePlan:
        """Return blocks of at most `MAX_BLOCK_BYTES`, or one row."""
        self.plan = SavePlan([WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO)
                              for name in self._objects])
        for key, tensor in self._tensors.items():
            rows, *columns = tensor.shape or (1,)
            rows_per_block = max(1, MAX_BLOCK_BYTES // max(1, math.prod(columns) * tensor.dtype.itemsize))
            for first in range(0, rows, rows_per_block):
                offset, extent = [first, *[0] * len(columns)], [min(rows_per_block, rows - first), *columns]
                chunk = ChunkStorageMetadata(*(torch.Size(sizes[:len(tensor.shape)])  # none for a number
                                               for sizes in (offset, extent)))
                self.plan.items.append(WriteItem(
                    MetadataIndex(key, chunk.offsets), WriteItemType.SHARD, tensor_data=TensorWriteData(
                        chunk, TensorProperties(tensor.dtype), torch.Size(tensor.shape))))
        return self.plan

    def resolve_data(self, item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Read a block, or serialize an object."""
        if item.tensor_data is None:
            torch.save(self._objects[item.index.fqn], raw := io.BytesIO())
            return raw
        key, chunk = item.index.fqn, item.tensor_data.chunk
        block = self._tensors[key].read(chunk.offsets, chunk.sizes)
        return convert_tensor(block, block.dtype, self._path, key)


def write_hf_files(source: TrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Write tokenizer and config.json of a model in `dtype`."""
    tokens = read_token_ids(source.path / "tokenizer")
    copy_companions(source.path / "tokenizer", folder, tokens)
    family = models.get_family(source.settings.model.family)
    config = family.to_hf_config(source.settings.model, str(dtype).removeprefix("torch."), tokens)
    write_atomically(folder / CONFIG, format_json(config))


def write_export(out: Path, kind: str, source: TrainedModel, planner: DcpPlanner, subfolder: str,
                 write_companions: Callable[[Path], None], *, workers: int, overwrite: bool) -> None:
    """Write an artifact with a DCP checkpoint, and the hashes of its files, in `subfolder`; it appears when
    complete. `write_companions` writes other files into a folder. Raises `UserError`: the source is damaged,
    or the disk is full."""
    check_space(out, planner.size_bytes)
    if damage := find_damage(source.path, weights_only=source.num_updates is None):
        raise UserError(f"{damage}; {suggest_replacement(source.path)}")
    with create_artifact(out, kind, overwrite=overwrite) as artifact:
        folder = artifact.path / subfolder
        planner.write(folder, workers)
        write_companions(artifact.path)
        digests = {file.name: sha256_file(file) for file in sorted(folder.iterdir()) if file.is_file()}
        artifact.hashed_files = {
            f"{subfolder}/{name}": FileRecord(f"{SHA256}:{digest}", (folder / name).stat().st_size)
            for name, digest in digests.items()}
        write_atomically(folder / INTEGRITY, format_json({"algorithm": SHA256, "files": digests}))
        artifact.add_input(source.path, for_export=True)
        artifact.content = {"step": source.step, "family": source.settings.model.family,
                            "num_updates": source.num_updates}

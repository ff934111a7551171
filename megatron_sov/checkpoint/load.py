"""Load checkpoints at any parallel layout.

A checkpoint folder holds the `model` and `optimizer` tensors (see `sharded_tensors.py`), `state.json` (step,
data cursors, counters), the settings of the run and the tokenizer. `save.py` publishes it under its name when
all files of all processes are on disk. Each process reads the blocks that its layout needs.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint.sharded_tensors import TensorReader
from megatron_sov.engine.model.language_model import LanguageModel
from megatron_sov.engine.model.local_shards import LocalShard, list_local_shards
from megatron_sov.engine.optimizer.optimizer import Optimizer
from megatron_sov.engine.parallel.values import gather_objects
from megatron_sov.model.families.adapters import PREFIX
from megatron_sov.model.families.encoders import PREFIXES as ENCODERS
from megatron_sov.runs import checkpoints
from megatron_sov.runs.checkpoints import ADAPTER, MODEL


@torch.no_grad()
def load_model(path: Path, model: LanguageModel, *, new_encoders: bool = False) -> None:
    """Load this process's weights from a checkpoint with any layout (collective).

    For an adapter checkpoint, the base checkpoint is verified and loaded too. If `model` has adapters and the
    checkpoint holds all weights, the adapters of `model` keep their values.

    Args:
        path: checkpoint folder.
        model: model to fill.
        new_encoders: image and audio encoders of `model` that the checkpoint lacks keep their values.

    Raises:
        UserError: on every process: keys or shapes differ from the model, a file is damaged, the base of an
            adapter is missing, or the model has no adapter for an adapter checkpoint.
    """
    base = checkpoints.read_adapter_base(path)
    if base is None:
        _load_part(path, MODEL, model, new_encoders)
    else:
        with raise_on_all_ranks():
            checkpoints.check_adapter_settings(path, model.lora, model.architecture)
            frozen = checkpoints.find_adapter_base(path, base)
        check_weights(frozen)
        _load_part(frozen, MODEL, model, new_encoders)
        _load_part(path, ADAPTER, model)
    model.requantize_weights()
    if model.lora.on:
        model.adapter_base = base or checkpoints.AdapterBase.from_checkpoint(path)
    if model.lora.dora and base is None:
        for chunk in model.chunks:
            chunk.adapters.set_magnitudes(chunk)


@torch.no_grad()
def load_optimizer(path: Path, optimizer: Optimizer, num_updates: int) -> None:
    """Load this process's optimizer state from a checkpoint with any layout (collective). Raises `UserError`:
    on every process: the checkpoint has no optimizer state, or a file is damaged."""
    reader = TensorReader(path, "optimizer")
    with raise_on_all_ranks():
        _copy_blocks(path, reader, list(optimizer.state_shards()))
    optimizer.model.requantize_weights()
    optimizer.restore_updates(num_updates)


def read_state(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / checkpoints.STATE_FILE).read_text(encoding="utf-8")))


def check_weights(path: Path) -> None:
    """Check weight files against the checkpoint's manifest, a share per process (collective). Raises
    `UserError`: on every process, naming the first damaged file and the newest sound checkpoint."""
    problem = find_damage(path, weights_only=True)
    if problem is not None:
        raise UserError(f"{problem}; {checkpoints.suggest_replacement(path)}")


def find_damage(path: Path, *, weights_only: bool = False) -> str | None:
    """Check the files of a checkpoint, a share per process; return the first problem or None (collective)."""
    problem: str | None = None
    with raise_on_all_ranks():
        problem = checkpoints.find_damage(path, rank=dist.get_rank(), size=dist.get_world_size(),
                                          weights_only=weights_only)
    return next((p for p in gather_objects(problem) if p is not None), None)


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise the `with` block's exception on every process if a process raises (collective)."""
    error: Exception | None = None
    try:
        yield
    except Exception as e:
        error = e
    errors = [e for e in gather_objects(error) if e is not None]
    if errors:
        raise errors[0]


def _load_part(path: Path, part: str, model: LanguageModel, new_encoders: bool = False) -> None:
    reader = TensorReader(path, part)
    blocks = [b for b in list_local_shards(model) if b.key.startswith(PREFIX) == (part == ADAPTER)]
    if new_encoders:
        stored_keys = set(reader.keys())
        # an encoder without tensors in the checkpoint is new and keeps the initial weights
        new_prefixes = tuple(prefix for prefix in ENCODERS
                             if not any(key.startswith(prefix) for key in stored_keys))
        blocks = [b for b in blocks if not b.key.startswith(new_prefixes)]
    local_keys = {b.key for b in blocks}
    model_keys: set[str] = set().union(*gather_objects(local_keys))
    _check_keys(path, model_keys, set(reader.keys()))
    with raise_on_all_ranks():
        _copy_blocks(path, reader, blocks)


def _copy_blocks(path: Path, reader: TensorReader, blocks: list[LocalShard]) -> None:
    stored_keys = set(reader.keys())
    for block in blocks:
        if block.key not in stored_keys:
            raise UserError(f"{path}: has no tensor {block.key}; was it written with another optimizer, "
                            "precision or model?")
        if reader.get_shape(block.key) != block.global_shape:
            raise UserError(f"{path}: {block.key} has shape {reader.get_shape(block.key)}, the model needs "
                            f"{block.global_shape}; use the recipe and settings that the "
                            "checkpoint was made with")
        block.data.copy_(reader.read(block.key, block.offset, block.shape).reshape(block.data.shape))


def _check_keys(path: Path, model_keys: set[str], stored_keys: set[str]) -> None:
    missing, extra = sorted(model_keys - stored_keys), sorted(stored_keys - model_keys)
    if missing or extra:
        problems = [f"lacks {len(missing)} tensors, e.g. {missing[0]}"] if missing else []
        problems += [f"has {len(extra)} tensors that the model lacks, e.g. {extra[0]}"] if extra else []
        raise UserError(f"{path}: {' and '.join(problems)}; use the recipe and settings that the "
                        "checkpoint was made with")

"""Checkpoints that belong to no layout: every process writes the blocks it owns and reads
the blocks it needs.

A checkpoint is an artifact folder: `model` and `optimizer` tensors (see `sharded_tensors.py`), `state.json`
(step, data cursors, counters), the run's settings and the tokenizer.  It appears under its name only when
every file of every process is on disk (`save.py`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sov.base.errors import UserError
from megatron_sov.engine.mcore.checkpoint.save import Companions, Saver
from megatron_sov.engine.mcore.checkpoint.sharded_tensors import TensorReader
from megatron_sov.engine.mcore.model.language_model import LanguageModel
from megatron_sov.engine.mcore.model.local_shards import LocalShard, local_shards
from megatron_sov.engine.mcore.optimizer.optimizer import Optimizer
from megatron_sov.engine.mcore.parallel.object_collectives import gather_objects
from megatron_sov.model.families.adapters import PREFIX
from megatron_sov.model.families.encoders import PREFIXES as ENCODERS
from megatron_sov.runs import checkpoints
from megatron_sov.runs.checkpoints import ADAPTER, MODEL


def save(path: Path, model: LanguageModel, optimizer: Optimizer | None, state: dict[str, Any],
         settings: dict[str, Any], tokenizer: Path | None) -> None:
    """Write one checkpoint and wait for it; called by every process together.  A run uses a `Saver`.

    Args:
        path: the checkpoint's folder; nothing may be there.
        state: plain values of the loop (the same on every process): must hold `step` and `tokens`.
        settings: the run's config.
        tokenizer: folder whose files are carried along.

    Raises:
        UserError: any process could not write; nothing is left under `path`, and every process raises.
    """
    saver = Saver()
    saver.begin(path, model, optimizer, Companions(state, settings, tokenizer), waits=True)
    saver.finish()


@contextlib.contextmanager
def agreement() -> Iterator[None]:
    """Run the block on every process; where it raises on any of them, every process raises,
    so that none waits for it."""
    problem: Exception | None = None
    try:
        yield
    except Exception as e:
        problem = e
    found = [p for p in gather_objects(problem) if p is not None]
    if found:
        raise found[0]


def damage(path: Path, *, weights_only: bool = False) -> str | None:
    """Return, on every process, what is wrong with a checkpoint's files, or None;
    each process looks at a share of them."""
    problem: str | None = None
    with agreement():
        problem = checkpoints.damage(path, rank=dist.get_rank(), size=dist.get_world_size(),
                                     weights_only=weights_only)
    return next((p for p in gather_objects(problem) if p is not None), None)


def check(path: Path) -> None:
    """Check the weights of a checkpoint against its manifest, each process a share of the files.

    Raises:
        UserError: on every process, naming the first damaged file and what to use in its place.
    """
    problem = damage(path, weights_only=True)
    if problem is not None:
        raise UserError(f"{problem}; {checkpoints.instead_of(path)}")


@torch.no_grad()
def load_model(path: Path, model: LanguageModel, *, new_encoders: bool = False) -> None:
    """Read this process's part of the weights, from whatever layout wrote them.

    Of an adapter's checkpoint its base is read too, which is checked before.  A model with adapters that
    reads a checkpoint of all weights keeps the adapters that it has, beside these weights.

    Args:
        path: the checkpoint.
        model: is given the weights.
        new_encoders: a model may have an encoder of pictures or sounds that the checkpoint has not; it keeps
            the weights that it has.

    Raises:
        UserError: on every process; the checkpoint holds other tensors or shapes than the
            model, or is damaged; it is an adapter, and its base is not there or the model has none.
    """
    base = checkpoints.adapter_base(path)
    if base is None:
        _load_part(path, MODEL, model, new_encoders)
    elif not model.lora.on:
        raise UserError(f"{path}: is an adapter, and lora.rank is 0; train with its lora settings, or from "
                        "what `megatron-sov convert to-hf` makes of it")
    else:
        with agreement():
            _refuse_other_adapters(path, model)
            frozen = checkpoints.found_base(path, base)
        check(frozen)
        _load_part(frozen, MODEL, model, new_encoders)
        _load_part(path, ADAPTER, model)
    if model.lora.on:
        model.adapter_base = base or checkpoints.AdapterBase.of(path)
    if model.lora.dora and base is None:
        for chunk in model.chunks:
            chunk.adapters.set_magnitudes(chunk)


def _refuse_other_adapters(path: Path, model: LanguageModel) -> None:
    """Raise `UserError` where an adapter was trained with other settings: with another alpha, say, it would
    be another adapter."""
    ours = model.lora.identity(model.architecture)
    for name, theirs in checkpoints.settings_of(path).lora.identity(model.architecture).items():
        if theirs != ours[name]:
            raise UserError(f"{path}: is an adapter with lora.{name} = {theirs}, not {ours[name]}; "
                            "use the setting that it was made with")


def _load_part(path: Path, part: str, model: LanguageModel, new_encoders: bool = False) -> None:
    reader = TensorReader(path, part)
    blocks = [b for b in local_shards(model) if b.key.startswith(PREFIX) == (part == ADAPTER)]
    if new_encoders:
        known = set(reader.keys())
        new = tuple(prefix for prefix in ENCODERS if not any(key.startswith(prefix) for key in known))
        blocks = [b for b in blocks if not b.key.startswith(new)]
    names: set[str] = {key for keys in gather_objects({b.key for b in blocks}) for key in keys}
    _refuse_difference(path, names, set(reader.keys()))
    with agreement():
        _fill(path, reader, blocks)


@torch.no_grad()
def load_optimizer(path: Path, optimizer: Optimizer, num_updates: int) -> None:
    """Read this process's part of the optimizer's state, from whatever layout wrote it.

    Raises:
        UserError: on every process; the checkpoint holds no such state, or is damaged.
    """
    reader = TensorReader(path, "optimizer")
    with agreement():
        _fill(path, reader, list(optimizer.state_shards()))
    optimizer.restore_updates(num_updates)


def _fill(path: Path, reader: TensorReader, blocks: list[LocalShard]) -> None:
    known = set(reader.keys())
    for block in blocks:
        if block.key not in known:
            raise UserError(f"{path}: has no tensor {block.key}; was it written with another optimizer, "
                            "precision or model?")
        if reader.shape(block.key) != block.global_shape:
            raise UserError(f"{path}: {block.key} has shape {reader.shape(block.key)}, the model needs "
                            f"{block.global_shape}; use the recipe and settings that the "
                            "checkpoint was made with")
        block.data.copy_(reader.read(block.key, block.offset, block.shape).reshape(block.data.shape))


def _refuse_difference(path: Path, wanted: set[str], found: set[str]) -> None:
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    if missing or extra:
        what = [f"lacks {len(missing)} tensors, e.g. {missing[0]}"] if missing else []
        what += [f"has {len(extra)} tensors that the model lacks, e.g. {extra[0]}"] if extra else []
        raise UserError(f"{path}: {' and '.join(what)}; use the recipe and settings that the "
                        "checkpoint was made with")


def read_state(path: Path) -> dict[str, Any]:
    """Return the loop's values as they were saved."""
    return dict(json.loads((path / checkpoints.STATE).read_text(encoding="utf-8")))

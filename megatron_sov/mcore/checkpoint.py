"""Checkpoints that belong to no layout: every process writes the blocks it owns and reads the blocks it needs.

A checkpoint is an artifact folder: `model` and `optimizer` tensors (see `tensors.py`), `state.json` (step, data cursors,
counters), the run's settings and the tokenizer.  It appears under its name only when every file of every process is on disk.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sov.artifacts import (
    MANIFEST,
    ArtifactWriter,
    FileRecord,
    atomic_write,
    new_artifact,
    read_manifest,
    sha256_file,
    to_json,
)
from megatron_sov.errors import UserError
from megatron_sov.mcore.blocks import Block, of
from megatron_sov.mcore.model import LanguageModel
from megatron_sov.mcore.optim import Optimizer
from megatron_sov.mcore.run_checkpoints import KIND
from megatron_sov.mcore.tensors import TensorReader, TensorWriter, write_index

STATE = "state.json"


def save(path: Path, model: LanguageModel, optimizer: Optimizer | None, state: dict[str, Any], settings: dict[str, Any],
         tokenizer: Path | None) -> None:
    """Write a checkpoint; called by every process together.

    Args:
        path: the checkpoint's folder; one of the same name is replaced.
        state: plain values of the loop (the same on every process): must hold `step` and `tokens`.
        settings: the run's config.
        tokenizer: folder whose files are carried along.

    Raises:
        UserError: any process could not write; nothing is left under `path`, and every process raises.
    """
    main = dist.get_rank() == 0
    with contextlib.ExitStack() as opened:  # leaving it by an exception deletes what was written
        artifact: ArtifactWriter | None = None
        with _agreement():
            if main:
                artifact = opened.enter_context(new_artifact(path, KIND, overwrite=True))
        written = _gather(_write_local(_share(artifact.path if artifact else None), model, optimizer))
        with _agreement():
            for part in written:
                if part["error"]:
                    raise UserError(part["error"])
            if artifact is not None:
                _complete(artifact, written, state, settings, tokenizer)
                opened.close()


def _complete(artifact: ArtifactWriter, written: list[dict[str, Any]], state: dict[str, Any], settings: dict[str, Any],
              tokenizer: Path | None) -> None:
    """Write what stands beside the tensors, and the manifest's contents; `written` is what every process wrote."""
    folder = artifact.path
    parts = list(written[0]["index"])
    for part in parts:
        write_index(folder, part, [w["index"][part] for w in written])
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder / "tokenizer", ignore=shutil.ignore_patterns(MANIFEST))
    atomic_write(folder / STATE, to_json(state))
    artifact.known_files = {name: record for w in written for name, record in w["files"].items()}
    artifact.content = {"step": state["step"], "tokens": state["tokens"], "parts": parts}
    artifact.settings = settings


@contextlib.contextmanager
def _agreement() -> Iterator[None]:
    """Run the block on every process; where it raises on any of them, every process raises, so that none waits for it."""
    problem: Exception | None = None
    try:
        yield
    except Exception as e:
        problem = e
    found = [p for p in _gather(problem) if p is not None]
    if found:
        raise found[0]


def _write_local(folder: Path, model: LanguageModel, optimizer: Optimizer | None) -> dict[str, Any]:
    """Write this process's blocks; errors are returned, so that no process waits for one that has failed."""
    rank = dist.get_rank()
    result: dict[str, Any] = {"error": None, "index": {}, "files": {}}
    try:
        sources: list[tuple[str, Iterable[Block]]] = [("model", of(model))]
        if optimizer:
            sources.append(("optimizer", optimizer.state_blocks()))
        for part, blocks in sources:
            writer = TensorWriter(folder, part, rank)
            for block in blocks:
                if block.owned:
                    writer.add(block.key, block.data, block.global_shape, block.offset)
            result["index"][part] = writer.finish()
        names = {p["file"] for index in result["index"].values() for entry in index.values() for p in entry["pieces"]}
        for name in sorted(names):
            result["files"][name] = FileRecord(sha256_file(folder / name), (folder / name).stat().st_size)
    except OSError as e:
        result["error"] = (f"{folder}: rank {rank} could not write its part of the checkpoint ({e}); "
                           "free some space or choose another --run")
    return result


def _share(path: Path | None) -> Path:
    """Return rank 0's path on every process."""
    shared: list[Path | None] = [path]
    dist.broadcast_object_list(shared, src=0)
    assert shared[0] is not None, "rank 0 passes the folder that it has made"
    return shared[0]


def _gather(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def check(path: Path) -> None:
    """Check a checkpoint's files against its manifest, each process a share of them.

    Raises:
        UserError: on every process, naming the first damaged file.
    """
    manifest = read_manifest(path, KIND)
    rank, size = dist.get_rank(), dist.get_world_size()
    with _agreement():
        for name in sorted(manifest.files)[rank::size]:
            file, record = path / name, manifest.files[name]
            if not file.is_file() or file.stat().st_size != record.size_bytes or sha256_file(file) != record.sha256:
                raise UserError(f"{file}: is missing or differs from the manifest's hash; "
                                f"delete {path} to continue from the checkpoint before")


@torch.no_grad()
def load_model(path: Path, model: LanguageModel) -> None:
    """Read this process's part of the weights, from whatever layout wrote them.

    Raises:
        UserError: on every process; the checkpoint holds other tensors or shapes than the model, or is damaged.
    """
    reader = TensorReader(path, "model")
    blocks = of(model)
    names: set[str] = {key for keys in _gather({b.key for b in blocks}) for key in keys}
    _refuse_difference(path, names, set(reader.keys()))
    with _agreement():
        _fill(path, reader, blocks)


@torch.no_grad()
def load_optimizer(path: Path, optimizer: Optimizer, num_updates: int) -> None:
    """Read this process's part of the optimizer's state, from whatever layout wrote it.

    Raises:
        UserError: on every process; the checkpoint holds no such state, or is damaged.
    """
    reader = TensorReader(path, "optimizer")
    with _agreement():
        _fill(path, reader, list(optimizer.state_blocks()))
    optimizer.restore_updates(num_updates)


def _fill(path: Path, reader: TensorReader, blocks: list[Block]) -> None:
    known = set(reader.keys())
    for block in blocks:
        if block.key not in known:
            raise UserError(f"{path}: has no tensor {block.key}; was it written with another precision or model?")
        if reader.shape(block.key) != block.global_shape:
            raise UserError(f"{path}: {block.key} has shape {reader.shape(block.key)}, the model needs {block.global_shape}; "
                            "use the recipe and settings that the checkpoint was made with")
        block.data.copy_(reader.read(block.key, block.offset, block.shape).reshape(block.data.shape))


def _refuse_difference(path: Path, wanted: set[str], found: set[str]) -> None:
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    if missing or extra:
        what = [f"lacks {len(missing)} tensors, e.g. {missing[0]}"] if missing else []
        what += [f"has {len(extra)} tensors that the model lacks, e.g. {extra[0]}"] if extra else []
        raise UserError(f"{path}: {' and '.join(what)}; use the recipe and settings that the checkpoint was made with")


def read_state(path: Path) -> dict[str, Any]:
    """Return the loop's values as they were saved."""
    return dict(json.loads((path / STATE).read_text(encoding="utf-8")))
